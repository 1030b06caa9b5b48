"""The operators of a fused transformer block, as functions with a backward: each is one kernel.

Tokens come as (N, tokens, width). Weights, modulation and angles get no gradient: in a frozen
transformer none of them asks for one, and `dreamtune.fast.transformer` looks before it calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dreamtune.fast.ops import BLOCK, TILE, accumulator, blocks_of, power_of_2


def kernels() -> Any:
    from dreamtune.fast import row_kernels

    return row_kernels


def by_batch(x: Tensor, given: Tensor | None) -> tuple[Tensor, int, int]:
    """What modulates x (N, tokens, width), (1 or N, 1, width), as a kernel takes it: with the step
    from one batch's to the next, and whether there is any.
    """
    if given is None:
        return x, 0, 0
    given = given if given.stride(-1) == 1 else given.contiguous()
    return given, given.stride(0) if given.shape[0] > 1 else 0, 1


def whole_rows(width: int, dtype: torch.dtype) -> dict[str, Any]:
    lanes = power_of_2(width)
    rows = max(1, TILE // lanes)
    warps = 8 if lanes * rows > TILE // 2 else 4
    return {"LANES": lanes, "ROWS": rows, "ACC": accumulator(dtype), "num_warps": warps}


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, gain: Tensor | None, shift: Tensor | None,
        skip: Tensor | None, eps: float, centered: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        x, width = x.contiguous(), x.shape[-1]
        rows, kinds = x.numel() // width, whole_rows(width, x.dtype)
        gains, gain_step, gained = by_batch(x, gain)
        shifts, shift_step, shifted = by_batch(x, shift)
        y = torch.empty_like(x)
        kernels().norm_rows[(-(-rows // kinds["ROWS"]),)](
            x, x if weight is None else weight, gains, shifts,
            x if skip is None else skip.contiguous(), y, rows, x.shape[1], width, gain_step,
            shift_step, eps, int(centered), int(weight is not None), gained, shifted,
            int(skip is not None), **kinds,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, gain)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.centered, ctx.skipped = eps, centered, skip is not None
        return y, x

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, around: Tensor | None) -> Any:  # type: ignore[override]
        x, weight, gain = ctx.saved_tensors
        if dy is None:
            return around, *[None] * 6
        width, dy = x.shape[-1], dy.contiguous()
        rows, kinds = x.numel() // width, whole_rows(width, x.dtype)
        gains, gain_step, gained = by_batch(x, gain)
        dx = torch.empty_like(x)
        kernels().norm_rows_back[(-(-rows // kinds["ROWS"]),)](
            x, x if weight is None else weight, gains, dy,
            dy if around is None else around.contiguous(), dx, rows, x.shape[1], width, gain_step,
            ctx.eps, int(ctx.centered), int(weight is not None), gained, int(around is not None),
            **kinds,
        )  # fmt: skip
        return dx, None, None, None, dy if ctx.skipped else None, None, None


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, gain: Tensor | None = None, skip: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x) weight gain + skip, x) over the last dimension: gain (1 or N, 1, width).

    The second is x itself, for what goes around the norm: the gradient of both paths is one kernel.
    """
    y, same = _Norm.apply(x, weight, gain, None, skip, eps, False)
    return y, same


def layer_norm(x: Tensor, eps: float, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """(layer_norm(x) gain + shift, x): gain and shift (1 or N, 1, width)."""
    y, same = _Norm.apply(x, None, gain, shift, None, eps, True)
    return y, same


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, skip: Tensor) -> Tensor:
        ctx.save_for_backward(gain)
        return gated_rows(x, gain, skip)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        (gain,) = ctx.saved_tensors
        return gated_rows(dy, gain, None), None, dy


def gated_rows(x: Tensor, gain: Tensor, skip: Tensor | None) -> Tensor:
    x, width = x.contiguous(), x.shape[-1]
    rows, y = x.numel() // width, torch.empty_like(x)
    gains, gain_step, _ = by_batch(x, gain)
    kernels().gated_rows[blocks_of(rows, width)](
        x, gains, x if skip is None else skip.contiguous(), y, rows, x.shape[1], width, gain_step,
        int(skip is not None), ACC=accumulator(x.dtype), **BLOCK,
    )  # fmt: skip
    return y


def gated(x: Tensor, gain: Tensor, skip: Tensor) -> Tensor:
    """gain x + skip: gain (1 or N, 1, width)."""
    y: Tensor = _Gated.apply(x, gain, skip)
    return y


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor | None) -> Tensor:
        if b is None:
            given = by_rows(a)
            first, second = given.chunk(2, -1)
        else:
            first, second, given = a.contiguous(), b.contiguous(), a
        width, rows = first.shape[-1], first[..., 0].numel()
        y = torch.empty(first.shape, device=a.device, dtype=a.dtype)
        kernels().swiglu_rows[blocks_of(rows, width)](
            first, second, y, rows, width, first.stride(-2), ACC=accumulator(a.dtype), **BLOCK
        )
        ctx.save_for_backward(*((given,) if b is None else (first, second)))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        saved, dy = ctx.saved_tensors, by_rows(dy)
        one = len(saved) == 1
        a, b = saved[0].chunk(2, -1) if one else saved
        width, rows = a.shape[-1], a[..., 0].numel()
        shape = (*a.shape[:-1], 2 * width)
        whole = torch.empty(shape, device=a.device, dtype=a.dtype) if one else None
        da, db = (torch.empty_like(a), torch.empty_like(b)) if whole is None else whole.chunk(2, -1)
        kernels().swiglu_rows_back[blocks_of(rows, width)](
            a, b, dy, da, db, rows, width, a.stride(-2), dy.stride(-2), da.stride(-2),
            ACC=accumulator(a.dtype), **BLOCK,
        )  # fmt: skip
        return (da, db) if whole is None else (whole, None)


def swiglu(a: Tensor, b: Tensor | None = None) -> Tensor:
    """silu(a) b; without b, that of the two halves of a."""
    y: Tensor = _SwiGLU.apply(a, b)
    return y


def by_rows(x: Tensor) -> Tensor:
    """x (N, tokens, ...), or a copy, whose rows are whole and at equal steps over all batches."""
    even = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    if even and x[0, 0].is_contiguous():
        return x
    return x.clone(memory_format=torch.contiguous_format)  # of one token any step is contiguous


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
    ) -> Tensor:
        x = by_rows(x)
        y = torch.empty(x.shape, device=x.device, dtype=x.dtype)
        args, kinds = rotation(x, cos, eps)
        kernels().rotated_heads[(-(-args[0] // kinds["ROWS"]),)](
            x, weight, cos, sin, y, *args, **kinds
        )
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        x, weight, cos, sin = ctx.saved_tensors
        dx = torch.empty(x.shape, device=x.device, dtype=x.dtype)
        args, kinds = rotation(x, cos, ctx.eps)
        kernels().rotated_heads_back[(-(-args[0] // kinds["ROWS"]),)](
            x, weight, cos, sin, dy.contiguous(), dx, *args, **kinds
        )
        return dx, *[None] * 4


def rotation(x: Tensor, cos: Tensor, eps: float) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """rows, heads, tokens, width, step of a token, step of a batch's angles, eps; and constants."""
    n, length, heads, width = x.shape
    step = cos.stride(0) if cos.shape[0] > 1 else 0
    kinds = whole_rows(width, x.dtype)
    return (n * length * heads, heads, length, width, x.stride(1), step, eps), kinds


def rotated(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """rms_norm(x) weight, and each pair of neighbours turned: x (N, tokens, heads, width); cos and
    sin (1 or N, tokens, width / 2), every second value of tables `width` wide.

    Raises ValueError for angles that are not.
    """
    n, length, heads, width = x.shape
    for angles in (cos, sin):
        fits = angles.shape in ((1, length, width // 2), (n, length, width // 2))
        if not fits or angles.stride()[1:] != (width, 2):
            raise ValueError(
                f"`cos` and `sin` must be (1 or {n}, {length}, {width // 2}) at steps of "
                f"({width}, 2), got {tuple(angles.shape)} at {angles.stride()[1:]}"
            )
    y: Tensor = _Rotated.apply(x, weight, cos, sin, eps)
    return y
