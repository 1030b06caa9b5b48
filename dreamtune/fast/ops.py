"""The operators of the fused step, as functions with a backward: each is one or two kernels.

Pictures come and go channels-last, (N, C, H, W) with C innermost in memory. Norm weights, biases
and `add` get no gradient: in a frozen UNet none of them asks for one. `why_not_fused` says
where these cannot run; there the UNet's own modules do.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS = 32  # groups that one program looks at, at most
LANES = 512  # channels that one program looks at, at most
TILE = 4096  # values that a program holds at once
PARTS = 128  # parts of a picture's rows, at most
PROGRAMS = 264  # to fill a large GPU twice
WARPS = 4


def why_not_fused(device: torch.device, gradient_checkpointing: bool = False) -> str | None:
    """Why a frozen network cannot run through the kernels here, or None."""
    if device.type != "cuda":
        return f"the kernels need a CUDA device, this is {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if gradient_checkpointing:
        return "gradient checkpointing computes the blocks as diffusers wrote them"
    return None


def kernels() -> Any:
    from dreamtune.fast import kernels

    return kernels


def accumulator(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


def power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


class Grid:
    """How a group norm of x (N, C, H, W) is cut into programs."""

    def __init__(self, x: Tensor, groups: int) -> None:
        self.n, self.width = x.shape[0], x.shape[1]
        self.rows = x.shape[2] * x.shape[3]
        self.per_group = self.width // groups
        fitting = [
            g
            for g in range(1, min(groups, GROUPS) + 1)
            if groups % g == 0 and g * self.per_group <= LANES
        ]
        self.span = max(fitting) * self.per_group
        self.lanes = LANES if self.span > LANES // 4 else LANES // 4  # few variants to compile
        self.step = max(1, TILE // self.lanes)
        blocks = self.width // self.span
        wanted = -(-PROGRAMS // (self.n * blocks))
        steps = -(-self.rows // self.step)
        self.rows_each = -(-steps // max(1, min(wanted, PARTS, steps))) * self.step
        self.parts = -(-self.rows // self.rows_each)
        self.programs = (self.n, self.parts, blocks)
        self.kinds = {
            "GROUPS": GROUPS, "LANES": self.lanes, "ROWS": self.step, "ACC": accumulator(x.dtype),
            "num_warps": WARPS,
        }  # fmt: skip
        self.cut = (self.rows, self.width, self.span, self.per_group, self.rows_each)
        self.sums = torch.promote_types(x.dtype, torch.float32)

    def buffer(self, x: Tensor, parts: int) -> Tensor:
        blocks = self.programs[2]
        return torch.empty(self.n, parts, blocks, 2, GROUPS, device=x.device, dtype=self.sums)


def fits_group_norm(channels: int, groups: int) -> bool:
    return channels % groups == 0 and channels // groups <= LANES


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None, groups: int,
        eps: float, silu: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        k, x = kernels(), channels_last(x)
        grid = Grid(x, groups)
        part, stat, y = grid.buffer(x, grid.parts), grid.buffer(x, 1), torch.empty_like(x)
        given = x if add is None else add.contiguous()
        flags = int(add is not None), int(silu)
        k.group_sums[grid.programs](x, given, part, *grid.cut, flags[0], **grid.kinds)
        k.group_apply[grid.programs](
            x, given, weight, bias, part, stat, y, *grid.cut, grid.parts, eps, *flags,
            PARTS=PARTS, **grid.kinds,
        )  # fmt: skip
        ctx.save_for_backward(x, given, weight, bias, stat)
        ctx.set_materialize_grads(False)
        ctx.groups, ctx.flags = groups, flags
        return y, x

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, skip: Tensor | None) -> Any:  # type: ignore[override]
        x, given, weight, bias, stat = ctx.saved_tensors
        if dy is None:
            return skip, *[None] * 6
        k, dy = kernels(), channels_last(dy)
        grid = Grid(x, ctx.groups)
        part, dx = grid.buffer(x, grid.parts), torch.empty_like(x)
        around = dy if skip is None else channels_last(skip)
        k.group_sums_back[grid.programs](
            x, given, weight, bias, stat, dy, part, *grid.cut, *ctx.flags, **grid.kinds
        )
        k.group_apply_back[grid.programs](
            x, given, weight, bias, stat, dy, around, part, dx, *grid.cut, grid.parts, *ctx.flags,
            int(skip is not None), PARTS=PARTS, **grid.kinds,
        )  # fmt: skip
        return dx, *[None] * 6


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool = False,
    add: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(act(group_norm(x + add)), x): x (N, C, H, W), add (N, C).

    The second is x itself, for what goes around the norm: the gradient of both paths is one kernel.
    """
    y, same = _GroupNorm.apply(x, weight, bias, add, groups, eps, silu)
    return y, same


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, more: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        x, width = x.contiguous(), x.shape[-1]
        rows, lanes = x.numel() // width, power_of_2(width)
        step = max(1, TILE // lanes)
        kinds = {"LANES": lanes, "ROWS": step, "ACC": accumulator(x.dtype)}
        kind = torch.promote_types(x.dtype, torch.float32)
        stat = torch.empty(2, rows, device=x.device, dtype=kind)
        total = x if more is None else torch.empty_like(x)
        y = torch.empty_like(x)
        kernels().layer_norm[(-(-rows // step),)](
            x, x if more is None else more.contiguous(), weight, bias, total, stat, y, rows, width,
            eps, int(more is not None), **kinds,
        )  # fmt: skip
        ctx.save_for_backward(total, weight, stat)
        ctx.set_materialize_grads(False)
        ctx.kinds, ctx.more = kinds, more is not None
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, skip: Tensor | None) -> Any:  # type: ignore[override]
        x, weight, stat = ctx.saved_tensors
        if dy is None:
            dx = skip
        else:
            rows, width, dy = stat.shape[1], x.shape[-1], dy.contiguous()
            dx = torch.empty_like(x)
            kernels().layer_norm_back[(-(-rows // ctx.kinds["ROWS"]),)](
                x, weight, stat, dy, dy if skip is None else skip.contiguous(), dx, rows, width,
                int(skip is not None), **ctx.kinds,
            )  # fmt: skip
        return dx, dx if ctx.more else None, None, None, None


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, more: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + more), x + more) over the last dimension."""
    y, total = _LayerNorm.apply(x, more, weight, bias, eps)
    return y, total


BLOCK = {"LANES": 256, "ROWS": 8}


def blocks_of(rows: int, width: int) -> tuple[int, int]:
    return -(-rows // BLOCK["ROWS"]), -(-width // BLOCK["LANES"])


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        width = x.shape[-1] // 2
        rows = x.numel() // (2 * width)
        y = x.new_empty(*x.shape[:-1], width)
        acc = accumulator(x.dtype)
        kernels().geglu[blocks_of(rows, width)](x, y, rows, width, ACC=acc, **BLOCK)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        width = x.shape[-1] // 2
        rows, dx = x.numel() // (2 * width), torch.empty_like(x)
        acc = accumulator(x.dtype)
        kernels().geglu_back[blocks_of(rows, width)](
            x, dy.contiguous(), dx, rows, width, ACC=acc, **BLOCK
        )
        return dx


def geglu(x: Tensor) -> Tensor:
    """a * gelu(b) of x = (a, b) along the last dimension."""
    y: Tensor = _GEGLU.apply(x)
    return y


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, skip: Tensor, bias: Tensor) -> Tensor:
        x, skip = channels_last(x), channels_last(skip)
        y, width = torch.empty_like(x), x.shape[1]
        rows = x.numel() // width
        kernels().add_bias[blocks_of(rows, width)](
            x, skip, bias, y, rows, width, ACC=accumulator(x.dtype), **BLOCK
        )
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        return dy, dy, None


def add_bias(x: Tensor, skip: Tensor, bias: Tensor) -> Tensor:
    """x + skip + bias: x, skip (N, C, H, W), bias (C,)."""
    y: Tensor = _AddBias.apply(x, skip, bias)
    return y


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.padding = padding
        return F.conv2d(x, weight, padding=padding)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return F.conv_transpose2d(dy, weight, padding=ctx.padding), None, None


def convolution(x: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    """`F.conv2d(x, weight, padding=padding)`, x (N, C, H, W), weight (out, C, kh, kw), frozen.

    torch's own keeps x for the gradient of the weight, also where nobody asks for it; the gradient
    of x is the transposed convolution, which needs the weight alone.
    """
    y: Tensor = _Convolution.apply(x, weight, padding)
    return y


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
