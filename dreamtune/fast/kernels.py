"""Triton kernels of the fused step: the norms, activations and sums of a frozen UNet, and backward.

Weights are frozen and get no gradient. Pictures are channels-last in memory, (N, rows, C), so that
nothing is transposed between a convolution and a norm. Sums are in ACC, float32 (float64 for
float64), in an order that does not change.

A group norm is two kernels, each way: sums by group over parts of the rows, then the values. A
program looks at `span` channels, which are whole groups. Flags are arguments, not constants: each
variant would be compiled, at a second or so apiece, the first time on a machine. `eps` has its type
stated: without one a Python float goes in as float32, and 1e-5 is then off by 2.5e-13.

Loads stand before what is computed from them, and what only the end needs is computed there: the
compiler keeps the order, and a version written otherwise cost 4% of a step.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _members(lane, span, per_group, GROUPS: tl.constexpr):
    """Which channels belong to which group, (GROUPS, LANES)."""
    inside = lane < span
    return ((lane // per_group)[None, :] == tl.arange(0, GROUPS)[:, None]) & inside[None, :]


@triton.jit
def _by_channel(per_group, which):
    return tl.sum(tl.where(which, per_group[:, None], 0.0), 0)


@triton.jit
def _by_group(per_channel, which):
    return tl.sum(tl.where(which, per_channel[None, :], 0.0), 1)


@triton.jit
def _sum_parts(part_ptr, n, parts, block, blocks, PARTS: tl.constexpr, GROUPS: tl.constexpr):
    """The two sums of each group over all parts."""
    part, group = tl.arange(0, PARTS), tl.arange(0, GROUPS)
    at = ((n * parts + part) * blocks + block)[:, None] * (2 * GROUPS) + group[None, :]
    mask = (part < parts)[:, None]
    first = tl.sum(tl.load(part_ptr + at, mask=mask, other=0.0), 0)
    second = tl.sum(tl.load(part_ptr + at + GROUPS, mask=mask, other=0.0), 0)
    return first, second


@triton.jit
def _store_part(
    part_ptr, n, part, parts, block, blocks, first, second, which, GROUPS: tl.constexpr
):
    group = tl.arange(0, GROUPS)
    at = part_ptr + ((n * parts + part) * blocks + block) * (2 * GROUPS) + group
    tl.store(at, _by_group(first, which))
    tl.store(at + GROUPS, _by_group(second, which))


@triton.jit(do_not_specialize=["rows", "span", "per_group", "rows_each", "add"])
def group_sums(
    x_ptr, add_ptr, part_ptr, rows, width, span, per_group, rows_each, add,
    GROUPS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Sum and sum of squares of x + add, by group, over a part of the rows."""
    n, part, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lane = tl.arange(0, LANES)
    inside = lane < span
    c = block * span + lane
    first = tl.zeros([LANES], ACC)
    second = tl.zeros([LANES], ACC)
    more = tl.load(add_ptr + n * width + c, mask=inside & (add > 0), other=0.0).to(ACC)
    begin = part * rows_each
    end = tl.minimum(begin + rows_each, rows)
    base = x_ptr + n.to(tl.int64) * rows * width
    for row in range(begin, end, ROWS):
        r = row + tl.arange(0, ROWS)
        mask = (r < end)[:, None] & inside[None, :]
        x = tl.load(base + r[:, None] * width + c[None, :], mask=mask, other=0.0).to(ACC)
        x = tl.where(mask, x + more[None, :], 0.0)
        first += tl.sum(x, 0)
        second += tl.sum(x * x, 0)
    which = _members(lane, span, per_group, GROUPS)
    _store_part(
        part_ptr, n, part, tl.num_programs(1), block, tl.num_programs(2), first, second, which,
        GROUPS,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["rows", "span", "per_group", "rows_each", "parts", "eps", "add", "silu"]
)
def group_apply(
    x_ptr, add_ptr, weight_ptr, bias_ptr, part_ptr, stat_ptr, y_ptr,
    rows, width, span, per_group, rows_each, parts, eps: tl.float64, add, silu,
    GROUPS: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = act(norm(x + add) * weight + bias); keeps mean and 1 / deviation for backward."""
    n, part, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks = tl.num_programs(2)
    lane, group = tl.arange(0, LANES), tl.arange(0, GROUPS)
    inside = lane < span
    c = block * span + lane
    which = _members(lane, span, per_group, GROUPS)
    first, second = _sum_parts(part_ptr, n, parts, block, blocks, PARTS, GROUPS)
    count = (rows * per_group).to(ACC)
    mean = first / count
    variance = tl.maximum(second / count - mean * mean, 0.0)
    scale = 1 / tl.sqrt(variance + tl.full([GROUPS], eps, ACC))
    if part == 0:
        kept = stat_ptr + (n * blocks + block) * (2 * GROUPS) + group
        tl.store(kept, mean)
        tl.store(kept + GROUPS, scale)
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0).to(ACC)
    bias = tl.load(bias_ptr + c, mask=inside, other=0.0).to(ACC)
    slope = weight * _by_channel(scale, which)
    shift = bias - _by_channel(mean, which) * slope
    more = tl.load(add_ptr + n * width + c, mask=inside & (add > 0), other=0.0).to(ACC)
    shift += more * slope
    begin = part * rows_each
    end = tl.minimum(begin + rows_each, rows)
    start = n.to(tl.int64) * rows * width
    for row in range(begin, end, ROWS):
        r = row + tl.arange(0, ROWS)
        mask = (r < end)[:, None] & inside[None, :]
        at = start + r[:, None] * width + c[None, :]
        z = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC) * slope[None, :] + shift[None, :]
        if silu:
            z = z / (1 + tl.exp(-z))
        tl.store(y_ptr + at, z.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _upstream(x, dy, weight, bias, silu):
    """The gradient of the normalised values."""
    if silu:
        z = x * weight + bias
        s = 1 / (1 + tl.exp(-z))
        dy = dy * s * (1 + z * (1 - s))
    return dy * weight


@triton.jit(do_not_specialize=["rows", "span", "per_group", "rows_each", "add", "silu"])
def group_sums_back(
    x_ptr, add_ptr, weight_ptr, bias_ptr, stat_ptr, dy_ptr, part_ptr,
    rows, width, span, per_group, rows_each, add, silu,
    GROUPS: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums of g and of g x̂ by group: g the gradient of the normalised values x̂."""
    n, part, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks = tl.num_programs(2)
    lane = tl.arange(0, LANES)
    inside = lane < span
    c = block * span + lane
    kept = stat_ptr + (n * blocks + block) * (2 * GROUPS) + lane // per_group
    mean = tl.load(kept, mask=inside, other=0.0)
    scale = tl.load(kept + GROUPS, mask=inside, other=0.0)
    mean -= tl.load(add_ptr + n * width + c, mask=inside & (add > 0), other=0.0).to(ACC)
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0).to(ACC)
    bias = tl.load(bias_ptr + c, mask=inside, other=0.0).to(ACC)
    first = tl.zeros([LANES], ACC)
    second = tl.zeros([LANES], ACC)
    begin = part * rows_each
    end = tl.minimum(begin + rows_each, rows)
    start = n.to(tl.int64) * rows * width
    for row in range(begin, end, ROWS):
        r = row + tl.arange(0, ROWS)
        mask = (r < end)[:, None] & inside[None, :]
        at = start + r[:, None] * width + c[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(ACC)
        x = (x - mean[None, :]) * scale[None, :]
        g = _upstream(x, dy, weight[None, :], bias[None, :], silu)
        first += tl.sum(g, 0)
        second += tl.sum(g * x, 0)
    which = _members(lane, span, per_group, GROUPS)
    _store_part(part_ptr, n, part, tl.num_programs(1), block, blocks, first, second, which, GROUPS)


@triton.jit(
    do_not_specialize=["rows", "span", "per_group", "rows_each", "parts", "add", "silu", "skip"]
)
def group_apply_back(
    x_ptr, add_ptr, weight_ptr, bias_ptr, stat_ptr, dy_ptr, skip_ptr, part_ptr, dx_ptr,
    rows, width, span, per_group, rows_each, parts, add, silu, skip,
    GROUPS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """dx, plus the gradient that reached x around the norm."""
    n, part, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks = tl.num_programs(2)
    lane = tl.arange(0, LANES)
    inside = lane < span
    c = block * span + lane
    kept = stat_ptr + (n * blocks + block) * (2 * GROUPS) + lane // per_group
    mean = tl.load(kept, mask=inside, other=0.0)
    scale = tl.load(kept + GROUPS, mask=inside, other=0.0)
    mean -= tl.load(add_ptr + n * width + c, mask=inside & (add > 0), other=0.0).to(ACC)
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0).to(ACC)
    bias = tl.load(bias_ptr + c, mask=inside, other=0.0).to(ACC)
    which = _members(lane, span, per_group, GROUPS)
    first, second = _sum_parts(part_ptr, n, parts, block, blocks, PARTS, GROUPS)
    count = (rows * per_group).to(ACC)
    first = _by_channel(first / count, which)
    second = _by_channel(second / count, which)
    begin = part * rows_each
    end = tl.minimum(begin + rows_each, rows)
    start = n.to(tl.int64) * rows * width
    for row in range(begin, end, ROWS):
        r = row + tl.arange(0, ROWS)
        mask = (r < end)[:, None] & inside[None, :]
        at = start + r[:, None] * width + c[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(ACC)
        around = tl.load(skip_ptr + at, mask=mask & (skip > 0), other=0.0).to(ACC)
        x = (x - mean[None, :]) * scale[None, :]
        g = _upstream(x, dy, weight[None, :], bias[None, :], silu)
        dx = scale[None, :] * (g - first[None, :] - x * second[None, :]) + around
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "eps", "more"])
def layer_norm(
    x_ptr, more_ptr, weight_ptr, bias_ptr, sum_ptr, stat_ptr, y_ptr, rows, width, eps: tl.float64,
    more, LANES: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = norm(x + more) * weight + bias over the last dimension; keeps the sum, in its dtype."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, LANES)
    mask = (r < rows)[:, None] & (c < width)[None, :]
    at = r.to(tl.int64)[:, None] * width + c[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    if more:
        x += tl.load(more_ptr + at, mask=mask, other=0.0).to(ACC)
        kept = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, kept, mask=mask)
        x = kept.to(ACC)
    mean = tl.sum(x, 1) / width
    apart = tl.where(mask, x - mean[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(apart * apart, 1) / width + tl.full([ROWS], eps, ACC))
    tl.store(stat_ptr + r, mean, mask=r < rows)
    tl.store(stat_ptr + rows + r, scale, mask=r < rows)
    weight = tl.load(weight_ptr + c, mask=c < width, other=0.0).to(ACC)
    bias = tl.load(bias_ptr + c, mask=c < width, other=0.0).to(ACC)
    y = apart * scale[:, None] * weight[None, :] + bias[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "skip"])
def layer_norm_back(
    x_ptr, weight_ptr, stat_ptr, dy_ptr, skip_ptr, dx_ptr, rows, width, skip,
    LANES: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx, plus the gradient that reached x around the norm."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, LANES)
    mask = (r < rows)[:, None] & (c < width)[None, :]
    at = r.to(tl.int64)[:, None] * width + c[None, :]
    mean = tl.load(stat_ptr + r, mask=r < rows, other=0.0)
    scale = tl.load(stat_ptr + rows + r, mask=r < rows, other=0.0)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    weight = tl.load(weight_ptr + c, mask=c < width, other=0.0).to(ACC)
    g = tl.load(dy_ptr + at, mask=mask, other=0.0).to(ACC) * weight[None, :]
    around = tl.load(skip_ptr + at, mask=mask & (skip > 0), other=0.0).to(ACC)
    x = tl.where(mask, (x - mean[:, None]) * scale[:, None], 0.0)
    first = tl.sum(g, 1) / width
    second = tl.sum(g * x, 1) / width
    dx = scale[:, None] * (g - first[:, None] - x * second[:, None]) + around
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _normal(x):
    """The distribution function and the density of the normal distribution."""
    below = 0.5 * (1 + tl.math.erf(x * 0.7071067811865476))
    return below, 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit(do_not_specialize=["rows"])
def geglu(
    x_ptr, y_ptr, rows, width, LANES: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """y = a gelu(b) of rows (a, b), each `width` long."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * LANES + tl.arange(0, LANES)
    mask = (r < rows)[:, None] & (c < width)[None, :]
    out = r.to(tl.int64)[:, None] * width + c[None, :]
    at = r.to(tl.int64)[:, None] * (2 * width) + c[None, :]
    a = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    b = tl.load(x_ptr + at + width, mask=mask, other=0.0).to(ACC)
    below, _ = _normal(b)
    tl.store(y_ptr + out, (a * b * below).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def geglu_back(
    x_ptr, dy_ptr, dx_ptr, rows, width,
    LANES: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * LANES + tl.arange(0, LANES)
    mask = (r < rows)[:, None] & (c < width)[None, :]
    out = r.to(tl.int64)[:, None] * width + c[None, :]
    at = r.to(tl.int64)[:, None] * (2 * width) + c[None, :]
    a = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    b = tl.load(x_ptr + at + width, mask=mask, other=0.0).to(ACC)
    dy = tl.load(dy_ptr + out, mask=mask, other=0.0).to(ACC)
    below, density = _normal(b)
    kind = dx_ptr.dtype.element_ty
    tl.store(dx_ptr + at, (dy * b * below).to(kind), mask=mask)
    tl.store(dx_ptr + at + width, (dy * a * (below + b * density)).to(kind), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def add_bias(
    x_ptr, skip_ptr, bias_ptr, y_ptr, rows, width,
    LANES: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = x + skip + bias, the bias along the last dimension."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * LANES + tl.arange(0, LANES)
    mask = (r < rows)[:, None] & (c < width)[None, :]
    at = r.to(tl.int64)[:, None] * width + c[None, :]
    y = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    y += tl.load(skip_ptr + at, mask=mask, other=0.0).to(ACC)
    y += tl.load(bias_ptr + c, mask=c < width, other=0.0).to(ACC)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
