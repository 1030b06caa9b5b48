"""Whether a scorer gives published numbers: the real photos of DreamBooth's set among themselves,
which takes no generated image, only the weights and the photos.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dreamtune.evaluation.layout import Photos
from dreamtune.evaluation.protocols import Protocol, check_encoders
from dreamtune.evaluation.statistics import Estimate, estimate, weights
from dreamtune.metrics import Scorers
from dreamtune.metrics.similarity import PHOTOS
from dreamtune.metrics.store import FeatureStore

# The "real images" rows. Neither paper says whether a photo is compared with itself; OFT's code
# leaves that out.
PUBLISHED = {
    "paper": ("DreamBooth, arXiv 2208.12242", {"dino": 0.774, "clip_i": 0.885}),
    "oft": ("OFT, arXiv 2306.07280", {"dino": 0.703, "clip_i": 0.864}),
}
SUBJECTS, PICTURES = 30, 158


@dataclass(frozen=True)
class Check:
    """One score of the photos: apart, of pairs of different photos; itself, with each photo and
    itself among the pairs; published, None where nobody has said a number."""

    key: str
    title: str
    apart: Estimate
    itself: Estimate
    published: float | None


def selfcheck(photos: Mapping[str, Photos], scorers: Scorers, protocol: Protocol) -> list[Check]:
    """The photo similarities of a protocol, of each subject's photos with its own.

    Raises ValueError for encoders that are not the protocol's, a protocol without such a score, and
    photos of which no subject has two.
    """
    check_encoders(protocol, scorers.protocol)
    asked = [m for m in scorers.metrics if m.comparison is PHOTOS]
    if not asked:
        raise ValueError(
            f"protocol `{protocol.name}` has no score of images against all photos: take paper, "
            "oft or another that has."
        )
    known = {name: own.photos for name, own in photos.items() if len(own.photos) > 1}
    if not known:
        raise ValueError("no subject has two photos: there is no pair to compare.")
    store = FeatureStore({m.extractor.name: scorers.extractors[m.extractor.name] for m in asked})
    store.add([picture for own in known.values() for picture in own])
    _, published = PUBLISHED.get(protocol.name, ("", {}))
    found = []
    for metric in asked:
        rows = [store.features(metric.extractor.name, own) for own in known.values()]
        apart, itself = (mean_of(list(known), rows, protocol, own) for own in (False, True))
        found.append(Check(metric.key, metric.title, apart, itself, published.get(metric.key)))
    return found


def mean_of(
    names: Sequence[str], rows: Sequence[Tensor], protocol: Protocol, itself: bool
) -> Estimate:
    """The protocol's mean of each photo's mean cosine to the photos of its subject (N_s, D), itself
    among them or not."""
    values, subjects, pairs = [], [], []
    for name, features in zip(names, rows, strict=True):
        cosines = (features @ features.T).double()
        count = len(features)
        others = cosines.sum(1) - (0 if itself else cosines.diagonal())
        values += (others / (count if itself else count - 1)).tolist()
        subjects += [name] * count
        pairs += [count if itself else count - 1] * count
    w = weights(protocol.averaging, subjects, np.array(pairs, dtype=np.float64))
    return estimate(values, subjects, subjects, w)


def text_of(checks: Sequence[Check], photos: Mapping[str, Photos], protocol: Protocol) -> str:
    """A table for people, and what it is compared with."""
    count = sum(len(own.photos) for own in photos.values())
    source, _ = PUBLISHED.get(protocol.name, ("", {}))
    lines = [
        f"Real images of {len(photos)} subjects, {count} photos, by protocol {protocol.name}.",
        f"{'':<10}{'published':>10}  {'different photos (95%)':<26}{'with self pairs (95%)':<26}n",
    ]
    for check in checks:
        said = "–" if check.published is None else f"{check.published:.3f}"
        lines.append(
            f"{check.title:<10}{said:>10}  {interval(check.apart):<26}{interval(check.itself):<26}"
            f"{check.apart.n} photos"
        )
    if source:
        lines.append(f"Published: {source}.")
        if (len(photos), count) != (SUBJECTS, PICTURES):
            lines.append(
                f"Warning: it is of {SUBJECTS} subjects with {PICTURES} photos, these are others."
            )
    return "\n".join(lines)


def interval(e: Estimate) -> str:
    return f"{e.mean:.3f}" + ("" if e.low is None else f" ({e.low:.3f} to {e.high:.3f})")
