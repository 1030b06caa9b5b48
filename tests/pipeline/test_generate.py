"""Images from a run: those of its adapter, at its settings, beside what is there already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dreamtune
from dreamtune.config import Config
from dreamtune.models.load import load_base
from dreamtune.models.sample import grid, sample
from dreamtune.pipeline.generate import generate

PROMPTS = ["a sks dog on a red chair", "a sks dog"]


@pytest.fixture
def run_dir(settings: dict[str, Any]) -> Path:
    rate = {"learning_rate": 0.3, "guidance_scale": 2.0}
    return dreamtune.train(Config(**settings | rate)).run_dir


def pixels(paths: list[Path]) -> list[np.ndarray]:
    return [np.asarray(Image.open(path), dtype=int) for path in paths]


def test_images_are_those_of_the_adapter_on_its_base(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    paths = generate(run_dir, PROMPTS, num_images=2, seed=5, output_dir=out)
    assert [p.name for p in paths] == ["0000.png", "0001.png", "0002.png", "0003.png"]
    base = load_base(str(dreamtune_base(run_dir)))
    with base.sampling("base") as pipe:
        dreamtune.load(pipe, run_dir)
        names, seeds = grid(PROMPTS, [5, 6])
        wanted = sample(
            pipe, names, seeds, steps=2, guidance_scale=2.0, guidance_rescale=0.3, size=16
        )
    for ours, theirs in zip(pixels(paths), wanted, strict=True):
        assert abs(ours - np.asarray(theirs, dtype=int)).max() <= 1
    plain = generate(run_dir, PROMPTS, num_images=2, seed=5, scale=0.0, output_dir=out)
    assert [p.name for p in plain] == ["0004.png", "0005.png", "0006.png", "0007.png"]
    moved = [abs(a - b).max() for a, b in zip(pixels(paths), pixels(plain), strict=True)]
    assert max(moved) > 1


def dreamtune_base(run_dir: Path) -> str:
    from dreamtune.files.find import adapter_file, base_of_run

    return base_of_run(adapter_file(run_dir))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_images": 0}, "`num_images` must be at least 1, got 0"),
        ({"steps": 0}, "`num_inference_steps` must be at least 1, got 0"),
        ({"seed": -1}, "`seed` must be at least 0, got -1"),
        ({"resolution": 12}, "`resolution` must be a multiple of 8, got 12"),
    ],
)
def test_refusals_come_before_anything_is_read(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(Path("nowhere"), ["a"], **given)
