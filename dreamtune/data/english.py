"""What of English a subject's words need: where a noun ends, and "a" or "an"."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence


def listed(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Where a class noun ends: articles and other determiners, prepositions, conjunctions, adverbs.
FUNCTION_WORDS = listed(
    """a an the this that these those his her its their my our your some any each every no
    about above across after against along alongside amid among around as at atop before behind
    below beneath beside besides between beyond by during for from in inside into near next of off
    on onto out outside over through toward towards under underneath up upon via with within
    without and but because if nor or so than when where which while who whose
    alone away here indoors outdoors there together"""
)


# Verbs of captions, less those that are as often nouns (can, flies, set); -ing and -ed by rule.
VERBS = listed(
    """are be been drinks eats had has have held holds is jumps lies lit looks made runs sat seen
    shown sits sleeps stands stood swims walks was wears were worn"""
)


# Nouns that look like a verb's form.
ING_NOUNS = listed(
    """bling building ceiling clothing drawing duckling dumpling earring evening gosling
    icing keyring king lightning morning painting pudding railing ring sapling sibling sling spring
    starling sterling string swing thing viking wing wiring"""
)


ED_NOUNS = listed(
    """bed biped bobsled breed flatbed moped quadruped red reed seaweed seed shed sled steed
    thoroughbred weed"""
)


COLOURS = listed(
    """beige black blue brown gold gray green grey orange pink purple red silver teal white
    yellow"""
)


# The words of "a photo of": neither an identifier nor a class.
MEDIA = listed("closeup close-up image photo photograph picture portrait rendering selfie shot")


# Letters do not settle these: the sound that the word begins with does. The package `inflect`
# knows such words too, but says "a SUV", "a usher", "a 8-bit".
CONSONANT_SOUND = re.compile(
    r"eu|ewe|ouija|(?:one|once)(?![a-z])|ones(?:ie|elf)|u(?:ni(?!n|ll|r|ss|dent|m(?!o))|nanim|bi"
    r"|fo|ganda|k|r[aeiou]|s[abeu]|s(?![a-z])|t[aeiou]|v(?![a-z]))"
)


VOWEL_SOUND = re.compile(
    r"[aeiou]|(?:hour|honest|honou?r|heir)|x(?:-?ray|box|mas)|(?:lcd|mp3|mri|rv|suv)(?![a-z])"
    r"|8|1[18](?!\d)|18\d\d(?!\d)"
)


SPELLED_OUT = re.compile(r"[FHLMNRSX][B-DF-HJ-NP-TV-XZ0-9]+(?![A-Za-z])|LED\b")  # an NFT


OPENING = "\"'“‘(["  # may stand between an article and its word


def ends_noun(keys: Sequence[str], i: int, known: frozenset[str]) -> bool:
    """Whether the noun ends before word i. Words are given in lower case."""
    word, following = keys[i], keys[i + 1] if i + 1 < len(keys) else ""
    leads_on = bool(following) and following not in FUNCTION_WORDS and following not in VERBS
    if word == "of":  # "bowl of berries", but not "statue of the king"
        return i == 0 or not leads_on
    if word == "and":  # "black and white cat", but not "cat and dog"
        return not (i > 0 and keys[i - 1] in COLOURS and following in COLOURS)
    if word in FUNCTION_WORDS or word in VERBS:
        return True
    if word.endswith("ing") and word not in ING_NOUNS:  # "rocking horse", but not "horse standing"
        return not leads_on or (i > 0 and word not in known)
    # "vase filled with", but not "chocolate covered strawberry"
    return i > 0 and word.endswith("ed") and word not in ED_NOUNS and not leads_on


def article_of(phrase: str) -> str:
    """Either "a" or "an", by the sound that the phrase begins with: an hour, a unicorn."""
    letters = unicodedata.normalize("NFKD", phrase).lstrip("<" + OPENING)
    if SPELLED_OUT.match(letters):
        return "an"
    key = letters.lower()
    return "an" if VOWEL_SOUND.match(key) and not CONSONANT_SOUND.match(key) else "a"
