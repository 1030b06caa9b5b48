"""The fast way of adapted layers: their weights lie one after the other in memory.

Layers that read the same input, the query, key and value of an attention, are one `Projection` and
one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamtune.injection.change import Factors, Use, combined
from dreamtune.injection.convolution import convolved
from dreamtune.injection.layer import AdaptedLayer
from dreamtune.injection.scaled_rows import ScaledRows

ALIGN = 8  # values: rows of fewer are no rows for a GPU's fast kernels


def wide_rank(rank: int) -> int:
    return -(-rank // ALIGN) * ALIGN


class Projection:
    """P layers of one shape that may read the same input, P = 1 for most.

    Attributes:
        factors: set by `Stack.set`, in the dtype of the weight: (P, out, R), (P, R, in), ...; with
            several slots, or routed rows, one of each a block of the batch: (P, K, out, R), ...
        wide: without gradients, the weight with `down` below it: a product less.
        use: of the adapter.
    """

    def __init__(self, layers: Sequence[AdaptedLayer], use: Use) -> None:
        self.layers, self.single = list(layers), len(layers) == 1
        self.use = use
        self.weight: Tensor  # (P, out, in), frozen
        self.factors = Factors()
        self.wide: Wide | None = None
        for index, layer in enumerate(self.layers):
            layer.projection, layer.index = self, index

    @property
    def bias(self) -> Tensor | None:
        """Layers that are one product have none."""
        return self.layers[0].bias if self.single else None

    def together(self, device: str) -> bool:
        """Whether `__call__` gives what the layers would."""
        return self.plain() and self.frozen(device)

    def frozen(self, device: str) -> bool:
        """Whether nothing of the weights asks for a gradient, and all is of one dtype."""
        if torch.is_autocast_enabled(device):
            return False
        return not torch.is_grad_enabled() or not any(
            p is not None and p.requires_grad for m in self.layers for p in (m.weight, m.bias)
        )

    def plain(self) -> bool:
        """Whether the change is `up @ down`, the same for all rows of a slot."""
        return self.factors.low_rank and self.use.at is None

    def __call__(self, input: Tensor) -> Sequence[Tensor]:
        """The outputs (batch, ..., out) of the P layers for one input (batch, ..., in)."""
        if not torch.is_grad_enabled():
            return self.stacked(input).unbind(0)
        up, down, *_ = self.factors
        assert up is not None and down is not None
        ys = _Project.apply(self.rows(input, down.dim() == 4), self.weight, self.bias, up, down)
        return [y.view(*input.shape[:-1], y.shape[-1]) for y in ys]

    def stacked(self, input: Tensor) -> Tensor:
        """(P, batch, ..., out), without gradients."""
        up, down, *_ = self.factors
        assert up is not None and down is not None
        if self.wide is not None:
            y = self.wide(input)
        else:
            x = self.rows(input, down.dim() == 4)
            y = project(x, self.weight, self.bias, up, side_by_side(down))[0]
        return y.view(len(y), *input.shape[:-1], y.shape[-1])

    def rows(self, input: Tensor, split: bool) -> Tensor:
        """(T, in), or (K, T, in) for K factors."""
        if not split:
            return input.reshape(-1, input.shape[-1])
        some = next(x for x in self.factors if x is not None)
        blocks = self.use.blocks(len(input), some.shape[1])
        return input.reshape(blocks, -1, input.shape[-1])

    def own(self, layer: Any) -> Factors:
        """Of one layer."""
        return Factors(*(None if x is None else x[layer.index] for x in self.factors))

    def one(self, layer: Any, input: Tensor) -> Tensor:
        """What `layer` gives alone."""
        if self.single and self.together(input.device.type):
            if self.wide is not None and not torch.is_grad_enabled():
                return self.wide.one(input).view(*input.shape[:-1], layer.out_features)
            return self(input)[0]
        own = self.own(layer)
        up, down, gain, rotation = own
        same_for_all_rows = rotation is None and self.use.at is None
        if gain is not None and same_for_all_rows and self.frozen(input.device.type):
            x = self.rows(input, gain.dim() == 2)
            y = ScaledRows.apply(x, layer.weight, layer.bias, gain, up, down)
            return y.view(*input.shape[:-1], layer.out_features)  # type: ignore[no-any-return]
        if up is None or down is None or not self.plain():
            return combined(input, layer.weight, layer.bias, [(own, self.use)], layer.heights)
        x = self.rows(input, down.dim() == 3)
        y, h = F.linear(x, layer.weight, layer.bias), x @ down.mT
        if up.dtype != y.dtype:  # autocast chose another dtype than the weight's
            up, h = up.to(y.dtype), h.to(y.dtype)
        y = y.addmm_(h, up.mT) if x.dim() == 2 else y.baddbmm_(h, up.mT)
        return y.view(*input.shape[:-1], layer.out_features)


class Convolution(Projection):
    """A convolution alone: it computes as a plain one does, with the factors of the group."""

    def one(self, layer: Any, input: Tensor) -> Tensor:
        return convolved(layer, input, [(self.own(layer), self.use)])


class Wide:
    """`W x + b + up (down x)` for weights with `down` below them, (P, out + R, in): one product
    gives `W x` and `down x`. up: (P, R, out). What each call needs is computed once: a pipeline's
    step waits for Python more than for the GPU. bias: (out + R), zeros below; of one part only.
    """

    def __init__(self, wide: Tensor, bias: Tensor | None, up: Tensor) -> None:
        self.parts, self.height, _ = wide.shape
        self.sizes = up.shape[-1], up.shape[-2]
        self.flat = wide.flatten(0, 1)
        self.bias = bias
        self.up = up if self.parts > 1 else up[0]

    def __call__(self, input: Tensor) -> Tensor:
        """(P, rows, out)."""
        return self.one(input)[None] if self.parts == 1 else self.many(input)

    def one(self, input: Tensor) -> Tensor:
        t = F.linear(input, self.flat, self.bias).view(-1, self.height)
        y, h = t.split(self.sizes, 1)
        return y.addmm_(h, self.up)

    def many(self, input: Tensor) -> Tensor:
        t = F.linear(input, self.flat, self.bias).view(-1, self.parts, self.height).transpose(0, 1)
        y, h = t.split(self.sizes, 2)
        return y.baddbmm_(h, self.up)


def side_by_side(down: Tensor) -> Tensor:
    """(P, R, in) -> (P R, in); (P, K, R, in) -> (K, P R, in)."""
    return down.flatten(0, 1) if down.dim() == 3 else down.movedim(0, 1).flatten(1, 2)


def project(
    x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor]:
    """`x Wᵀ + b + (x downᵀ) upᵀ`, (P, ..., T, out), and all `x downᵀ`, (..., T, P R).

    x (T, in), weight (P, out, in), up (P, out, R), down (P R, in); or x (K, T, in), up (P, K, out,
    R), down (K, P R, in).
    """
    parts = len(weight)
    y, h = F.linear(x, weight.flatten(0, 1), bias), x @ down.mT
    # In place: a copy of y would be a kernel and its memory.
    if parts == 1:
        y = y.addmm_(h, up[0].mT) if x.dim() == 2 else y.baddbmm_(h, up[0].mT)
        return y.unsqueeze(0), h
    ys, hs = (z.unflatten(-1, (parts, -1)).movedim(-2, 0) for z in (y, h))
    if torch.compiler.is_compiling():  # makes copies of a view that is written to, and fails
        return ys + hs @ up.mT, h
    if x.dim() == 2:
        return ys.baddbmm_(hs, up.mT), h
    for part in range(parts):
        ys[part].baddbmm_(hs[part], up[part].mT)
    return ys, h


class _Project(torch.autograd.Function):
    """`project` with its backward written out: left to autograd, each product's gradient of x is a
    tensor of its own, and further kernels add them. The weight gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor
    ) -> tuple[Tensor, ...]:
        flat = side_by_side(down)
        y, h = project(x, weight, bias, up, flat)
        ctx.save_for_backward(x, weight, up, flat, h)
        return tuple(y.unbind(0))

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Any:
        x, weight, up, flat, h = ctx.saved_tensors
        parts, rank = len(weight), up.shape[-1]
        for_x, _, _, for_up, for_down = ctx.needs_input_grad
        dx = dup = ddown = None
        dy = dys[0] if parts == 1 else torch.cat(dys, -1)
        by_part = [z.unflatten(-1, (parts, -1)).movedim(-2, 0) for z in (dy, h)]
        dh = times(by_part[0], up)  # (P, ..., T, R)
        if for_up:
            dup = times(by_part[0].mT, by_part[1])
        dh = dh[0] if parts == 1 else dh.movedim(0, -2).flatten(-2)
        if for_down:
            ddown = (dh.mT @ x).unflatten(-2, (parts, rank)).movedim(-3, 0)
        if for_x:
            dx = (dy.reshape(-1, dy.shape[-1]) @ weight.flatten(0, 1)).view_as(x)
            dx = dx.addmm_(dh, flat) if x.dim() == 2 else dx.baddbmm_(dh, flat)
        return dx, None, None, dup, ddown


def times(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of (P, ..., n, m): without copies, as a product over the leading dimensions makes."""
    if a.dim() == 3:
        return a @ b if len(a) > 1 else (a[0] @ b[0]).unsqueeze(0)
    return torch.stack([x @ y for x, y in zip(a, b)]) if len(a) > 1 else (a[0] @ b[0])[None]
