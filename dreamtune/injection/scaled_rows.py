"""The fast way of a change with a gain: `(1 + gain) * (x Wᵀ) + b + (x downᵀ) upᵀ`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class ScaledRows(torch.autograd.Function):
    """x (T, in), weight (out, in), gain (out), up (out, R), down (R, in) -> (T, out); or x (K, T,
    in), gain (K, out), up (K, out, R), down (K, R, in). bias (out) or None; up and down or None.

    The gradient of the gain needs `x Wᵀ`, which is computed again in the backward: kept, it would
    be as much memory as the outputs of all layers. The weight gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gain: Tensor,
        up: Tensor | None,
        down: Tensor | None,
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        plain = y if bias is None else y - bias  # no gain, and it is the base to the bit
        y = torch.addcmul(y, plain, by_token(gain))
        h = None
        if up is not None and down is not None:
            h = x @ down.mT
            y = y.addmm_(h, up.mT) if x.dim() == 2 else y.baddbmm_(h, up.mT)
        ctx.save_for_backward(x, weight, gain, up, down, h)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,) = grads
        x, weight, gain, up, down, h = ctx.saved_tensors
        for_x, _, _, for_gain, for_up, for_down = ctx.needs_input_grad
        dx = dgain = dup = ddown = dh = None
        if up is not None and (for_x or for_down):
            dh = dy @ up
        if for_gain:
            dgain = F.linear(x, weight).mul_(dy).sum(-2)
        if for_up:
            dup = dy.mT @ h
        if for_down and dh is not None:
            ddown = dh.mT @ x
        if for_x:
            dx = torch.addcmul(dy, dy, by_token(gain)) @ weight
            if dh is not None:
                dx = dx.addmm_(dh, down) if x.dim() == 2 else dx.baddbmm_(dh, down)
        return dx, None, None, dgain, dup, ddown


def by_token(gain: Tensor) -> Tensor:
    """(out) as it is; (K, out) -> (K, 1, out)."""
    return gain if gain.dim() == 1 else gain.unsqueeze(1)
