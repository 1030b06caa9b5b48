"""The adapted layer: a linear layer that adds its slots' low-rank change, in two small products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Factors = tuple[Tensor | None, Tensor]


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
        if down.dim() == 3:
            return self._forward_slots(input, up, down)
        if up is None:
            return F.linear(input, down, self.bias)
        rows = input.reshape(-1, self.in_features)
        y = F.linear(rows, self.weight, self.bias)
        h = F.linear(rows, down)
        if up.dtype != y.dtype:  # autocast chose another dtype than the weight's
            up, h = up.to(y.dtype), h.to(y.dtype)
        # In place: backward needs no value of y, and a copy of it would be a kernel and its memory.
        return y.addmm_(h, up.mT).view(*input.shape[:-1], self.out_features)

    def _forward_slots(self, input: Tensor, up: Tensor | None, down: Tensor) -> Tensor:
        blocks, batch = down.shape[0], input.shape[0]
        if self.routed and batch != blocks:
            raise ValueError(f"`route` was given {blocks} rows, but the batch has {batch}")
        if batch % blocks:
            raise ValueError(f"a batch of {batch} rows does not split into {blocks} equal slots")
        rows = input.reshape(blocks, -1, self.in_features)
        if up is None:
            y = torch.bmm(rows, down.mT)
            y = y if self.bias is None else y + self.bias
        else:
            y = F.linear(rows, self.weight, self.bias)
            h = torch.bmm(rows, down.mT)
            if up.dtype != y.dtype:
                up, h = up.to(y.dtype), h.to(y.dtype)
            y = y.baddbmm_(h, up.mT)
        return y.view(*input.shape[:-1], self.out_features)
