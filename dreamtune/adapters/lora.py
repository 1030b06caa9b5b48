"""LoRA."""

from __future__ import annotations

import math

from torch import Tensor, nn

from dreamtune.adapters.base import Adapter, Generators, register


@register
class LoRA(Adapter):
    """`W' = W + (alpha / r) B A`, B zero at the start.

    Paper: LoRA, arXiv 2106.09685, equation 3.

    Args:
        rank: r.
        alpha: strength; None is `rank`, a scale of 1.
    """

    name = "lora"
    paper = "https://arxiv.org/abs/2106.09685"
    identity_at_start = True
    depends_on_weight = False
    learning_rate = 6e-4

    def __init__(
        self,
        weight: Tensor,
        *,
        slots: int = 1,
        generator: Generators = None,
        rank: int = 16,
        alpha: float | None = None,
    ) -> None:
        if rank < 1:
            raise ValueError(f"`rank` must be at least 1, got {rank}")
        alpha = float(rank if alpha is None else alpha)
        super().__init__(weight, slots, generator, {"rank": rank, "alpha": alpha})
        out, width = weight.shape[-2:]
        # kaiming_uniform(a=sqrt 5) of an (r, in) matrix is uniform in ±1/sqrt(in).
        self.A = nn.Parameter(self.uniform(weight, generator, (rank, width), 1 / math.sqrt(width)))
        self.B = nn.Parameter(self.constant(weight, (out, rank), 0.0))
        self.strength = alpha / rank

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        up = self.B if self.strength == 1 else self.strength * self.B
        return up, self.A
