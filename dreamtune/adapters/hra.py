"""HRA: a chain of Householder reflections of the weight's input."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dreamtune.adapters.base import Adapter, Generators, register
from dreamtune.adapters.maths import frozen_product, product_norm, unit
from dreamtune.fields import EvenRank


@register
class HRA(Adapter):
    """`W' = W H_1 H_2 ... H_r`, `H_i = I - 2 û_i û_iᵀ`; u_i and u_i+1 equal in pairs at the start.

    Paper: HRA, arXiv 2405.17484, equation 4, without its orthogonality penalty. The product is
    orthogonal, and the identity at the start.

    A pair is written with `d = v̂ - û`, which is zero at the start: `H(u) H(v) = I + û aᵀ - 2 d v̂ᵀ`,
    `a = 2 (1 - |d|²) d - 2 |d|² û`. So nothing cancels near the start. The pairs are multiplied out
    as in the compact WY form: `I + P M Qᵀ`, M the inverse of a triangular matrix.

    Args:
        rank: r, the number of reflections; even, or the start would be a reflection.
    """

    name = "hra"
    paper = "https://arxiv.org/abs/2405.17484"
    identity_at_start = True
    depends_on_weight = True
    learning_rate = 1.5e-3

    def __init__(
        self,
        weight: Tensor,
        *,
        slots: int = 1,
        generator: Generators = None,
        rank: EvenRank = 8,
    ) -> None:
        super().__init__(weight, slots, generator, {"rank": rank})
        width = weight.shape[-1]
        u = self.uniform(weight, generator, (rank // 2, width), 1 / math.sqrt(width))
        self.u = nn.Parameter(u.repeat_interleave(2, -2))

    def factors(self, weight: Tensor, *constants: Tensor) -> tuple[Tensor, Tensor]:
        p, q = self._pairs()
        return _chained(frozen_product(weight, p.mT), p, q), q

    def share_of_bound(self, weight: Tensor) -> Tensor:
        """Of the distance `2 sqrt(r)` from I that r reflections can reach."""
        p, q = self._pairs()
        return product_norm(_chained(p.mT, p, q), q) / (2 * math.sqrt(self.options["rank"]))

    def _pairs(self) -> tuple[Tensor, Tensor]:
        """Pᵀ and Qᵀ of the pairs, (*L, S, r, in), each pair `I + P Qᵀ` of its two rows."""
        u, v = unit(self.u, -1).unflatten(-2, (-1, 2)).unbind(-2)  # (*L, S, r / 2, in)
        d = v - u
        size = d.square().sum(-1, keepdim=True)
        p = torch.stack([u, d], -2).flatten(-3, -2)
        return p, torch.stack([2 * (1 - size) * d - 2 * size * u, -2 * v], -2).flatten(-3, -2)


def _chained(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """`x M`, where the product of the pairs is `I + P M Qᵀ`."""
    # M⁻¹ = I - the part of Qᵀ P that joins a pair to a later one
    pair = torch.arange(p.shape[-2], device=p.device) // 2
    joins = (q @ p.mT) * (pair[:, None] < pair)
    inverse = torch.eye(p.shape[-2], dtype=p.dtype, device=p.device) - joins
    return torch.linalg.solve_triangular(inverse, x, upper=True, left=False, unitriangular=True)
