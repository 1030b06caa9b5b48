"""Means of scores with 95% intervals: the bootstrap over clusters, and paired differences.

Images of one subject resemble each other, so subjects are drawn, not images (Davison and Hinkley
1997, section 3.8). With a single subject its prompts are drawn, which says nothing of other
subjects; with a single prompt its images are.

The three ways of averaging that benchmarks use are three weights of an image, so every mean here is
sum(w x) / sum(w).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Averaging = Literal["pairs", "images", "subjects"]
LEVEL = 0.95
REPLICATES = 10_000
SEED = 0  # of the draws: the same scores give the same interval
_AT_ONCE = 1 << 22  # counts that are drawn at once, 32 MB

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval.

    n: values that it is of. clusters: how many were drawn from, of `unit`: "subjects", "prompts" of
    one subject, or "images" of one prompt. low, high: None where there is one cluster alone.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    clusters: int
    unit: str

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def weights(averaging: Averaging, subjects: Sequence[Hashable], pairs: ArrayLike) -> Array:
    """(N,) of each image in the mean.

    "pairs": the flat mean of all comparisons, so an image weighs as many as it has (its subject's
    photos); "images": each image the same (micro); "subjects": the mean of the subjects' means
    (macro).
    """
    if averaging == "pairs":
        return np.asarray(pairs, dtype=np.float64)
    if averaging == "images":
        return np.ones(len(subjects))
    _, index, counts = np.unique(_numbered(subjects), return_inverse=True, return_counts=True)
    return 1.0 / counts[index]


def clusters_of(
    subjects: Sequence[Hashable], prompts: Sequence[Hashable], tied: bool = False
) -> tuple[NDArray[np.int64], str]:
    """((N,) number of each image's cluster, what the clusters are). tied: see `estimate`."""
    for unit, labels in (("subjects", subjects), ("prompts", prompts)):
        if len(set(labels)) > 1:
            return _numbered(labels), unit
    return np.zeros(len(subjects), np.int64) if tied else np.arange(len(subjects)), "images"


def estimate(
    values: ArrayLike,
    subjects: Sequence[Hashable],
    prompts: Sequence[Hashable],
    w: ArrayLike | None = None,
    replicates: int = REPLICATES,
    tied: bool = False,
) -> Estimate:
    """The weighted mean of values (N,) with its interval; of differences it is the paired one.

    The percentiles of the bootstrap are taken away from the mean by t_{C-1} / z * sqrt(C / (C - 1))
    for C clusters: drawn from few, they are too narrow, as a normal interval without Student's t is
    (Hesterberg 2015, section 4.3.1).

    tied: the values of a prompt's images are of the same pairs of them: one prompt alone has no
    interval.

    Raises:
        ValueError: no values, one that is not finite, or lengths that differ.
    """
    x = np.asarray(values, dtype=np.float64)
    w = np.ones(len(x)) if w is None else np.asarray(w, dtype=np.float64)
    if not len(x) or not len(x) == len(w) == len(subjects) == len(prompts):
        raise ValueError(
            "values, weights, subjects and prompts need equal lengths of at least 1, got "
            f"{len(x)}, {len(w)}, {len(subjects)} and {len(prompts)}"
        )
    if not np.isfinite(x).all():
        raise ValueError(f"{(~np.isfinite(x)).sum()} of {len(x)} values are not finite")
    labels, unit = clusters_of(subjects, prompts, tied)
    mean = float((w * x).sum() / w.sum())
    count = len(np.unique(labels))
    if count < 2:
        return Estimate(mean, None, None, len(x), count, unit)
    drawn = bootstrap(x[:, None], w, labels, replicates)[:, 0]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(drawn, (tail, 1 - tail)).tolist()
    wider = widening(count)
    return Estimate(
        mean, mean - wider * (mean - low), mean + wider * (high - mean), len(x), count, unit
    )


def bootstrap(
    values: Array, w: Array, labels: NDArray[np.int64], replicates: int = REPLICATES
) -> Array:
    """(replicates, K) weighted means of the columns of values (N, K), clusters drawn with
    replacement; all columns see the same draws, so their covariance is that of the means.

    w: (N,), or (N, K) of each column its own.
    """
    _, index = np.unique(labels, return_inverse=True)
    count, columns = int(index.max()) + 1, values.shape[1]
    w = np.broadcast_to(w if w.ndim > 1 else w[:, None], values.shape)
    sums = np.zeros((count, 2 * columns))
    np.add.at(sums, index, np.column_stack([values * w, w]))
    random = np.random.default_rng(SEED)
    size = max(1, _AT_ONCE // count)
    parts = []
    for start in range(0, replicates, size):
        rows = min(size, replicates - start)
        drawn = random.multinomial(count, np.full(count, 1 / count), size=rows) @ sums
        parts.append(drawn[:, :columns] / drawn[:, columns:])
    return np.concatenate(parts)


@cache
def widening(clusters: int) -> float:
    """t_{C-1} / z * sqrt(C / (C - 1)), the factor of `estimate`."""
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    return student_t(clusters - 1) / z * math.sqrt(clusters / (clusters - 1))


@cache
def student_t(degrees: int) -> float:
    """t with P(|T| < t) = LEVEL, by bisection of `student_cdf`."""
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if student_cdf(middle, degrees) > LEVEL else (middle, high)
    return (low + high) / 2


def student_cdf(t: float, degrees: int) -> float:
    """P(|T| < t) for Student's t of a whole number of degrees of freedom (Abramowitz and Stegun
    1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(odd, degrees - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (k + 1) / (k + 2)
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


def _numbered(labels: Sequence[Hashable]) -> NDArray[np.int64]:
    """(N,) equal numbers for equal labels, from 0 in the order of their first occurrence: what is
    drawn does not depend on how names sort."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(label, len(known)) for label in labels], dtype=np.int64)
