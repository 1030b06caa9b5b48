"""What is shown of several runs."""

from __future__ import annotations

from pathlib import Path

from dreamtune.training.console import table
from dreamtune.training.run_folder import TrainResult


def result(best: int, last: int, **scores: float) -> TrainResult:
    record = {"step": best, **scores}
    history = [record, {"step": last, **scores}]
    return TrainResult(Path("r"), Path("a"), None, best, record, history, "")


def test_table_of_runs() -> None:
    runs = {
        "seed=0": result(3, 6, dino=0.5, clip_i=0.25, clip_t=0.125),
        "seed=1": result(6, 6, dino=0.75, clip_i=0.5, clip_t=0.0625),
    }
    lines = table(runs, {"seed=2": "no finite loss"}).splitlines()
    assert lines[0].split() == ["run", "steps", "best", "DINO", "CLIP-I", "CLIP-T"]
    assert lines[1].split() == ["seed=0", "6", "3", "0.500", "0.250", "0.125"]
    assert lines[2].split() == ["seed=1", "6", "6", "0.750", "0.500", "0.062"]
    assert lines[3].split(maxsplit=1) == ["seed=2", "failed: no finite loss"]


def test_table_without_scores_has_no_columns_of_them() -> None:
    head, line = table({"a run": result(6, 6)}, {}).splitlines()
    assert head.split() == ["run", "steps", "best"] and line.split() == ["a", "run", "6", "6"]
