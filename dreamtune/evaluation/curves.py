"""Scores of a run against its training steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dreamtune.evaluation.chart import (
    ACCENT,
    CARD,
    INK,
    MARK,
    SOFT,
    chart,
    limits,
    put,
    set_scale,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = 340, 216
MARGINS = 50, 14, 14, 26  # a number of seven digits fits


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
    """One chart: `values` against `steps`, the point `best` (an index) marked with its value; ""
    where no value is left.

    Args:
        reference: a dashed level, such as the photos among themselves.
        other: a second, quieter line on the same scale. Values that are None or not finite are
            left out of either line.
    """
    points, others = _finite(steps, values), _finite(steps, other)
    if not points:
        return ""
    low, high = limits([y for _, y in points + others] + ([] if reference is None else [reference]))

    def paint(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        set_scale(axes, "y", low, high)
        axes.set_xlim(0, max(*steps, 1))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=True))
        if reference is not None:
            axes.axhline(reference, color=SOFT, linewidth=1, dashes=(5, 4), gid=f"{MARK}reference")
            put(axes, reference_name, (0, reference), (0, 4), "right", right_edge=True)
        if others:
            axes.plot(*zip(*others), color=SOFT, linewidth=1.5, alpha=0.8, gid=f"{MARK}other")
            put(axes, other_name, others[-1], (0, 5), "right")
        style: dict[str, Any] = {"color": INK, "linewidth": 2, "marker": "o", "markersize": 4.5}
        # A point on the frame is whole.
        axes.plot(*zip(*points), **style, clip_on=False, gid=f"{MARK}line")
        if shown is not None:
            _mark(axes, steps[best], shown, format(shown, number_format), reference)

    chosen = values[best]
    shown = chosen if chosen is not None and math.isfinite(chosen) else None
    first, last = (format(y, number_format) for _, y in (points[0], points[-1]))
    said = f"{title} against training steps, from {first} to {last}"
    if shown is not None:
        said += f"; {shown:{number_format}} at the best step, {steps[best]}"
    return chart(title, said, SIZE, paint, MARGINS)


def _mark(axes: Axes, step: int, value: float, text: str, reference: float | None) -> None:
    """The best step: a line through the chart, and the point with its value."""
    axes.axvline(step, color=ACCENT, linewidth=1, dashes=(2, 3), gid=f"{MARK}best")
    dot: dict[str, Any] = {
        "color": ACCENT,
        "markeredgecolor": CARD,
        "markeredgewidth": 2,
        "markersize": 11,
    }
    axes.plot([step], [value], marker="o", **dot, clip_on=False, zorder=4, gid=f"{MARK}best-dot")
    (low, high), last = axes.get_ylim(), axes.get_xlim()[1]
    # Below the point if the label above would touch the top or the reference's own label.
    near = reference is not None and 0 < (reference - value) / (high - low) < 0.2
    down = near or (high - value) / (high - low) < 0.1
    right = step < 0.6 * last
    shift = (9 if right else -9, -6 if down else 6)
    put(axes, text, (step, value), shift, "left" if right else "right", value=True)


def _finite(steps: Sequence[int], values: Sequence[float | None]) -> list[tuple[int, float]]:
    return [(s, v) for s, v in zip(steps, values) if v is not None and math.isfinite(v)]
