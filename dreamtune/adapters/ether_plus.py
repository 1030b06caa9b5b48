"""ETHER+: two opposed rank-one changes a block, on one or both sides of the weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dreamtune.adapters.base import (
    Adapter,
    Generators,
    blocks_of,
    frozen_product,
    many_block_columns,
    register,
    unit,
)


@register
class ETHERPlus(Adapter):
    """`W' = H W H̃` (two sides) or `H W` (one), blocks of H: `I - û ûᵀ + v̂ v̂ᵀ`, v = -u at the start.

    Paper: ETHER, arXiv 2405.20271, equation 4. Distance of H from I: at most sqrt(2 n).

    `v̂ v̂ᵀ - û ûᵀ` is written as `((v̂ - û)(v̂ + û)ᵀ + (v̂ + û)(v̂ - û)ᵀ) / 2`: the same, without
    the terms that cancel near the start, where v̂ + û is exactly zero and so is the change, in
    every dtype.

    Args:
        blocks: n on each side; must divide the widths.
        sides: 2, or 1 for the output side alone.
    """

    name = "ether+"
    paper = "https://arxiv.org/abs/2405.20271"
    identity_at_start = True
    depends_on_weight = True
    learning_rate = 6e-3

    def __init__(
        self,
        weight: Tensor,
        *,
        slots: int = 1,
        generator: Generators = None,
        blocks: int = 4,
        sides: int = 2,
    ) -> None:
        if sides not in (1, 2):
            raise ValueError(f"`sides` must be 1 or 2, got {sides}")
        super().__init__(weight, slots, generator, {"blocks": blocks, "sides": sides})
        self.u, self.v = self._pair(weight, generator, -2, "output")
        if sides == 2:
            self.u_in, self.v_in = self._pair(weight, generator, -1, "input")

    def _pair(
        self, weight: Tensor, generator: Generators, dim: int, side: str
    ) -> tuple[nn.Parameter, nn.Parameter]:
        blocks = self.options["blocks"]
        size = blocks_of(weight.shape[dim], blocks, side)
        u = self.uniform(weight, generator, (blocks, size), 1 / math.sqrt(size))
        return nn.Parameter(u), nn.Parameter(-u)

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        p, q = _opposed(self.u, self.v)
        down = frozen_product(weight.mT, q).mT
        if self.options["sides"] == 1:
            return p, down
        # (I + p qᵀ) W (I + s tᵀ) - W = p (qᵀ W) + (W s + p (qᵀ W) s) tᵀ
        s, t = _opposed(self.u_in, self.v_in)
        right = frozen_product(weight, s) + p @ (down @ s)
        return torch.cat([p, right], -1), torch.cat([down, t.mT], -2)


def _opposed(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q), each (..., width, 2 n), with `p qᵀ = v̂ v̂ᵀ - û ûᵀ` block by block."""
    u, v = unit(torch.stack([u, v]), -1).unbind(0)
    # 1/sqrt(2) in both, so that one is the other with its columns swapped in pairs
    p = many_block_columns(torch.stack([v - u, v + u], -1) * math.sqrt(0.5))
    return p, p.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
