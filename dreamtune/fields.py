"""Settings field by field: the facts that stand on a field, and values checked against types and
ranges, by pydantic's rules in our sentences. The same for flags, YAML, sweeps and Python, for the
config and for the options of methods; and for what stands in files.
"""

from __future__ import annotations

import json
import reprlib
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import field
from difflib import get_close_matches
from functools import partial
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError
from typing_extensions import NotRequired, TypedDict

Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
AtLeast0 = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Pixels = Annotated[int, Field(ge=1, le=1 << 14, multiple_of=8)]
# What is made of a larger number overflows, or never ends.
Count = Annotated[int, Field(ge=1, le=10**9)]
CountOr0 = Annotated[int, Field(ge=0, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]  # torch takes 64 bits; images count up from it
Rank = Annotated[int, Field(ge=1, le=4096)]  # beyond the width of every layer
EvenRank = Annotated[int, Field(ge=2, le=4096, multiple_of=2)]
Terms = Annotated[int, Field(ge=2, le=32)]  # of a sum of powers
Share = Annotated[float, Field(ge=0, le=1)]
# YAML 1.1 reads bare `no` and `off` as false, `on` as true.
YAML_WORDS = {"no": False, "off": False, "on": True}
KINDS = {
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "bool_parsing": "true or false",
}


SHOWN = 300  # characters of a value in a message
NAME_LIMIT = 100  # characters of a word that near ones are looked for


class UnreadableFile(ValueError):
    """A file that does not hold what it must. The message names the file, and what is wrong in it:
    a field, a tensor, a line.
    """


def opt(
    default: Any,
    help: str,
    group: str,
    shown: str = "",
    *,
    resume: bool | Callable[[Mapping[str, Any]], bool] = False,
    own: bool = False,
    swept: bool = False,
) -> Any:
    """A field with all that is known of it; type, range and choices stand in its annotation.

    Args:
        group: the heading in the help; "stacked" makes several runs of one command, a run alone
            has none of it.
        shown: the words for a default that is computed.
        resume: a continuation may change it, the numbers of the run stay as they were; or what
            tells so from the settings of the run.
        own: config.yaml in a subject's folder may set it.
        swept: it may be swept.
    """
    facts = {"help": help, "group": group, "shown": shown}
    rules = {"resume": resume, "own": own, "swept": swept}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata={**facts, **rules})
    return field(default=default, metadata={**facts, **rules})


def one_part(name: str) -> bool:
    """Whether it is the name of a file or folder, and no path: whatever system reads it."""
    return name.isprintable() and name.strip(".") != "" and not set(name) & set("/\\")


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean `x`?' or ''."""
    if len(word) > NAME_LIMIT:
        return ""
    found = get_close_matches(word, list(known), 2, 0.55)
    return f" Did you mean {' or '.join(f'`{n}`' for n in found)}?" if found else ""


def checker(
    hints: Mapping[str, Any], needed: Collection[str] = (), others: bool = False
) -> TypeAdapter[dict[str, Any]]:
    """What `validated` checks by.

    Args:
        hints: name -> type with its range, for instance `Annotated[int, Field(ge=1)]` or
            `Literal["auto", "off"]`.
        needed: the names that must be there.
        others: further names pass, unchecked.
    """
    fields = {n: Annotated[h, BeforeValidator(partial(plain, h))] for n, h in hints.items()}
    make: Any = TypedDict  # for fields that are not written out
    kind = make("Values", {n: h if n in needed else NotRequired[h] for n, h in fields.items()})
    kind.__pydantic_config__ = ConfigDict(
        extra="allow" if others else "forbid",
        coerce_numbers_to_str=True,
        arbitrary_types_allowed=True,
    )
    return TypeAdapter(kind)


def validated(rules: TypeAdapter[dict[str, Any]], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values in their types. Raises ValueError that names each field, its rule and the value
    that breaks it.
    """
    try:
        return rules.validate_python(dict(values))
    except ValidationError as error:
        worst: dict[Any, Any] = {}
        for found in error.errors(include_url=False):
            name = found["loc"][0]
            # A union fails once for each of its types; the deepest is the type that was meant.
            if name not in worst or len(found["loc"]) > len(worst[name]["loc"]):
                worst[name] = found
        raise ValueError(" ".join(sentence(f) for f in worst.values())) from None


def from_file(rules: TypeAdapter[dict[str, Any]], values: Any, place: str) -> dict[str, Any]:
    """`validated` for what was read. place: file, and where in it, for the UnreadableFile that it
    raises.
    """
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UnreadableFile(f"{place} must hold names with values, got {shown(values)}")
    try:
        return validated(rules, values)
    except ValueError as error:
        raise UnreadableFile(f"{place}: {error}") from None


def from_json(text: str | bytes, place: str) -> Any:
    """A JSON text. Raises UnreadableFile, which names the place, for what is none."""
    try:
        return json.loads(text)
    except ValueError as error:  # broken, not UTF-8, a number of too many digits
        raise UnreadableFile(f"{place} is not JSON: {error}") from None
    except RecursionError:
        raise UnreadableFile(f"{place} is not JSON of ours: it is nested too deeply") from None


def shown(value: Any) -> str:
    """`repr`, of bounded length: a few lines of YAML may stand for a value without end."""
    text = _SHORT.repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 200, 200, 60


def sentence(found: Mapping[str, Any]) -> str:
    """One of pydantic's errors as "`name` must be <rule>, got <value>."."""
    kind, value, context = found["type"], found["input"], found.get("ctx", {})
    if kind == "missing":
        return f"`{found['loc'][0]}` is missing."
    if kind == "extra_forbidden":
        return f"`{found['loc'][0]}` is not known."
    start, got = f"`{found['loc'][0]}` must be", f"got {shown(value)}."
    bounds = [v for v in context.values() if isinstance(v, (int, float))]
    if value is None:
        return f"`{found['loc'][0]}` cannot be empty."
    if kind == "literal_error":
        return f"{start} one of {context['expected'].replace(chr(39), '')}; {got}"
    if kind == "finite_number":
        return f"{start} finite, got {float(value)}."
    if kind in KINDS:
        return f"{start} {KINDS[kind]}, {got}"
    if bounds and not kind.endswith(("too_short", "too_long")):  # lengths: of texts and lists
        number = number_of(value, bounds[0]) if isinstance(value, str) else value
        return (
            f"{start} {limit(kind, bounds[0])}, got {shown(number)}{near(kind, bounds[0], number)}."
        )
    if kind.endswith("_type"):
        return f"{start} of type {kind.removesuffix('_type').replace('string', 'str')}, {got}"
    return f"`{found['loc'][0]}`: {found['msg']}, {got}"


def number_of(text: str, like: float) -> float:
    """A text that pydantic takes for such a number: `-0.0` is an int."""
    number = float(text)
    if isinstance(like, int) and number.is_integer():
        return int(text) if text.strip("+-").isdecimal() else int(number)
    return number


def limit(kind: str, bound: float) -> str:
    whole = isinstance(bound, int)
    number = f"{bound}" if whole else f"{bound:g}"
    if kind == "greater_than":
        return f"at least {bound + 1}" if whole else f"above {bound:g} and finite"
    if kind == "less_than":
        return f"below {number}"
    words = {"greater_than_equal": "at least", "less_than_equal": "at most"}
    return f"{words.get(kind, 'a multiple of')} {number}"


def near(kind: str, bound: float, number: float) -> str:
    if kind != "multiple_of":
        return ""
    close = max(1, (2 * number + bound) // (2 * bound)) * bound
    return f"; the nearest is {shown(close)}"


def plain(hint: Any, value: Any) -> Any:
    """The value as Python writes it: YAML's bare words, one word for a list, a path for a text."""
    kinds = parts(hint)
    if isinstance(value, bool) and (words := choices(hint)):
        return next((w for w in words if YAML_WORDS.get(w) is value), value)
    if isinstance(value, bool) and bool not in kinds and {int, float} & set(kinds):
        wanted: Any = "int_type" if int in kinds else "float_type"
        raise PydanticCustomError(wanted, "true and false are no numbers")
    if isinstance(value, str) and str not in kinds and list[str] in kinds:
        return [value]
    return str(value) if isinstance(value, PurePath) else value


def parts(hint: Any) -> list[Any]:
    """The types of a union, without their ranges."""
    if typing.get_origin(hint) is Annotated:
        return parts(typing.get_args(hint)[0])
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return [p for a in typing.get_args(hint) for p in parts(a)]
    return [hint]


def choices(hint: Any) -> tuple[Any, ...]:
    """The words of a Literal, () for other types."""
    literals = [p for p in parts(hint) if typing.get_origin(p) is Literal]
    return tuple(w for p in literals for w in typing.get_args(p))
