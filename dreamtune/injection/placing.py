"""What is set for a model's adapters, as factors in places: for forwards that are recorded or
compiled, which ask no strength and no route.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from dreamtune.injection.bank import Bank
from dreamtune.injection.change import Factors
from dreamtune.injection.injected import InjectedAdapter
from dreamtune.injection.layer import Adapted
from dreamtune.injection.places import walk
from dreamtune.injection.plain import Block
from dreamtune.injection.rows import Tables, kinds_of, layers_by_shape, parts_of

KEPT = 12  # tables at once, of other ranks or numbers of rows


class Placing:
    """The places of a model's adapted layers, and what is in them."""

    def __init__(self, model: nn.Module, bank: Bank) -> None:
        self.model, self.bank = model, bank
        self.kept: OrderedDict[object, Tables] = OrderedDict()
        self.stacked: dict[str, tuple[list[list[Factors]], int, list[Block]]] = {}
        self.count = 0
        self.look()

    def look(self) -> None:
        """At the layers that are adapted now. All places are new."""
        layers = {s.path: s.module for s in walk(self.model) if isinstance(s.module, Adapted)}
        self.layers = layers_by_shape(layers)
        self.names = {id(layer): name for name, layer in layers.items()}
        self.kept.clear()
        self.stacked.clear()
        self.members = self.bank.members

    def is_current(self) -> bool:
        """Whether the adapters are those that were looked at: of others, other layers are."""
        return self.members == self.bank.members

    def tables(self) -> Tables | None:
        """With what is set now in its places; None where a recorded forward cannot have it."""
        mix, bank = self.bank.mix, self.bank
        if mix.regions is not None:
            return None
        blocks: dict[str, Sequence[Block]] = {}
        calls: dict[str, float] = {}
        numbers: dict[str, int] = {}  # tell factors from those before them
        if not mix.off:
            for adapter in InjectedAdapter.of(self.model):
                if adapter.groups[0].adapter.asks_for_timestep or adapter.slots > 1:
                    return None
                numbers[adapter.name], blocks[adapter.name] = self._stacked(adapter)
                calls[adapter.name] = 1.0  # in its factors
            for name in mix.from_shelf():
                weight = next(iter(bank.shelf.places.values())).layer.weight
                plain = bank.shelf.factors(name, weight)
                numbers[name], blocks[name] = plain.number, plain.blocks
                calls[name] = bank.shelf.use.call
        now = mix.state, calls, numbers
        last = next(reversed(self.kept.values()), None)
        if last is not None and last.held == now:
            return last
        parts = parts_of(mix, blocks, self.layers, calls)
        rows = None if mix.rows is None else len(mix.order)
        kinds = kinds_of(parts)
        key = rows, tuple(sorted(kinds.items()))
        tables = self.kept.get(key)
        if tables is None:
            tables = self.kept[key] = Tables(self.layers, rows, kinds, mix.parted)
            while len(self.kept) > KEPT:
                self.kept.popitem(last=False)
        self.kept.move_to_end(key)
        if tables.held != now:
            tables.set(parts)
            tables.held = now
        return tables

    def _stacked(self, adapter: InjectedAdapter) -> tuple[int, Sequence[Block]]:
        """A loaded adapter's factors, (L, ...), with a number that tells them from others."""
        now = [
            [change.factors(layer.weight) for change, layer in zip(group.changes, group.layers)]
            for group in adapter.groups
        ]
        before = self.stacked.get(adapter.name)
        if before is not None and all(
            a is b for old, new in zip(before[0], now, strict=True) for a, b in zip(old, new)
        ):
            return before[1:]
        found = []
        for group, own in zip(adapter.groups, now, strict=True):
            parts = zip(*own)
            stacked = (None if each[0] is None else torch.stack(each) for each in parts)
            names = tuple(self.names[id(layer)] for layer in group.layers)
            found.append(Block(names, Factors(*stacked)))
        self.count -= 1  # those of the shelf count up
        self.stacked[adapter.name] = now, self.count, found
        return self.count, found
