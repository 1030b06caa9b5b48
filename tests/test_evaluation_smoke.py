"""The smoke form of every command and script that evaluates, end to end on the embedded base: one
run of a benchmark is what the commands then look at."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamtune import embedded
from dreamtune.cli import main
from dreamtune.evaluation.results import read_results

EVAL = Path(__file__).parents[1] / "eval"
sys.path += [str(EVAL), str(EVAL / "speed")]

import dreambench  # noqa: E402
import embedded_subjects  # noqa: E402

METHOD = "delora,rank=2"
SUBJECT = embedded.subjects("report")[0]
PROTOCOL = """
like: dreamtune
metrics: [dino, clip_i, clip_t, dino_held_out, dino_retrieval, dino_drift]
prompts: ["a {} in the snow", "a red {}"]
images_per_prompt: 1
unrelated: [a pizza on a green background]
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`eval/dreambench.py --benchmark emojibench`: one subject, two steps, three images."""
    torch.set_num_threads(1)  # as every test: pictures are compared to the bit
    folder = tmp_path_factory.mktemp("emojibench")
    (folder / "small.yaml").write_text(PROTOCOL)
    flags = [
        *("--benchmark", "emojibench", "--work", str(folder / "bench"), "--only", SUBJECT.id),
        *("--methods", METHOD, "--protocol", str(folder / "small.yaml"), "--device", "cpu"),
        *("--max_train_steps", "2", "--validation_steps", "2", "--checkpointing_steps", "1"),
        *("--num_inference_steps", "1", "--validation_prompt", "a {}"),
        *("--num_validation_images", "2"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DREAMTUNE_CACHE", str(folder / "cache"))
        assert dreambench.main(flags) == 0
    return folder


@pytest.fixture
def run(work: Path) -> Path:
    return work / "bench" / "runs" / METHOD / "seed-0" / "00" / SUBJECT.id


def test_emojibench(work: Path) -> None:
    found = read_results(work / "bench" / "results" / METHOD)
    assert found.subjects == [SUBJECT.id] and found.source["kind"] == "emojibench"
    assert (len(found.images), len(found.base)) == (3, 2)
    assert {s["model"] for s in (found.protocol["scorers"][k] for k in ("dino", "clip"))} == {
        "embedded"
    }
    scores = found.scores()
    assert 0 < scores["dino_held_out"].mean < 1 and scores["dino"].n == 2


def test_score_compare_and_cache(
    work: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`dreamtune score` of a run with no flag but the protocol: base, scorers, photos and gallery
    are the package's own. It makes the pictures that the benchmark made."""
    rule = ["--protocol", str(work / "small.yaml")]
    assert main(["score", str(run), *rule, "--output_dir", str(tmp_path / "a")]) == 0
    found, bench = read_results(tmp_path / "a"), read_results(work / "bench" / "results" / METHOD)
    assert found.source["base"] == "embedded" and found.source["kind"] == "a run"
    assert [row.sha256 for row in found.images] == [row.sha256 for row in bench.images]
    assert found.scores()["dino"].mean == pytest.approx(bench.scores()["dino"].mean, abs=1e-5)
    page = (tmp_path / "a" / "report.html").read_text()
    assert "on the embedded base" in page and page.count('<svg viewBox="0 0') == 1
    again = ["score", str(tmp_path / "a" / "images"), *rule, "--output_dir", str(tmp_path / "b")]
    photos = ["--photos", str(work / "bench" / "photos" / "00")]
    assert main([*again, *photos, "--gallery", str(work / "bench" / "photos" / "00")]) == 1
    assert "Nothing is downloaded that was not named" in capsys.readouterr().err
    own = ["--dino", "embedded", "--clip", "embedded", "--gallery", str(embedded.SUBJECTS)]
    assert main([*again, *photos, *own]) == 0
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "CLIP-T: A and B are equal" in capsys.readouterr().out
    assert main(["cache"]) == 0 and "MiB" in capsys.readouterr().out
    assert main(["cache", "--clear"]) == 0 and "Removed" in capsys.readouterr().out


def test_selfcheck(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for subject in embedded.subjects("dev")[:2]:
        for photo in subject.photos:
            (tmp_path / subject.id).mkdir(exist_ok=True)
            shutil.copy(photo, tmp_path / subject.id)
    flags = ["--selfcheck", "--dino", "embedded", "--clip", "embedded"]
    assert main(["score", str(tmp_path), *flags]) == 0
    assert "Real images of 2 subjects, 10 photos, by protocol dreamtune" in capsys.readouterr().out


def test_analyse(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyse", str(run)]) == 0
    said = capsys.readouterr().out
    found = json.loads((run / "analysis.json").read_text())
    assert [entry["step"] for entry in found["files"]] == [1, 2]
    assert "step 2, the best: weights moved by" in said and "of its bound used" in said
    page = (run / "report.html").read_text()
    assert page.count("What happened to the weights") == 1 and page.count("Relative weight") >= 2
    assert main(["analyse", str(run / "nothing")]) == 1


@pytest.mark.parametrize("measure", ["quickstart", "tunability"])
def test_embedded_subjects(
    measure: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embedded_subjects.main([measure, "--work", str(tmp_path), "--smoke"])
    out, first = capsys.readouterr().out, embedded.subjects("dev")[0].id
    assert f"\n| {first} | " in out
    last = "all 1: " if measure == "quickstart" else "retrieved among 42: base "
    assert last in out.splitlines()[-1]


def test_speed_of_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import score

    score.main(["--work", str(tmp_path / "new"), "--size", "tiny", "--count", "8"])
    said: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["images"] == 8 and said["all_s"] > 0
    assert (tmp_path / "new" / "scores" / "report.html").is_file()
    with pytest.raises(SystemExit, match="new` is there: name a new --work"):
        score.main(["--work", str(tmp_path / "new"), "--size", "tiny", "--count", "8"])
