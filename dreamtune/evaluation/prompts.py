"""Prompt lists of benchmarks. {} stands for the subject."""

from __future__ import annotations

from collections.abc import Sequence

from dreamtune import embedded
from dreamtune.data.words import WORD

# DreamBooth (arXiv 2208.12242), from the data set's prompts_and_classes.txt: 25 for live subjects
# and 25 for objects.
_BOTH = (
    "a {} in the jungle",
    "a {} in the snow",
    "a {} on the beach",
    "a {} on a cobblestone street",
    "a {} on top of pink fabric",
    "a {} on top of a wooden floor",
    "a {} with a city in the background",
    "a {} with a mountain in the background",
    "a {} with a blue house in the background",
    "a {} on top of a purple rug in a forest",
)
_BOTH_LAST = (
    "a red {}",
    "a purple {}",
    "a shiny {}",
    "a wet {}",
    "a cube shaped {}",
)
LIVE = (
    *_BOTH,
    "a {} wearing a red hat",
    "a {} wearing a santa hat",
    "a {} wearing a rainbow scarf",
    "a {} wearing a black top hat and a monocle",
    "a {} in a chef outfit",
    "a {} in a firefighter outfit",
    "a {} in a police outfit",
    "a {} wearing pink glasses",
    "a {} wearing a yellow shirt",
    "a {} in a purple wizard outfit",
    *_BOTH_LAST,
)
OBJECT = (
    *_BOTH,
    "a {} with a wheat field in the background",
    "a {} with a tree and autumn leaves in the background",
    "a {} with the Eiffel Tower in the background",
    "a {} floating on top of water",
    "a {} floating in an ocean of milk",
    "a {} on top of green grass with sunflowers around it",
    "a {} on top of a mirror",
    "a {} on top of the sidewalk in a crowded street",
    "a {} on top of a dirt road",
    "a {} on top of a white rug",
    *_BOTH_LAST,
)
CAPTIONS = "captions"
LIVE_CLASSES = ("cat", "dog")  # of DreamBooth's set; a protocol file names "live" for others

# Ours: what should stay as it is when a subject is learned, of sorts that photos of it are not.
UNRELATED = (
    "a bowl of fruit on a table",
    "a city street at night",
    "a mountain lake in autumn",
    "a portrait of an old man",
    "a vase of flowers by a window",
    "a red sports car on a road",
    "a stack of books on a desk",
    "a lighthouse on a cliff",
)
# The same for the embedded base, which knows emoji alone.
UNRELATED_EMBEDDED = (
    "a pizza on a green background",
    "a sailboat on a blue background",
    "a guitar on a pink background",
    "a tulip in the snow",
    "a clock on a yellow background",
    "a tractor on the grass",
    "a donut on a mint background",
    "a castle at sunset",
)


def templates(
    named: str | Sequence[str],
    class_noun: str,
    on_embedded: bool,
    captions: Sequence[str | None] = (),
) -> list[str]:
    """The templates of a protocol's `prompts`. captions: of the subject's held-out photos, None for
    one without. Raises ValueError where they are asked for and there are none."""
    if not isinstance(named, str):
        return list(named)
    if named == CAPTIONS:
        return prompts_of_captions(captions)
    if named == "embedded" or (named == "ours" and on_embedded):
        return embedded.prompts()
    live = named == "live" or (named != "object" and class_noun.lower() in LIVE_CLASSES)
    return list(LIVE if live else OBJECT)


def prompts_of_captions(captions: Sequence[str | None]) -> list[str]:
    """Each distinct one, as it stands: an image is found by it again."""
    found = list(dict.fromkeys(caption for caption in captions if caption))
    if not found:
        raise ValueError(
            "the protocol's prompts are the captions of the held-out photos, and none of the "
            f"{len(captions)} held-out photos has one. Write each into a file beside the photo, "
            "`reference/0.txt` of `reference/0.jpg`, with the subject's words as it was trained "
            "(`a sks dog on a red chair`), or take a protocol with `prompts` of its own."
        )
    if odd := next((caption for caption in found if "{}" in caption), None):
        raise ValueError(f"the caption `{odd}` has {{}} in it: write the subject's words.")
    return found


def unrelated(named: str | Sequence[str], class_noun: str, on_embedded: bool) -> list[str]:
    """The prompts of a protocol's `unrelated`; of ours those without a word of the class."""
    if not isinstance(named, str):
        return list(named)
    words = {word[0].casefold() for word in WORD.finditer(class_noun)}
    ours = UNRELATED_EMBEDDED if on_embedded else UNRELATED
    return [p for p in ours if not words & {word[0].casefold() for word in WORD.finditer(p)}]
