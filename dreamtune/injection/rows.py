"""The factors of every row of a batch in places that stay: what a recorded forward reads.

Other adapters, strengths or rows are other values in the same places, as long as ranks and kinds of
change stay what they were, up to a rank that is rounded up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dreamtune.injection.change import Factors, Use, constant
from dreamtune.injection.mix import Mix, Pairs, Strength, at
from dreamtune.injection.plain import Block
from dreamtune.injection.region import Region

RANKS = 16  # the smallest place, which the others are 2, 4, 8, ... times as wide as

Adapters = Mapping[str, Sequence[Block]]


class Kind(NamedTuple):
    """What the layers of a table are changed by. rank: 0 for no `up` and `down`; rotations: numbers
    of blocks, and their sizes.
    """

    rank: int = 0
    gain: bool = False
    rotations: tuple[tuple[int, int], ...] = ()


class Part(NamedTuple):
    """What an adapter has for layers of a table. layers: their places there, None for all, in
    order; strength: one, or one each, (L,).
    """

    layers: Tensor | None
    factors: Factors
    strength: float | Tensor


class Table:
    """Layers of one shape.

    Attributes:
        rows: of the batch; None: all rows have the same. parted: as `Use` has it.
        places: up (L, [rows,] out, R) and so on; of each layer views in `pairs`.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        rows: int | None,
        kind: Kind,
        parted: bool = False,
    ) -> None:
        self.paths = {path: index for index, path in enumerate(layers)}
        self.rows, self.kind = rows, kind
        like: Tensor = next(iter(layers.values())).weight  # type: ignore[assignment]
        out, width = like.flatten(1).shape
        lead = (len(layers),) if rows is None else (len(layers), rows)

        def place(*shape: int) -> Tensor:
            return torch.zeros(*lead, *shape, dtype=like.dtype, device=like.device)

        low = kind.rank > 0
        self.up = place(out, kind.rank) if low else None
        self.down = place(kind.rank, width) if low else None
        self.gain = place(out) if kind.gain else None
        self.rotations = {(n, size): place(n, size, size) for n, size in kind.rotations}
        use = Use(1)
        if rows is not None:
            numbers = torch.arange(rows, device=like.device)
            use = Use(rows, rows=numbers, parted=parted)
        self.pairs: dict[nn.Module, Pairs] = {}
        for index, layer in enumerate(layers.values()):
            parts = (None if x is None else x[index] for x in (self.up, self.down, self.gain))
            turned = [Factors(rotation=x[index]) for x in self.rotations.values()]
            found = [Factors(*parts), *turned]
            self.pairs[layer] = [(f, use) for f in found if any(x is not None for x in f)]

    def clear(self) -> None:
        for place in (self.up, self.gain, *self.rotations.values()):
            if place is not None:
                place.zero_()

    def set(self, row: int | None, parts: Sequence[Part]) -> None:
        """The sum of the parts, in places that are clear."""
        start = 0
        for index, factors, strength in parts:
            s = strength
            if isinstance(s, Tensor):
                s = s.view(-1, 1, 1)
            up, down, gain, rotation = factors
            if up is not None and down is not None and self.up is not None:
                assert self.down is not None
                end = start + up.shape[-1]
                scaled = up if isinstance(s, float) and s == 1 else up * s
                _write(_row(self.up, row)[..., start:end], index, scaled)
                _write(_row(self.down, row)[:, start:end], index, down)
                start = end
            if gain is not None and self.gain is not None:
                _write(_row(self.gain, row), index, (gain.unsqueeze(-1) * s).squeeze(-1), add=True)
            if rotation is not None:
                place = _row(self.rotations[_blocks(rotation)], row)
                turned = rotation * (s if isinstance(s, float) else s.unsqueeze(-1))
                _write(place, index, turned, add=True)


def _blocks(rotation: Tensor) -> tuple[int, int]:
    return rotation.shape[1], rotation.shape[2]


def _row(place: Tensor, row: int | None) -> Tensor:
    return place if row is None else place[:, row]


def _write(place: Tensor, index: Tensor | None, values: Tensor, add: bool = False) -> None:
    if index is None:
        place.copy_(place + values if add else values)
    else:
        place[index] = (place[index] + values if add else values).to(place.dtype)


class Tables:
    """The tables of a model's adapted layers.

    Attributes:
        layers: shape -> module path -> layer.
        pairs: layer -> what it computes with.
    """

    def __init__(
        self,
        layers: Mapping[tuple[int, ...], Mapping[str, nn.Module]],
        rows: int | None,
        kinds: Mapping[tuple[int, ...], Kind],
        parted: bool = False,
    ) -> None:
        with constant():
            self.tables = {s: Table(layers[s], rows, kind, parted) for s, kind in kinds.items()}
        pairs = {x: own for t in self.tables.values() for x, own in t.pairs.items()}
        self.pairs = {
            layer: pairs.get(layer, []) for own in layers.values() for layer in own.values()
        }
        self.held: object = None  # what was set last

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Inside, the layers compute with what is in the places."""
        self.put()
        try:
            yield
        finally:
            self.take()

    def put(self) -> None:
        for layer, pairs in self.pairs.items():
            layer.placed = pairs  # type: ignore[assignment]

    def take(self) -> None:
        for layer in self.pairs:
            layer.placed = None  # type: ignore[assignment]

    def set(self, parts: Mapping[tuple[int, ...], Mapping[int | None, Sequence[Part]]]) -> None:
        with constant():
            for shape, table in self.tables.items():
                table.clear()
                for row, own in parts.get(shape, {}).items():
                    table.set(row, own)


def layers_by_shape(
    layers: Mapping[str, Any],
) -> dict[tuple[int, ...], dict[str, nn.Module]]:
    found: dict[tuple[int, ...], dict[str, nn.Module]] = {}
    for path, layer in layers.items():
        found.setdefault(tuple(layer.weight.shape), {})[path] = layer
    return found


def parts_of(
    mix: Mix,
    adapters: Adapters,
    layers: Mapping[tuple[int, ...], Mapping[str, nn.Module]],
    call: Mapping[str, float],
) -> dict[tuple[int, ...], dict[int | None, list[Part]]]:
    """Shape -> row of the batch -> what is in it. call: an adapter's strength beside the mix's."""
    given: list[tuple[int | None, Mapping[str, Strength]]]
    if mix.rows is None:
        given = [(None, {name: mix.strengths.get(name, 1.0) for name in adapters})]
    else:
        given = [(row, mix.rows[number]) for row, number in enumerate(mix.order.tolist())]
    order = {shape: {p: i for i, p in enumerate(own)} for shape, own in layers.items()}
    shape_of = {path: shape for shape, own in layers.items() for path in own}
    made: dict[tuple[str, str], list[tuple[tuple[int, ...], Part]]] = {}
    found: dict[tuple[int, ...], dict[int | None, list[Part]]] = {}
    for row, strengths in given:
        for name, strength in strengths.items():
            key = name, repr(strength)
            if key not in made:
                made[key] = [
                    (shape_of[b.paths[0]], _part(b, strength, call[name], order))
                    for b in adapters.get(name, ())
                    if b.paths
                ]
            if strength == 0 or call.get(name) == 0:
                continue  # with 0 in some blocks alone it is the same forward as with 1 there
            for shape, part in made[key]:
                found.setdefault(shape, {}).setdefault(row, []).append(part)
    return found


def _part(
    block: Block,
    strength: Strength,
    call: float,
    order: Mapping[tuple[int, ...], Mapping[str, int]],
) -> Part:
    some = next(x for x in block.factors if x is not None)
    own = next(o for o in order.values() if block.paths[0] in o)
    places = [own[path] for path in block.paths]
    index = None
    if places != list(range(len(own))):
        index = torch.tensor(places, device=some.device)
    assert not isinstance(strength, Region), "regions are not for places"
    if not isinstance(strength, Mapping):
        return Part(index, block.factors, strength * call)
    each = [at(strength, path) * call for path in block.paths]
    if len(set(each)) == 1:
        return Part(index, block.factors, each[0])
    # not rounded to 16 bits before the product is
    dtype = torch.promote_types(some.dtype, torch.float32)
    return Part(index, block.factors, torch.tensor(each, device=some.device, dtype=dtype))


def kinds_of(
    parts: Mapping[tuple[int, ...], Mapping[int | None, Sequence[Part]]],
) -> dict[tuple[int, ...], Kind]:
    found = {}
    for shape, rows in parts.items():
        factors = [part.factors for own in rows.values() for part in own]
        wide = max(
            sum(f.up.shape[-1] for f in (part.factors for part in own) if f.up is not None)
            for own in rows.values()
        )
        rank = RANKS
        while rank < wide:
            rank *= 2
        turned = {_blocks(f.rotation) for f in factors if f.rotation is not None}
        gained = any(f.gain is not None for f in factors)
        found[shape] = Kind(rank if wide else 0, gained, tuple(sorted(turned)))
    return found
