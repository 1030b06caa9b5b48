"""OFT: an orthogonal rotation of the weight's input, block by block."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dreamtune.adapters.base import Adapter, Generators, WeightChange, register
from dreamtune.adapters.maths import blocks_of
from dreamtune.fields import Count, Terms

AT_ONCE = 2**20  # values above the diagonal


@register
class OFT(Adapter):
    """`W' = W Rᵀ`, R of blocks `(I + Q)(I - Q)⁻¹`, each Q skew-symmetric and 0 at the start.

    Paper: OFT, arXiv 2306.07280, equation 5; the Cayley-Neumann form is of OFTv2, arXiv 2506.19847:
    the inverse is cut to a sum of powers, `R = I + 2 Q + 2 Q² + ... + Q^(terms - 1)`, orthogonal
    for small Q. Inputs are rotated, the weight is never multiplied.

    Args:
        blocks: n, must divide the width of the input.
        exact: invert; R is then orthogonal for any Q.
        terms: of the sum, the first is I.
    """

    name = "oft"
    paper = "https://arxiv.org/abs/2306.07280"
    identity_at_start = True
    low_rank = False
    depends_on_weight = True
    learning_rate = 6e-5
    above: Tensor

    def __init__(
        self,
        weight: Tensor,
        *,
        slots: int = 1,
        generator: Generators = None,
        blocks: Count = 4,
        exact: bool = False,
        terms: Terms = 5,
    ) -> None:
        options: dict[str, Any] = {"blocks": blocks, "exact": exact, "terms": terms}
        super().__init__(weight, slots, generator, options)
        size = self.size = blocks_of(weight.shape[-1], blocks, "input")
        if size < 2:
            raise ValueError(
                f"`blocks` must leave blocks of at least 2 of every input width, here"
                f" {weight.shape[-1]}, got {blocks}"
            )
        self.q = nn.Parameter(self.constant(weight, (blocks, size * (size - 1) // 2), 0.0))
        row, column = torch.triu_indices(size, size, 1, device=weight.device)
        self.register_buffer("above", row * size + column, persistent=False)

    def change(self, weight: Tensor, *constants: Tensor) -> WeightChange:
        if not (torch.is_grad_enabled() and self.q.requires_grad):
            return WeightChange(rotation=self._rotation(self.q))
        # Its powers, each twice the size of q, are computed again in the backward, of a few layers
        # at a time: of all at once they would be the peak of a step's memory.
        rows = max(1, AT_ONCE // max(1, self.q[:1].numel()))
        rotations = [
            checkpoint(self._rotation, part, use_reentrant=False, preserve_rng_state=False)
            for part in self.q.split(rows)
        ]
        return WeightChange(rotation=torch.cat(rotations) if len(rotations) > 1 else rotations[0])

    def _rotation(self, values: Tensor) -> Tensor:
        """R - I, of the values above the diagonal."""
        upper = values.new_zeros(*values.shape[:-1], self.size**2)
        upper = upper.index_copy(-1, self.above, values).unflatten(-1, (self.size, self.size))
        q = upper - upper.mT
        if self.options["exact"]:
            eye = torch.eye(self.size, dtype=q.dtype, device=q.device)
            return torch.linalg.solve_ex(eye - q, 2 * q)[0]
        power, rotation = q, torch.zeros_like(q)
        for _ in range(2, self.options["terms"]):
            rotation = rotation + 2 * power
            power = power @ q
        return rotation + power

    def share_of_bound(self, weight: Tensor) -> Tensor | None:
        """Of the distance `2 sqrt(in)` of R from I; the sum of powers bounds nothing."""
        rotation = self.change(weight).rotation
        if not self.options["exact"] or rotation is None:
            return None
        return rotation.flatten(-3).norm(dim=-1) / (2 * math.sqrt(weight.shape[-1]))
