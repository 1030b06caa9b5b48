"""The fast way of a group: its weights as one tensor, and factors in places that stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamtune.adapters import Adapter
from dreamtune.injection.change import Factors, Use, factors_of, version
from dreamtune.injection.layer import AdaptedConv2d, AdaptedLayer
from dreamtune.injection.projection import Convolution, Projection, Wide, wide_rank


class Stack:
    """Same-shape layers whose weights are views of one tensor's rows.

    Attributes:
        adapter: parameters (L, S, ...).
        parts: the projections, in the order of the stack.
        weight: (L, out, in); of convolutions (L, out, in * kh * kw).
        roomy: whether there is room below each weight for the `down` of one slot: then a forward
            without gradients has a product less (`Wide`), and a joint projection with gradients
            copies its weights.
    """

    def __init__(
        self, adapter: Adapter, parts: Sequence[Sequence[AdaptedLayer]], use: Use, roomy: bool
    ) -> None:
        self.adapter, self.use = adapter, use
        kind = Convolution if isinstance(parts[0][0], AdaptedConv2d) else Projection
        self.roomy, self.watched = roomy and kind is Projection, roomy
        self.parts = [kind(part, use) for part in parts]
        self.layers = [layer for part in parts for layer in part]
        self.sizes = [len(part) for part in parts]
        self.restack()

    def release(self) -> None:
        """Each weight its own tensor again, the layers plain."""
        for layer in self.layers:
            layer.projection, layer.index = None, 0
            for tensor in (layer.weight, layer.bias):
                if tensor is not None and tensor.untyped_storage().nbytes() > tensor.nbytes:
                    tensor.data = tensor.data.clone()

    def restack(self) -> None:
        """Follows a model that was moved or cast: stacks its weights again, moves the adapter."""
        first = self.layers[0].weight
        self.adapter.to(first.device)
        room = self._room()
        out, width = first.flatten(1).shape
        shape = (len(self.layers), out + room, width)
        self.stack = torch.zeros(shape, dtype=first.dtype, device=first.device)
        # .data: writing below the weights must not count as a change of them
        self.weight = self.stack.data[:, :out]
        for layer, row in zip(self.layers, self.weight):
            row.copy_(layer.weight.data.flatten(1))
            layer.weight.data = row.view(layer.weight.shape)
        self.kept: tuple[Tensor, ...] = ()
        self.kept_of: object = None  # the weights that `kept` was computed from
        self.places: dict[tuple[object, ...], Tensor] = {}
        # kept like the stack, so that a recorded forward finds the factors where they were
        self.ups = self.stack.new_zeros(len(self.layers), room, out)
        self.wides: list[Wide] = []
        for part, weight in zip(self.parts, self.weight.split(self.sizes)):
            part.weight, part.wide = weight, None
        if room:
            places = zip(self.parts, self.stack.split(self.sizes), self.ups.split(self.sizes))
            self.wides = [Wide(wide, self._bias(part, room), ups) for part, wide, ups in places]

    def _bias(self, part: Projection, room: int) -> Tensor | None:
        """The part's bias with zeros below it, for the room below its weight; the layer's is a view
        of it.
        """
        if part.bias is None:
            return None
        roomy = F.pad(part.bias.data, (0, room))
        part.bias.data = roomy[: len(part.bias)]
        return roomy

    def constants(self, anew: bool = False) -> tuple[Tensor, ...]:
        """What the method takes of the frozen weights alone, computed where one of them changed.

        anew: also where no weight shows that it has, as after a write through `.data`. They stay
        where they are in memory, for a recorded step reads them there.
        """
        now = [(w.data_ptr(), version(w)) for w in self.weights()]
        if anew or now != self.kept_of:
            with torch.inference_mode(False), torch.no_grad():
                new = self.adapter.constants(self.weight)
                for old, x in zip(self.kept, new):
                    old.copy_(x)
            self.kept, self.kept_of = self.kept or new, now
        return self.kept

    def weights(self) -> list[Tensor]:
        return [layer.weight for layer in self.layers]

    @torch.no_grad()
    def _room(self) -> int:
        adapter, weights = self.adapter, [layer.weight.data for layer in self.layers]
        none = not self.roomy or adapter.slots > 1 or not adapter.low_rank
        none = none or adapter.asks_for_timestep
        if none or weights[0].device.type == "meta":
            return 0
        return wide_rank(adapter.factors(torch.stack(weights))[1].shape[-2])

    def factors(self) -> Factors:
        """(L, [K,] ...)."""
        return factors_of(self.adapter, self.weight, self.use, *self.constants())

    def clear(self) -> None:
        """Lets go of the factors, and so of the graph that they carry."""
        for part in self.parts:
            part.factors, part.wide = Factors(), None

    def set(self, factors: Factors, training: bool) -> None:
        """Gives the layers their factors, (L, [K,] ...)."""
        room = self.ups.shape[1]
        down = factors.down
        wide = not training and down is not None and down.dim() == 3 and room > 0
        if not wide and not torch.is_grad_enabled():
            named = zip(Factors._fields, factors)
            factors = Factors(*(None if x is None else self.placed(name, x) for name, x in named))
        elif factors.rotation is not None and not self.watched:
            # The only large one: it is not there twice. Each forward of a trainer has its backward
            # before the next.
            rotation = _Placed.apply(factors.rotation, self.place("rotation", factors.rotation))
            factors = factors._replace(rotation=rotation)
        none = [None] * len(self.parts)
        rows = zip(*(none if x is None else x.split(self.sizes) for x in factors))
        for part, own in zip(self.parts, rows, strict=True):
            part.factors, part.wide = Factors(*own), None
        up, down, *_ = factors
        if not wide or up is None or down is None:
            return
        with torch.no_grad():
            below = F.pad(down, (0, 0, 0, room - down.shape[1]))
            self.stack[:, self.weight.shape[1] :] = below
            self.ups[:, : up.shape[-1]] = up.mT
            for part, kept in zip(self.parts, self.wides, strict=True):
                part.wide = kept

    def placed(self, name: str, x: Tensor) -> Tensor:
        """x without a gradient, always in the same place: a recorded forward reads it there."""
        return self.place(name, x).copy_(x.detach())

    def place(self, name: str, x: Tensor) -> Tensor:
        key = (name, x.shape, x.dtype, x.is_inference())
        if key not in self.places:
            self.places[key] = torch.empty_like(x.detach(), memory_format=torch.contiguous_format)
        return self.places[key]


class _Placed(torch.autograd.Function):
    """x in another's memory, with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        return place.copy_(x).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
