"""Whether two results differ: image by image, by subject, prompt and seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dreamtune.evaluation.results import Results, Row, within
from dreamtune.evaluation.statistics import Estimate, estimate, weights
from dreamtune.metrics import METRICS

# What a benchmark of many subjects does not state of its sampling: each image says it.
OF_IMAGES = ("prompts", "unrelated", "seeds")
SHOWN = 8  # differences of protocols that a message lists


@dataclass(frozen=True)
class Difference:
    """B minus A of one score, over the images that both have; a, b: their means over those."""

    key: str
    title: str
    a: float
    b: float
    estimate: Estimate

    @property
    def differs(self) -> bool:
        return self.estimate.excludes_zero

    def sentence(self) -> str:
        e = self.estimate
        pairs = f"{e.n} pairs of images from {counted(e.clusters, e.unit)}"
        means = f"A {self.a:.3f}, B {self.b:.3f}"
        if e.low is None or e.high is None:
            return (
                f"{self.title}: B - A = {e.mean:+.3f} ({means}; {pairs}), which is too few for an "
                "interval."
            )
        interval = f"95% {e.low:+.3f} to {e.high:+.3f}"
        if e.mean == e.low == e.high == 0:
            return f"{self.title}: A and B are equal ({means}; {pairs})."
        if not self.differs:
            return (
                f"{self.title}: no difference can be told: B - A = {e.mean:+.3f} ({interval}; "
                f"{means}; {pairs})."
            )
        word = "higher" if e.mean > 0 else "lower"
        return (
            f"{self.title}: B is {word} than A by {abs(e.mean):.3f} (B - A {e.mean:+.3f}, "
            f"{interval}; {means}; {pairs})."
        )


@dataclass(frozen=True)
class Comparison:
    """differences: of each score that both have. alone_a, alone_b: images without a partner.
    notes: what may explain a difference."""

    differences: list[Difference]
    alone_a: int
    alone_b: int
    notes: list[str]

    def text(self, a: str, b: str) -> str:
        """Sentences, the verdict last."""
        lines = [f"A is `{a}`, B is `{b}`; paired by subject, prompt and seed."]
        if self.alone_a or self.alone_b:
            lines.append(
                f"Without a partner, and left out: {self.alone_a} images of A, {self.alone_b} of B."
            )
        lines += self.notes
        lines += [difference.sentence() for difference in self.differences]
        return "\n".join([*lines, self.verdict()])

    def verdict(self) -> str:
        told = [d for d in self.differences if d.differs]
        of = f"{len(self.differences)} score{'s' * (len(self.differences) != 1)}"
        if not told:
            return f"A and B cannot be told apart by {'any of ' * (of[:2] != '1 ')}{of}."
        names = ", ".join(f"{d.title} ({'B' if d.estimate.mean > 0 else 'A'} higher)" for d in told)
        chance = (
            " Each interval is for its score alone: of twenty, one excludes 0 by chance."
            if len(self.differences) > 1
            else ""
        )
        return f"A and B differ in {names}; {len(told)} of {of}.{chance}"


def compare(a: Results, b: Results) -> Comparison:
    """B minus A.

    Raises:
        ValueError: the protocols differ, or the photos of a subject that both have, with what
            differs; or no image of A has a partner in B.
    """
    check_comparable(a, b)
    rows_a, rows_b = ({row.key: row for row in r.images} for r in (a, b))
    both = [key for key in rows_a if key in rows_b]
    if not both:
        raise ValueError(
            "no image of A has a partner in B: images are paired by subject, prompt and seed, and "
            f"A's first is {shown_key(a.images[0])}, B's {shown_key(b.images[0])}."
        )
    differences = []
    notes = [f"Note: {note}." for note in notes_of(a, b)]
    for key in a.keys:
        pairs = [
            (rows_a[k], rows_b[k])
            for k in both
            if rows_a[k].scores.get(key) is not None and rows_b[k].scores.get(key) is not None
        ]
        alike = [(x, y) for x, y in pairs if not (x.base and y.base) or x.base == y.base]
        if len(alike) < len(pairs):
            notes.append(
                f"Left out of {title_of(key)}: {len(pairs) - len(alike)} of {len(pairs)} images, "
                "which A and B compare with other images of the base. Score both with one "
                "--base_images."
            )
        if pairs := alike:
            differences.append(difference_of(key, pairs, a))
    return Comparison(differences, len(rows_a) - len(both), len(rows_b) - len(both), notes)


def difference_of(key: str, pairs: list[tuple[Row, Row]], a: Results) -> Difference:
    firsts = [first for first, _ in pairs]
    subjects, prompts = [r.subject for r in firsts], [r.prompt for r in firsts]
    w = weights(a.averaging, subjects, [r.pairs.get(key, 1) for r in firsts])
    values = [tuple(float(row.scores[key] or 0.0) for row in pair) for pair in pairs]
    mean_a, mean_b = (float((w * [v[i] for v in values]).sum() / w.sum()) for i in (0, 1))
    tied = key in METRICS and METRICS[key].tied
    found = estimate([y - x for x, y in values], subjects, prompts, w, tied=tied)
    if key in METRICS and (bounds := METRICS[key].bounds) is not None:
        span = bounds[1] - bounds[0]
        found = within(found, (-span, span))
    return Difference(key, title_of(key), mean_a, mean_b, found)


def title_of(key: str) -> str:
    """Of a score for people; of what a metric is compared with, its title beside the metric's."""
    if key in METRICS:
        return METRICS[key].title
    for metric in METRICS.values():
        if metric.comparison is not None and metric.comparison_key == key:
            return f"{metric.title}, {metric.comparison.title}"
    return key


def check_comparable(a: Results, b: Results) -> None:
    """Raises ValueError that lists what differs."""
    apart = differing(loose(a.protocol), loose(b.protocol))
    first, second = (r.protocol.get("sampling") for r in (a, b))
    if first is not None and second is not None:
        unsaid = [name for name in OF_IMAGES if name not in first or name not in second]
        how_a, how_b = ({k: v for k, v in s.items() if k not in unsaid} for s in (first, second))
        apart += differing(how_a, how_b, "sampling")
    if apart:
        more = f", and {len(apart) - SHOWN} more" if len(apart) > SHOWN else ""
        raise ValueError(
            "results of different protocols do not compare. A and B differ in "
            f"{'; '.join(apart[:SHOWN])}{more}. Score both with one protocol and the same weights."
        )
    photos = [r.inputs.get("photos", {}) for r in (a, b)]
    other = [s for s in photos[0] if s in photos[1] and photos[0][s] != photos[1][s]]
    if other:
        raise ValueError(
            f"A and B were scored against other photos of {', '.join(f'`{s}`' for s in other[:5])}"
            f" ({len(other)} of {len(photos[0])} subjects): score both against the same ones."
        )


def loose(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Without words for people, what a folder of images does not say, and which weights a protocol
    asks for where the hash of those that were loaded is known."""
    found = {k: v for k, v in protocol.items() if k not in ("about", "sampling")}
    encoders, scorers = found.get("encoders"), found.get("scorers")
    if isinstance(encoders, Mapping) and isinstance(scorers, Mapping):
        found["encoders"] = {
            name: {k: v for k, v in said.items() if k != "weights"}
            if isinstance(said, Mapping)
            and isinstance(loaded := scorers.get(name), Mapping)
            and "weights" in loaded
            else said
            for name, said in encoders.items()
        }
    return found


def differing(a: Any, b: Any, place: str = "") -> list[str]:
    """`place: its value in a, its value in b` of all leaves that differ; of weights with one hash
    not the `model`, a name of where they lay."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        same = a.get("weights") is not None and a.get("weights") == b.get("weights")
        return [
            line
            for key in dict.fromkeys([*a, *b])
            if not (same and key == "model")
            for line in differing(a.get(key), b.get(key), f"{place}.{key}" if place else str(key))
        ]
    return [] if a == b else [f"`{place}`: {short(a)} and {short(b)}"]


def short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def notes_of(a: Results, b: Results) -> list[str]:
    notes = [
        f"{name} was {x} for A and {y} for B"
        for name in dict.fromkeys([*a.versions, *b.versions])
        if (x := a.versions.get(name)) != (y := b.versions.get(name))
    ]
    if a.source.get("base") != b.source.get("base"):
        notes.append(f"the bases are {a.source.get('base')} and {b.source.get('base')}")
    if (a.protocol.get("sampling") is None) != (b.protocol.get("sampling") is None):
        notes.append("how the images of one of them were sampled is not known")
    return notes


def shown_key(row: Row) -> str:
    return f"({row.subject}, `{row.prompt}`, {row.seed})"


def counted(count: int, unit: str) -> str:
    """`1 subject`, `3 prompts of one subject`."""
    if unit == "subjects":
        return f"{count} subject{'s' * (count != 1)}"
    if unit == "prompts":
        return f"{count} prompts of one subject"
    return f"{count} image{'s' * (count != 1)} of one prompt"
