"""Files of bases that ask for code, point elsewhere or hold values of no sense."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import base_plants, edit

from dreamtune.models.load import load_base

PLANTS = base_plants()
RIGHT = {"modules of known names beside", "scheduler of a module beside"}


@pytest.fixture
def base(tiny_pipeline_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pipeline_dir, tmp_path / "copy"))


@pytest.mark.parametrize("name", PLANTS)
def test_no_code_of_a_base_runs(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With "y" on the terminal, and the folder as the working directory."""
    marker = tmp_path / "ran"
    plant: Callable[[Path, Path], None] = PLANTS[name]
    plant(base, marker)
    monkeypatch.chdir(base)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    if name in RIGHT:
        load_base(str(base))
    else:
        with pytest.raises(ValueError, match=r"copy/\w+"):
            load_base(str(base))
    assert not marker.exists()


def test_the_plants_work(tmp_path: Path) -> None:
    """A pickle that is read without care runs; a module that is imported does."""
    from planted import Call, write_code

    torch.save({"x": Call(tmp_path / "a")}, tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    write_code(tmp_path, tmp_path / "b")
    exec((tmp_path / "evil.py").read_text(), {"__name__": "evil"})
    assert (tmp_path / "a").exists() and (tmp_path / "b").exists()


DEEP = "[" * 100_000
UNET, TEXT = "unet/config.json", "text_encoder/config.json"
SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (UNET, {"block_out_channels": "x"}, "`block_out_channels` must be"),
        (UNET, {"sample_size": -1}, "`sample_size` must be at least 1, got -1"),
        (UNET, {"flip_sin_to_cos": "no"}, "`flip_sin_to_cos` must be of type bool, got 'no'"),
        (UNET, {"layers_per_block": 10**9}, "`layers_per_block` must be at most 200"),
        (UNET, {"norm_eps": float("nan")}, "`norm_eps` must be finite"),
        (UNET, {"act_fn": "x"}, "`act_fn` must be one of silu"),
        (UNET, {"_class_name": "UNet1DModel"}, "holds no UNet2DConditionModel.*UNet1DModel"),
        ("vae/config.json", {"scaling_factor": 0}, "`scaling_factor` must be above 0"),
        ("vae/config.json", {"_class_name": "VQModel"}, "is of a 'VQModel', not of a Autoenc"),
        (TEXT, {"num_hidden_layers": 10**9}, "`num_hidden_layers` must be at most 200"),
        (TEXT, {"model_type": "bert"}, "`model_type` must be one of clip_text_model"),
        (TEXT, {"hidden_act": "x"}, "text_encoder` could not be loaded: KeyError"),
        (SCHEDULER, {"prediction_type": "sample"}, "`prediction_type` must be one of epsilon"),
        (SCHEDULER, {"num_train_timesteps": 10**12}, "`num_train_timesteps` must be at most"),
        (SCHEDULER, {"beta_start": 0.5}, "`beta_start` must be at most `beta_end`"),
        (TEXT, {"eos_token_id": None}, "`eos_token_id` cannot be empty"),
        (SCHEDULER, {"beta_schedule": []}, "`beta_schedule` must be one of"),
        ("tokenizer/tokenizer_config.json", {"tokenizer_class": "X"}, "`tokenizer_class` must be"),
    ],
)
def test_values_of_no_sense_are_named(
    base: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    edit(base / file, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_base(str(base))
    assert file.split("/")[0] in str(caught.value) or "copy" in str(caught.value)


@pytest.mark.parametrize("text", [DEEP, "", "[]", "null", "{", "\0", '"x"'])
@pytest.mark.parametrize("file", ["model_index.json", UNET, SCHEDULER])
def test_what_is_no_json_object_is_named(base: Path, file: str, text: str) -> None:
    (base / file).write_text(text)
    with pytest.raises(ValueError, match=file.split("/")[-1]):
        load_base(str(base))


def test_an_index_of_shards_stays_in_its_folder(base: Path) -> None:
    name = "diffusion_pytorch_model"
    file = base / "unet" / f"{name}.safetensors"
    shutil.move(file, base / "unet" / "a.safetensors")
    index = base / "unet" / f"{name}.safetensors.index.json"
    for place, message in (
        ("../vae/x.safetensors", "must name .safetensors files beside it"),
        ("x.gguf", "must name .safetensors files beside it"),
        ("b.safetensors", "names `b.safetensors`, which is not there"),
    ):
        index.write_text(json.dumps({"weight_map": {"x": place}}))
        with pytest.raises(ValueError, match=message):
            load_base(str(base))
