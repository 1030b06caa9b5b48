"""The adapted layer: a linear layer that adds its slots' low-rank change, in two small products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Factors = tuple[Tensor | None, Tensor]


class _LowRank(torch.autograd.Function):
    """`x Wᵀ + b + (x downᵀ) upᵀ` of rows x (T, in), or (K, T, in) with K factors.

    Backward is written out: left to autograd, the two gradients of x are tensors of their own that
    a further kernel adds.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        h = x @ down.mT
        ctx.save_for_backward(x, weight, up, down, h)
        return y.addmm_(h, up.mT) if x.dim() == 2 else y.baddbmm_(h, up.mT)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        x, weight, up, down, h = ctx.saved_tensors
        for_x, _, _, for_up, for_down = ctx.needs_input_grad
        dx = dup = ddown = None
        dh = dy @ up if for_x or for_down else None
        if for_up:
            dup = dy.mT @ h
        if dh is not None and for_down:
            ddown = dh.mT @ x
        if dh is not None and for_x:
            dx = (dy.reshape(-1, dy.shape[-1]) @ weight).view_as(x)
            dx = dx.addmm_(dh, down) if x.dim() == 2 else dx.baddbmm_(dh, down)
        return dx, None, None, dup, ddown


class AdaptedLinear(nn.Linear):
    """`y = W x + b + up (down x)`, sharing weight and bias with the layer that it stands for.

    `factors` are set by `InjectedAdapter.refresh`, in the dtype of the weight: `up` (out, R) and
    `down` (R, in); with several slots, or routed rows, one of each a block of the batch: (K, out,
    R), (K, R, in). For a method that is not low rank `up` is None and `down` the transformed
    weight, (out, in) or (K, out, in).
    """

    factors: Factors
    routed: bool  # K is the batch size, not a number of equal blocks

    @classmethod
    def of(cls, layer: nn.Linear) -> AdaptedLinear:
        """An adapted layer around the same parameters; nothing is allocated."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.in_features, new.out_features = layer.in_features, layer.out_features
        new.weight, new.bias = layer.weight, layer.bias
        new.training = layer.training
        new.routed = False
        return new

    def forward(self, input: Tensor) -> Tensor:
        up, down = self.factors
        if up is None:
            return self._forward_whole(input, down)
        rows = input.reshape(self._rows(input, down))
        if torch.is_grad_enabled() and self._frozen(input.device.type):
            y: Tensor = _LowRank.apply(rows, self.weight, self.bias, up, down)
        else:
            y = F.linear(rows, self.weight, self.bias)
            h = rows @ down.mT
            if up.dtype != y.dtype:  # autocast chose another dtype than the weight's
                up, h = up.to(y.dtype), h.to(y.dtype)
            # In place: a copy of y would be a kernel and its memory.
            y = y.addmm_(h, up.mT) if rows.dim() == 2 else y.baddbmm_(h, up.mT)
        return y.view(*input.shape[:-1], self.out_features)

    def _frozen(self, device: str) -> bool:
        """Whether nothing but the factors and the input can ask for a gradient, in one dtype."""
        trains = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        return not trains and not torch.is_autocast_enabled(device)

    def _forward_whole(self, input: Tensor, weight: Tensor) -> Tensor:
        """With the transformed weight of a method that is not low rank."""
        if weight.dim() == 2:
            return F.linear(input, weight, self.bias)
        y = torch.bmm(input.reshape(self._rows(input, weight)), weight.mT)
        y = y if self.bias is None else y + self.bias
        return y.view(*input.shape[:-1], self.out_features)

    def _rows(self, input: Tensor, down: Tensor) -> tuple[int, ...]:
        """(T, in), or (K, T, in) for K factors."""
        if down.dim() == 2:
            return -1, self.in_features
        blocks, batch = down.shape[0], input.shape[0]
        if self.routed and batch != blocks:
            raise ValueError(f"`route` was given {blocks} rows, but the batch has {batch}")
        if batch % blocks:
            raise ValueError(f"a batch of {batch} rows does not split into {blocks} equal slots")
        return blocks, -1, self.in_features
