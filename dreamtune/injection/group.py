"""The layers of one shape and set of options: their parameters in one tensor, a change for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dreamtune.adapters import Adapter
from dreamtune.adapters.in_parts import Parts
from dreamtune.injection.change import Change, Factors, Use, constant, factors_of, trains
from dreamtune.injection.layer import Adapted
from dreamtune.injection.places import Place, weight_of
from dreamtune.injection.stack import Stack


class Made(NamedTuple):
    """An adapter and the layers that it is for. suffix: of the group's key, from options that are
    not the common ones. parts: of each of the layers.
    """

    places: Mapping[str, Place]
    adapter: Adapter
    suffix: str
    parts: Parts


def kind_of(shape: Sequence[int], parts: Parts) -> str:
    """Of layers, in words."""
    return "x".join(map(str, shape)) + (f"({','.join(parts)})" if parts else "")


class Group:
    """Layers of one kind, shape and set of parts and options, and their adapter.

    Attributes:
        adapter: parameters (L, S, ...).
        key: shape, parts and suffix: "320x320", "64x32x3x3:rank=8", "48x16(q,k,v)".
        names: module paths, in the order of the parameters.
        layers: in the same order.
        stack: of the fast way, which the weights are rows of; None where the layers are plain.
    """

    def __init__(self, made: Made, use: Use) -> None:
        self.adapter, self.use = made.adapter, use
        self.names = list(made.places)
        self.parts = made.parts
        self.layers = [
            Adapted.of(place.layer, tuple(place.parts.values())) for place in made.places.values()
        ]
        self.key = kind_of(self.layers[0].weight.shape, made.parts) + made.suffix
        self.changes = [Change(made.adapter, i, use, n) for i, n in enumerate(self.names)]
        self.stack: Stack | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "stack": None}  # a copy is plain

    @property
    def weight(self) -> Tensor:
        """The frozen weights as they are now, (L, out, in)."""
        return self.stack.weight if self.stack is not None else torch.stack(self.weights())

    def weights(self) -> list[Tensor]:
        """(out, in) each; of a convolution (out, in * kh * kw)."""
        return [weight_of(layer).flatten(1) for layer in self.layers]

    def own_options(self, common: Mapping[str, Any], slot: int) -> dict[str, Any]:
        """Those of a slot that are not the common ones."""
        found = self.adapter.options_of(slot)
        return {name: value for name, value in found.items() if value != common[name]}

    def together(self) -> bool:
        """Whether all the weights are here, alike: then one computation is enough for the group."""
        kinds = {(layer.weight.device, layer.weight.dtype) for layer in self.layers}
        return len(kinds) == 1 and next(iter(kinds))[0].type != "meta"

    def forget(self) -> None:
        """Lets go of the factors, and so of the graph that they carry."""
        for change in self.changes:
            change.kept = None

    def prepare(self) -> None:
        """Computes the factors of all layers at once: for one after the other, many kernels more.

        A layer that is not as it was then computes its own.
        """
        weights = [layer.weight for layer in self.layers]
        self.adapter.to(weights[0].device)
        if trains(self.adapter):
            factors = self._factors(weights)
        else:
            with constant():
                factors = self._factors(weights)
        for change, weight, own in zip(self.changes, weights, factors.unbind(), strict=True):
            change.keep(weight, own)

    def _factors(self, weights: list[Tensor]) -> Factors:
        needs = self.adapter.depends_on_weight
        like = weights[0].detach().flatten(1)
        stacked = (
            torch.stack([w.detach().flatten(1) for w in weights])
            if needs
            else like.expand(len(weights), -1, -1)
        )
        with torch.autocast(like.device.type, enabled=False):
            return factors_of(self.adapter, stacked, self.use)
