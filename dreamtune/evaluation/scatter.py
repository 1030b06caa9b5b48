"""Likeness against prompt following as inline SVG, with 95% ellipses of the means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from dreamtune.evaluation.curves import label, scale
from dreamtune.evaluation.results import Row
from dreamtune.evaluation.statistics import Averaging, bootstrap, clusters_of, weights, widening

WIDTH, HEIGHT = 520, 360
LEFT, RIGHT, TOP, BOTTOM = 54, 18, 16, 44
CHI2 = 5.991  # 95% of chi-squared with two degrees of freedom
CORNERS = 48  # of an ellipse that is drawn

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
    """Of the rows that have both scores; None where none has. The ellipse is that of the bootstrap,
    as wide as the intervals are (`statistics.estimate`); one cluster alone has none."""
    known = [r for r in rows if r.scores.get(x_key) is not None and r.scores.get(y_key) is not None]
    if not known:
        return None
    values = np.array([[r.scores[x_key], r.scores[y_key]] for r in known], dtype=np.float64)
    subjects = [row.subject for row in known]
    w = weights(averaging, subjects, [row.pairs.get(y_key, 1) for row in known])
    mean = (w[:, None] * values).sum(0) / w.sum()
    each = {s: values[[i for i, o in enumerate(subjects) if o == s]].mean(0) for s in subjects}
    labels, _ = clusters_of(subjects, [row.prompt for row in known])
    count = len(np.unique(labels))
    outline: list[Point] = []
    if count > 1:
        drawn = bootstrap(values, w, labels, 2000)
        spread, axes = np.linalg.eigh(np.cov(drawn.T))
        radii = np.sqrt(np.clip(spread, 0, None) * CHI2) * widening(count)
        turns = np.linspace(0, 2 * math.pi, CORNERS, endpoint=False)
        circle = np.stack([np.cos(turns) * radii[0], np.sin(turns) * radii[1]], 1)
        outline = [(float(x), float(y)) for x, y in circle @ axes.T + mean]
    dots = [(float(p[0]), float(p[1])) for p in each.values()]
    return Cloud(name, (float(mean[0]), float(mean[1])), outline, dots)


@dataclass(frozen=True)
class _Frame:
    """Values on the chart's pixels, with their axes."""

    x: tuple[float, float, list[float]]  # low, high, ticks
    y: tuple[float, float, list[float]]

    def at(self, point: Point) -> Point:
        across = (point[0] - self.x[0]) / (self.x[1] - self.x[0])
        down = (self.y[1] - point[1]) / (self.y[1] - self.y[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), TOP + down * (HEIGHT - TOP - BOTTOM)

    def rule(self, kind: str, value: float) -> str:
        y = self.at((self.x[0], value))[1]
        ends = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
        return f'<line class="{kind}" {ends}/>'

    def axes(self, x_title: str, y_title: str) -> list[str]:
        parts = [self.rule("rule", t) for t in self.y[2]]
        for t in self.y[2]:
            y = self.at((self.x[0], t))[1] + 3.5
            parts.append(tick(LEFT - 7, y, t, "end"))
        parts += [tick(self.at((t, 0.0))[0], HEIGHT - 28, t, "middle") for t in self.x[2]]
        parts.append(label(WIDTH - RIGHT, HEIGHT - 8, f"{x_title} →", "end"))
        return [*parts, label(LEFT, TOP - 8, f"↑ {y_title}", "start")]

    def dots(self, cloud: Cloud, kind: str) -> list[str]:
        x, y = self.at(cloud.mean)
        each = [self.at(p) for p in cloud.subjects] if len(cloud.subjects) > 1 else []
        specks = [
            f'<circle class="speck {kind}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in each
        ]
        side, dx = ("end", -10) if x > WIDTH * 0.6 else ("start", 10)
        mean = f'<circle class="mean {kind}" cx="{x:.1f}" cy="{y:.1f}" r="6"/>'
        return [*specks, mean, label(x + dx, y - 9, cloud.name, side)]

    def ellipse(self, cloud: Cloud, kind: str) -> str:
        if not cloud.outline:
            return ""
        corners = " ".join("{:.1f},{:.1f}".format(*self.at(p)) for p in cloud.outline)
        return f'<polygon class="ellipse {kind}" points="{corners}"/>'


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
    # An ellipse of few subjects may be many times the plot: it is cut off, not the dots squeezed.
    x, y = (
        limited([p[i] for p in shown], [p[i] for c in clouds for p in c.outline]) for i in (0, 1)
    )
    if level is not None:
        y = (min(y[0], level), max(y[1], level))
    frame = _Frame(scale(*x), scale(*y))
    kinds = ["first", *["second"] * (len(clouds) - 1)]
    parts = frame.axes(x_title, y_title)
    if level is not None:
        height = frame.at((0.0, level))[1]
        parts += [frame.rule("reference", level)]
        parts += [label(WIDTH - RIGHT, height - 5, level_name, "end")]
    inside = f'x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"'
    ellipses = "".join(frame.ellipse(c, kind) for c, kind in zip(clouds, kinds))
    for c, kind in [*zip(clouds, kinds)][::-1]:
        parts += frame.dots(c, kind)
    said = "; ".join(f"{c.name} at {c.mean[0]:.3f}, {c.mean[1]:.3f}" for c in clouds)
    title = f"{y_title} against {x_title}"
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}: {said}")}">'
        f'<defs><clipPath id="plot"><rect {inside}/></clipPath></defs>'
        f'<g clip-path="url(#plot)">{ellipses}</g>{"".join(parts)}</svg></figure>'
    )


def tick(x: float, y: float, value: float, anchor: str) -> str:
    text = format(round(value, 9) + 0.0, ".3g")
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def limited(dots: Sequence[float], outline: Sequence[float]) -> tuple[float, float]:
    """(low, high) of the dots, widened to the outline by at most the dots' own spread, or 0.05."""
    low, high = min(dots), max(dots)
    room = max(high - low, 0.05)
    return max(min([low, *outline]), low - room), min(max([high, *outline]), high + room)
