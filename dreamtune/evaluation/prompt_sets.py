"""Which prompts each subject has, in one form for all: {} stands for the subject, so that "a red
sks fox" and "a red sks dog" are one prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dreamtune import embedded
from dreamtune.data.words import SubjectWords, in_all, read_words
from dreamtune.evaluation.layout import Generated, Photos
from dreamtune.evaluation.prompts import CAPTIONS, LIVE, OBJECT, templates
from dreamtune.evaluation.protocols import Protocol

Prompts = Mapping[str, str]  # by what is compared, as it is written


def prompt_counts(
    images: Sequence[Generated], photos: Mapping[str, Photos], identifier: str, protocol: Protocol
) -> dict[str, Any]:
    """What subjects lack of the prompts of others, and all of the protocol's, as plain data.

    Subjects whose words nothing tells, and that share no prompt with another, are compared by how
    many prompts they have. identifier: looked for in prompts of subjects without words.
    """
    written: dict[str, list[str]] = {}
    for image in images:
        if image.prompt not in (own := written.setdefault(image.subject, [])):
            own.append(image.prompt)
    words = {s: words_in(own, photos[s].words, identifier) for s, own in written.items()}
    sets = {s: as_set(form(p, words[s]) for p in own) for s, own in written.items()}
    named = {s: own for s, own in sets.items() if is_named(own)}
    lists = {s: list_of(protocol.prompts, own, words[s], photos[s]) for s, own in named.items()}
    told = {s: own for s, own in sets.items() if s in named or shares(s, sets)}
    most = max(map(len, sets.values()))
    asked, there = (merged(found.values()) for found in (lists, named))
    return {
        "missing_prompts": missing_prompts(told, lists),
        "subjects_with_fewer_prompts": sorted(
            f"{s} ({len(own)} of {most})"
            for s, own in sets.items()
            if s not in told and len(own) < most
        ),
        "protocol_prompts": [len(asked.keys() & there.keys()), len(asked)] if asked else None,
        "unnamed_subjects": sorted(
            f"{s} (`{said.name}`)"
            for s in sets
            if s not in named and (said := photos[s].words) is not None
        ),
        "prompts_of_no_subject": [text for key, text in asked.items() if key not in there],
    }


def missing_prompts(
    sets: Mapping[str, Prompts], lists: Mapping[str, Prompts]
) -> dict[str, list[str]]:
    """By subject, what others have and it lacks. A prompt that the protocol has for other classes
    alone, as DreamBooth's of animals and of objects, is not missing. lists: the protocol's."""
    every, asked = merged(sets.values()), merged(lists.values())
    found = {}
    for subject, own in sets.items():
        others = asked.keys() - lists.get(subject, asked).keys() - own.keys()
        if lacking := [every[k] for k in every if k not in own and k not in others]:
            found[subject] = lacking
    return found


def list_of(
    named: str | Sequence[str], own: Prompts, words: SubjectWords | None, photos: Photos
) -> Prompts:
    """The protocol's prompts for a subject: of several lists that it may take the one that the
    subject has most of, by its class where that does not tell; the captions of its own held-out
    photos, if there are any, where those are asked for."""
    if named == CAPTIONS:
        return as_set(form(caption, words) for caption in photos.captions if caption)
    lists = [templates(named, words.class_noun if words else "", False)]
    if named in ("dreambooth", "ours"):
        lists += [list(LIVE), list(OBJECT)]
    if named == "ours":
        lists.append(embedded.prompts())
    return max(map(as_set, lists), key=lambda prompts: len(prompts.keys() & own.keys()))


def words_in(
    prompts: Sequence[str], words: SubjectWords | None, identifier: str
) -> SubjectWords | None:
    """A subject's words, by its prompts where nothing else says them; None where they do not."""
    if words is not None:
        return words
    named = [prompt for prompt in prompts if in_all(identifier, [prompt])]
    try:
        return read_words(None, None, identifier, named) if named else None
    except ValueError:  # prompts that disagree
        return None


def form(prompt: str, words: SubjectWords | None) -> str:
    """The prompt with {} for the subject, also where it is named by its class alone."""
    if words is None:
        return prompt
    found = words.template(prompt)
    if "{}" in found or not words.class_noun:
        return found
    return replace(words, name=words.class_noun).template(prompt)


def as_set(prompts: Iterable[str]) -> Prompts:
    """Without case and full stops, which say nothing of what is asked."""
    found: dict[str, str] = {}
    for prompt in prompts:
        found.setdefault(" ".join(prompt.casefold().split()).rstrip(" ."), prompt)
    return found


def is_named(prompts: Prompts) -> bool:
    return any("{}" in prompt for prompt in prompts)


def shares(subject: str, sets: Mapping[str, Prompts]) -> bool:
    others = (own for other, own in sets.items() if other != subject)
    return any(sets[subject].keys() & own.keys() for own in others)


def merged(sets: Iterable[Prompts]) -> dict[str, str]:
    return {key: text for own in sets for key, text in own.items()}
