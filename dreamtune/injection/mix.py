"""How the changes in a model's layers add up: each at a strength, in all rows of a batch or row by
row.

A layer holds the changes, by name; a `Mix` that its layers share says how much of each. What they
come to is kept in the layer until a strength, a row or a factor is another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamtune.injection.change import Factors, InLayer, Use, constant, trains
from dreamtune.injection.region import Region
from dreamtune.injection.regions import Regions

Strength = float | Mapping[str, float] | Region
Pairs = list[tuple[Factors, Use]]


def at(strength: Strength, path: str) -> float:
    """In the layer of that path: by parts of a model, that of the longest that it is in, 1 where it
    is in none.
    """
    if isinstance(strength, Region):
        strength = strength.strength
    if not isinstance(strength, Mapping):
        return strength
    found = [part for part in strength if path == part or path.startswith(f"{part}.")]
    return strength[max(found, key=len)] if found else 1.0


class Stock(Protocol):
    """Adapters beside those in the layers."""

    entries: dict[str, Any]
    places: dict[str, Any]

    def path_of(self, layer: nn.Module) -> str | None: ...

    def change(self, name: str, path: str) -> InLayer | None: ...


class Used(NamedTuple):
    """A change that some row has. strengths: of each row; one where all have the same."""

    name: str
    strengths: Sequence[float]


class Mixed(NamedTuple):
    """What a layer keeps: of that state of the mix, of those factors."""

    state: int
    used: Sequence[Used]
    factors: Sequence[Factors] = ()
    pairs: Pairs | None = None


class Mix:
    """Attributes:
    strengths: of adapters by name, in all rows; 1 where none is given.
    rows: in their place the same for each row of a batch; an adapter that a row does not name is
        not in it. None where all rows are alike.
    regions: where in the picture those of the rows act; None where all are everywhere.
    order: the row of each row of the model's batch, (batch,).
    off: nothing is added: the changes are in the weights.
    parted: whether layers may have several rows for each of the model's batch.
    shelf: of adapters that are in use where they are named; None for none.
    state: differs where something was set.
    """

    def __init__(self) -> None:
        self.strengths: Mapping[str, Strength] = {}
        self.rows: Sequence[Mapping[str, Strength]] | None = None
        self.regions: Regions | None = None
        self.order = torch.zeros(0, dtype=torch.long)
        self.off = self.parted = False
        self.shelf: Stock | None = None
        self.state = 0
        self._named: tuple[int, list[str]] = -1, []

    def set(
        self,
        strengths: Mapping[str, Strength],
        rows: Sequence[Mapping[str, Strength]] | None = None,
    ) -> None:
        self.strengths, self.rows = strengths, rows
        self.regions = Regions.of(rows)
        self.state += 1

    def spread(self, order: Sequence[int]) -> None:
        """Which row each row of the batch is, in the forwards that come."""
        if self.order.tolist() != list(order):
            with constant():  # also of a later forward with gradients
                self.order = torch.tensor(order)
            self.state += 1

    @property
    def plain(self) -> bool:
        """Whether all changes are in all rows as they are, and none comes from the shelf."""
        alike = not self.off and self.rows is None
        return alike and all(s == 1 for s in self.strengths.values()) and not self.from_shelf()

    def from_shelf(self) -> list[str]:
        """Those of the shelf that are in use."""
        if self.shelf is None or not self.shelf.entries or self.off:
            return []
        if self._named[0] != self.state:
            given = [self.strengths] if self.rows is None else self.rows
            found = {
                n for row in given for n, s in row.items() if s != 0 and n in self.shelf.entries
            }
            self._named = self.state, sorted(found)
        return self._named[1]

    def strength(self, name: str, path: str) -> float:
        """Of an adapter in a layer, where all rows are alike."""
        return at(self.strengths.get(name, 1.0), path)

    def pairs(self, layer: Any, x: Tensor) -> Pairs:
        """What the layer computes with, of its changes. x: what it is called with."""
        if self.off:
            return []
        changes = self.changes(layer)
        kept: Mixed | None = layer.__dict__.get("mixed")
        if kept is None or kept.state != self.state:
            kept = Mixed(self.state, self._used(changes))
            if not torch.compiler.is_compiling():
                layer.mixed = kept
        own = [changes[used.name] for used in kept.used]
        factors = [change.factors(layer.weight) for change in own]
        if self.regions is not None:
            named = [(u.name, c, f, u.strengths) for u, c, f in zip(kept.used, own, factors)]
            return self.regions.pairs(layer, x, named)
        if self.rows is None and all(used.strengths[0] == 1 for used in kept.used):
            return [(f, change.use) for f, change in zip(factors, own)]
        if kept.pairs is not None and all(a is b for a, b in zip(kept.factors, factors)):
            return kept.pairs
        passing = any(trains(c.adapter) or c.use.at is not None for c in own)
        keep = not passing and not torch.compiler.is_compiling()
        with (
            torch.autocast(layer.weight.device.type, enabled=False),
            constant() if keep else nullcontext(),
        ):
            parts = list(zip(factors, (c.use for c in own), (u.strengths for u in kept.used)))
            pairs = (
                everywhere(parts) if self.rows is None else by_row(parts, self.order, self.parted)
            )
        if keep:
            layer.mixed = kept._replace(factors=factors, pairs=pairs)
        return pairs

    def changes(self, layer: Any) -> Mapping[str, InLayer]:
        """Those in the layer, and those in use from the shelf."""
        names = self.from_shelf()
        if not names or self.shelf is None:
            return layer.changes  # type: ignore[no-any-return]
        path = self.shelf.path_of(layer)
        stored = {name: path and self.shelf.change(name, path) for name in names}
        return {**layer.changes, **{name: found for name, found in stored.items() if found}}

    def _used(self, changes: Mapping[str, InLayer]) -> list[Used]:
        found = []
        for name, change in changes.items():
            strengths = [self.strength(name, change.path)]
            if self.rows is not None:
                strengths = [at(row.get(name, 0.0), change.path) for row in self.rows]
            if any(strength != 0 for strength in strengths):
                found.append(Used(name, strengths))
        return found


Part = tuple[Factors, Use, Sequence[float]]


def is_low_rank(part: Part) -> bool:
    """Whether `up @ down` is all, the same for all rows: then several are one product."""
    factors, use, _ = part
    return factors.low_rank and use.at is None and factors.up is not None


def everywhere(parts: Sequence[Part]) -> Pairs:
    """In all rows each change at its one strength."""
    pairs = [(p[0].scaled(p[2][0]), p[1]) for p in parts if not is_low_rank(p)]
    low = [f.scaled(strengths[0]) for f, _, strengths in filter(is_low_rank, parts)]
    if low:
        up = torch.cat([f.up for f in low if f.up is not None], -1)
        down = torch.cat([f.down for f in low if f.down is not None], -2)
        pairs.append((Factors(up=up, down=down), Use(1)))
    return pairs


def by_row(parts: Sequence[Part], order: Tensor, parted: bool) -> Pairs:
    """In the rows that `order` has (batch,), each change at the strength of that row."""
    pairs: Pairs = []
    for factors, use, strengths in (part for part in parts if not is_low_rank(part)):
        some = next(x for x in factors if x is not None)
        row = torch.tensor(strengths, device=some.device)[order.to(some.device)]
        row = row if use.at is None else row * use.at.to(row)
        pairs.append((factors, replace(use, at=row, parted=parted)))
    low = list(filter(is_low_rank, parts))
    if not low:
        return pairs
    ups, downs = [], []
    for number in range(len(low[0][2])):
        own = [(f, strengths[number]) for f, _, strengths in low if strengths[number] != 0]
        own = own or [(low[0][0], 0.0)]
        ups.append(torch.cat([s * f.up for f, s in own if f.up is not None], -1))
        downs.append(torch.cat([f.down for f, _ in own if f.down is not None], -2))
    rank = max(up.shape[-1] for up in ups)
    up = torch.stack([F.pad(x, (0, rank - x.shape[-1])) for x in ups])
    down = torch.stack([F.pad(x, (0, 0, 0, rank - x.shape[-2])) for x in downs])
    order = order.to(up.device)
    numbers = torch.arange(len(order), device=up.device)
    rows = Use(len(order), rows=numbers, parted=parted)
    return [*pairs, (Factors(up=up[order], down=down[order]), rows)]
