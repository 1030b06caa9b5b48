"""Folders of scorers that lack weights, ask for code or hold values of no sense."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from planted import clip_plants, dino_plants, edit
from safetensors.torch import load_file, save_file
from scorer_folders import write_clip, write_dino

from dreamtune.metrics import Clip, Dino

CASES = [
    *((write_dino, Dino, name, plant) for name, plant in dino_plants().items()),
    *((write_clip, Clip, name, plant) for name, plant in clip_plants().items()),
]


@pytest.mark.parametrize(("write", "kind", "name", "plant"), CASES)
def test_no_code_of_a_scorer_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any, kind: Any, name: str, plant: Any
) -> None:
    """Before: open_clip passed the config's `trust_remote_code` on, and transformers asked."""
    folder, marker = write(tmp_path / "scorer"), tmp_path / "ran"
    plant(folder, marker)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(ValueError, match="scorer"):
        kind(str(folder))
    assert not marker.exists()


@pytest.mark.parametrize("write", [write_dino, write_clip])
def test_a_scorer_without_a_weight_is_refused(tmp_path: Path, write: Any) -> None:
    folder = write(tmp_path / "scorer")
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    kind = Dino if write is write_dino else Clip
    for key in list(tensors)[::9]:
        rest = {k: v for k, v in tensors.items() if k != key}
        save_file(rest, file, metadata={"format": "pt"})
        named = "lacks weights" if kind is Dino else key
        with pytest.raises(ValueError, match=named):
            kind(str(folder))


def test_a_clip_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "scorer")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="scorer"):
        Clip(str(folder))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"model_type": "ijepa"}, "`model_type` must be one of vit"),
        ("config.json", {"num_hidden_layers": 10**9}, "`num_hidden_layers` must be at most 200"),
        ("config.json", {"num_hidden_layers": 1}, "has layers that its config.json has not"),
        ("preprocessor_config.json", {"size": {"height": 8, "width": 9}}, "must say one side"),
        ("preprocessor_config.json", {"size": 3}, "of 3 px, less than a patch of the model, 8 px"),
        ("preprocessor_config.json", {"size": "x"}, "`size` must be"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "`image_mean`: it must be a list of"),
        (
            "preprocessor_config.json",
            {"image_mean": [0.5] * 3},
            "both `image_mean` and `image_std`",
        ),
        ("preprocessor_config.json", {"resample": 9}, "`resample` must be at most 5"),
        ("preprocessor_config.json", {"do_rescale": False}, "`do_rescale` must be one of True"),
    ],
)
def test_values_of_a_dino_that_make_no_sense(
    tmp_path: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    folder = write_dino(tmp_path / "scorer")
    edit(folder / file, **changes)
    with pytest.raises(ValueError, match=f"{file}.*{message}|{message}"):
        Dino(str(folder))


def test_a_preprocessor_without_normalisation_is_obeyed(tmp_path: Path) -> None:
    dino = Dino(str(write_dino(tmp_path / "dino", do_normalize=False)))
    assert (dino.protocol["mean"], dino.protocol["std"]) == ([0.0] * 3, [1.0] * 3)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("vision_cfg", {"layers": 10**9}, "`layers` must be at most 200"),
        ("text_cfg", {"context_length": "x"}, "`context_length` must be of type int"),
        ("preprocess_cfg", {"std": [0, 1, 1]}, "`std` must be above 0"),
        ("preprocess_cfg", {"interpolation": "x"}, "`interpolation` must be one of bicubic"),
        ("vision_cfg", {"no_such": 1}, "could not be loaded: TypeError"),
    ],
)
def test_values_of_a_clip_that_make_no_sense(
    tmp_path: Path, section: str, changes: dict[str, Any], message: str
) -> None:
    folder = write_clip(tmp_path / "scorer")
    config = json.loads((folder / "open_clip_config.json").read_text())
    (config if section == "preprocess_cfg" else config["model_cfg"])[section] |= changes
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        Clip(f"local-dir:{folder}")
