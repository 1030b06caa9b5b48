"""A low-rank change none of whose singular values exceeds a bound, whatever its parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dreamtune.adapters.base import Adapter, Generators, register
from dreamtune.fields import Above0, Rank


@register
class NormBounded(Adapter):
    """`W' = W + 2 delta P Qᵀ`, P (out, r) and Q (in, r) with `PᵀP + QᵀQ <= I`; Q zero at the start.

    After NB-LoRA, arXiv 2501.19050, by the property that its abstract states, not by its formulas,
    which were not at hand: every singular value of the change is at most delta, and every change of
    rank r within that bound is reached. The first holds as `‖P x‖² + ‖Q x‖² <= ‖x‖²`; the second as
    singular values `delta sin 2θ` come of P = U cos θ and Q = V sin θ.

    `[T; P; Q]`, T left out, is the Cayley map of a free matrix Y (out + in, r): with `Z = YᵀY`,
    `[(I - Z) (I + Z)⁻¹; -2 Y (I + Z)⁻¹]`, whose columns are orthonormal.

    Args:
        rank: r.
        delta: the bound, in the unit of W.
    """

    name = "norm_bounded"
    paper = "https://arxiv.org/abs/2501.19050"
    identity_at_start = True
    depends_on_weight = False
    learning_rate = 1e-3

    def __init__(
        self,
        weight: Tensor,
        *,
        slots: int = 1,
        generator: Generators = None,
        rank: Rank = 16,
        delta: Above0 = 1.0,
    ) -> None:
        super().__init__(weight, slots, generator, {"rank": rank, "delta": delta})
        out, width = weight.shape[-2:]
        # as an orthonormal matrix would be: Z is then about I, where Q moves the change most
        self.P = nn.Parameter(self.uniform(weight, generator, (out, rank), math.sqrt(3 / out)))
        self.Q = nn.Parameter(self.constant(weight, (width, rank), 0.0))

    def factors(self, weight: Tensor, *constants: Tensor) -> tuple[Tensor, Tensor]:
        z = self.P.mT @ self.P + self.Q.mT @ self.Q
        eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
        lower = torch.linalg.cholesky_ex(z + eye)[0]
        half = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
        inverse = half.mT @ half  # `cholesky_inverse` cannot be recorded in a CUDA graph
        return (8 * self.options["delta"]) * self.P @ inverse, (self.Q @ inverse).mT

    def share_of_bound(self, weight: Tensor) -> Tensor:
        """The largest singular value of the change, over delta."""
        up, down = self.factors(weight)
        small = torch.linalg.qr(up)[1] @ torch.linalg.qr(down.mT)[1].mT
        return torch.linalg.matrix_norm(small, 2) / self.options["delta"]
