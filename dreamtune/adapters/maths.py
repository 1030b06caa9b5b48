"""What several methods compute: unit vectors, block columns, products with the frozen weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Unit(torch.autograd.Function):
    """`unit` with its backward in few kernels: methods call it for every shape at every step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
        kept = norm.clamp_min(eps)
        y = x / kept
        ctx.save_for_backward(y, norm, kept)
        ctx.dim = dim
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        y, norm, kept = ctx.saved_tensors
        along = (y * grad).sum(ctx.dim, keepdim=True).masked_fill_(norm < kept, 0.0)
        return torch.addcmul(grad, y, along, value=-1).div_(kept), None, None


def unit(x: Tensor, dim: int, eps: float = 1e-4) -> Tensor:
    """x over its norm along `dim`, at least `eps`: a zero row stays zero, not NaN."""
    y: Tensor = _Unit.apply(x, dim, eps)
    return y


def product_norm(up: Tensor, down: Tensor) -> Tensor:
    """The Frobenius norm of `up @ down`, (...,), without the product."""
    square = ((up.mT @ up) * (down @ down.mT).mT).sum((-2, -1))
    return square.clamp_min(0).sqrt()


def block_columns(u: Tensor) -> Tensor:
    """Blocks (..., n, k) -> (..., n * k, n): column i holds block i in its place."""
    if u.shape[-2] == 1:
        return u.mT
    spread = torch.diag_embed(u.mT, dim1=-3, dim2=-1)  # its backward is a view
    return spread.flatten(-3, -2)


def blocks_of(width: int, blocks: int, side: str) -> int:
    """Size of each of `blocks` equal blocks of a side; ValueError where they do not fit."""
    if width % blocks:
        raise ValueError(f"`blocks` must divide every {side} width, here {width}, got {blocks}")
    return width // blocks


class _FrozenProduct(torch.autograd.Function):
    """`weight @ x` in x's dtype. Keeps the weight as it is for backward, not its float32 copy."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, parts: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.parts = parts
        return split_product(weight, x, parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return None, split_product(weight.mT, grad, ctx.parts), None


def split_product(weight: Tensor, x: Tensor, parts: int) -> Tensor:
    """`weight @ x` in x's dtype.

    Where a GPU multiplies bf16 into float32, x is a sum of bf16 numbers, three for float32's
    precision, two for 16 bits of it: the weight is read once, as it is, instead of copied to
    float32 and read again.
    """
    split = weight.dtype == torch.bfloat16 and x.dtype == torch.float32
    if not (split and x.is_cuda and weight.dim() == 3):
        return weight.to(x.dtype) @ x
    product = torch.bmm(weight, bf16_parts(x, parts), out_dtype=torch.float32)
    return product.unflatten(-1, (parts, -1)).sum(-2)


def bf16_parts(x: Tensor, parts: int) -> Tensor:
    """x (..., n) float32 -> (..., parts n) bf16, parts that add up to x, the largest first."""
    n = x.shape[-1]
    split = x.new_empty(*x.shape[:-1], parts * n, dtype=torch.bfloat16)
    *leading, last = split.split(n, -1)
    for index, part in enumerate(leading):
        part.copy_(x)
        if index + 2 < parts:
            x = x - part
    torch.sub(x, leading[-1], out=last)
    return split


def frozen_product(weight: Tensor, columns: Tensor) -> Tensor:
    """`weight @ columns` for weight (*L, out, in) and columns (*L, S, in, n) -> (*L, S, out, n).

    The slots become columns of one product: broadcasting would copy the weight for every slot.
    With bf16 weights on a GPU it is float32's precision without gradients, 16 bits with them: the
    factors of a step are rounded to bf16 next.
    """
    slots, n = columns.shape[-3], columns.shape[-1]
    flat = columns.transpose(-3, -2).flatten(-2)
    parts = 2 if torch.is_grad_enabled() and columns.requires_grad else 3
    product: Tensor = _FrozenProduct.apply(weight, flat, parts)
    return product.unflatten(-1, (slots, n)).transpose(-3, -2)


def block_factors(
    pairs: Sequence[tuple[Tensor, Tensor] | None], heights: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Factors of rows below rows, of those of each, (..., out_i, r_i) and (..., r_i, in): up
    block-diagonal, (..., sum out_i, sum r_i), down stacked, (..., sum r_i, in). None for rows
    without a change, `heights` of them; some have one.
    """
    there = [pair for pair in pairs if pair is not None]
    left, rest = 0, sum(up.shape[-1] for up, _ in there)
    ups = []
    for pair, height in zip(pairs, heights, strict=True):
        up = there[0][0].new_zeros(*there[0][0].shape[:-2], height, 0) if pair is None else pair[0]
        rest -= up.shape[-1]
        ups.append(F.pad(up, (left, rest)))
        left += up.shape[-1]
    return torch.cat(ups, -2), torch.cat([down for _, down in there], -2)


Pieces = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def turns_parts(rotation: Tensor | None, width: int) -> bool:
    """Whether a rotation (..., P n, width / n, width / n) is of several parts of a weight."""
    return rotation is not None and rotation.shape[-3] * rotation.shape[-1] > width


def by_part(change: Pieces, heights: Sequence[int], width: int) -> list[Pieces]:
    """up, down, gain and rotation of each part of a weight, so many rows each, of the whole's."""
    up, down, gain, rotation = change
    parts = len(heights)
    none: Sequence[Tensor | None] = [None] * parts
    ups = none if up is None else up.split(list(heights), -2)
    gains = none if gain is None else gain.split(list(heights), -1)
    rotations: Sequence[Tensor | None] = [rotation] * parts
    if rotation is not None and turns_parts(rotation, width):
        rotations = rotation.chunk(parts, -3)
    return [(ups[i], down, gains[i], rotations[i]) for i in range(parts)]
