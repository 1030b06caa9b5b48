"""DoRA: the rows of a LoRA-changed weight in their direction, their lengths learned."""

from __future__ import annotations

import math

import torch
from pydantic import FiniteFloat
from torch import Tensor, nn

from dreamtune.adapters.base import Adapter, Generators, WeightChange, register
from dreamtune.adapters.maths import frozen_product
from dreamtune.fields import Rank


@register
class DoRA(Adapter):
    """`W' = m (W + s B A) / ‖W + s B A‖`, norms of rows, `s = alpha / r`; m = ‖W‖ at the start.

    Paper: DoRA, arXiv 2402.09353, equation 5. The norms are computed from `W Aᵀ` and `A Aᵀ`:
    `W + s B A` is never made.

    Args:
        rank: r.
        alpha: None is `rank`, s = 1. The papers' rows of rank 16 on subject-driven generation are
            of alpha = 2 r.
        detach_norm: no gradient goes through the norms (section 4.3, as everybody trains it).
    """

    name = "dora"
    paper = "https://arxiv.org/abs/2402.09353"
    identity_at_start = True
    low_rank = False
    depends_on_weight = True
    learning_rate = 6e-4
    no_decay = frozenset({"magnitude"})
    note = "alpha None is the rank; the papers' rows of rank 16 are of alpha = 2 rank: --alpha 32"

    def __init__(
        self,
        weight: Tensor,
        *,
        slots: int = 1,
        generator: Generators = None,
        rank: Rank = 16,
        alpha: FiniteFloat | None = None,
        detach_norm: bool = True,
    ) -> None:
        alpha = float(rank if alpha is None else alpha)
        options = {"rank": rank, "alpha": alpha, "detach_norm": detach_norm}
        super().__init__(weight, slots, generator, options)
        out, width = weight.shape[-2:]
        self.A = nn.Parameter(self.uniform(weight, generator, (rank, width), 1 / math.sqrt(width)))
        self.B = nn.Parameter(self.constant(weight, (out, rank), 0.0))
        lengths = torch.empty_like(self.B[..., 0].detach())
        if not weight.is_meta:
            lengths.copy_(self.constants(weight)[0].sqrt())
        self.magnitude = nn.Parameter(lengths)
        self.strength = alpha / rank

    def change(self, weight: Tensor, *constants: Tensor) -> WeightChange:
        (squares,) = constants or self.constants(weight)
        if self.options["detach_norm"]:
            with torch.no_grad():
                norms = self._norms(weight, squares)
        else:
            norms = self._norms(weight, squares)
        share = self.magnitude / norms
        return WeightChange(
            up=(self.strength * share).unsqueeze(-1) * self.B, down=self.A, gain=share - 1
        )

    def _norms(self, weight: Tensor, squares: Tensor) -> Tensor:
        """(*L, S, out): the norms of the rows of `W + s B A`, at least 1e-4 for a row of zeros."""
        crossed = (frozen_product(weight, self.A.mT) * self.B).sum(-1)
        own = ((self.B @ (self.A @ self.A.mT)) * self.B).sum(-1)
        total = squares + 2 * self.strength * crossed + self.strength**2 * own
        return total.clamp_min(1e-8).sqrt()

    @torch.no_grad()
    def constants(self, weight: Tensor) -> tuple[Tensor, ...]:
        """(*L, 1, out): the squared norms of the rows of W."""
        norms = torch.linalg.vector_norm(weight, dim=-1, dtype=self.A.dtype)
        return (norms.square().unsqueeze(-2),)
