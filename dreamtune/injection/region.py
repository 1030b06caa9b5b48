"""A part of the picture in which an adapter acts: a box or a mask, at any layer's resolution."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Region:
    """Where in the picture an adapter acts, and how much.

    Args:
        box: (left, top, right, bottom) in fractions of the picture's width and height.
        mask: in place of a box, (height, width) of the picture's aspect and any resolution: a PIL
            image, an array or a tensor, of truth values, of numbers 0 to 1, or of whole numbers to
            255. Between 0 and 1 the change is in part.
        strength: of the adapter inside, as `set_adapters` takes it.
        prompt: of the region, in place of the picture's; without, the model decides what is where.
            It is to ask for a picture of the same composition: the region shows its part of it. A
            pipeline encodes it, `route` on a network cannot.
        text: the prompt encoded, (tokens, width); set by `route`.

    Raises:
        ValueError: both or none of box and mask; a box that is empty or beyond the picture; a mask
        that is empty, not 2-D, or of other values; a prompt that is no text.
    """

    box: Sequence[float] | None = None
    mask: Any = None
    strength: float | Mapping[str, float] = 1.0
    prompt: str | None = None
    text: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.box is None) is (self.mask is None):
            raise ValueError(
                "a `Region` has a `box` or a `mask`, got"
                f" {'none of them' if self.box is None else 'both'}"
            )
        if self.prompt is not None and not isinstance(self.prompt, str):
            raise ValueError(f"`prompt` of a `Region` must be a text, got {self.prompt!r}")
        if self.box is not None:
            object.__setattr__(self, "box", _box(self.box))
        else:
            object.__setattr__(self, "mask", _mask(self.mask))

    def share(self, height: int, width: int) -> Tensor:
        """How much of each of (height, width) equal cells is inside, 0 to 1: area averaging."""
        if self.box is not None:
            left, top, right, bottom = self.box
            down, across = _covered(height, [top], [bottom]), _covered(width, [left], [right])
            return (down @ across.mT).float()
        down, across = (_covered(n, *_cells(m)) for n, m in zip((height, width), self.mask.shape))
        return (down @ self.mask.double() @ across.mT).float()

    def check(self, name: str, height: int, width: int) -> None:
        """name: of the adapter. Raises ValueError where a picture of (height, width) cells has not
        the mask's aspect, to within a cell.
        """
        if self.mask is None:
            return
        rows, columns = self.mask.shape
        if abs(columns / rows * height - width) > 1:
            raise ValueError(
                f"the mask of `{name}` is {rows} x {columns} (height x width), of another aspect"
                f" than the picture, which is {height} x {width} in the network: crop or pad it as"
                " the picture is"
            )

    @property
    def place(self) -> Hashable:
        """Equal where the same part of the picture is meant, with the same prompt."""
        if self.mask is None:
            return self.prompt, self.box
        return self.prompt, tuple(self.mask.shape), self.mask.numpy().tobytes()


def _cells(count: int) -> tuple[list[float], list[float]]:
    """Starts and ends of equal cells of 0 to 1."""
    edges = [i / count for i in range(count + 1)]
    return edges[:-1], edges[1:]


def _covered(count: int, starts: Sequence[float], ends: Sequence[float]) -> Tensor:
    """(count, n): what share of each of `count` equal cells of 0 to 1 each of n intervals covers.
    In float64, so that in float32 what is covered whole is 1.
    """
    low, high = (torch.tensor(x, dtype=torch.float64)[:, None] for x in _cells(count))
    start, end = (torch.tensor(x, dtype=torch.float64) for x in (starts, ends))
    return (torch.minimum(high, end) - torch.maximum(low, start)).clamp(min=0) * count


def _box(given: Any) -> tuple[float, ...]:
    sides = tuple(given) if isinstance(given, list | tuple) else ()
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in sides)
    if len(sides) != 4 or not numbers or not all(map(math.isfinite, sides)):
        raise ValueError(f"`box` must be four numbers (left, top, right, bottom), got {given!r}")
    left, top, right, bottom = map(float, sides)
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(
            "`box` must be fractions of the picture, 0 <= left < right <= 1 and 0 <= top < bottom"
            f" <= 1, got (left, top, right, bottom) = {given!r}: divide pixels by width and height"
        )
    return left, top, right, bottom


def _mask(given: Any) -> Tensor:
    """(height, width), 0 to 1, on the CPU."""
    if hasattr(given, "getbands"):  # of PIL
        if given.has_transparency_data:
            raise ValueError(
                f"`mask` is a picture of mode {given.mode} with transparency: give the channel that"
                " is meant, for instance `picture.getchannel('A')`"
            )
        given = torch.tensor(list(given.convert("L").tobytes())).view(given.height, given.width)
        given = given / 255
    try:
        mask = torch.as_tensor(given).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`mask` must be a PIL image, an array or a tensor, got {type(given).__name__}: {error}"
        ) from None
    if mask.dim() != 2 or not mask.numel():
        raise ValueError(f"`mask` must be (height, width), got {tuple(mask.shape)}")
    if mask.is_complex():
        raise ValueError(f"`mask` must be real, got {mask.dtype}")
    whole = not mask.is_floating_point()
    mask = mask.float()
    if whole and mask.max() > 1:
        mask = mask / 255
    if not (mask.min() >= 0 and mask.max() <= 1):  # NaN is neither
        raise ValueError(
            "`mask` must have values 0 to 1, or whole ones to 255, got"
            f" {mask.min().item():g} to {mask.max().item():g}"
        )
    if mask.max() == 0:
        raise ValueError("`mask` is empty: nothing of the picture is inside")
    return mask.contiguous()
