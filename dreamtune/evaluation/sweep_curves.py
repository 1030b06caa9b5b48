"""Scores of several runs against a value that was swept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dreamtune.evaluation.chart import (
    INK,
    MARK,
    SMALL,
    SOFT,
    chart,
    limited,
    limits,
    plain,
    set_scale,
)
from dreamtune.evaluation.statistics import Estimate, estimate, weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = 340, 216
DASH = 0.12  # on either side of a mean, where the places are 1 apart
DECADES = 8.0  # ratio of the largest to the smallest value from which the axis is logarithmic
UNORDERED = ("seed",)  # numbers of which a larger one is not more
LONGEST, ROOM = 22, 28  # characters: of one label, and of all before they are turned

Value = float | str


@dataclass(frozen=True)
class Point:
    """A run's score at the swept value; text: the value as it was written; seed: of the run."""

    value: Value
    text: str
    score: float
    seed: str = ""


def swept_curve(title: str, name: str, points: Sequence[Point], number_format: str = ".3f") -> str:
    """One chart: a dot a run, the mean at each value, with its 95% interval over seeds where there
    are several. A line joins the means of numbers; nothing lies between words or between seeds, of
    which the chart shows the mean of all instead. Scores that are not finite are left out.

    Args:
        name: of what was swept. Words, and values of which one is a word, stand side by side in
            their order; positive numbers that span decades on a logarithmic axis.

    "" where nothing is left.
    """
    shown = [point for point in points if math.isfinite(point.score)]
    if not shown:
        return ""
    places, log = places_of(name, [point.value for point in shown])
    ordered = is_ordered(name, [point.value for point in shown])
    means = {v: over_seeds([p for p in shown if p.value == v]) for v in places}
    whole = over_seeds(shown) if name == "seed" and len(means) > 1 else None
    texts = {point.value: point.text for point in shown}

    def paint(axes: Axes) -> None:
        ends = [end for e in (*means.values(), whole) if e for end in (e.low, e.high)]
        scores = [point.score for point in shown]
        set_scale(axes, "y", *limits(limited(scores, [end for end in ends if end is not None])))
        set_places(axes, places, texts, log)
        if whole is not None:
            level(axes, whole)
        if ordered:
            line = sorted((places[v], e.mean) for v, e in means.items())
            axes.plot(*zip(*line), color=INK, linewidth=2, gid=f"{MARK}line")
        for value, e in means.items():
            x = places[value]
            if not ordered:
                axes.plot([x - DASH, x + DASH], [e.mean] * 2, color=INK, lw=2, gid=f"{MARK}dash")
            if e.low is not None and e.high is not None:
                axes.plot([x, x], [e.low, e.high], color=INK, lw=1, gid=f"{MARK}interval")
        dots = [places[point.value] for point in shown], scores
        style: dict[str, Any] = {"color": INK, "linestyle": "none", "marker": "o", "markersize": 5}
        axes.plot(*dots, **style, clip_on=False, gid=f"{MARK}dots")

    said = "; ".join(f"{texts[v]}: {e.mean:{number_format}}" for v, e in means.items())
    if whole is not None and whole.low is not None and whole.high is not None:
        said += (
            f"; mean of {len(means)} seeds: {whole.mean:{number_format}}, 95% interval "
            f"{whole.low:{number_format}} to {whole.high:{number_format}}"
        )
    return chart(f"{title} against {name}", f"{title} against {name}: {said}", SIZE, paint)


def over_seeds(points: Sequence[Point]) -> Estimate:
    """The mean of the seeds' means, with its interval where there are several."""
    seeds = [point.seed for point in points]
    scores = [point.score for point in points]
    w = weights("subjects", seeds, [1] * len(seeds))
    return estimate(scores, seeds, [""] * len(seeds), w, tied=True)


def level(axes: Axes, e: Estimate) -> None:
    """The mean of all seeds as a dashed line, its interval as a band."""
    if e.low is not None and e.high is not None:
        axes.axhspan(e.low, e.high, color=SOFT, alpha=0.14, linewidth=0, gid=f"{MARK}band")
    axes.axhline(e.mean, color=SOFT, linewidth=1, dashes=(5, 4), gid=f"{MARK}reference")


def set_places(axes: Axes, places: dict[Value, float], texts: dict[Value, str], log: bool) -> None:
    """The horizontal axis: the values that were tried, as they were written, and no others."""
    from matplotlib.ticker import NullLocator

    low, high = min(places.values()), max(places.values())
    if log:
        axes.set_xscale("log")
        room = (high / low) ** 0.07
        axes.set_xlim(low / room, high * room)
    else:
        room = 0.07 * (high - low) or 1.0
        axes.set_xlim(low - room, high + room)
    axes.xaxis.set_minor_locator(NullLocator())
    labels = [plain(t if len(t) <= LONGEST else f"{t[: LONGEST - 1]}…") for t in texts.values()]
    turned = sum(map(len, labels)) > ROOM
    look: dict[str, Any] = (
        {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if turned else {}
    )
    axes.set_xticks([places[v] for v in texts], labels, fontsize=SMALL, **look)


def is_ordered(name: str, values: Sequence[Value]) -> bool:
    words = any(isinstance(value, (str, bool)) for value in values)
    return not words and name not in UNORDERED


def places_of(name: str, values: Sequence[Value]) -> tuple[dict[Value, float], bool]:
    """(where each distinct value stands, whether the axis is logarithmic)."""
    distinct = list(dict.fromkeys(values))
    if not is_ordered(name, distinct):
        return {value: float(i) for i, value in enumerate(distinct)}, False
    places = {value: float(value) for value in distinct}
    low, high = min(places.values()), max(places.values())
    return places, low > 0 and high >= DECADES * low
