"""Which layers are adapted, and with which options: names, globs and regular expressions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from dreamtune.adapters import Adapter, resolve_options
from dreamtune.adapters.in_parts import Parts
from dreamtune.injection.places import Place, Spot, adaptable, walk
from dreamtune.injection.places import layer_at as layer_at
from dreamtune.injection.places import unwrapped as unwrapped
from dreamtune.injection.places import weight_of as weight_of

TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0")
REGEX = "re:"
LISTED = 12  # kinds of layers in a message

Targets = str | Sequence[str] | Mapping[str, Mapping[str, Any]]


class Choice(NamedTuple):
    """A layer to adapt. entry: what chose it; options: that differ from the common ones; parts: on
    which the method acts for itself, none for the whole weight.
    """

    place: Place
    entry: str
    options: Mapping[str, Any]
    parts: Parts


def entries_of(target_modules: Targets) -> dict[str, Mapping[str, Any]]:
    """Entry -> its options. Raises ValueError for what is none."""
    if isinstance(target_modules, str):
        target_modules = (target_modules,)
    if not isinstance(target_modules, Mapping):
        target_modules = {entry: {} for entry in target_modules}
    if not target_modules:
        raise ValueError("`target_modules` is empty: name at least one layer, for instance `to_q`")
    for entry, options in target_modules.items():
        if not isinstance(entry, str) or not isinstance(options, Mapping):
            raise ValueError(
                "`target_modules` must be names of layers, or names with options of the method,"
                f" got {entry!r}: {options!r}"
            )
        matcher(entry)
    return dict(target_modules)


def check_entries(
    method: type[Adapter], target_modules: Targets, options: Mapping[str, Any]
) -> None:
    """Raises ValueError for what can be refused without a model."""
    for entry, own in entries_of(target_modules).items():
        options_at(method, options, entry, own)


def options_at(
    method: type[Adapter], common: Mapping[str, Any], entry: str, own: Mapping[str, Any]
) -> dict[str, Any]:
    """The options of an entry's layers, defaults filled in."""
    try:
        return resolve_options(method, {**common, **own})
    except ValueError as error:
        raise ValueError(f"`target_modules`, `{entry}`: {error}") from None


def is_name(entry: str) -> bool:
    return not entry.startswith(REGEX) and not set(entry) & set("*?[")


def matcher(entry: str) -> Callable[[str], object]:
    """Whether a module path is meant. Raises ValueError for a broken regular expression."""
    if entry.startswith(REGEX):
        try:
            return re.compile(entry.removeprefix(REGEX)).fullmatch
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"`target_modules`: `{entry}` is no expression: {error}") from None
    if is_name(entry):
        return lambda path: path == entry or path.endswith(f".{entry}")
    return lambda path: fnmatchcase(path, entry)


def choose(model: nn.Module, target_modules: Targets) -> dict[str, Choice]:
    """Module path -> choice, by the first entry that matches; paths are those of the model as it
    would be without wrappers.

    Raises ValueError for an entry that matches no layer, or layers that cannot be adapted.
    """
    entries, model = entries_of(target_modules), unwrapped(model)
    spots = walk(model)
    chosen: dict[str, tuple[tuple[int, int], Spot, str]] = {}
    nothing: list[str] = []
    for number, entry in enumerate(entries):
        match = matcher(entry)
        matched = [spot for spot in spots if match(spot.path)]
        layers = [spot for spot in matched if adaptable(spot.module)]
        if not matched:
            nothing.append(entry)
        elif not layers:
            raise ValueError(
                f"`target_modules`: `{entry}` matches only {_kinds(matched)}; adapted are torch's"
                " `Linear` and `Conv2d`"
            )
        if is_name(entry):  # a name means all that has it, a pattern what can be adapted
            layers += [s for s in matched if _holds(s.module) and not adaptable(s.module)]
        new = [spot for spot in layers if spot.path not in chosen]
        if layers and not new and any(entries.values()):
            raise ValueError(
                f"`target_modules`: `{entry}` matches only layers of the entries before it: put it"
                " before them"
            )
        chosen |= {spot.path: (_order(spot, entry, number), spot, entry) for spot in new}
    if nothing:
        raise ValueError(_no_layer(model, spots, nothing))
    ordered = sorted(chosen.values(), key=lambda found: found[0])
    found = [(spot.place(), entry, spot.path) for _, spot, entry in ordered]
    return {path: Choice(place, entry, entries[entry], place.parts) for place, entry, path in found}


def choose_paths(model: nn.Module, paths: Collection[str]) -> dict[str, Choice]:
    """The layers of these very paths; those that are not there are left out."""
    found = [s for s in walk(unwrapped(model)) if s.path in paths and adaptable(s.module)]
    places = {spot.path: spot.place() for spot in found}
    return {path: Choice(place, path, {}, place.parts) for path, place in places.items()}


def layers_of(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Module path -> layer, for all of a kind that can be adapted."""
    spots = walk(unwrapped(model))
    return {s.path: s.module for s in spots if isinstance(s.module, nn.Linear | nn.Conv2d)}


def find_targets(
    model: nn.Module, target_modules: Targets = TARGET_MODULES
) -> dict[str, nn.Linear | nn.Conv2d]:
    """Module path -> layer, for all that are meant."""
    return {path: choice.place.layer for path, choice in choose(model, target_modules).items()}


def _order(spot: Spot, entry: str, number: int) -> tuple[int, int]:
    """The model's; what is named below an attention in the order of the names: runs and files of
    projections have always had their layers so.
    """
    above = spot.attention
    if above is not None and spot.path == (f"{above.path}.{entry}" if above.path else entry):
        return above.order, number
    return spot.order, -1


def _holds(module: nn.Module) -> bool:
    """Whether it has weights of its own."""
    return any(p is not None for p in module._parameters.values())


def _kinds(spots: Iterable[Spot]) -> str:
    kinds = Counter(type(spot.module).__name__ for spot in spots)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def _no_layer(model: nn.Module, spots: Iterable[Spot], nothing: Iterable[str]) -> str:
    counts = Counter(
        (last(spot.path), "Conv2d" if isinstance(spot.module, nn.Conv2d) else "Linear")
        for spot in spots
        if adaptable(spot.module)
    )
    there = [f"`{name}` ({count} {kind})" for (name, kind), count in counts.most_common(LISTED)]
    if len(counts) > LISTED:
        there.append(f"{len(counts) - LISTED} more")
    listed = ", ".join(there) or "no `Linear` and no `Conv2d`"
    missing = ", ".join(f"`{entry}`" for entry in nothing)
    return (
        f"`target_modules`: no layer matches {missing}. `{type(model).__name__}` has {listed}. A"
        " name is a whole path or its end, `*` makes it a glob, `re:` before it an expression"
    )


def last(path: str) -> str:
    """The end of a path that tells a layer from its siblings' kinds: a number takes its list."""
    *above, last = path.split(".")
    return f"{above[-1]}.{last}" if last.isdigit() and above else last
