"""The adapted layer: a linear layer that adds the changes in it."""

from __future__ import annotations

import types
from typing import Any, Protocol

from torch import Tensor, nn

from dreamtune.injection.change import Change, linear


class Faster(Protocol):
    """The fast way of layers, which computes what each would."""

    def one(self, layer: Any, input: Tensor) -> Tensor: ...


class AdaptedLinear(nn.Linear):
    """`y = W x + b + up (down x)`, with the layer's own weight and bias, where they are.

    It is the layer that was there, of another class: whatever holds it, its hooks, a LoRA around
    it, an offload, holds the adapted one, and holds the layer again when the change is out.

    Attributes:
        changes: name -> change, all added.
        projection: the fast way that computes it; None in a layer that is plain.
        index: in the projection.
    """

    changes: dict[str, Change]
    projection: Faster | None
    index: int

    @staticmethod
    def of(layer: nn.Linear) -> AdaptedLinear:
        """The layer itself, adapted, without a change yet."""
        layer.__class__ = AdaptedLinear
        assert isinstance(layer, AdaptedLinear)
        layer.changes, layer.projection, layer.index = {}, None, 0
        follow(layer)
        return layer

    def release(self) -> nn.Linear:
        """The layer as it was."""
        for name in ("changes", "projection", "index"):
            self.__dict__.pop(name, None)
        self.__class__ = nn.Linear  # type: ignore[assignment]
        follow(self)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "projection": None, "index": 0}  # a copy is plain

    def forward(self, input: Tensor) -> Tensor:
        if self.projection is not None:
            return self.projection.one(self, input)
        return linear(input, self.weight, self.bias, list(self.changes.values()))


def follow(layer: nn.Linear) -> None:
    """An offload has taken the method of the class that the layer had: it calls the other now."""
    old = layer.__dict__.get("_old_forward")
    if isinstance(old, types.MethodType):
        layer.__dict__["_old_forward"] = types.MethodType(type(layer).forward, layer)


def has_own_forward(layer: nn.Linear) -> bool:
    """Whether the instance has a forward that is none of its class, nor accelerate's around it."""
    if "forward" not in layer.__dict__:
        return False
    old = layer.__dict__.get("_old_forward")
    return getattr(old, "__func__", None) is not type(layer).forward
