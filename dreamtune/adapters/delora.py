"""DeLoRA: direction and strength of a low-rank change, decoupled."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import FiniteFloat
from torch import Tensor, nn

from dreamtune.adapters.base import Adapter, Generators, register
from dreamtune.adapters.maths import unit
from dreamtune.fields import Rank


@register
class DeLoRA(Adapter):
    """`W' = W + (lambda / r) (b̂ â - b̂0 â0) * w`: unit rows â, unit columns b̂, column norms w of W.

    Paper: DeLoRA, arXiv 2503.18225, equations 5 and 9. As in the authors' code the frozen copy (A0,
    B0) of the start is multiplied by the trainable lambda; the paper subtracts a constant. So the
    change is 0 at the start, and grows with the learning rate. `start="peft"` is PEFT's form: no
    copy, B zero at the start; the first optimizer step then jumps to the boundary, whatever the
    learning rate.

    Whatever A and B are, the change's Frobenius norm is at most 2 |lambda| max_j w_j, half of that
    with `start="peft"`. Nothing bounds lambda, which is trained too.

    The difference of the two products is written as `(b̂ - b̂0) â + b̂0 (â - â0)`, which is the
    same and has no large terms that cancel: exactly 0 at the start, and accurate in bf16 and fp16
    near it.

    Args:
        rank: r; the change has rank 2 r (r with `start="peft"`).
        lambda_init: start of lambda, the strength. The change is about lambda sqrt(2 / (r in)) of
            W's norm for directions at random to their start, lambda / sqrt(r in) with
            `start="peft"`, and at most 2 lambda max_j w_j / ||W||: that is 2 lambda / sqrt(in)
            where all columns have one norm, more where not. The default is from one short
            comparison (n = 1 subject, 30 steps at rate 1e-2, layers 128 to 192 wide): 4 fitted
            best, 1 was bound too tightly, 15 moved the weights by 31% and fitted worse.
        start: "residual" or "peft".
    """

    name = "delora"
    paper = "https://arxiv.org/abs/2503.18225"
    identity_at_start = True
    depends_on_weight = True
    learning_rate = 1e-2
    own_learning_rates = {"lambda_": 1e-3}
    no_decay = frozenset({"lambda_"})
    per_slot = frozenset({"lambda_init"})
    A0: Tensor
    B0: Tensor

    def __init__(
        self,
        weight: Tensor,
        *,
        slots: int = 1,
        generator: Generators = None,
        rank: Rank = 16,
        lambda_init: FiniteFloat | list[FiniteFloat] = 4.0,
        start: Literal["residual", "peft"] = "residual",
    ) -> None:
        options = {"rank": rank, "lambda_init": lambda_init, "start": start}
        super().__init__(weight, slots, generator, options)
        out, width = weight.shape[-2:]
        self.A = nn.Parameter(self.uniform(weight, generator, (rank, width), 1 / math.sqrt(width)))
        if start == "residual":
            self.B = nn.Parameter(self.uniform(weight, generator, (out, rank), 1 / math.sqrt(rank)))
            self.register_buffer("A0", self.A.detach().clone())
            self.register_buffer("B0", self.B.detach().clone())
        else:
            self.B = nn.Parameter(self.constant(weight, (out, rank), 0.0))
        self.lambda_ = nn.Parameter(self.constant(weight, (1,), lambda_init))

    def factors(self, weight: Tensor, *constants: Tensor) -> tuple[Tensor, Tensor]:
        (norms,) = constants or self.constants(weight)
        a, b = unit(self.A, -1), unit(self.B, -2)
        strength = (self.lambda_ / self.A.shape[-2]).unsqueeze(-1) * norms
        if self.options["start"] == "peft":
            return b, strength * a
        a0, b0 = unit(self.A0, -1), unit(self.B0, -2)
        return torch.cat([b - b0, b0], -1), strength * torch.cat([a, a - a0], -2)

    def constants(self, weight: Tensor) -> tuple[Tensor, ...]:
        """w, (*L, 1, 1, in): the norms of the columns of W."""
        with torch.no_grad():
            norms = torch.linalg.vector_norm(weight, dim=-2, dtype=self.A.dtype)
        return (norms[..., None, None, :],)
