"""Time to quality, by `robustness.py`'s results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from robustness_stats import KEPT, MAIN_SCORE, Results, Row, by, mean_of, score

from dreamtune.evaluation.statistics import Estimate


@dataclass(frozen=True)
class Reached:
    """When runs came to a quality. runs: all; those that never did are in no mean. steps, seconds:
    of a run alone; seconds is None where a step alone was not timed."""

    runs: int
    reached: int
    steps: Estimate | None
    seconds: Estimate | None


def time_to_quality(
    results: Results, rows: Sequence[Row], needed: Callable[[Sequence[Row]], float]
) -> Reached:
    """rows: all scored steps of one variant's runs at one rate. needed: the main score to come to,
    of one run's rows. The steps are those that were scored: the quality was there by then."""
    alone = results.about.get("calibration", {}).get("seconds_a_step_alone", {})
    times, count = [], 0
    for own in by(rows, "subject", "seed").values():
        own, count = sorted(own, key=lambda row: row["step"]), count + 1
        need = needed(own)
        first = next((r for r in own if (score(results, r, MAIN_SCORE) or 0.0) >= need), None)
        if first is not None:
            times.append(first)
    seconds = alone.get(rows[0]["variant"]) if rows else None
    return Reached(
        count,
        len(times),
        at_least_0(mean_of(times, lambda row: row["step"])),
        None if seconds is None else at_least_0(mean_of(times, lambda row: row["step"] * seconds)),
    )


def at_least_0(found: Estimate | None) -> Estimate | None:
    """Widened for few subjects, an interval may go beyond what is possible."""
    if found is None or found.low is None:
        return found
    return replace(found, low=max(found.low, 0.0))


def own_best(results: Results, kept: float = KEPT) -> Callable[[Sequence[Row]], float]:
    """That share of the best of the run itself."""
    return lambda own: kept * max(score(results, row, MAIN_SCORE) or 0.0 for row in own)


def common_best(
    results: Results, rows: Sequence[Row], kept: float = KEPT
) -> Callable[[Sequence[Row]], float]:
    """That share of the best mean of its subject over seeds, at any step of any variant and rate of
    the rows."""
    most: dict[str, float] = {}
    for (subject, *_), own in by(rows, "subject", "variant", "multiplier", "step").items():
        value = fmean(score(results, row, MAIN_SCORE) or 0.0 for row in own)
        most[subject] = max(most.get(subject, -math.inf), value)
    return lambda own: kept * most[own[0]["subject"]]
