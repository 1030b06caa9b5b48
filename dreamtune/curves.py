"""Score curves as inline SVG: colours come from the page's CSS, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 340, 216
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 30


def curve(
    title: str,
    steps: Sequence[int],
    values: Sequence[float | None],
    best: int,
    *,
    reference: float | None = None,
    reference_name: str = "",
    other: Sequence[float | None] = (),
    other_name: str = "",
) -> str:
    """One chart: `values` against `steps`, the point `best` (an index) marked with its value.

    Args:
        reference: a dashed level, such as the photos among themselves.
        other: a second, quieter line on the same scale. Values that are None or not finite are
            left out of either line.
    """
    points = _finite(steps, values)
    others = _finite(steps, other)
    shown = [y for _, y in points + others] + ([] if reference is None else [reference])
    if not points:
        return ""
    low, high, ticks = _scale(min(shown), max(shown))
    last = max(max(steps), 1)

    def x(step: float) -> float:
        return LEFT + step / last * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    unit = ticks[1] - ticks[0]
    digits = next((d for d in range(7) if abs(round(unit, d) - unit) < 1e-3 * unit), 7)
    parts = [
        f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text class="tick" x="{LEFT - 7}" y="{y(t) + 3.5:.1f}" text-anchor="end">'
        f"{t:.{digits}f}</text>"
        for t in ticks
    ]
    for step in _step_ticks(last):
        anchor = "end" if step == last else "middle"
        parts.append(
            f'<text class="tick" x="{x(step):.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">'
            f"{step}</text>"
        )
    if reference is not None:
        parts.append(
            f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(reference):.1f}" '
            f'y2="{y(reference):.1f}"/>'
        )
        parts.append(_label(WIDTH - RIGHT, y(reference) - 5, reference_name, "end"))
    if others:
        path = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in others)
        parts.append(f'<polyline class="other" points="{path}"/>')
        parts.append(_label(x(others[-1][0]), y(others[-1][1]) - 6, other_name, "end"))
    path = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in points)
    parts.append(f'<polyline class="line" points="{path}"/>')
    parts += [f'<circle class="dot" cx="{x(s):.1f}" cy="{y(v):.1f}" r="2.6"/>' for s, v in points]
    chosen = values[best]
    summary = f"{title} against training steps, from {points[0][1]:.3f} to {points[-1][1]:.3f}"
    if chosen is not None and math.isfinite(chosen):
        cx, cy = x(steps[best]), y(chosen)
        side = ("start", 9.0) if cx < WIDTH * 0.6 else ("end", -9.0)
        # Below the point if the label above would touch the top or the reference's own label.
        near = reference is not None and 0 < cy - y(reference) < 34
        dy = 18 if near or cy < TOP + 18 else -9
        # First, so that every label stands on top of it.
        parts.insert(
            0,
            f'<line class="best" x1="{cx:.1f}" x2="{cx:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>',
        )
        parts.append(
            f'<circle class="best-dot" cx="{cx:.1f}" cy="{cy:.1f}" r="5"/>'
            f'<text class="value" x="{cx + side[1]:.1f}" y="{cy + dy:.1f}" '
            f'text-anchor="{side[0]}">{chosen:.3f}</text>'
        )
        summary += f"; {chosen:.3f} at the best step, {steps[best]}"
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(summary)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _finite(steps: Sequence[int], values: Sequence[float | None]) -> list[tuple[int, float]]:
    return [(s, v) for s, v in zip(steps, values) if v is not None and math.isfinite(v)]


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text class="name" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _scale(low: float, high: float) -> tuple[float, float, list[float]]:
    """(axis low, axis high, ticks) with two to five ticks at 1, 2 or 5 times a power of ten."""
    if high - low < 1e-3:
        low, high = low - 0.01, high + 0.01
    pad = 0.12 * (high - low)
    low, high = low - pad, high + pad
    raw = (high - low) / 3
    power = 10.0 ** math.floor(math.log10(raw))
    unit = next(u * power for u in (1, 2, 5, 10) if u * power >= raw * 0.999)
    if (high - low) / unit < 2:
        unit /= 2
    first = math.ceil(low / unit)
    return low, high, [i * unit for i in range(first, math.floor(high / unit) + 1)]


def _step_ticks(last: int) -> list[int]:
    """0, the last step and up to four round ones between."""
    raw = last / 4
    power = 10.0 ** math.floor(math.log10(raw)) if raw >= 1 else 1
    unit = max(1, round(next(u * power for u in (1, 2, 2.5, 5, 10) if u * power >= raw * 0.999)))
    return [step for step in range(0, last, unit) if last - step > unit * 0.4] + [last]
