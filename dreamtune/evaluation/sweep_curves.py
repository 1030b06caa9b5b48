"""Scores of several runs against a value that was swept, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from statistics import fmean

from dreamtune.evaluation.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, scale

DASH = 16  # pixels on either side of a word
DECADES = 8.0  # ratio of the largest to the smallest value from which the axis is logarithmic

Value = float | str


def swept_curve(
    title: str,
    name: str,
    points: Sequence[tuple[Value, str, float]],
    number_format: str = ".3f",
) -> str:
    """One chart: a dot a run, and a line through the means of the runs of each value, or a dash at
    the mean of each word.

    Args:
        name: of what was swept.
        points: (value, as it was written, score) of each run. Words, and values of which one is a
            word, stand side by side in their order; positive numbers that span decades on a
            logarithmic axis. Scores that are not finite are left out.

    "" where nothing is left.
    """
    shown = [(value, text, score) for value, text, score in points if math.isfinite(score)]
    if not shown:
        return ""
    places = places_of([value for value, _, _ in shown])
    low, high, ticks = scale(min(s for *_, s in shown), max(s for *_, s in shown))

    def x(value: Value) -> float:
        return LEFT + (0.06 + 0.88 * places[value]) * (WIDTH - LEFT - RIGHT)

    def y(score: float) -> float:
        return TOP + (high - score) / (high - low) * (HEIGHT - TOP - BOTTOM)

    means = {v: fmean(s for w, _, s in shown if w == v) for v in places}
    parts = []
    for tick in ticks:
        parts.append(
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" '
            f'y2="{y(tick):.1f}"/><text class="tick" x="{LEFT - 7}" y="{y(tick) + 3.5:.1f}" '
            f'text-anchor="end">{tick:.3g}</text>'
        )
    for value, text in dict((value, text) for value, text, _ in shown).items():
        parts.append(
            f'<text class="tick" x="{x(value):.1f}" y="{HEIGHT - 10}" text-anchor="middle">'
            f"{escape(text)}</text>"
        )
    if any(isinstance(value, str) for value in means):  # words have no way between them
        lines = [[(x(v) - DASH, y(m)), (x(v) + DASH, y(m))] for v, m in means.items()]
    else:
        lines = [[(x(v), y(means[v])) for v in sorted(means, key=x)]]
    for line in lines:
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in line)
        parts.append(f'<polyline class="line" points="{path}"/>')
    parts += [f'<circle class="dot" cx="{x(v):.1f}" cy="{y(s):.1f}" r="2.6"/>' for v, _, s in shown]
    texts = {value: text for value, text, _ in shown}
    said = "; ".join(f"{texts[v]}: {m:{number_format}}" for v, m in means.items())
    head = f"{title} against {name}"
    return (
        f'<figure class="chart"><figcaption>{escape(head)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{head}: {said}")}">'
        f"{''.join(parts)}</svg></figure>"
    )


def places_of(values: Sequence[Value]) -> dict[Value, float]:
    """Where each distinct value stands on the axis, 0 to 1; a value alone in the middle."""
    distinct = list(dict.fromkeys(values))
    numbers = [float(v) for v in distinct if not isinstance(v, str)]
    if len(numbers) < len(distinct):
        numbers = [float(i) for i in range(len(distinct))]
    elif min(numbers) > 0 and max(numbers) >= DECADES * min(numbers):
        numbers = [math.log(number) for number in numbers]
    low, high = min(numbers), max(numbers)
    return {v: (n - low) / (high - low) if high > low else 0.5 for v, n in zip(distinct, numbers)}
