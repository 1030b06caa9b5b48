"""A convolution with changes of its weight, seen as (out, in * kh * kw).

`down` is a convolution of the layer's own stride, padding and dilation with R outputs, `up` one of
1x1. A rotation turns the weight, for the input that it would turn is never made: one convolution
more, exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamtune.injection.change import Factors, Use


def convolved(layer: nn.Conv2d, x: Tensor, changes: Sequence[tuple[Factors, Use]]) -> Tensor:
    """`W * x + b` and the changes, (batch, out, h, w) for x (batch, in, height, width); each change
    is of W, none of another.
    """
    if x.dim() == 3:
        return convolved(layer, x[None], changes)[0]
    y = plain = layer._conv_forward(x, layer.weight, layer.bias)
    if layer.bias is not None and any(f.gain is not None for f, _ in changes):
        plain = y - layer.bias.to(y.dtype)[:, None, None]
    for factors, use in changes:
        for part in _parts(layer, x, plain, factors, use):
            y = y + (part if use.at is None else _at_rows(part, use))
    return y


def _at_rows(part: Tensor, use: Use) -> Tensor:
    at = use.strengths(len(part)).to(part)
    return part * at.reshape(len(at), 1, *(at.shape[1:] or (1, 1)))


def _parts(layer: nn.Conv2d, x: Tensor, plain: Tensor, factors: Factors, use: Use) -> list[Tensor]:
    """What a change adds, (batch, out, h, w) each. plain: `W * x`."""

    def convolve(x: Tensor, kernels: Tensor) -> Tensor:
        return layer._conv_forward(x, kernels.view(-1, *layer.weight.shape[1:]), None)

    up, down, gain, rotation = factors
    found = []
    if rotation is not None:
        found.append(_each(convolve, x, turned(layer.weight, rotation), 2, use))
    if gain is not None:
        found.append(_each(_times, plain, gain, 1, use))
    if up is not None and down is not None:
        found.append(_each(_pointwise, _each(convolve, x, down, 2, use), up, 2, use))
    return [part.to(plain.dtype) for part in found]


def turned(weight: Tensor, rotation: Tensor) -> Tensor:
    """`W Dᵀ` block by block of its width, ([K,] out, in * kh * kw)."""
    blocks = weight.flatten(1).unflatten(-1, rotation.shape[-3:-1]).transpose(0, 1)
    return (blocks @ rotation.mT).transpose(-3, -2).flatten(-2)


def _pointwise(h: Tensor, up: Tensor) -> Tensor:
    return F.conv2d(h, up[..., None, None])


def _times(y: Tensor, gain: Tensor) -> Tensor:
    return y * gain[:, None, None].to(y.dtype)


def _each(
    apply: Callable[[Tensor, Tensor], Tensor], x: Tensor, factor: Tensor, dims: int, use: Use
) -> Tensor:
    """`apply` to x and a factor of so many dimensions; or to each block of the batch and its own
    factor, of K in one tensor.
    """
    if factor.dim() == dims:
        return apply(x, factor)
    blocks = use.blocks(len(x), len(factor))
    return torch.cat([apply(part, own) for part, own in zip(x.chunk(blocks), factor, strict=True)])
