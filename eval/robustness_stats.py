"""Statistics of `robustness.py`'s results: means with intervals clustered by subject, the width of
the range of rates, time to quality."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamtune.evaluation.statistics import (
    LEVEL,
    Estimate,
    bootstrap,
    estimate,
    weights,
    widening,
)

KEPT = 0.95  # of the best: what a rate must keep, and what counts as quality reached
MAIN_SCORE, PROMPT_KEPT = "dino", "prompt_kept"
NO_PICTURE = 0.0  # the main score of a run that diverged: it gives no picture

Row = Mapping[str, Any]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Results:
    """A results file. rows: one a run and scored step; base: subject -> its scores without an
    adapter; titles: of variants."""

    about: Mapping[str, Any]
    rows: Sequence[Row]
    base: Mapping[str, Row]
    titles: Mapping[str, str]

    def of(self, *parts: str, last: bool = True) -> list[Row]:
        """The rows of these parts; last: of each run's end alone."""
        return [r for r in self.rows if r["part"] in parts and (not last or is_last(r))]

    def variants(self, rows: Iterable[Row]) -> list[str]:
        """In the order of the table of variants."""
        there = {row["variant"] for row in rows}
        return [name for name in self.titles if name in there]


def is_last(row: Row) -> bool:
    return bool(row["step"] == row["steps"])


def read(path: Path) -> Results:
    """Raises ValueError for another kind of file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"`{path}` cannot be read: {error}") from None
    if not isinstance(found, dict) or found.get("kind") != "robustness":
        raise ValueError(f"`{path}` is no results.json of robustness.py.")
    rows = [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]
    base = {line["subject"]: line for line in found["base"]}
    return Results(found, rows, base, found["variants"])


def score(results: Results, row: Row, key: str) -> float | None:
    """Of one row; `clip_t_margin` is over the base's, `prompt_kept` a share of the base's. The main
    score of a run that diverged is NO_PICTURE, others it has none."""
    if key == "clip_t_margin":
        own, base = row.get("clip_t"), results.base.get(row["subject"], {}).get("clip_t")
        return None if own is None or base is None else own - base
    if key == PROMPT_KEPT:
        mine, theirs = own_prompt(row), own_prompt(results.base.get(row["subject"], {}))
        return None if mine is None or not theirs else mine / theirs
    if row["diverged"] and key == MAIN_SCORE:
        return NO_PICTURE
    value: float | None = row.get(key)
    return value


def own_prompt(row: Row) -> float | None:
    """CLIP-T with the own prompt minus with the others'."""
    own, others = row.get("clip_t"), row.get("clip_t_shuffled")
    return None if own is None or others is None else own - others


def mean(results: Results, rows: Sequence[Row], key: str) -> Estimate | None:
    """Each subject counts the same; the interval is clustered by subject. None without a score."""
    return mean_of(rows, lambda row: score(results, row, key))


def mean_of(rows: Sequence[Row], value: Callable[[Row], float | None]) -> Estimate | None:
    known = [(row, x) for row in rows if (x := value(row)) is not None]
    if not known:
        return None
    subjects = [row["subject"] for row, _ in known]
    runs = [(row["subject"], row["seed"]) for row, _ in known]
    w = weights("subjects", subjects, [1] * len(known))
    found = estimate([x for _, x in known], subjects, runs, w, tied=True)
    if found.unit == "subjects":
        return found
    return Estimate(found.mean, None, None, found.n, 1, "subjects")  # says nothing of others


def by(rows: Iterable[Row], *names: str) -> dict[Any, list[Row]]:
    """The rows by the values of these fields, a tuple where there are several; sorted."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in names)
        found.setdefault(key if len(names) > 1 else key[0], []).append(row)
    return dict(sorted(found.items()))


def diverged(rows: Iterable[Row]) -> int:
    return sum(bool(row["diverged"]) for row in rows)


@dataclass(frozen=True)
class Sweep:
    """A variant over its rates. subjects: those that have all of the rates; scores: (subjects,
    rates), of each the mean over its seeds; runs, diverged: of each rate."""

    multipliers: tuple[float, ...]
    rates: tuple[float, ...]
    subjects: tuple[str, ...]
    scores: Array
    runs: tuple[int, ...]
    diverged: tuple[int, ...]

    @property
    def best(self) -> int:
        """The rate of the highest mean."""
        return int(self.scores.mean(0).argmax())


def sweep(results: Results, rows: Sequence[Row], key: str = MAIN_SCORE) -> Sweep | None:
    """Of one variant's last rows. None where no subject has all of the rates."""
    cells: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        if (value := score(results, row, key)) is not None:
            cells.setdefault((row["subject"], row["multiplier"]), []).append(value)
    multipliers = sorted({row["multiplier"] for row in rows})
    names = dict.fromkeys(row["subject"] for row in rows)
    whole = [s for s in names if all((s, m) in cells for m in multipliers)]
    if not whole:
        return None
    rates = {row["multiplier"]: row["rate"] for row in rows}
    own = [[row for row in rows if row["multiplier"] == m] for m in multipliers]
    return Sweep(
        tuple(multipliers),
        tuple(rates[m] for m in multipliers),
        tuple(whole),
        np.array([[fmean(cells[s, m]) for m in multipliers] for s in whole]),
        tuple(len(part) for part in own),
        tuple(diverged(part) for part in own),
    )


@dataclass(frozen=True)
class Width:
    """The range of rates around the best that keeps a share of its score.

    low, high: ends as multipliers, on straight lines between the rates that were run (of the
    logarithm). factor: high / low, with its 95% interval, None of a single subject. open_low,
    open_high: the range reaches the first or the last rate that was run: it may be wider.
    """

    low: float
    high: float
    factor: float
    factor_low: float | None
    factor_high: float | None
    open_low: bool
    open_high: bool


def ends(x: Array, y: Array, floor: Array | float, kept: float = KEPT) -> tuple[Array, Array]:
    """Low and high end (N,) of the range around the largest of y (N, K) at x (K,) in which the
    lines through the points stay at floor + kept (best - floor) or more. floor: (N,)."""
    count = len(y)
    best = y.argmax(1)
    top = y[np.arange(count), best]
    need = floor + kept * (top - floor)
    found = []
    for direction in (-1, 1):
        end, open_ = x[best].astype(np.float64), np.ones(count, bool)
        for step in range(1, len(x)):
            to = best + direction * step
            inside = open_ & (to >= 0) & (to < len(x))
            to = to.clip(0, len(x) - 1)
            before = (to - direction).clip(0, len(x) - 1)
            y0, y1 = y[np.arange(count), before], y[np.arange(count), to]
            stays = y1 >= need
            fall = np.where(y0 > y1, y0 - y1, 1.0)
            cut = x[before] + (x[to] - x[before]) * ((y0 - need) / fall).clip(0, 1)
            end = np.where(inside, np.where(stays, x[to], cut), end)
            open_ &= ~inside | stays
        found.append(end)
    return found[0], found[1]


def width(own: Sweep, floors: Array | None = None, kept: float = KEPT) -> Width:
    """With an interval by the bootstrap over subjects, of the factor's logarithm, widened for few
    subjects as `estimate` does, and cut off at what was run. floors: (subjects,) of a score that
    counts as nothing, by default 0."""
    x = np.log2(np.array(own.multipliers))
    floors = np.zeros(len(own.subjects)) if floors is None else floors
    low, high = (float(e[0]) for e in ends(x, own.scores.mean(0)[None], floors.mean(), kept))
    ranges: tuple[float | None, float | None] = (None, None)
    count = len(own.subjects)
    if count > 1:
        drawn = bootstrap(np.column_stack([own.scores, floors]), np.ones(count), np.arange(count))
        lows, highs = ends(x, drawn[:, :-1], drawn[:, -1], kept)
        tail, octaves, wider = (1 - LEVEL) / 2, high - low, widening(count)
        quantiles = np.quantile(highs - lows, (tail, 1 - tail)).tolist()
        around = (octaves + wider * (q - octaves) for q in quantiles)
        ranges = tuple(2 ** min(max(a, 0.0), float(x[-1] - x[0])) for a in around)  # type: ignore
    return Width(
        2**low, 2**high, 2 ** (high - low), *ranges, low <= float(x[0]), high >= float(x[-1])
    )


def base_floors(results: Results, own: Sweep) -> Array | None:
    """The base's main score of each subject; None where one is not known."""
    if any(s not in results.base for s in own.subjects):
        return None
    return np.array([results.base[s][MAIN_SCORE] for s in own.subjects], dtype=np.float64)


def best_rate(results: Results, variant: str, *parts: str) -> float | None:
    """The rate of the variant's best mean in these parts; None where there is none."""
    rows = [r for r in results.of(*parts) if r["variant"] == variant]
    own = sweep(results, rows) if rows else None
    return None if own is None else own.rates[own.best]


def at_rate(rows: Iterable[Row], variant: str, rate: float | None) -> list[Row]:
    """Those of the variant at that rate; a rate is a product, and rounded."""
    return [
        row for row in rows
        if row["variant"] == variant and rate and math.isclose(row["rate"], rate, rel_tol=1e-6)
    ]  # fmt: skip


def at_chosen_rate(results: Results, variant: str, *parts: str) -> tuple[list[Row], str]:
    """The variant's last rows in these parts at its best rate by the development subjects, where
    that was run there, else by the reporting subjects of these parts themselves; and by which."""
    rows = results.of(*parts)
    for whom, of in (("development", ("defaults",)), ("reporting", parts)):
        if found := at_rate(rows, variant, best_rate(results, variant, *of)):
            return found, whom
    return [], ""


def difference(
    results: Results, ours: Sequence[Row], theirs: Sequence[Row], key: str
) -> Estimate | None:
    """Ours minus theirs, paired by subject and seed."""
    other = {(r["subject"], r["seed"]): score(results, r, key) for r in theirs}

    def value(row: Row) -> float | None:
        a, b = score(results, row, key), other.get((row["subject"], row["seed"]))
        return None if a is None or b is None else a - b

    return mean_of(ours, value)


def seed_spread(results: Results, rows: Sequence[Row], key: str = MAIN_SCORE) -> Estimate | None:
    """The standard deviation over the seeds of a subject, its mean over subjects. None where no
    subject has two seeds."""
    found = []
    for subject, own in by(rows, "subject").items():
        values = [x for row in own if (x := score(results, row, key)) is not None]
        if len(values) > 1:
            found.append({"subject": subject, "seed": 0, "spread": stdev(values)})
    return mean_of(found, lambda row: row["spread"])


def minutes(results: Results) -> dict[str, float]:
    """Minutes of all waves, by device."""
    found: Counter[str] = Counter()
    for wave in results.about.get("waves", []):
        names = ("setup_seconds", "step_seconds", "scoring_seconds")
        found[wave["device"]] += sum(wave[name] for name in names) / 60
    return dict(found)
