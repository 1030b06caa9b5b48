"""Triton kernels of a transformer's rows, and backward: norms with modulation, gated sums, SwiGLU,
and the norm and rotary embedding of queries and keys.

A row is a token (or a head of one), its values next to each other in memory. What modulates is a
row for each batch, `each` tokens long, and gets no gradient; `*_step` is from one batch's to the
next, 0 where all have the same. Flags are arguments, as in `kernels`; sums are in ACC. What the
forward could keep for backward is computed again there: a program holds its whole row anyway.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _normed(x, mask, width, eps, centered, ROWS: tl.constexpr, ACC: tl.constexpr):
    """(normalised rows, 1 / deviation); centered: 1 of a layer norm, 0 of the root mean square."""
    mean = tl.sum(x, 1) / width * centered
    x = tl.where(mask, x - mean[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(x * x, 1) / width + tl.full([ROWS], eps, ACC))
    return x * scale[:, None], scale


@triton.jit(
    do_not_specialize=[
        "rows", "each", "gain_step", "shift_step", "eps", "centered", "weighted", "gained",
        "shifted", "skipped",
    ]
)  # fmt: skip
def norm_rows(
    x_ptr, weight_ptr, gain_ptr, shift_ptr, skip_ptr, y_ptr, rows, each, width, gain_step,
    shift_step, eps: tl.float64, centered, weighted, gained, shifted, skipped,
    LANES: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = norm(x) weight gain + shift + skip."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, LANES)
    inside = (c < width)[None, :]
    mask = (r < rows)[:, None] & inside
    at = r.to(tl.int64)[:, None] * width + c[None, :]
    batch = (r // each).to(tl.int64)[:, None]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    weight = tl.load(weight_ptr + c[None, :], mask=inside & (weighted > 0), other=1.0).to(ACC)
    gains = gain_ptr + batch * gain_step + c[None, :]
    gain = tl.load(gains, mask=mask & (gained > 0), other=1.0).to(ACC)
    shifts = shift_ptr + batch * shift_step + c[None, :]
    shift = tl.load(shifts, mask=mask & (shifted > 0), other=0.0).to(ACC)
    skip = tl.load(skip_ptr + at, mask=mask & (skipped > 0), other=0.0).to(ACC)
    x, _ = _normed(x, mask, width, eps, centered, ROWS, ACC)
    y = x * (weight * gain) + shift + skip
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "rows", "each", "gain_step", "eps", "centered", "weighted", "gained", "skipped"
    ]
)  # fmt: skip
def norm_rows_back(
    x_ptr, weight_ptr, gain_ptr, dy_ptr, around_ptr, dx_ptr, rows, each, width, gain_step,
    eps: tl.float64, centered, weighted, gained, skipped,
    LANES: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx, plus the gradient that reached x around the norm."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, LANES)
    inside = (c < width)[None, :]
    mask = (r < rows)[:, None] & inside
    at = r.to(tl.int64)[:, None] * width + c[None, :]
    batch = (r // each).to(tl.int64)[:, None]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    g = tl.load(dy_ptr + at, mask=mask, other=0.0).to(ACC)
    weight = tl.load(weight_ptr + c[None, :], mask=inside & (weighted > 0), other=1.0).to(ACC)
    gains = gain_ptr + batch * gain_step + c[None, :]
    gain = tl.load(gains, mask=mask & (gained > 0), other=1.0).to(ACC)
    around = tl.load(around_ptr + at, mask=mask & (skipped > 0), other=0.0).to(ACC)
    x, scale = _normed(x, mask, width, eps, centered, ROWS, ACC)
    g = g * weight * gain
    first = tl.sum(g, 1) / width * centered
    second = tl.sum(g * x, 1) / width
    dx = scale[:, None] * (g - first[:, None] - x * second[:, None]) + around
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "each", "gain_step", "skipped"])
def gated_rows(
    x_ptr, gain_ptr, skip_ptr, y_ptr, rows, each, width, gain_step, skipped,
    LANES: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = gain x + skip."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * LANES + tl.arange(0, LANES)
    mask = (r < rows)[:, None] & (c < width)[None, :]
    at = r.to(tl.int64)[:, None] * width + c[None, :]
    gains = gain_ptr + (r // each).to(tl.int64)[:, None] * gain_step + c[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    gain = tl.load(gains, mask=mask, other=0.0).to(ACC)
    skip = tl.load(skip_ptr + at, mask=mask & (skipped > 0), other=0.0).to(ACC)
    tl.store(y_ptr + at, (gain * x + skip).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "step"])
def swiglu_rows(
    a_ptr, b_ptr, y_ptr, rows, width, step,
    LANES: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = silu(a) b; step: from a row of a and of b to the next."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * LANES + tl.arange(0, LANES)
    mask = (r < rows)[:, None] & (c < width)[None, :]
    at = r.to(tl.int64)[:, None] * step + c[None, :]
    a = tl.load(a_ptr + at, mask=mask, other=0.0).to(ACC)
    b = tl.load(b_ptr + at, mask=mask, other=0.0).to(ACC)
    out = r.to(tl.int64)[:, None] * width + c[None, :]
    tl.store(y_ptr + out, (a * b / (1 + tl.exp(-a))).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "step", "dy_step", "out_step"])
def swiglu_rows_back(
    a_ptr, b_ptr, dy_ptr, da_ptr, db_ptr, rows, width, step, dy_step, out_step,
    LANES: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * LANES + tl.arange(0, LANES)
    mask = (r < rows)[:, None] & (c < width)[None, :]
    at = r.to(tl.int64)[:, None] * step + c[None, :]
    a = tl.load(a_ptr + at, mask=mask, other=0.0).to(ACC)
    b = tl.load(b_ptr + at, mask=mask, other=0.0).to(ACC)
    above = r.to(tl.int64)[:, None] * dy_step + c[None, :]
    dy = tl.load(dy_ptr + above, mask=mask, other=0.0).to(ACC)
    open = 1 / (1 + tl.exp(-a))
    out = r.to(tl.int64)[:, None] * out_step + c[None, :]
    kind = da_ptr.dtype.element_ty
    tl.store(da_ptr + out, (dy * b * open * (1 + a * (1 - open))).to(kind), mask=mask)
    tl.store(db_ptr + out, (dy * a * open).to(kind), mask=mask)


@triton.jit
def _pairs(x, ROWS: tl.constexpr, HALF: tl.constexpr):
    """Values 0, 2, 4, ... and 1, 3, 5, ... of each row."""
    return tl.split(tl.reshape(x, [ROWS, HALF, 2]))


@triton.jit
def _rows_of(a, b, ROWS: tl.constexpr, HALF: tl.constexpr):
    return tl.reshape(tl.join(a, b), [ROWS, 2 * HALF])


@triton.jit
def _angles(cos_ptr, sin_ptr, token, length, batch_step, r, rows, width, HALF: tl.constexpr):
    """cos and sin of each row's token, (ROWS, HALF); every second value of a table `width` wide."""
    pair = tl.arange(0, HALF)
    batch = (token // length).to(tl.int64)
    place = (token % length).to(tl.int64)
    at = (batch * batch_step + place * width)[:, None] + 2 * pair[None, :]
    mask = (r < rows)[:, None] & (2 * pair < width)[None, :]
    cos = tl.load(cos_ptr + at, mask=mask, other=0.0)
    return cos, tl.load(sin_ptr + at, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["rows", "heads", "length", "step", "batch_step", "eps"])
def rotated_heads(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, y_ptr, rows, heads, length, width, step, batch_step,
    eps: tl.float64, LANES: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows are heads of tokens, `step` from a token to the next: normed by the root mean square,
    times weight, and pairs of neighbours turned by the token's angles.
    """
    HALF: tl.constexpr = LANES // 2
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, LANES)
    mask = (r < rows)[:, None] & (c < width)[None, :]
    token = r // heads
    at = (token.to(tl.int64) * step + (r % heads) * width)[:, None] + c[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    weight = tl.load(weight_ptr + c, mask=c < width, other=0.0).to(ACC)
    cos, sin = _angles(cos_ptr, sin_ptr, token, length, batch_step, r, rows, width, HALF)
    cos = cos.to(ACC)
    sin = sin.to(ACC)
    x, _ = _normed(x, mask, width, eps, 0, ROWS, ACC)
    a, b = _pairs(x * weight[None, :], ROWS, HALF)
    y = _rows_of(a * cos - b * sin, b * cos + a * sin, ROWS, HALF)
    out = r.to(tl.int64)[:, None] * width + c[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "heads", "length", "step", "batch_step", "eps"])
def rotated_heads_back(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, dy_ptr, dx_ptr, rows, heads, length, width, step,
    batch_step, eps: tl.float64, LANES: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = LANES // 2
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, LANES)
    mask = (r < rows)[:, None] & (c < width)[None, :]
    token = r // heads
    at = (token.to(tl.int64) * step + (r % heads) * width)[:, None] + c[None, :]
    out = r.to(tl.int64)[:, None] * width + c[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    dy = tl.load(dy_ptr + out, mask=mask, other=0.0).to(ACC)
    weight = tl.load(weight_ptr + c, mask=c < width, other=0.0).to(ACC)
    cos, sin = _angles(cos_ptr, sin_ptr, token, length, batch_step, r, rows, width, HALF)
    cos = cos.to(ACC)
    sin = sin.to(ACC)
    x, scale = _normed(x, mask, width, eps, 0, ROWS, ACC)
    a, b = _pairs(dy, ROWS, HALF)
    g = _rows_of(a * cos + b * sin, b * cos - a * sin, ROWS, HALF) * weight[None, :]
    dx = scale[:, None] * (g - x * (tl.sum(g * x, 1) / width)[:, None])
    tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
