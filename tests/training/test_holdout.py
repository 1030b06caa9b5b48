"""Photos that nothing is trained on, the sign of overfitting, and the base's pictures made once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreamtune.config import Config
from dreamtune.data.photos import chosen, hold_out, read_folder
from dreamtune.evaluation import validation
from dreamtune.evaluation.layout import read_subject, without
from dreamtune.evaluation.overfit import last_overfitting, overfitting
from dreamtune.evaluation.validation import read_grid
from dreamtune.metrics import Scorers
from dreamtune.training.train import train, train_stacked

pytestmark = pytest.mark.usefixtures("undrawn")


def test_how_many_are_held_out() -> None:
    digests = [f"{i * 37 % 11:02}" for i in range(11)]
    assert [len(chosen(digests[:n], "auto")) for n in (1, 5, 6, 9, 10)] == [0, 0, 1, 1, 2]
    assert chosen(digests, "auto", others=True) == set() == chosen(digests, "0")
    assert chosen(digests, "2") == {"00", "01"} == chosen(digests[::-1], "2")
    assert chosen(["a", "a", "b"], "1") == {"b"}  # what is there twice would be trained on
    with pytest.raises(ValueError, match="`holdout` is 3, and there are 3 photos"):
        chosen(digests[:3], "3")
    with pytest.raises(ValueError, match="`holdout` must be auto or at least 0, got '-1'"):
        Config(holdout="-1")


@pytest.fixture
def photos(photo_dir: Path, tmp_path: Path) -> Path:
    """Three photos, and one in reference/."""
    folder = tmp_path / "photos"
    shutil.copytree(photo_dir, folder)
    (folder / "reference").mkdir()
    pixels = np.random.default_rng(7).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "reference" / "own.png")
    return folder


def test_held_out_photos_are_scored_and_not_trained_on(
    settings: dict[str, Any], scorer_names: dict[str, str], photos: Path, capsys: Any
) -> None:
    common = {**settings, **scorer_names, "instance_data_dir": str(photos), "holdout": "1"}
    result = train(Config(**common))
    assert "2 photos, 2 held out of training (reference/own.png, " in capsys.readouterr().out
    folder = hold_out(read_folder(photos), "1")
    assert len(folder.photos) == len(folder.held_out) == 2 and folder.skipped == [".DS_Store"]
    dino = Scorers.load(scorer_names).extractors["dino"]
    for record in result.history:
        grid = result.run_dir / "samples" / f"{record['step']:06d}.png"
        images = dino.images(read_grid(grid, 2, 16))
        for key, part in (("dino", folder.photos), ("dino_held_out", folder.held_out)):
            cosines = images @ dino.images([p.image for p in part]).T
            assert record[key] == pytest.approx(cosines.mean().item(), abs=1e-5)
        seen = images @ dino.images([p.image for p in folder.photos]).T
        assert record["dino_nearest"] == pytest.approx(seen.amax(1).mean().item(), abs=1e-5)
    # a scoring of the run takes the same for held out
    found = without(read_subject(photos), "1")
    assert [p.digest for p in found.photos] == [p.digest for p in folder.photos]
    assert [p.digest for p in found.held_out] == [p.digest for p in folder.held_out]
    shutil.copy(photos / "0.png", photos / "reference" / "own.png")
    more = {"output_dir": common["output_dir"], "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match="the photos held out in .* are not those"):
        train(Config(**{**common, **more, "max_train_steps": 7}))


def test_without_held_out_photos_there_is_no_such_score(
    settings: dict[str, Any], scorer_names: dict[str, str]
) -> None:
    result = train(Config(**{**settings, **scorer_names, "max_train_steps": 1}))
    assert all("dino_nearest" in r for r in result.history)
    assert not any("dino_held_out" in r for r in result.history)


def history(*rows: tuple[int, float, float], error: float | None = 0.01) -> list[dict[str, Any]]:
    errors = {"dino_nearest_se": error, "clip_t_se": error}
    return [{"step": s, "dino_nearest": near, "clip_t": text, **errors} for s, near, text in rows]


def test_overfitting_is_nearer_to_photos_and_farther_from_prompts() -> None:
    rows = [(0, 0.2, 0.40), (10, 0.6, 0.35), (20, 0.7, 0.36), (30, 0.8, 0.30)]
    text = overfitting(history(*rows))
    assert text and "from step 20 to 30" in text
    assert "(0.700 to 0.800) while CLIP-T fell (0.360 to 0.300)" in text
    assert overfitting(history(*rows[:3])) is None  # CLIP-T rose
    assert overfitting(history(*rows[:2])) is None  # nothing trained before it
    assert overfitting(history(*rows, (40, 0.71, 0.30), error=0.02)) is None  # within the noise
    assert overfitting(history(*rows[:3], (30, 0.8, 0.352))) is None
    assert overfitting(history(*rows[:3], (30, 0.8, 0.30), error=None)) == text
    assert overfitting(history(*rows[:3], (30, 0.8, 0.358), error=None)) is None
    later = history(*rows, (40, 0.6, 0.37))
    assert overfitting(later) is None and last_overfitting(later) == text
    assert overfitting([{"step": 0, "loss": 1.0}]) is None


def test_pictures_of_the_base_are_made_once(
    settings: dict[str, Any],
    scorer_names: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[list[str]] = []
    sample = validation.sample
    monkeypatch.setattr(
        validation, "sample", lambda pipe, prompts, *a, **k: (
            made.append(list(prompts)), sample(pipe, prompts, *a, **k)
        )[1],
    )  # fmt: skip
    sweep = {**settings, **scorer_names, "max_train_steps": 1, "validation_steps": 0}
    swept = Config(**sweep, sweep=["seed=0,1,2"], slots="2")
    result = train_stacked(swept)
    # step 0 once; step 1 of a wave of two and of one
    assert [len(prompts) for prompts in made] == [2, 4, 2]
    alone = train(Config(**{**sweep, "seed": 1, "output_dir": str(tmp_path / "alone")}))
    ours = result.results["seed=1"]
    assert (ours.best_step, ours.reason) == (alone.best_step, alone.reason)
    first = [json.loads((r.run_dir / "metrics.jsonl").read_text().splitlines()[0]) for r in
             (alone, *result.results.values())]  # fmt: skip
    for record in first[1:]:
        assert record["dino"] == pytest.approx(first[0]["dino"], abs=1e-6)
