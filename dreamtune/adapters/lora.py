"""LoRA."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import FiniteFloat
from torch import Tensor, nn

from dreamtune.adapters.base import Adapter, Generators, register
from dreamtune.fields import Above0, Rank


@register
class LoRA(Adapter):
    """`W' = W + (alpha / r) B A`, B zero at the start.

    Paper: LoRA, arXiv 2106.09685, equation 3.

    Args:
        rank: r.
        alpha: strength; None is a scale of 1: `rank`, its root with `use_rslora`. The papers'
            rows of rank 16 on subject-driven generation are of alpha = 2 r.
        use_rslora: the scale is `alpha / sqrt(r)` (rsLoRA, arXiv 2312.03732).
        init_lora_weights: A's start: "kaiming", uniform in ±1 / sqrt(in), or "gaussian", of
            deviation 1 / r.
        train_a: False keeps A as it starts (LoRA-FA, arXiv 2308.03303).
        loraplus_lr_ratio: B's learning rate over A's (LoRA+, arXiv 2402.12354: 16).
    """

    name = "lora"
    paper = "https://arxiv.org/abs/2106.09685"
    identity_at_start = True
    depends_on_weight = False
    learning_rate = 6e-4
    per_slot = frozenset({"alpha"})
    note = "alpha None is the rank; the papers' rows of rank 16 are of alpha = 2 rank: --alpha 32"
    A: Tensor
    strengths: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        *,
        slots: int = 1,
        generator: Generators = None,
        rank: Rank = 16,
        alpha: FiniteFloat | list[FiniteFloat | None] | None = None,
        use_rslora: bool = False,
        init_lora_weights: Literal["kaiming", "gaussian"] = "kaiming",
        train_a: bool = True,
        loraplus_lr_ratio: Above0 = 1.0,
    ) -> None:
        whole = math.sqrt(rank) if use_rslora else float(rank)
        given = alpha if isinstance(alpha, list) else [alpha]
        alphas = [whole if a is None else float(a) for a in given]
        options = {
            "rank": rank,
            "alpha": alphas if isinstance(alpha, list) else alphas[0],
            "use_rslora": use_rslora,
            "init_lora_weights": init_lora_weights,
            "train_a": train_a,
            "loraplus_lr_ratio": loraplus_lr_ratio,
        }
        super().__init__(weight, slots, generator, options)
        out, width = weight.shape[-2:]
        if init_lora_weights == "gaussian":
            A = self.normal(weight, generator, (rank, width), 1 / rank)
        else:  # kaiming_uniform(a=sqrt 5) of an (r, in) matrix
            A = self.uniform(weight, generator, (rank, width), 1 / math.sqrt(width))
        if train_a:
            self.A = nn.Parameter(A)
        else:
            self.register_buffer("A", A)
        self.B = nn.Parameter(self.constant(weight, (out, rank), 0.0))
        self.rate_factors = {"B": loraplus_lr_ratio}
        self.strength = alphas[0] / whole
        each = None
        if isinstance(alpha, list):
            each = torch.tensor(alphas, dtype=self.B.dtype, device=weight.device) / whole
            each = each.view(-1, 1, 1)
        self.register_buffer("strengths", each, persistent=False)

    def factors(self, weight: Tensor, *constants: Tensor) -> tuple[Tensor, Tensor]:
        if self.strengths is not None:
            return self.strengths * self.B, self.A
        up = self.B if self.strength == 1 else self.strength * self.B
        return up, self.A
