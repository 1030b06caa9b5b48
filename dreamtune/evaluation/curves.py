"""Score curves as inline SVG: colours come from the page's CSS, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
    number_format: str = ".3f",
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
    low, high, ticks = scale(min(shown), max(shown))
    plane = _Plane(low, high, max(max(steps), 1))
    parts = plane.grid(ticks)
    if reference is not None:
        level = plane.y(reference)
        parts.append(_rule("reference", level))
        parts.append(label(WIDTH - RIGHT, level - 5, reference_name, "end"))
    if others:
        parts.append(f'<polyline class="other" points="{plane.path(others)}"/>')
        x, y = plane.x(others[-1][0]), plane.y(others[-1][1])
        parts.append(label(x, y - 6, other_name, "end"))
    parts.append(f'<polyline class="line" points="{plane.path(points)}"/>')
    parts += [
        f'<circle class="dot" cx="{plane.x(s):.1f}" cy="{plane.y(v):.1f}" r="2.6"/>'
        for s, v in points
    ]
    chosen = values[best]
    first, last = (format(y, number_format) for _, y in (points[0], points[-1]))
    summary = f"{title} against training steps, from {first} to {last}"
    if chosen is not None and math.isfinite(chosen):
        line, dot = plane.mark(steps[best], chosen, format(chosen, number_format), reference)
        # First, so that every label stands on top of it.
        parts = [line, *parts, dot]
        summary += f"; {chosen:{number_format}} at the best step, {steps[best]}"
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(summary)}">'
        f"{''.join(parts)}</svg></figure>"
    )


@dataclass(frozen=True)
class _Plane:
    """Steps 0 to `last` and values `low` to `high` on the chart's pixels."""

    low: float
    high: float
    last: int

    def x(self, step: float) -> float:
        return LEFT + step / self.last * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return TOP + (self.high - value) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Sequence[tuple[int, float]]) -> str:
        return " ".join(f"{self.x(s):.1f},{self.y(v):.1f}" for s, v in points)

    def grid(self, ticks: Sequence[float]) -> list[str]:
        unit = ticks[1] - ticks[0]
        digits = next((d for d in range(7) if abs(round(unit, d) - unit) < 1e-3 * unit), 7)
        parts = [
            _rule("rule", self.y(t))
            + f'<text class="tick" x="{LEFT - 7}" y="{self.y(t) + 3.5:.1f}" text-anchor="end">'
            f"{t:.{digits}f}</text>"
            for t in ticks
        ]
        for step in _step_ticks(self.last):
            anchor = "end" if step == self.last else "middle"
            parts.append(
                f'<text class="tick" x="{self.x(step):.1f}" y="{HEIGHT - 10}" '
                f'text-anchor="{anchor}">{step}</text>'
            )
        return parts

    def mark(self, step: int, value: float, text: str, reference: float | None) -> tuple[str, str]:
        """The best step: a line through the chart, and the point with its value."""
        x, y = self.x(step), self.y(value)
        anchor, dx = ("start", 9.0) if x < WIDTH * 0.6 else ("end", -9.0)
        # Below the point if the label above would touch the top or the reference's own label.
        near = reference is not None and 0 < y - self.y(reference) < 34
        dy = 18 if near or y < TOP + 18 else -9
        line = f'<line class="best" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        return line, (
            f'<circle class="best-dot" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
            f'<text class="value" x="{x + dx:.1f}" y="{y + dy:.1f}" '
            f'text-anchor="{anchor}">{text}</text>'
        )


def _rule(kind: str, y: float) -> str:
    return f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _finite(steps: Sequence[int], values: Sequence[float | None]) -> list[tuple[int, float]]:
    return [(s, v) for s, v in zip(steps, values) if v is not None and math.isfinite(v)]


def label(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text class="name" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def scale(low: float, high: float) -> tuple[float, float, list[float]]:
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
