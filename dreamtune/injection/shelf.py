"""Many adapters for one model, of which few are in use: plain factors on the device, the rest on
the CPU or in their files, those that were used last nearest.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dreamtune.adapters.base import WeightChange, changed
from dreamtune.injection.adapter_file import Fingerprint
from dreamtune.injection.change import Factors, Use
from dreamtune.injection.layer import Adapted
from dreamtune.injection.places import Place, Spot, attentions_of, check_in_place
from dreamtune.injection.plain import Layer, Plain

GIB = 1 << 30


class Source(Protocol):
    """Where an adapter's factors come from, again and again the same."""

    def read(self, layers: Mapping[str, Layer]) -> Plain: ...


class Entry(NamedTuple):
    """An adapter on the shelf. paths: of the layers that it changes; nbytes: of its factors;
    options, metadata: as its file has them.
    """

    name: str
    method: str
    paths: tuple[str, ...]
    nbytes: int
    source: Source
    options: Mapping[str, Any]
    metadata: Mapping[str, Any]


class Stored:
    """The change of one layer by an adapter on the shelf; for a layer what a `Change` is."""

    def __init__(self, name: str, shelf: Shelf, path: str) -> None:
        self.name, self.shelf, self.path = name, shelf, path
        self.adapter, self.use = NOTHING, shelf.use

    def factors(self, weight: Tensor) -> Factors:
        return self.shelf.factors(self.name, weight).of[self.path].scaled(self.use.call)

    def difference(self, weight: Tensor) -> Tensor:
        """What it adds to the weight at strength 1."""
        base = weight.detach().flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
        parts = (None if x is None else x[None].to(base) for x in self.factors(weight))
        heights = tuple(self.shelf.places[self.path].parts.values())
        return (changed(base, WeightChange(*parts), heights)[0] - base).view(weight.shape)


class _Nothing(nn.Module):
    asks_for_timestep = False


NOTHING = _Nothing()  # has no parameters: nothing trains, and nothing changes


class Shelf:
    """Attributes:
    entries: name -> adapter, in the order that they came.
    places: module path -> place of the layers that some adapter changes.
    device_budget, cpu_budget: bytes of factors there.
    spots: of the model's modules, as they were when it was looked at.
    prints: fingerprint of the layers that were asked for.
    read: how often factors were read from files since they came, for whoever measures.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.entries: dict[str, Entry] = {}
        self.places: dict[str, Place] = {}
        self.paths: dict[nn.Module, str] = {}
        self.attentions: list[nn.Module] = []
        self.spots: list[Spot] | None = None
        self.device_budget, self.cpu_budget = 2 * GIB, 4 * GIB
        self.near: OrderedDict[str, Plain] = OrderedDict()  # on the device, last used last
        self.far: OrderedDict[str, Plain] = OrderedDict()  # on the CPU
        self.use = Use(1)
        self.read = 0
        self.prints: Fingerprint = {}
        self.changes: dict[tuple[str, str], Stored] = {}

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "near": OrderedDict(), "far": OrderedDict(), "spots": None}

    def put(self, entry: Entry, factors: Plain, places: Mapping[str, Place]) -> None:
        """One more; its layers are adapted from now on."""
        self.entries[entry.name] = entry
        for path, place in places.items():
            Adapted.of(place.layer, tuple(place.parts.values()))
            self.places.setdefault(path, place)
            self.paths[place.layer] = path
        self.attentions = attentions_of(self.places.values())
        self._keep(entry.name, factors)

    def drop(self, name: str) -> None:
        """Raises KeyError where there is none of that name."""
        del self.entries[name]
        self.near.pop(name, None)
        self.far.pop(name, None)
        self.changes = {key: c for key, c in self.changes.items() if key[0] != name}
        still = {path for entry in self.entries.values() for path in entry.paths}
        for path in [path for path in self.places if path not in still]:
            layer = self.places.pop(path).layer
            del self.paths[layer]
            if isinstance(layer, Adapted) and not layer.changes:
                layer.release()
        self.attentions = attentions_of(self.places.values())

    def path_of(self, layer: nn.Module) -> str | None:
        """None where no adapter changes it."""
        found: str | None = self.paths.get(layer)
        return found

    def change(self, name: str, path: str) -> Stored | None:
        """None where it changes nothing in that layer."""
        key = name, path
        if key not in self.changes:
            if path not in self.entries[name].paths:
                return None
            self.changes[key] = Stored(name, self, path)
        return self.changes[key]

    def before_forward(self, strength: float) -> None:
        """strength: of this call. Raises ValueError where the model no longer has the layers."""
        check_in_place(self.places, self.attentions)
        self.use.call = strength

    def bring(self, names: Collection[str]) -> None:
        """Those are on the device after it. Raises ValueError where the budget does not hold them,
        and for a file that is no longer what it was.
        """
        needed = sum(self.entries[name].nbytes for name in names)
        if needed > self.device_budget:
            raise ValueError(
                f"{len(names)} adapters in use need {_in_words(needed)}, and"
                f" {_in_words(self.device_budget)} are allowed: route fewer at once, or give more,"
                " `dreamtune.load_many(pipe, {}, device_budget=...)`"
            )
        coming = sum(self.entries[name].nbytes for name in names if name not in self.near)
        self._shrink(self.near, self.device_budget - coming, names)  # before: never over the budget
        for name in names:
            self._near(name, self._weight())

    def fit(self) -> None:
        """Within budgets that are others now."""
        self._shrink(self.near, self.device_budget, ())
        self._shrink(self.far, self.cpu_budget, ())

    def factors(self, name: str, weight: Tensor) -> Plain:
        """On the device and in the dtype of the weight."""
        found = self.near.get(name)
        if found is None or (found.flat.device, found.flat.dtype) != (weight.device, weight.dtype):
            found = self._near(name, weight)
        return found

    def _weight(self) -> Tensor:
        found = next(iter(self.places.values())).layer.weight
        assert isinstance(found, Tensor)
        return found

    def _near(self, name: str, weight: Tensor) -> Plain:
        found = self.near.get(name)
        if found is None or (found.flat.device, found.flat.dtype) != (weight.device, weight.dtype):
            kept = self.far.get(name)
            if kept is None or kept.flat.dtype != weight.dtype:
                entry = self.entries[name]
                kept = entry.source.read({path: self.places[path].layer for path in entry.paths})
                self.read += 1
                kept = self._keep(name, kept)
            found = kept.to(weight.device)
            self.near[name] = found
        self.near.move_to_end(name)
        if name in self.far:
            self.far.move_to_end(name)
        return found

    def _keep(self, name: str, factors: Plain) -> Plain:
        if self._weight().device.type == "cuda":
            factors = factors.pinned()
        self.far[name] = factors
        self.far.move_to_end(name)
        self._shrink(self.far, self.cpu_budget, ())
        return factors

    def _shrink(self, tier: OrderedDict[str, Plain], budget: int, kept: Iterable[str]) -> None:
        """Lets those go that were not used for longest."""
        total = sum(x.nbytes for x in tier.values())
        for name in [name for name in tier if name not in set(kept)]:
            if total <= budget:
                return
            total -= tier.pop(name).nbytes


def _in_words(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 10 << 20 else f"{-(-size >> 10)} KiB"
