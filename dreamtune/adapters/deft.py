"""DEFT: a learned subspace of the weight's output is taken out, and other contents put in."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import FiniteFloat
from torch import Tensor, nn

from dreamtune.adapters.base import Adapter, Generators, register
from dreamtune.adapters.maths import frozen_product
from dreamtune.fields import Rank


@register
class DEFT(Adapter):
    """`W' = (I - Q Pᵀ) W + s Q R`: Q and P (out, r) from one learned matrix, R (r, in) learned.

    Paper: DEFT, arXiv 2509.22793, equations 3 and 4.

    R is learned as its difference to what Pᵀ W is at the start, so that `W' = W` there, in every
    dtype: `W' = W + Q (s R - (P - P0)ᵀ W)`, P0 the start's, saved and never trained.

    Args:
        rank: r.
        alpha: `s = alpha / r`; None is 1.
        projection: "relu": Q the matrix, P = relu(Q). "qr": P = Q, its orthonormal basis of the QR
            decomposition with a positive diagonal, the same on every device.
    """

    name = "deft"
    paper = "https://arxiv.org/abs/2509.22793"
    identity_at_start = True
    depends_on_weight = True
    learning_rate = 6e-4
    P0: Tensor

    def __init__(
        self,
        weight: Tensor,
        *,
        slots: int = 1,
        generator: Generators = None,
        rank: Rank = 16,
        alpha: FiniteFloat | None = None,
        projection: Literal["relu", "qr"] = "relu",
    ) -> None:
        options: dict[str, Any] = {"rank": rank, "alpha": alpha, "projection": projection}
        super().__init__(weight, slots, generator, options)
        out, width = weight.shape[-2:]
        if projection == "qr" and rank > out:
            raise ValueError(f"`rank` must be at most every output width, here {out}, got {rank}")
        # uniform of the standard deviation of PEFT's normal start
        self.P = nn.Parameter(self.uniform(weight, generator, (out, rank), 0.02 * math.sqrt(3)))
        self.R = nn.Parameter(self.constant(weight, (rank, width), 0.0))
        self.register_buffer("P0", self.P.detach().clone())
        self.strength = 1.0 if alpha is None else alpha / rank

    def factors(self, weight: Tensor, *constants: Tensor) -> tuple[Tensor, Tensor]:
        q, p = self._pair(self.P)
        moved = p - self._pair(self.P0)[1]
        return q, self.strength * self.R - frozen_product(weight.mT, moved).mT

    def _pair(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """(Q, P), (*L, S, out, r)."""
        if self.options["projection"] == "relu":
            return matrix, matrix.relu()
        gram = matrix.mT @ matrix
        # a column of zeros stays one; else it is below rounding
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        lower = torch.linalg.cholesky_ex(gram + torch.finfo(gram.dtype).eps * eye)[0]
        q = torch.linalg.solve_triangular(lower.mT, matrix, upper=True, left=False)
        return q, q
