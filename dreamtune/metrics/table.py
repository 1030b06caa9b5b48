"""The table of metrics: what each is called, computed from and compared with.

Records, the progress bar, the page, the table of several runs and the adapter's file go over it, in
its order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from dreamtune.fields import nearest
from dreamtune.metrics.extractor import Extractor


@dataclass(frozen=True)
class Features:
    """One extractor's features of one scoring, float32 on the CPU.

    images (N, D); photos (M, D); index (N,), the row of the distinct prompt that image i was made
    from; texts (P, D), one row for each distinct prompt, None of an extractor without texts;
    held_out (H, D), photos of the subject that nothing was trained on, None where there are none.

    What only a scoring of finished pictures has, None where it is not there:
        own_photo (N,): the row of `held_out` whose caption is the prompt of image i, -1 for none.
        others (G, D), owners (G,): photos of other subjects, and the number of each one's subject.
        base (N, D): what the base makes of the prompt and seed of image i.
        inside (N, D), outside (N, D): images with all but the subject, and with the subject,
            painted in the mean colour of the extractor; nan in rows of images without a mask.
        photos_inside (m, D): the photos that have a mask, likewise.
    """

    images: Tensor
    photos: Tensor
    index: Tensor
    texts: Tensor | None = None
    held_out: Tensor | None = None
    own_photo: Tensor | None = None
    others: Tensor | None = None
    owners: Tensor | None = None
    base: Tensor | None = None
    inside: Tensor | None = None
    outside: Tensor | None = None
    photos_inside: Tensor | None = None


Score = Callable[[Features], "Tensor | float | None"]
"""A tensor (N,) with one value an image, nan for one that has nothing to be compared with; one
number for all; or None where no image has."""

Kind = Literal["subject", "prompt", "other"]


def error_key(key: str) -> str:
    """Where a record keeps the standard error of `key`."""
    return f"{key}_se"


@dataclass(frozen=True)
class Comparison:
    """What a metric's curve is read against, kept in records as `<metric>_<suffix>`.

    constant: the same at every step, drawn as a level; else a second curve.
    error: standard error of a score that is one number, None where it has none. Scores with one
        value an image have theirs from those.
    """

    suffix: str
    title: str
    score: Score
    pairing: str
    constant: bool
    error: Callable[[Features], float | None] | None = None


@dataclass(frozen=True)
class Metric:
    """One line of the table.

    Args:
        key: in metrics.jsonl.
        title: for people.
        extractor: what `score` gets the features of.
        score: pure function of features.
        pairing: what is compared with what and how it is averaged, for the protocol.
        comparison: what to read it against.
        format: of its numbers.
        while_training: computed at every validation; else only where asked for by key.
        kind: of what it measures: likeness to the subject or obedience to the prompt (both the
            higher the better), or something else.
        pairs: comparisons behind the value of one image, its weight in a flat mean of all pairs.
        unrelated: it is of pictures of prompts that do not name the subject.
        masked: it needs masks.
        tied: an image is compared with the others of its prompt, so their values share pairs.
        bounds: of its mean, where an interval might go beyond what is possible.
        brief: shown where there is room for a few numbers alone, as in the progress bar.
    """

    key: str
    title: str
    extractor: type[Extractor]
    score: Score
    pairing: str
    comparison: Comparison | None = None
    format: str = ".3f"
    while_training: bool = True
    kind: Kind = "other"
    pairs: Callable[[Features], int] = lambda features: 1
    unrelated: bool = False
    masked: bool = False
    tied: bool = False
    bounds: tuple[float, float] | None = None
    brief: bool = True

    @property
    def functions(self) -> dict[str, tuple[Score, str]]:
        """(function, pairing) of each key that this metric puts into a record."""
        keys = {self.key: (self.score, self.pairing)}
        if self.comparison is not None:
            keys[self.comparison_key] = (self.comparison.score, self.comparison.pairing)
        return keys

    @property
    def comparison_key(self) -> str:
        return "" if self.comparison is None else f"{self.key}_{self.comparison.suffix}"

    @property
    def difference_key(self) -> str:
        """Of the metric minus its comparison, image by image: records keep its standard error,
        which is smaller than those of the two suggest."""
        return "" if self.comparison is None else f"{self.key}_minus_{self.comparison.suffix}"

    @property
    def record_keys(self) -> list[str]:
        """All that a record may hold of it."""
        numbers = list(self.functions)
        return numbers + [error_key(k) for k in (*numbers, self.difference_key) if k]

    def values(self, features: Features) -> dict[str, Tensor | float | None]:
        """What each of `functions` gives. Raises ValueError for a tensor that is not (N,)."""
        found = {key: function(features) for key, (function, _) in self.functions.items()}
        count = len(features.images)
        for key, value in found.items():
            if isinstance(value, Tensor) and value.shape != (count,):
                raise ValueError(
                    f"`{key}` gave values of shape {tuple(value.shape)} for {count} images; a "
                    f"tensor holds one an image, ({count},)"
                )
        return found

    def text(self, record: Mapping[str, Any], missing: str = "–") -> str:
        """Its number in a record."""
        return missing if (value := record.get(self.key)) is None else format(value, self.format)

    def error_text(self, record: Mapping[str, Any]) -> str:
        """`± 0.012`, "" where the record has no standard error of it."""
        value = record.get(error_key(self.key))
        return "" if value is None else f"± {value:{self.format}}"

    def comparison_text(self, record: Mapping[str, Any]) -> str:
        """Title and number of what it is read against, "" where the record has none."""
        value = record.get(self.comparison_key)
        if self.comparison is None or value is None:
            return ""
        return f"{self.comparison.title} {value:{self.format}}"


_TABLE: dict[str, Metric] = {}
METRICS: Mapping[str, Metric] = MappingProxyType(_TABLE)


def register(metric: Metric) -> Metric:
    """`METRICS[metric.key]`.

    Raises:
        ValueError: one of its keys is taken, or another extractor has its extractor's name.
    """
    for other in _TABLE.values():
        if taken := [key for key in metric.record_keys if key in other.record_keys]:
            raise ValueError(f"metric key `{taken[0]}` is taken by `{other.title}`")
        ours, theirs = metric.extractor, other.extractor
        if ours.name == theirs.name and ours is not theirs:
            raise ValueError(f"extractor name `{ours.name}` is taken by `{theirs.__module__}`")
    _TABLE[metric.key] = metric
    return metric


def find_metrics(keys: Iterable[str] | None = None) -> list[Metric]:
    """The metrics of those keys; without keys all that are computed while training.

    Raises:
        ValueError: there is no such metric.
    """
    if keys is None:
        return [metric for metric in METRICS.values() if metric.while_training]
    keys = list(keys)
    if unknown := [key for key in keys if key not in METRICS]:
        near = nearest(unknown[0], METRICS)
        raise ValueError(f"unknown metric `{unknown[0]}`.{near} Metrics: {', '.join(METRICS)}")
    return [METRICS[key] for key in keys]


def scored(records: Iterable[Mapping[str, Any]]) -> list[Metric]:
    """The metrics that any of the records has a number of."""
    records = list(records)
    return [m for m in METRICS.values() if any(r.get(m.key) is not None for r in records)]


def scores_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The metrics' own numbers in a record, without what they are compared with."""
    return {metric.key: record[metric.key] for metric in scored([record])}


def scores_text(record: Mapping[str, Any]) -> str:
    """`DINO 0.512 CLIP-I 0.734`, of the brief metrics that the record has."""
    return " ".join(f"{m.title} {m.text(record)}" for m in scored([record]) if m.brief)
