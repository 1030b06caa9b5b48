"""DeLoRA: direction and strength of a low-rank change, decoupled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import FiniteFloat
from torch import Tensor, nn

from dreamtune.adapters.base import Adapter, Generators, register
from dreamtune.adapters.maths import frozen_product, product_norm, unit
from dreamtune.fields import AtLeast0, Rank, Share

STEPS = 1000  # of the diffusion process of every base that has timesteps in whole numbers


@register
class DeLoRA(Adapter):
    """`W' = W + (lambda / r) (b̂ â - b̂0 â0) * w`: unit rows â, unit columns b̂, column norms w of W.

    Paper: DeLoRA, arXiv 2503.18225, equations 5 and 9. As in the authors' code the frozen copy (A0,
    B0) of the start is multiplied by the trainable lambda; the paper subtracts a constant. So the
    change is 0 at the start, and grows with the learning rate. `start="peft"` is PEFT's form: no
    copy, B zero at the start; the first optimizer step then jumps to the boundary, whatever the
    learning rate.

    Whatever A and B are, the change's Frobenius norm is at most 2 |lambda| max_j w_j, half of that
    with `start="peft"`. Nothing bounds lambda, which is trained too; without `normalize` nothing
    bounds the change.

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
        normalize: False, for ablations: A and B as they are (the paper's table 4).
        weight_scaling: False, for ablations: w is 1.
        multiplicative: `W' = W (I + (lambda / r) (b̂ â - b̂0 â0))`, b̂ then as wide as the input:
            ETHER+ one-sided, relaxed to any rank and bound (section 3.2). It has no w.
        lambda_learning_rate: of lambda; 0 keeps it as it starts.
        timestep_floor: m; at timestep t of 1000 the strength is lambda (1 - (1 - m) t / 1000). Less
            than 1 holds the noisiest steps back, where a subject's pictures are learned by heart
            first (after T-LoRA, arXiv 2507.05964). No plain LoRA holds that, nor does a merge.
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
    lambda_: Tensor

    def __init__(
        self,
        weight: Tensor,
        *,
        slots: int = 1,
        generator: Generators = None,
        rank: Rank = 16,
        lambda_init: FiniteFloat | list[FiniteFloat] = 4.0,
        start: Literal["residual", "peft"] = "residual",
        normalize: bool = True,
        weight_scaling: bool = True,
        multiplicative: bool = False,
        lambda_learning_rate: AtLeast0 = 1e-3,
        timestep_floor: Share = 1.0,
    ) -> None:
        options: dict[str, Any] = {
            "rank": rank,
            "lambda_init": lambda_init,
            "start": start,
            "normalize": normalize,
            "weight_scaling": weight_scaling,
            "multiplicative": multiplicative,
            "lambda_learning_rate": lambda_learning_rate,
            "timestep_floor": timestep_floor,
        }
        super().__init__(weight, slots, generator, options)
        out, width = weight.shape[-2:]
        height = width if multiplicative else out
        self.A = nn.Parameter(self.uniform(weight, generator, (rank, width), 1 / math.sqrt(width)))
        if start == "residual":
            B = self.uniform(weight, generator, (height, rank), 1 / math.sqrt(rank))
            self.B = nn.Parameter(B)
            self.register_buffer("A0", self.A.detach().clone())
            self.register_buffer("B0", self.B.detach().clone())
        else:
            self.B = nn.Parameter(self.constant(weight, (height, rank), 0.0))
        strength = self.constant(weight, (1,), lambda_init)
        if lambda_learning_rate > 0:
            self.lambda_ = nn.Parameter(strength)
            self.own_learning_rates = {"lambda_": lambda_learning_rate}
        else:
            self.register_buffer("lambda_", strength)
            self.own_learning_rates = {}

    def factors(self, weight: Tensor, *constants: Tensor) -> tuple[Tensor, Tensor]:
        strength = (self.lambda_ / self.A.shape[-2]).unsqueeze(-1)
        if self.options["weight_scaling"] and not self.options["multiplicative"]:
            (norms,) = constants or self.constants(weight)
            strength = strength * norms
        a, b = self._directions(self.A, self.B)
        if self.options["start"] == "residual":
            a0, b0 = self._directions(self.A0, self.B0)
            a, b = torch.cat([a, a - a0], -2), torch.cat([b - b0, b0], -1)
        if self.options["multiplicative"]:
            b = frozen_product(weight, b)
        return b, strength * a

    def _directions(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return (unit(A, -1), unit(B, -2)) if self.options["normalize"] else (A, B)

    def constants(self, weight: Tensor) -> tuple[Tensor, ...]:
        """w, (*L, 1, 1, in): the norms of the columns of W."""
        with torch.no_grad():
            norms = torch.linalg.vector_norm(weight, dim=-2, dtype=self.A.dtype)
        return (norms[..., None, None, :],)

    def share_of_bound(self, weight: Tensor) -> Tensor | None:
        """Of the Frobenius norm at the present lambda; of `change` of I where multiplicative."""
        if not self.options["normalize"]:
            return None
        if self.options["multiplicative"]:
            weight = torch.eye(weight.shape[-1]).to(weight).expand(*weight.shape[:-2], -1, -1)
        up, down = self.factors(weight)
        most = self.lambda_.abs().squeeze(-1) * (2 if self.options["start"] == "residual" else 1)
        if self.options["weight_scaling"] and not self.options["multiplicative"]:
            most = most * self.constants(weight)[0].amax(-1).squeeze(-1)
        return product_norm(up, down) / most.clamp_min(1e-30)

    @property
    def asks_for_timestep(self) -> bool:
        return bool(self.options["timestep_floor"] < 1)

    def strength_at(self, timesteps: Tensor) -> Tensor:
        return 1 - (1 - self.options["timestep_floor"]) / STEPS * timesteps.float()

    @classmethod
    def no_plain_lora(cls, options: Mapping[str, Any]) -> str:
        floor = options.get("timestep_floor", 1.0)
        return "" if floor == 1 else f"changes with the timestep (`timestep_floor` {floor})"
