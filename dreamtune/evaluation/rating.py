"""How far each checkpoint came, in shares measured from step 0 with its noise in mind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dreamtune.metrics import METRICS
from dreamtune.metrics.table import error_key

SUBJECT, PROMPT = ("dino", "clip_i"), "clip_t"
NEEDED = (*SUBJECT, PROMPT)
"""The metrics that the rule reads, by key, with what they are compared with."""

MIN_PROMPT_KEPT = 0.8
"""Share of the base's prompt following that a winner keeps."""

MIN_ERRORS = 2
"""Standard errors that a way, or the base's prompt gap, is long at least, else it is noise."""

# Without standard errors, what counts as noise of a few images: similarity and prompt gap.
MIN_WAY, MIN_PROMPT_GAP = 0.02, 0.005

# Cosines of the same images differ by this much from one machine to another; no error is smaller.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Way:
    """From the base's images to the photos' own similarity, by the scorer of metric `key`.

    `start` and `end` are cosines, nan where step 0 has none; without a second photo the way goes
    to 1. `error` is its standard error, of the base's images and of the photos among themselves
    where that is known; None where records have none. `weight`: of its share in the subject
    gained, 0 if it does not count.
    """

    key: str
    start: float
    end: float
    error: float | None
    weight: float = 0.0

    @property
    def length(self) -> float:
        return self.end - self.start

    @property
    def span(self) -> float:
        """What shares are shares of: without a known error at least `MIN_WAY`."""
        return max(self.length, MIN_WAY) if self.error is None else self.length

    @property
    def beyond_noise(self) -> bool:
        return 0 < self.length < math.inf and self.length >= MIN_ERRORS * (self.error or 0.0)

    def share(self, value: float) -> float:
        """How much of the way `value` covers, at most 1: beyond it there are only copies."""
        return min((value - self.start) / self.span, 1.0)


@dataclass(frozen=True)
class Rating:
    """`subject_gained` and `prompt_kept` as shares (1 is all of it), `product` of the two.

    finite: whether all scores are numbers; if not, nothing is gained and nothing kept.
    subject_gained: None where no scorer counts. prompt_error: standard error of prompt_kept, None
    where it is not known.
    """

    step: int
    subject_gained: float | None
    prompt_kept: float
    prompt_error: float | None = None
    finite: bool = True

    @property
    def kept_enough(self) -> bool:
        return self.prompt_kept >= MIN_PROMPT_KEPT

    @property
    def product(self) -> float | None:
        return None if self.subject_gained is None else self.subject_gained * self.prompt_kept

    @property
    def rank(self) -> tuple[int, float]:
        """What the best checkpoint has the largest of; step 0 is (0, 0)."""
        gained = self.subject_gained is None or self.subject_gained > 0
        if self.step == 0 or not gained or not self.prompt_kept > 0:
            return (0, 0.0)
        # Among those that lost too much of the prompt, the one that lost least is the most use.
        if not self.kept_enough:
            return (1, self.prompt_kept)
        return (2, float(self.step) if self.product is None else self.product)


@dataclass(frozen=True)
class Baseline:
    """What step 0 says of the measures themselves, so that no later record changes them.

    gap, gap_error: the base's prompt gap and its standard error, None where not known.
    one_prompt: there are no other prompts to compare with.
    """

    ways: tuple[Way, ...]
    gap: float
    gap_error: float | None
    one_prompt: bool

    @classmethod
    def of(cls, start: Mapping[str, Any]) -> Baseline:
        one = start.get(METRICS[PROMPT].comparison_key) is None
        ways = _weighed([_way(start, key) for key in SUBJECT])
        return cls(ways, prompt_gap(start), _gap_error(start), one)

    @property
    def counting(self) -> list[Way]:
        return [way for way in self.ways if way.weight > 0]

    @property
    def prompt_counts(self) -> bool:
        """Whether the base follows prompts at all, as far as can be told."""
        noise = max(MIN_PROMPT_GAP, MIN_ERRORS * (self.gap_error or 0.0))
        return noise < self.gap < math.inf

    def rating(self, record: Mapping[str, Any]) -> Rating:
        step = record["step"]
        subject = 0.0 if self.counting else None
        if step == 0:
            return Rating(step, subject, 1.0)
        gap = prompt_gap(record)
        if not all(math.isfinite(x) for x in (gap, *(number(record, key) for key in NEEDED))):
            return Rating(step, subject, 0.0, finite=False)
        if self.counting:
            subject = sum(way.weight * way.share(record[way.key]) for way in self.counting)
        if not self.prompt_counts:
            return Rating(step, subject, 1.0)
        kept, own = gap / self.gap, _gap_error(record)
        error = None
        if own is not None and self.gap_error is not None:
            # As of independent images. Steps share prompts and seeds, so it is rather too large.
            error = math.hypot(own, kept * self.gap_error) / self.gap
        # Rounded, so that 0.08 to 0.064 is 80% and not 79.99999999999999%.
        return Rating(step, subject, min(round(kept, 9), 1.0), error)


def rate(history: Sequence[Mapping[str, Any]]) -> list[Rating]:
    """A rating for every scoring, by `RULE`.

    Args:
        history: records with step, dino, clip_i, clip_t, and where known clip_t_shuffled,
            dino_photos, clip_i_photos and the standard errors of `Scores.record`. Without the
            photos' own similarity (a single photo) the way goes to a cosine of 1; without shuffled
            prompts (a single prompt) CLIP-T counts as it is. Ways are weighed by the errors of step
            0; without them the scorers weigh the same.

    Raises:
        ValueError: there is no record of step 0.
    """
    baseline = baseline_of(history)
    return [baseline.rating(record) for record in history]


def baseline_of(history: Sequence[Mapping[str, Any]]) -> Baseline:
    """Of the record of step 0. Raises ValueError: there is none."""
    start = next((record for record in history if record["step"] == 0), None)
    if start is None:
        raise ValueError("the base (step 0) is not in the history; every share is measured from it")
    return Baseline.of(start)


def number(record: Mapping[str, Any], key: str) -> float:
    """nan where the record has none."""
    value = record.get(key)
    return math.nan if value is None else float(value)


def prompt_gap(record: Mapping[str, Any]) -> float:
    """CLIP-T with the own prompt minus with the others (or minus nothing, for one prompt)."""
    return number(record, PROMPT) - (record.get(METRICS[PROMPT].comparison_key) or 0.0)


def _gap_error(record: Mapping[str, Any]) -> float | None:
    metric = METRICS[PROMPT]
    one = record.get(metric.comparison_key) is None
    return _error(record, metric.key if one else metric.difference_key)


def _error(record: Mapping[str, Any], key: str) -> float | None:
    error = number(record, error_key(key))
    return max(error, _ROUNDING) if 0 <= error < math.inf else None


def _way(start: Mapping[str, Any], key: str) -> Way:
    photos = METRICS[key].comparison_key
    end = 1.0 if start.get(photos) is None else number(start, photos)
    error = _error(start, key)
    if error is not None:
        error = math.hypot(error, _error(start, photos) or 0.0)
    return Way(key, number(start, key), end, error)


def _weighed(ways: Sequence[Way]) -> tuple[Way, ...]:
    """By (way / its standard error)^2, adding up to 1; equally where an error is not known."""
    counting = [way for way in ways if way.beyond_noise]
    known = all(way.error is not None for way in counting)
    raw = {way.key: (way.length / (way.error or 1.0)) ** 2 if known else 1.0 for way in counting}
    total = sum(raw.values())
    return tuple(
        replace(way, weight=raw[way.key] / total if way.key in raw else 0.0) for way in ways
    )
