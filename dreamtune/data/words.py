"""A subject's words: what names it, what class it is of, and prompts with and without them.

All rules are English, as the prompts are. They look at words only, never at a model, so that what
was read can be said before anything is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dreamtune.data.english import FUNCTION_WORDS, MEDIA, OPENING, article_of, ends_noun

DEFAULT_IDENTIFIER = "sks"


# A word, with its hyphens and apostrophes; `<new1>` and `[V]`, as papers write identifiers.
WORD = re.compile(r"[<\[]\w[^\s<>\[\]]*[>\]]|\w+(?:[-'’]+\w+)*")


# Scripts that are written without spaces, or that hang endings on a foreign word (Korean): a word
# in other letters stands whole between them.
SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
    "\uf900-\ufaff\U00020000-\U0003ffff"
)
# What makes a word longer. CLIP reads `sks_dog` as three: an underscore does not.
LETTER = rf"[^\W_{SPACELESS}]"


ARTICLE = rf"(?:(?<![\w'’-])(?P<article>an?)(?P<gap>\s+[{re.escape(OPENING)}]*))?"


@dataclass(frozen=True)
class SubjectWords:
    """The words of a subject, as its prompts have them.

    name: what fills the {} of a prompt, "sks apple"; identifier: "sks"; class_noun: "apple", or ""
    where the prompts name none; article: "a" or "an" where all prompts have it before the name,
    else "", which leaves it to the sound of the next word.
    """

    name: str
    identifier: str
    class_noun: str
    article: str = ""

    def prompt(self, template: str) -> str:
        """Template to prompt: "an {} on the beach" -> "a sks apple on the beach"."""
        return fill(template, self.name, self.article)

    def template(self, prompt: str) -> str:
        """Prompt to template, with "a" for its article: "an ohwx apple on the beach" -> "a {} on
        the beach"."""
        return pattern(self.name).sub(
            lambda place: f"{'a' + place['gap'] if place['article'] else ''}{{}}{place['after']}",
            prompt,
        )

    def plain(self, prompt: str) -> str:
        """The prompt that a model is asked which never saw the identifier: "a sks apple on the
        beach" -> "an apple on the beach".
        """
        named = self.class_noun and not without_identifier(self.name, self.identifier)
        return without_identifier(prompt, self.identifier, self.class_noun if named else "")

    def class_prompt(self, prompt: str | None = None) -> str:
        """The prompt of the class by that of the subject: "a sks apple" -> "an apple".

        Raises ValueError if there is no class noun.
        """
        if not self.class_noun:
            raise ValueError(
                f"class images need a class, and nothing names the class of `{self.name}`: set "
                "--class_prompt, for instance 'a dog'."
            )
        return self.plain(self.prompt("a {}") if prompt is None else prompt)

    def summary(self) -> str:
        noun = f"class `{self.class_noun}`" if self.class_noun else "no class noun"
        return f"`{self.name}` (identifier `{self.identifier}`, {noun})"


def read_words(
    prompt: str | None,
    class_prompt: str | None = None,
    identifier: str | None = None,
    captions: Sequence[str] = (),
    folders: Sequence[str] = (),
) -> SubjectWords:
    """The words of a subject, from the prompt of its photos or else from their captions.

    The identifier is `identifier`, else "sks" if it stands there, else the words beyond
    `class_prompt`, else the first word of `folders`, the names that kohya's scripts want: "ohwx" of
    `10_ohwx woman`. The class noun is what follows it, up to a word that cannot belong to a noun.
    Words are compared whole, without case and punctuation.

    Raises:
        ValueError: the words cannot be told for sure.
    """
    texts, kind = ([prompt], "prompt") if prompt else (list(captions), "caption")
    if not texts:
        raise ValueError(
            "no prompt and no caption: set --instance_prompt, for instance 'a sks dog'"
        )
    known = class_keys(class_prompt or "")
    wanted = " ".join((identifier or "").split())
    if not wanted:
        wanted = DEFAULT_IDENTIFIER
        if not in_all(wanted, texts):
            beyond = beyond_class(texts, known) if known else None
            wanted = beyond or first_word(folders, texts) or wanted
    places = []
    for text in texts:
        place = pattern(wanted).search(text)
        if place is None:
            raise ValueError(
                f"the identifier `{wanted}` is not in the {kind} `{text}`: name the rare word that "
                "stands for the subject with --identifier"
                + (", or the subject with --instance_prompt." if kind == "caption" else ".")
            )
        places.append(place)
    found = place_text(places[0])
    noun = agreed([class_noun(following(p), known) for p in places])
    articles = {(p["article"] or "").lower() for p in places}
    return SubjectWords(
        name=f"{found} {noun}".strip(),
        identifier=found,
        class_noun=noun or noun_of_class(class_prompt or ""),
        article=articles.pop() if len(articles) == 1 else "",
    )


def in_all(identifier: str, texts: Sequence[str]) -> bool:
    return all(pattern(identifier).search(text) for text in texts)


def first_word(folders: Sequence[str], texts: Sequence[str]) -> str | None:
    """The word that names of folders begin with, where a class follows and all texts have it."""
    names = [name.split() for name in folders]
    firsts = {words[0].casefold() for words in names if words}
    if len(firsts) != 1 or any(len(words) < 2 for words in names) or firsts <= FUNCTION_WORDS:
        return None
    return names[0][0] if in_all(names[0][0], texts) else None


def following(place: re.Match[str]) -> str:
    """What stands after an identifier; nothing where a script without spaces goes on at once: it
    does not tell where its nouns end.
    """
    text = place.string[place.end() :]
    return "" if re.match(f"[{SPACELESS}]", text) and not place["after"] else text


def beyond_class(texts: Sequence[str], known: frozenset[str]) -> str | None:
    """The identifier, by the words that the class prompt lacks: those before a word of the class,
    else all. None if there are none.

    Raises ValueError if several could be it.
    """
    found: dict[str, str] = {}
    for text in texts:
        runs: list[tuple[int, int, bool]] = []  # from, to, whether a word of the class follows
        open_run = False
        for word in WORD.finditer(text):
            key = word[0].casefold()
            joined = open_run and not text[runs[-1][1] : word.start()].strip()
            if key in known and joined:
                runs[-1] = (*runs[-1][:2], True)
            open_run = key not in known | FUNCTION_WORDS | MEDIA
            if open_run:
                start = runs.pop()[0] if joined else word.start()
                runs.append((start, word.end(), False))
        before_class = [run for run in runs if run[2]]
        for start, end, _ in before_class or runs:
            found.setdefault(text[start:end].casefold(), text[start:end])
    if len(found) > 1:
        names = ", ".join(f"`{name}`" for name in found.values())
        raise ValueError(
            f"the identifier could be any of {names}: say which word stands for the subject with "
            "--identifier."
        )
    return next(iter(found.values()), None)


def class_noun(text: str, known: frozenset[str] = frozenset()) -> str:
    """The words at the start of `text` that a noun is made of: "robot toy on the grass" -> "robot
    toy". `known`: words of the class prompt, whose -ing words may be of the noun.
    """
    words, end = [], 0
    for word in WORD.finditer(text):
        if text[end : word.start()].strip():
            break  # punctuation ends a noun
        words.append(word)
        end = word.end()
    keys = [word[0].casefold() for word in words]
    count = next((i for i in range(len(keys)) if ends_noun(keys, i, known)), len(keys))
    return " ".join(word[0] for word in words[:count])


def agreed(nouns: Sequence[str]) -> str:
    """The noun that all begin with, by the shortest: "dog" of "dog", "dog barks" and "dog's face".

    Raises ValueError if the others do not begin with it.
    """
    named = [noun for noun in nouns if noun]
    if not named:
        return ""
    shortest = min(named, key=lambda noun: len(noun.split()))
    keys = owners(shortest)
    other = next((n for n in named if owners(n)[: len(keys)] != keys), None)
    if other is not None:
        raise ValueError(
            f"the captions disagree on what the subject is: `{shortest}` and `{other}`. Say it "
            "with --instance_prompt, for instance 'a sks dog'."
        )
    return shortest


def owners(noun: str) -> list[str]:
    """The words for comparison, without a possessive's ending."""
    return [re.sub(r"['’]s$", "", word) for word in noun.casefold().split()]


def class_keys(class_prompt: str) -> frozenset[str]:
    """The words of a class prompt that can be of its noun, in lower case."""
    keys = {word[0].casefold() for word in WORD.finditer(class_prompt)}
    return frozenset(keys - FUNCTION_WORDS - MEDIA)


def noun_of_class(class_prompt: str) -> str:
    """The noun of a class prompt: "dog" of "a photo of a dog in the snow", "" if it has none."""
    words = list(WORD.finditer(class_prompt))
    media = [i for i, word in enumerate(words) if word[0].casefold() in MEDIA]
    for word in words[media[-1] + 1 if media else 0 :]:
        if word[0].casefold() not in FUNCTION_WORDS:
            return class_noun(class_prompt[word.start() :], class_keys(class_prompt))
    return ""


def fill(template: str, phrase: str, article: str = "") -> str:
    """The template with `phrase` for each {}, and a or an before it: `article`, or "" for what the
    phrase sounds like. "a {} in the snow", "apple" -> "an apple in the snow".
    """

    def put(place: re.Match[str]) -> str:
        return leading(place, article or article_of(phrase)) + phrase

    return re.sub(ARTICLE + r"\{\}", put, template, flags=re.IGNORECASE)


def without_identifier(prompt: str, identifier: str, instead: str = "") -> str:
    """The prompt without its identifier: "a photo of a sks apple" -> "a photo of an apple".

    Whole words only, in any case. `instead`: a class noun to put in its place.
    """
    if not identifier:
        return prompt

    def put(place: re.Match[str]) -> str:
        if instead:
            return leading(place, article_of(instead)) + instead + place["after"]
        following = WORD.match(prompt, place.end()) if place["after"] else None
        sounds = following is not None and following[0].casefold() not in FUNCTION_WORDS
        article = article_of(prompt[place.end() :]) if sounds else ""
        opened = prompt[: place.start()].endswith(tuple(OPENING))
        return leading(place, article) or ("" if opened else " ")

    text = " ".join(pattern(identifier).sub(put, prompt).split())
    return re.sub(r"\s+([,.;:!?])", r"\1", text)


def pattern(identifier: str) -> re.Pattern[str]:
    """Finds the identifier as whole words, and an article right before it."""
    words = r"\s+".join(re.escape(word) for word in identifier.split())
    return re.compile(
        ARTICLE
        + rf"(?P<words>(?<!{LETTER})(?<!{LETTER}-){words}(?!{LETTER}|-{LETTER}))(?P<after>[\s_]*)",
        re.IGNORECASE,
    )


def place_text(place: re.Match[str]) -> str:
    return " ".join(place["words"].split())


def leading(place: re.Match[str], article: str) -> str:
    """The article that stands in the prompt, made `article` (""  leaves it), in its own case."""
    if place["article"] is None:
        return ""
    was = place["article"]
    now = article or was
    if was[0].isupper():
        now = now.upper() if was.isupper() and len(was) > 1 else now.capitalize()
    return now + place["gap"]


def validation_prompts(
    words: SubjectWords, templates: Sequence[str], images: int
) -> tuple[list[str], list[str]]:
    """The prompts, one an image with `images` of each template; and what a scorer is asked, to whom
    an identifier means nothing.
    """
    prompts = [words.prompt(template) for template in templates for _ in range(images)]
    return prompts, [words.plain(prompt) for prompt in prompts]
