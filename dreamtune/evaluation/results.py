"""What a scoring leaves: results.json, per_image.csv and per_subject.csv, and reading it back."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat, NonNegativeInt, PositiveInt

from dreamtune.evaluation.statistics import (
    REPLICATES,
    Averaging,
    Estimate,
    estimate,
    weights,
)
from dreamtune.fields import UnreadableFile, checker, from_file, from_json
from dreamtune.files.whole import whole
from dreamtune.metrics import METRICS
from dreamtune.textfile import contents
from dreamtune.version import __version__

RESULTS, PER_IMAGE, PER_SUBJECT = "results.json", "per_image.csv", "per_subject.csv"
FORMAT_VERSION = 1
PER_SUBJECT_REPLICATES = 2000  # of many intervals that nobody quotes to the third digit
MAX_BYTES = 1 << 28  # 3,000 images with 20 scores each are 3 MB

_RESULT = checker(
    {
        "format_version": PositiveInt,
        "source": dict[str, Any],
        "protocol": dict[str, Any],
        "inputs": dict[str, Any],
        "images": list[dict[str, Any]],
        "levels": dict[str, Any],
        "coverage": dict[str, Any],
        "warnings": list[str],
        "versions": dict[str, str],
        "seconds": dict[str, FiniteFloat],
    },
    needed=("format_version", "source", "protocol", "inputs", "images"),
    others=True,
)
_ROW = checker(
    {
        "subject": str,
        "prompt": str,
        "seed": int | str,
        "unrelated": bool,
        "file": str,
        "sha256": str,
        "scores": dict[str, FiniteFloat | None],
        "pairs": dict[str, NonNegativeInt],
        "base": str,
    },
    needed=("subject", "prompt", "seed", "unrelated", "scores", "pairs"),
    others=True,
)


@dataclass(frozen=True)
class Row:
    """One image's scores: by key, None where it has nothing to be compared with. pairs: comparisons
    behind a score, where not one. base: SHA-256 of the base's image that one of an unrelated prompt
    is compared with, "" where there is none or it is not known."""

    subject: str
    prompt: str
    seed: int | str
    unrelated: bool
    file: str
    sha256: str
    scores: Mapping[str, float | None]
    pairs: Mapping[str, int] = field(default_factory=dict)
    base: str = ""

    @property
    def key(self) -> tuple[str, str, int | str, bool]:
        return self.subject, self.prompt, self.seed, self.unrelated


@dataclass(frozen=True)
class Results:
    """A scoring.

    source: what was scored. protocol: all that the numbers depend on beside the pictures. inputs:
    hashes of the photos by subject. base: rows of the base's pictures, where they were there.
    levels: key -> subject -> a number of the photos themselves, such as `dino_photos`. coverage,
    warnings: what was there and what was not; its `photos` are counts by subject, of photos and
    held-out ones. seconds: what took how long.
    """

    source: Mapping[str, Any]
    protocol: Mapping[str, Any]
    inputs: Mapping[str, Any]
    images: Sequence[Row]
    base: Sequence[Row] = ()
    levels: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    coverage: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def averaging(self) -> Averaging:
        found: Averaging = self.protocol["averaging"]
        return found

    @property
    def keys(self) -> list[str]:
        """Of all scores that an image has, in the order of the protocol."""
        return list(dict.fromkeys(key for row in self.images for key in row.scores))

    @property
    def subjects(self) -> list[str]:
        return list(dict.fromkeys(row.subject for row in self.images))

    def scores(
        self, rows: Sequence[Row] | None = None, replicates: int = REPLICATES
    ) -> dict[str, Estimate]:
        """The mean of each score that some image has; of `rows`, by default all images."""
        rows = self.images if rows is None else rows
        found = {key: mean_of(rows, key, self.averaging, replicates) for key in self.keys}
        return {key: value for key, value in found.items() if value is not None}

    def level_scores(self, replicates: int = REPLICATES) -> dict[str, Estimate]:
        """Of each of `levels` the mean over the subjects. n: their photos, or subjects where
        `coverage` does not count those."""
        found = {}
        for key, values in self.levels.items():
            subjects = list(values)
            own = estimate(list(values.values()), subjects, subjects, replicates=replicates)
            counts = [self.photo_count(subject) for subject in subjects]
            n = own.n if None in counts else sum(count or 0 for count in counts)
            metric = next((m for m in METRICS.values() if m.comparison_key == key), None)
            own = within(own, metric.bounds if metric else None)
            found[key] = replace(own, n=n, unit="subjects")
        return found

    def photo_count(self, subject: str) -> int | None:
        """None where `coverage` does not say."""
        counts = self.coverage.get("photos", {}).get(subject)
        return int(counts[0]) if counts else None


def mean_of(
    rows: Sequence[Row], key: str, averaging: Averaging, replicates: int = REPLICATES
) -> Estimate | None:
    """None where no row has that score."""
    known = [(row, value) for row in rows if (value := row.scores.get(key)) is not None]
    if not known:
        return None
    subjects, prompts = [row.subject for row, _ in known], [row.prompt for row, _ in known]
    w = weights(averaging, subjects, [row.pairs.get(key, 1) for row, _ in known])
    metric = METRICS.get(key)
    tied, bounds = (metric.tied, metric.bounds) if metric else (False, None)
    found = estimate([value for _, value in known], subjects, prompts, w, replicates, tied)
    return within(found, bounds)


def within(found: Estimate, bounds: tuple[float, float] | None) -> Estimate:
    """Without what of the interval is beyond the bounds."""
    if bounds is None or found.low is None or found.high is None:
        return found
    return replace(found, low=max(found.low, bounds[0]), high=min(found.high, bounds[1]))


def write_results(results: Results, folder: Path) -> None:
    """The three files, into a folder that is there."""
    scores = {key: asdict(value) for key, value in results.scores().items()}
    base = {key: asdict(value) for key, value in results.scores(results.base).items()}
    levels = {key: asdict(value) for key, value in results.level_scores().items()}
    stated = {
        "format_version": FORMAT_VERSION,
        "dreamtune": __version__,
        "source": results.source,
        "protocol": results.protocol,
        "scores": scores,
        "base_scores": base,
        "level_scores": levels,
        "coverage": results.coverage,
        "warnings": list(results.warnings),
        "inputs": results.inputs,
        "levels": results.levels,
        "versions": results.versions,
        "seconds": {k: round(v, 3) for k, v in results.seconds.items()},
        "images": [asdict(row) for row in results.images],
        "base_images": [asdict(row) for row in results.base],
    }
    with whole(folder / RESULTS) as partial:
        partial.write_text(json.dumps(stated, indent=1) + "\n", encoding="utf-8")
    keys = results.keys
    head = ("subject", "prompt", "seed", "unrelated", "file", "sha256")
    lines = [
        [*(getattr(row, name) for name in head), *(row.scores.get(key) for key in keys)]
        for row in results.images
    ]
    write_csv(folder / PER_IMAGE, [*head, *keys], lines)
    write_csv(folder / PER_SUBJECT, *per_subject(results))


def per_subject(results: Results) -> tuple[list[str], list[list[Any]]]:
    """(heads, lines): of each subject and score the mean, its interval over prompts, and n; of a
    level n alone, the photos, which are no sample of its prompts."""
    lines: list[list[Any]] = []
    for subject in results.subjects:
        rows = [row for row in results.images if row.subject == subject]
        own = results.scores(rows, PER_SUBJECT_REPLICATES)
        lines += [
            [subject, key, e.mean, e.low, e.high, e.n, e.clusters, e.unit] for key, e in own.items()
        ]
        lines += [
            [
                subject,
                key,
                values[subject],
                None,
                None,
                results.photo_count(subject),
                None,
                "photos",
            ]
            for key, values in results.levels.items()
            if subject in values
        ]
    return ["subject", "score", "mean", "low", "high", "n", "clusters", "unit"], lines


def write_csv(path: Path, heads: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    with whole(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(heads)
        writer.writerows([[safe_cell(value) for value in line] for line in lines])


def safe_cell(value: Any) -> Any:
    """A spreadsheet runs a cell that begins like a formula; a quote before it makes it a text."""
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value


def read_results(path: str | Path) -> Results:
    """From results.json, or the folder that holds it. Raises UnreadableFile for what is none."""
    path = Path(path).expanduser()
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file():
        raise UnreadableFile(
            f"there is no `{file}`: give the folder that `dreamtune score` wrote, or its {RESULTS}."
        )
    place = f"`{file}`"
    found = from_file(_RESULT, from_json(contents(file, MAX_BYTES), place), place)
    if found["format_version"] > FORMAT_VERSION:
        raise UnreadableFile(
            f"{place} has format version {found['format_version']}, this dreamtune reads up to "
            f"{FORMAT_VERSION}: install a newer one"
        )
    for name in ("averaging", "metrics"):
        if name not in found["protocol"]:
            raise UnreadableFile(f"{place}, `protocol`: `{name}` is missing.")
    rows = {
        kind: [
            row_of(from_file(_ROW, row, f"{place}, `{kind}`, {number}"))
            for number, row in enumerate(found.get(kind, []), 1)
        ]
        for kind in ("images", "base_images")
    }
    if not rows["images"]:
        raise UnreadableFile(f"{place} holds no images.")
    names = ("source", "protocol", "inputs", "levels", "coverage", "warnings", "versions")
    return Results(
        **{name: found[name] for name in (*names, "seconds") if name in found},
        images=rows["images"],
        base=rows["base_images"],
    )


def row_of(values: Mapping[str, Any]) -> Row:
    known = {name: values[name] for name in Row.__annotations__ if name in values}
    return Row(**{"file": "", "sha256": "", **known})
