"""ETHER: a reflection of the weight along one learned direction a block."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn

from dreamtune.adapters.base import Adapter, Generators, register
from dreamtune.adapters.maths import block_columns, blocks_of, frozen_product, unit
from dreamtune.fields import Count


@register
class ETHER(Adapter):
    """`W' = W H` (input side) or `H W` (output side), H block-diagonal with blocks `I - 2 û ûᵀ`.

    Paper: ETHER, arXiv 2405.20271, equation 2. H is orthogonal and always at distance 2 sqrt(n)
    from I: there is no start at the base, and strength 0.5 projects û out. Unlike the released
    code, n > 1 on the input side is the block-diagonal product (theirs splits rows).

    Args:
        blocks: n; must divide the width of the side.
        side: "input" or "output".
    """

    name = "ether"
    paper = "https://arxiv.org/abs/2405.20271"
    identity_at_start = False
    depends_on_weight = True
    learning_rate = 6e-3

    def __init__(
        self,
        weight: Tensor,
        *,
        slots: int = 1,
        generator: Generators = None,
        blocks: Count = 1,
        side: Literal["input", "output"] = "input",
    ) -> None:
        super().__init__(weight, slots, generator, {"blocks": blocks, "side": side})
        size = blocks_of(weight.shape[-1 if side == "input" else -2], blocks, side)
        self.u = nn.Parameter(self.uniform(weight, generator, (blocks, size), 1 / math.sqrt(size)))

    def share_of_bound(self, weight: Tensor) -> Tensor:
        """All of it, always: a reflection is at its distance from I whatever its direction."""
        return self.u.new_ones(self.u.shape[:-2])

    def factors(self, weight: Tensor, *constants: Tensor) -> tuple[Tensor, Tensor]:
        columns = block_columns(unit(self.u, -1))
        if self.options["side"] == "input":
            return -2 * frozen_product(weight, columns), columns.mT
        return -2 * columns, frozen_product(weight.mT, columns).mT
