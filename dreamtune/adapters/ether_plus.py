"""ETHER+: two opposed rank-one changes a block, on one or both sides of the weight."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dreamtune.adapters.base import Adapter, Generators, register
from dreamtune.adapters.maths import blocks_of, frozen_product, product_norm, unit
from dreamtune.fields import Count


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
        blocks: Count = 4,
        sides: Literal[1, 2] = 2,
    ) -> None:
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

    def factors(self, weight: Tensor, *constants: Tensor) -> tuple[Tensor, Tensor]:
        if self.options["sides"] == 1:
            ((p, q),) = _opposed((self.u, self.v))
            return p, frozen_product(weight.mT, q).mT
        # (I + p qᵀ) W (I + s tᵀ) - W = p (qᵀ W) + (W s + p (qᵀ W) s) tᵀ
        outer, inner = (self.u, self.v), (self.u_in, self.v_in)
        together = self.u.shape == self.u_in.shape  # half the kernels
        (p, q), (s, t) = _opposed(outer, inner) if together else _opposed(outer) + _opposed(inner)
        down = frozen_product(weight.mT, q).mT
        right = frozen_product(weight, s) + p @ (down @ s)
        return torch.cat([p, right], -1), torch.cat([down, t.mT], -2)

    def share_of_bound(self, weight: Tensor) -> Tensor:
        """Of the distance sqrt(2 n) of H from I, the mean of the sides."""
        sides = [(self.u, self.v)] + (
            [(self.u_in, self.v_in)] if self.options["sides"] == 2 else []
        )
        shares = []
        for side in sides:
            ((p, q),) = _opposed(side)
            shares.append(product_norm(p, q.mT) / math.sqrt(2 * self.options["blocks"]))
        return torch.stack(shares).mean(0)


def _opposed(*pairs: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """For each (u, v), all of one shape, (p, q), each (..., width, 2 n), with
    `p qᵀ = v̂ v̂ᵀ - û ûᵀ` block by block.
    """
    units = unit(torch.stack([x for pair in zip(*pairs) for x in pair]), -1)
    p, q = _Columns.apply(units.unflatten(0, (2, -1)))
    return list(zip(p.unbind(0), q.unbind(0)))


class _Columns(torch.autograd.Function):
    """(û, v̂) (2, ..., n, k) -> p, q (..., n k, 2 n), columns (v̂ - û, v̂ + û) / sqrt(2) of a block
    in p, swapped in q. By hand: autograd takes twice the kernels, for every shape at every step.
    """

    @staticmethod
    def forward(ctx: Any, units: Tensor) -> tuple[Tensor, Tensor]:
        u, v = units.mT.unbind(0)  # (..., k, n)
        n = u.shape[-1]
        p = u.new_zeros(*u.shape[:-2], n, u.shape[-2], n, 2)
        minus, plus = p.diagonal(dim1=-4, dim2=-2).unbind(-2)
        _difference_and_sum(v, u, minus, plus)
        p.mul_(math.sqrt(0.5))
        ctx.n = n
        return p.flatten(-4, -3).flatten(-2), p.flip(-1).flatten(-4, -3).flatten(-2)

    @staticmethod
    def backward(ctx: Any, dp: Tensor, dq: Tensor) -> Tensor:  # type: ignore[override]
        shape = (*dp.shape[:-2], ctx.n, -1, ctx.n, 2)
        both = dp.reshape(shape) + dq.reshape(shape).flip(-1)
        minus, plus = both.diagonal(dim1=-4, dim2=-2).unbind(-2)  # (..., k, n)
        d = both.new_empty(2, *minus.mT.shape)
        _difference_and_sum(plus.mT, minus.mT, d[0], d[1])
        return d.mul_(math.sqrt(0.5))


def _difference_and_sum(a: Tensor, b: Tensor, minus: Tensor, plus: Tensor) -> None:
    """Writes a - b and a + b."""
    if torch.compiler.is_compiling():  # takes no view as `out`
        minus.copy_(a - b)
        plus.copy_(a + b)
    else:
        torch.sub(a, b, out=minus)
        torch.add(a, b, out=plus)
