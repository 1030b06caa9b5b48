"""Likeness against prompt following, with 95% ellipses of the means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dreamtune.evaluation.chart import (
    ACCENT,
    CARD,
    MARK,
    SMALL,
    SOFT,
    chart,
    limited,
    limits,
    plain,
    put,
    set_scale,
)
from dreamtune.evaluation.results import Row
from dreamtune.evaluation.statistics import (
    Array,
    Averaging,
    bootstrap,
    clusters_of,
    weights,
    widening,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = 420, 310
CHI2 = 5.991  # 95% of chi-squared with two degrees of freedom
CORNERS = 48  # of an ellipse that is drawn
NAME = 80, 16  # what a name takes of the chart, in pixels

Point = tuple[float, float]


@dataclass(frozen=True)
class Cloud:
    """A method in the plot: its mean (x, y), the outline of its ellipse, its subjects' means."""

    name: str
    mean: Point
    outline: Sequence[Point]
    subjects: Sequence[Point]


def cloud(
    name: str, rows: Sequence[Row], x_key: str, y_key: str, averaging: Averaging
) -> Cloud | None:
    """None where no row has one of the scores. Each score is averaged as the table averages it
    (`results.mean_of`): by its own comparisons. The ellipse is that of the bootstrap, as wide as
    the intervals are (`statistics.estimate`); one cluster alone has none."""
    rows = [row for row in rows if any(row.scores.get(k) is not None for k in (x_key, y_key))]
    columns = [column(rows, key, averaging) for key in (x_key, y_key)]
    values, w = (np.stack(part, 1) for part in zip(*columns))
    if not rows or not w.any(0).all():
        return None
    names = [row.subject for row in rows]
    labels, _ = clusters_of(names, [row.prompt for row in rows])
    mean = (w * values).sum(0) / w.sum(0)
    count = min(len(np.unique(labels[one > 0])) for one in w.T)
    outline = ellipse(mean, values, w, labels, count) if count > 1 else []
    dots = []
    for subject in dict.fromkeys(names):
        own = np.array([other == subject for other in names])
        if w[own].any(0).all():
            dots.append((w[own] * values[own]).sum(0) / w[own].sum(0))
    (middle, *each) = [(float(p[0]), float(p[1])) for p in (mean, *dots)]
    return Cloud(name, middle, outline, each)


def column(rows: Sequence[Row], key: str, averaging: Averaging) -> tuple[Array, Array]:
    """(N,) values of a score and its weights, both 0 where a row has it not."""
    found = [row.scores.get(key) for row in rows]
    known = np.array([value is not None for value in found], dtype=bool)
    having = [row for row, there in zip(rows, known) if there]
    w = np.zeros(len(rows))
    w[known] = weights(
        averaging, [row.subject for row in having], [row.pairs.get(key, 1) for row in having]
    )
    return np.array([value or 0.0 for value in found], dtype=np.float64), w


def ellipse(
    mean: Array, values: Array, w: Array, labels: NDArray[np.int64], count: int
) -> list[Point]:
    """The corners of the ellipse of the mean (2,); count: clusters that are drawn from."""
    with np.errstate(invalid="ignore"):
        drawn = bootstrap(values, w, labels, 2000)
    # A draw of clusters of which none has one of the scores is no draw.
    spread, axes = np.linalg.eigh(np.cov(drawn[np.isfinite(drawn).all(1)].T))
    radii = np.sqrt(np.clip(spread, 0, None) * CHI2) * widening(count)
    turns = np.linspace(0, 2 * math.pi, CORNERS, endpoint=False)
    circle = np.stack([np.cos(turns) * radii[0], np.sin(turns) * radii[1]], 1)
    return [(float(x), float(y)) for x, y in circle @ axes.T + mean]


def scatter(
    clouds: Sequence[Cloud],
    x_title: str,
    y_title: str,
    level: float | None = None,
    level_name: str = "",
) -> str:
    """One chart, the first cloud in front; level: a dashed line at that height, such as the photos
    among themselves."""
    shown = [p for c in clouds for p in (c.mean, *c.subjects)]
    x, y = (
        limited([p[i] for p in shown], [p[i] for c in clouds for p in c.outline]) for i in (0, 1)
    )
    if level is not None:
        y = (min(y[0], level), max(y[1], level))

    def paint(axes: Axes) -> None:
        set_scale(axes, "x", *limits(x))
        set_scale(axes, "y", *limits(y))
        axes.set_xlabel(plain(f"{x_title} →"), loc="right", color=SOFT, fontsize=SMALL)
        axes.set_title(plain(f"↑ {y_title}"), loc="left", color=SOFT, fontsize=SMALL)
        if level is not None:
            axes.axhline(level, color=SOFT, linewidth=1, dashes=(5, 4), gid=f"{MARK}reference")
            put(axes, level_name, (0, level), (0, 4), "right", right_edge=True)
        heights = apart(clouds, axes.get_xlim(), axes.get_ylim())
        for number, one in reversed([*enumerate(clouds)]):
            draw(axes, one, heights[number], first=not number)

    said = "; ".join(f"{c.name} at {c.mean[0]:.3f}, {c.mean[1]:.3f}" for c in clouds)
    title = f"{y_title} against {x_title}"
    return chart(title, f"{title}: {said}", SIZE, paint)


def apart(clouds: Sequence[Cloud], x: Point, y: Point) -> list[float]:
    """Where each name stands, on the axis of y: at its mean, or below the names that it would cover
    there. x, y: (low, high) of the axes."""
    width, line = (NAME[i] / SIZE[i] * (high - low) for i, (low, high) in enumerate((x, y)))
    heights = [one.mean[1] for one in clouds]
    done: list[int] = []
    for number in sorted(range(len(clouds)), key=lambda n: -heights[n]):
        near = [n for n in done if abs(clouds[n].mean[0] - clouds[number].mean[0]) < width]
        for other in sorted(near, key=lambda n: -heights[n]):
            if abs(heights[other] - heights[number]) < line:
                heights[number] = heights[other] - line
        done.append(number)
    return heights


def draw(axes: Axes, cloud: Cloud, height: float, first: bool) -> None:
    """Its ellipse, its subjects where there are several, its mean, and its name at that height."""
    colour, kind = (ACCENT, "first") if first else (SOFT, "second")
    if cloud.outline:
        corners = [*cloud.outline, cloud.outline[0]]
        axes.fill(*zip(*corners), color=colour, alpha=0.12, linewidth=0)
        axes.plot(*zip(*corners), color=colour, linewidth=1.5, gid=f"{MARK}ellipse {kind}")
    dots: dict[str, Any] = {"linestyle": "none", "marker": "o", "color": colour, "clip_on": False}
    if len(cloud.subjects) > 1:
        specks: dict[str, Any] = {"markersize": 6, "markeredgewidth": 0, "alpha": 0.45}
        axes.plot(*zip(*cloud.subjects), **dots, **specks, gid=f"{MARK}subjects {kind}")
    edge = (CARD, 2.0) if first else (SOFT, 2.5)
    dots |= {"color": colour if first else CARD, "markersize": 12, "zorder": 4}
    dots |= {"markeredgecolor": edge[0], "markeredgewidth": edge[1]}
    axes.plot(*([value] for value in cloud.mean), **dots, gid=f"{MARK}mean {kind}")
    low, high = axes.get_xlim()
    right = cloud.mean[0] < low + 0.6 * (high - low)
    at = cloud.mean[0], height
    put(axes, cloud.name, at, (9 if right else -9, 6), "left" if right else "right")
