"""LoRA."""

from __future__ import annotations

import math

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from dreamtune.adapters.base import Adapter, Generators, register


@register
class LoRA(Adapter):
    """`W' = W + (alpha / r) B A`, B zero at the start.

    Paper: LoRA, arXiv 2106.09685, equation 3.

    Args:
        rank: r.
        alpha: strength; None is `rank`, a scale of 1. The papers' rows of rank 16 on
            subject-driven generation are of alpha = 2 r.
    """

    name = "lora"
    paper = "https://arxiv.org/abs/2106.09685"
    identity_at_start = True
    depends_on_weight = False
    learning_rate = 6e-4
    per_slot = frozenset({"alpha"})
    note = "alpha None is the rank; the papers' rows of rank 16 are of alpha = 2 rank: --alpha 32"
    strengths: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        *,
        slots: int = 1,
        generator: Generators = None,
        rank: PositiveInt = 16,
        alpha: float | list[float | None] | None = None,
    ) -> None:
        given = alpha if isinstance(alpha, list) else [alpha]
        alphas = [float(rank if a is None else a) for a in given]
        own = alphas if isinstance(alpha, list) else alphas[0]
        super().__init__(weight, slots, generator, {"rank": rank, "alpha": own})
        out, width = weight.shape[-2:]
        # kaiming_uniform(a=sqrt 5) of an (r, in) matrix is uniform in ±1/sqrt(in).
        self.A = nn.Parameter(self.uniform(weight, generator, (rank, width), 1 / math.sqrt(width)))
        self.B = nn.Parameter(self.constant(weight, (out, rank), 0.0))
        self.strength = alphas[0] / rank
        each = None
        if isinstance(alpha, list):
            each = torch.tensor(alphas, dtype=self.B.dtype, device=weight.device) / rank
            each = each.view(-1, 1, 1)
        self.register_buffer("strengths", each, persistent=False)

    def factors(self, weight: Tensor, *constants: Tensor) -> tuple[Tensor, Tensor]:
        if self.strengths is not None:
            return self.strengths * self.B, self.A
        up = self.B if self.strength == 1 else self.strength * self.B
        return up, self.A
