"""The adapted layer: a linear layer, or a convolution, that adds the changes in it."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from dreamtune.injection.change import Change, combined
from dreamtune.injection.convolution import convolved
from dreamtune.injection.mix import Mix, Mixed, Pairs


class Faster(Protocol):
    """The fast way of layers, which computes what each would."""

    def one(self, layer: Any, input: Tensor) -> Tensor: ...


class Adapted:
    """What adapted layers share.

    It is the layer that was there, of another class: whatever holds it, its hooks, a LoRA around
    it, an offload, holds the adapted one, and holds the layer again when the change is out.

    Attributes:
        changes: name -> change, all added.
        mix: how much of each; None for all of them. mixed: what that came to.
        placed: what it computes with in place of that, while a forward is recorded or compiled.
        projection: the fast way that computes it; None in a layer that is plain.
        index: in the projection.
        heights: outputs of the parts that it is several layers of; () for one.
    """

    changes: dict[str, Change]
    mix: Mix | None
    mixed: Mixed | None
    placed: Pairs | None
    projection: Faster | None
    index: int
    heights: tuple[int, ...]
    weight: Any

    @staticmethod
    def of(layer: nn.Module, heights: Sequence[int] = ()) -> AdaptedLayer:
        """The layer itself, adapted, without a change yet; or with those that it has."""
        if isinstance(layer, Adapted):
            return layer  # type: ignore[return-value]
        layer.__class__ = KINDS[type(layer)]
        assert isinstance(layer, AdaptedLinear | AdaptedConv2d)
        layer.changes, layer.mix, layer.mixed, layer.placed = {}, None, None, None
        layer.projection, layer.index, layer.heights = None, 0, tuple(heights)
        follow(layer)
        return layer

    def release(self) -> nn.Module:
        """The layer as it was."""
        for name in ("changes", "mix", "mixed", "placed", "projection", "index", "heights"):
            self.__dict__.pop(name, None)
        self.__class__ = PLAIN[type(self)]  # type: ignore[assignment]
        assert isinstance(self, nn.Module)
        follow(self)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # a copy is plain, and computes its own
        return {**self.__dict__, "mixed": None, "placed": None, "projection": None, "index": 0}

    def pairs(self, x: Tensor) -> Pairs:
        """What it computes with, for x."""
        placed: Pairs | None = getattr(self, "placed", None)
        if placed is not None:
            return placed
        mix, changes = getattr(self, "mix", None), getattr(self, "changes", {})
        if mix is not None:
            return mix.pairs(self, x)
        return [(change.factors(self.weight), change.use) for change in changes.values()]


# Who took a `forward` while the layer was adapted may call it when the layer is released.


class AdaptedLinear(Adapted, nn.Linear):
    """`y = W x + b + up (down x)`, with the layer's own weight and bias, where they are."""

    def forward(self, input: Tensor) -> Tensor:
        projection = getattr(self, "projection", None)
        if projection is not None:
            return projection.one(self, input)
        heights = getattr(self, "heights", ())
        return combined(input, self.weight, self.bias, self.pairs(input), heights)


class AdaptedConv2d(Adapted, nn.Conv2d):
    """The same with convolutions: by `down`, as the layer's own, then by `up`, 1x1."""

    def forward(self, input: Tensor) -> Tensor:
        projection = getattr(self, "projection", None)
        if projection is not None:
            return projection.one(self, input)
        return convolved(self, input, self.pairs(input))


AdaptedLayer = AdaptedLinear | AdaptedConv2d
KINDS: Mapping[type[nn.Module], Any] = {nn.Linear: AdaptedLinear, nn.Conv2d: AdaptedConv2d}
PLAIN = {adapted: kind for kind, adapted in KINDS.items()}


def follow(layer: nn.Module) -> None:
    """An offload has taken the method of the class that the layer had, and leaves it as the layer's
    own when it goes: both are that of the class that it has now.
    """
    own = layer.__dict__
    if _of_class(own.get("forward")):
        del own["forward"]
    if _of_class(own.get("_old_forward")):
        own["_old_forward"] = types.MethodType(type(layer).forward, layer)


def has_own_forward(layer: nn.Module) -> bool:
    """Whether the instance has a forward that is none of its class, nor accelerate's around it."""
    own = layer.__dict__
    given = own.get("_old_forward", own.get("forward"))
    return given is not None and not _of_class(given)


FORWARDS = [kind.forward for pair in KINDS.items() for kind in pair]


def _of_class(method: Any) -> bool:
    return getattr(method, "__func__", None) in FORWARDS
