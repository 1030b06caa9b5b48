"""What a run makes of photos, captions, class images and the base: said, refused or compared."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dreamtune.config import Config
from dreamtune.models.base import Latents
from dreamtune.models.stable_diffusion import StableDiffusion
from dreamtune.training import run_folder
from dreamtune.training.train import train

PRIOR = {"with_prior_preservation": True, "num_class_images": 4}


def pictures(folder: Path, count: int, seed: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
            folder / f"r{i}.png"
        )
    return folder


@pytest.fixture
def quick(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    photos = pictures(tmp_path / "photos", 2)
    return {**settings, "instance_data_dir": str(photos), "max_train_steps": 1}


def test_the_class_images_of_kohyas_folders_serve(
    quick: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before: files of the folder itself were counted, whatever they were."""
    reg = tmp_path / "reg"
    pictures(reg / "1_dog", 4)
    for name in ("notes.md", "a.caption", "Thumbs.db"):
        (reg / name).write_text("no picture")
    before = sorted(reg.rglob("*"))
    train(Config(**quick, **PRIOR, class_data_dir=str(reg)))
    assert "Making" not in capsys.readouterr().out
    assert sorted(reg.rglob("*")) == before
    (reg / "1_dog" / "r3.png").unlink()
    train(
        Config(**{**quick, **PRIOR, "class_data_dir": str(reg), "output_dir": str(tmp_path / "b")})
    )
    assert "Making 1 class images" in capsys.readouterr().out
    assert sorted(p.name for p in reg.iterdir() if p not in before) == [
        ".dreamtune.json", "class-00000.png",
    ]  # fmt: skip


@pytest.mark.parametrize("way", ["itself", "dots", "link", "kohya", "parent of kohya"])
def test_the_photos_are_no_folder_of_class_images(
    way: str, quick: dict[str, Any], tmp_path: Path
) -> None:
    photos = Path(quick["instance_data_dir"])
    if "kohya" in way:
        shutil.move(photos, tmp_path / "all" / "10_sks dog")
        photos = tmp_path / "all" / "10_sks dog"
        quick["instance_data_dir"] = str(photos.parent if way == "kohya" else photos)
    folders = {
        "itself": photos,
        "dots": photos / ".." / photos.name,
        "link": tmp_path / "link",
        "kohya": photos,
        "parent of kohya": photos.parent,
    }
    (tmp_path / "link").symlink_to(photos)
    there = sorted(photos.iterdir())
    with pytest.raises(ValueError, match=r"`class_data_dir` .* holds the photos.*\(r0.png\)"):
        train(Config(**quick, **PRIOR, class_data_dir=str(folders[way])))
    assert sorted(photos.iterdir()) == there


def test_a_damaged_note_of_class_images_is_named(quick: dict[str, Any], tmp_path: Path) -> None:
    reg = pictures(tmp_path / "reg", 4)
    for text, message in (("{", "is not JSON"), ("[1]", "must hold how the images were made")):
        (reg / ".dreamtune.json").write_text(text)
        with pytest.raises(ValueError, match=rf"\.dreamtune\.json` {message}"):
            train(Config(**quick, **PRIOR, class_data_dir=str(reg)))


def test_captions_without_the_identifier_are_said(
    quick: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    photos = Path(quick["instance_data_dir"])
    (photos / "r0.txt").write_text("a dog on grass")
    (photos / "r1.txt").write_text("SKS, on grass")
    train(Config(**quick))
    warning = "Warning: 1 of 2 captions lack the identifier `sks`, which is not learned from"
    assert f"{warning} their photos (r0.png)." in capsys.readouterr().out
    (photos / "r0.txt").write_text("a sks_dog on grass")
    train(Config(**{**quick, "output_dir": quick["output_dir"] + "2"}))
    assert "Warning" not in capsys.readouterr().out


def test_a_run_goes_on_with_its_captions_alone(quick: dict[str, Any]) -> None:
    photos = Path(quick["instance_data_dir"])
    (photos / "r0.txt").write_text("a sks dog")
    first = train(Config(**quick))
    go_on = {"resume_from_checkpoint": "latest", "output_dir": str(first.run_dir)}
    (photos / "r0.txt").write_text("a sks dog in the deep snow")
    with pytest.raises(ValueError, match=r"the captions \(or repeats\) of r0.png in .* are not"):
        train(Config(**go_on, max_train_steps=2))
    (photos / "r0.txt").write_text("a sks  dog\n")
    assert train(Config(**go_on, max_train_steps=2)).history[-1]["step"] == 2
    with pytest.raises(ValueError, match="`max_train_steps` is 1, and the run is at step 2"):
        train(Config(**go_on, max_train_steps=1))


def test_a_run_goes_on_with_its_base_alone(quick: dict[str, Any], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(quick["pretrained_model_name_or_path"], base)
    first = train(Config(**{**quick, "pretrained_model_name_or_path": str(base)}))
    (file,) = (base / "unet").glob("*.safetensors")
    weights = load_file(file)
    name = next(n for n in weights if "to_q" in n)
    kept = (first.run_dir / "checkpoint-1" / run_folder.OPTIMIZER).read_bytes()
    save_file({**weights, name: weights[name] * 1.1}, file, {"format": "pt"})
    go_on = {"resume_from_checkpoint": "latest", "output_dir": str(first.run_dir)}
    with pytest.raises(ValueError, match="the base is not the one that .*: 1 of .* layers differ"):
        train(Config(**go_on, max_train_steps=2))
    assert (first.run_dir / "checkpoint-1" / run_folder.OPTIMIZER).read_bytes() == kept
    save_file(weights, file, {"format": "pt"})
    assert train(Config(**go_on, max_train_steps=2)).history[-1]["step"] == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([1], r"not finite for 1 of 2 pictures \(r1.png\): take them out"),
        ([0, 1], r"for 2 of 2 pictures \(r0.png, r1.png\): the autoencoder of the base is"),
    ],
)
def test_photos_whose_latents_are_not_finite_are_named(
    bad: list[int], message: str, quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before: their steps were skipped for the whole run."""
    original = StableDiffusion.encode_images

    def encode(self: StableDiffusion, pixels: torch.Tensor, batch: int = 4) -> Latents:
        latents = original(self, pixels, batch)
        latents.mean[bad, 0, 0, 0] = float("nan")
        return latents

    monkeypatch.setattr(StableDiffusion, "encode_images", encode)
    with pytest.raises(ValueError, match=message):
        train(Config(**quick))


def test_photos_are_kept_as_large_as_training_asks(
    quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from dreamtune.training.run import Run

    photos = tmp_path / "large"
    photos.mkdir()
    Image.new("RGB", (3000, 2000)).save(photos / "a.jpg")
    sides = {}
    for resolution in (64, 1536):
        config = {**quick, "instance_data_dir": str(photos), "resolution": resolution}
        sides[resolution] = Run(Config(**config)).images[0].size
    assert sides == {64: (1536, 1024), 1536: (2304, 1536)}
