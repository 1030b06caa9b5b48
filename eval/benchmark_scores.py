"""The scores of a benchmark's methods, each beside the base's, and how they compare."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmark_page import Pair, write_benchmark
from benchmark_parts import (
    BASE,
    IDENTIFIER,
    Plan,
    config_of,
    embedded_base,
    image_seeds,
    name_of,
    of_seeds,
    plain_json,
)

from dreamtune import embedded
from dreamtune.evaluation.compare import compare
from dreamtune.evaluation.layout import Photos, read_images, read_photos, without
from dreamtune.evaluation.protocol_file import find_protocol
from dreamtune.evaluation.results import Results, read_results, write_results
from dreamtune.evaluation.scores_page import write_page
from dreamtune.evaluation.scoring import score_images
from dreamtune.evaluation.task import Task
from dreamtune.files.whole import whole
from dreamtune.pipeline.score import load_scorers


def marks_of(work: Path, plan: Plan, method: str) -> dict[str, Path]:
    """Name of a part -> its mark, there or not: of all that a method's scores need."""
    names = [name_of(task) for task in plan.tasks() if task[0] in (BASE, method)]
    return {name: work / "done" / f"{name}.json" for name in names}


def scored_by(work: Path, plan: Plan, method: str, weights: dict[str, str]) -> dict[str, Any]:
    """What the results of a method depend on, for its mark. Raises ValueError where a part is not
    done."""
    marks = marks_of(work, plan, method)
    if missing := [name for name, mark in marks.items() if not mark.is_file()]:
        raise ValueError(f"not done yet: {', '.join(missing)}.")
    return {
        "seeds": plan.seeds,
        "weights": weights,
        **({"gallery": "embedded"} if embedded_base(plan) else {}),
        "protocol": plain_json(find_protocol(plan.protocol).statement()),
        "done": {name: mark.stat().st_mtime_ns for name, mark in marks.items()},
    }


def mark_of(work: Path, method: str) -> Path:
    return work / "scored" / f"{method}.json"


def is_scored(work: Path, plan: Plan, method: str, weights: dict[str, str]) -> bool:
    """Whether its results are of what is asked for now; not while a part is to be done."""
    mark = mark_of(work, method)
    if not all(path.is_file() for path in (mark, *marks_of(work, plan, method).values())):
        return False
    return bool(json.loads(mark.read_text()) == scored_by(work, plan, method, weights))


def score_method(work: Path, plan: Plan, method: str, weights: dict[str, str]) -> str:
    """Scores the images of a method whose parts are done, unless that was done; says so. Raises
    ValueError where they were sampled otherwise than the base's."""
    if is_scored(work, plan, method, weights):
        return f"{method}: was scored"
    wanted = scored_by(work, plan, method, weights)
    how, base_how = (sampling_of(work, plan, kind) for kind in (method, BASE))
    failed = dict(failures(work, plan, method))
    folder, text = work / "results" / method, ""
    if how:  # an earlier plan's seeds may have images where those of this one have none
        if base_how and how != base_how:
            raise ValueError(
                f"the base was sampled by {base_how} and `{method}` by {how}: name another --work."
            )
        about = {
            "kind": plan.benchmark, "name": method, "training": plan.training,
            "seeds": plan.seeds, "failed": failed,
        }  # fmt: skip
        write_scores(work, plan, method, weights, about, how)
        text = f"{method}: {folder / 'report.html'}"
    else:
        text = f"{method}: no images, for training failed: {'; '.join(failed.values())}"
    mark_of(work, method).parent.mkdir(exist_ok=True)
    with whole(mark_of(work, method)) as partial:
        partial.write_text(json.dumps(wanted))
    return text


def done_of(work: Path, plan: Plan, kind: str) -> list[dict[str, Any]]:
    """What the marks of the parts of a method, or of BASE, say."""
    names = [name_of(task) for task in plan.tasks() if task[0] == kind]
    return [json.loads((work / "done" / f"{name}.json").read_text()) for name in names]


def sampling_of(work: Path, plan: Plan, kind: str) -> dict[str, Any]:
    """{} where nothing could be sampled."""
    return next((d["sampling"] for d in done_of(work, plan, kind) if d["sampling"]), {})


def failures(work: Path, plan: Plan, method: str) -> list[tuple[str, str]]:
    """(subject, why), of all seeds."""
    return [pair for d in done_of(work, plan, method) for pair in d["failed"].items()]


def gallery_of(plan: Plan) -> dict[str, Photos] | None:
    """All subjects of the embedded base, as `dreamtune score` has them for its runs, so that both
    compare; None, the benchmark's own subjects, on another base."""
    return read_photos(embedded.SUBJECTS, IDENTIFIER)[0] if embedded_base(plan) else None


def write_scores(
    work: Path,
    plan: Plan,
    method: str,
    weights: dict[str, str],
    about: dict[str, Any],
    how: dict[str, Any],
) -> None:
    photos: dict[str, Photos] = {}
    for number in range(len(plan.parts)):
        known = read_photos(work / "photos" / f"{number:02}")[0]
        holdout = config_of(work, plan, (BASE, plan.seeds[0], number)).holdout
        photos |= {name: without(own, holdout) for name, own in known.items()}
    protocol = find_protocol(plan.protocol)
    seeds = {s for seed in plan.seeds for s in image_seeds(protocol, seed)}
    scorers = load_scorers(protocol, weights, embedded_base(plan))
    images = of_seeds(read_images(work / "images" / method), seeds)
    base = of_seeds(read_images(work / "images" / BASE), seeds)
    job = Task(images, photos, about, gallery_of(plan), base, identifier=IDENTIFIER, sampling=how)
    results, folder = score_images(job, scorers, protocol), work / "results" / method
    folder.mkdir(parents=True, exist_ok=True)
    write_results(results, folder)
    write_page(results, folder, {i.key: i.picture for i in images.images}, photos)


def finish(work: Path, plan: Plan, tell: Callable[[str], None] = print) -> dict[str, Results]:
    """The results of the methods that could be sampled, all scored, how they compare, and the page
    of all."""
    results = {
        method: read_results(work / "results" / method)
        for method in plan.methods
        if sampling_of(work, plan, method)
    }
    pairs = write_comparisons(work / "results" / "comparisons.txt", results, tell)
    failed = [(m, *pair) for m in plan.methods for pair in failures(work, plan, m)]
    tell(str(write_benchmark(work / "results", plan, results, pairs, failed)))
    return results


def write_comparisons(
    path: Path, results: dict[str, Results], tell: Callable[[str], None]
) -> list[Pair]:
    """Of each pair of methods, in sentences."""
    pairs = [Pair(a, b, compare(results[a], results[b])) for a, b in combinations(results, 2)]
    texts = [pair.comparison.text(pair.a, pair.b) for pair in pairs]
    with whole(path) as partial:
        partial.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    for text in texts:
        tell(text)
    return pairs
