"""A method on a layer that is several in one weight: it acts on each part for itself.

To everybody else it is one adapter with one change of the whole weight, so that forward, merge,
slots, routes, files and recorded steps need no other way for such a layer; parts that were layers
to them would each need a place in the model, a name and a print of its own. The price is zeros:
`up` has as many columns as all parts have rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamtune.adapters.base import Adapter, Generators, WeightChange
from dreamtune.adapters.maths import Pieces, block_factors

Parts = Mapping[str, int]  # name -> outputs, from above


def make(
    method: type[Adapter],
    weight: Tensor,
    parts: Parts,
    *,
    slots: int = 1,
    generator: Generators = None,
    **options: Any,
) -> Adapter:
    """The method on weights (*L, out, in), or on each of their parts. Raises ValueError where the
    options do not fit.
    """
    if parts:
        return InParts(method, weight, parts, slots, generator, options)
    return method(weight, slots=slots, generator=generator, **options)  # type: ignore[arg-type]


class InParts(Adapter):
    """`W' = [W1'; W2'; ...]` of a weight `[W1; W2; ...]`, the rows of each part as the method has
    them of the part alone. Low-rank parts are one low-rank change: down stacked, up block-diagonal,
    of a rank that is the sum of theirs. Rotations of the input are as many as there are parts.

    Its tensors are those of the parts, `<part>.<name>`.

    Args:
        parts: of all rows.
        options: of the method, the same in each part.
    """

    def __init__(
        self,
        method: type[Adapter],
        weight: Tensor,
        parts: Parts,
        slots: int,
        generator: Generators,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__(weight, slots, generator, {})
        self.heights = tuple(parts.values())
        if sum(self.heights) != weight.shape[-2] or min(self.heights) < 1:
            told = ", ".join(f"`{name}` {size}" for name, size in parts.items())
            raise ValueError(f"the parts of a weight of {weight.shape[-2]} outputs are {told}")
        for name, own in zip(parts, weight.split(self.heights, -2)):
            if not name.isidentifier() or hasattr(self, name):
                raise ValueError(f"a part needs a name of its own, got {name!r}")
            try:
                part = method(own, slots=slots, generator=generator, **options)  # type: ignore[arg-type]
            except ValueError as error:
                size = "x".join(map(str, own.shape[-2:]))
                raise ValueError(f"its part `{name}` ({size}): {error}") from None
            self.add_module(name, part)
        first = self.parts[0]
        self.options = first.options
        vars(self).update({name: getattr(first, name) for name in OF_A_PART})

    @property
    def parts(self) -> list[Adapter]:
        """From above."""
        return list(self._modules.values())  # type: ignore[arg-type]

    def options_of(self, slot: int) -> dict[str, Any]:
        return self.parts[0].options_of(slot)

    def constants(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Those of the parts, one after the other."""
        return tuple(x for part, own in self._of(weight) for x in part.constants(own))

    def changes(self, weight: Tensor, *constants: Tensor) -> list[WeightChange]:
        count = len(constants) // len(self.heights)
        return [
            part.change(own, *constants[i * count : (i + 1) * count])
            for i, (part, own) in enumerate(self._of(weight))
        ]

    def change(self, weight: Tensor, *constants: Tensor) -> WeightChange:
        return WeightChange(*whole(self.changes(weight, *constants)))

    def factors(self, weight: Tensor, *constants: Tensor) -> tuple[Tensor, Tensor]:
        up, down, *_ = self.change(weight, *constants)
        assert self.low_rank and up is not None and down is not None
        return up, down

    @property
    def asks_for_timestep(self) -> bool:
        return self.parts[0].asks_for_timestep

    def strength_at(self, timesteps: Tensor) -> Tensor:
        return self.parts[0].strength_at(timesteps)

    def share_of_bound(self, weight: Tensor) -> Tensor | None:
        """The mean over the parts, each a weight with a bound of its own."""
        shares = [part.share_of_bound(own) for part, own in self._of(weight)]
        found = [share for share in shares if share is not None]
        return torch.stack(found).mean(0) if len(found) == len(shares) else None

    def _of(self, weight: Tensor) -> list[tuple[Adapter, Tensor]]:
        """Each part with its rows, a view."""
        return list(zip(self.parts, weight.split(self.heights, -2), strict=True))


# What is read of an adapter itself, and is another of each method.
OF_A_PART = (
    "name", "paper", "identity_at_start", "low_rank", "depends_on_weight", "learning_rate",
    "own_learning_rates", "rate_factors", "no_decay", "note",
)  # fmt: skip


def whole(changes: Sequence[Pieces]) -> Pieces:
    """up, down, gain and rotation of a weight, of those of its parts; see `maths.by_part`."""
    if len(changes) == 1:
        return changes[0]
    ups, downs, gains, rotations = (
        [x for x in each if x is not None] for each in zip(*changes, strict=True)
    )
    up, down = joined(ups, downs) if ups else (None, None)
    gain = torch.cat(gains, -1) if gains else None
    return up, down, gain, torch.cat(rotations, -3) if rotations else None


def joined(ups: Sequence[Tensor], downs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Factors of the whole, of (..., out_i, r_i) and (..., r_i, in): up (..., sum out_i, P r) and
    down (..., P r, in). Each part has r = max r_i of the rank, so that `apart` knows its place.
    """
    rank = max(up.shape[-1] for up in ups)
    wide = [F.pad(up, (0, rank - up.shape[-1])) for up in ups]
    high = [F.pad(down, (0, 0, 0, rank - down.shape[-2])) for down in downs]
    return block_factors(list(zip(wide, high)), [up.shape[-2] for up in ups])


def apart(up: Tensor, down: Tensor, heights: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """The factors of each part, of what `joined` gives."""
    count = len(heights)
    rows = zip(up.split(list(heights), -2), down.chunk(count, -2))
    return [(own.chunk(count, -1)[i], below) for i, (own, below) in enumerate(rows)]
