"""Which adapter a path means: the same for load, export, generate and the command."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_unet

import dreamtune
from dreamtune.cli import main
from dreamtune.files.find import adapter_file, base_of_run, run_settings
from dreamtune.pipeline import load as pipeline
from dreamtune.pipeline.generate import generate

# What each path of the run below means, by the step of its adapter.
MEANT = {
    ".": 4,
    "best": 4,
    "best/adapter.safetensors": 4,
    "adapter.safetensors": 9,
    "checkpoint-6": 6,
    "checkpoint-6/best": 4,
}
each_path = pytest.mark.parametrize("place,step", MEANT.items())


@pytest.fixture
def run_dir(tmp_path: Path, tiny_pipeline_dir: Path) -> Path:
    """A run of 9 steps whose best is step 4, and of whose adapters element (0, 0) of every change
    is the step.
    """
    run = tmp_path / "run"
    adapter = dreamtune.inject(tiny_unet(), "lora", rank=1)
    for place, step in ((".", 9), ("best", 4), ("checkpoint-6", 6), ("checkpoint-6/best", 4)):
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.zero_()[..., 0, 0] = step**0.5
        adapter.save(run / place)
        if place != "checkpoint-6":
            dreamtune.export(adapter, run / place)
    (run / "checkpoint-6" / "run_state.json").write_text('{"step": 6}')
    (run / "config.yaml").write_text(f"pretrained_model_name_or_path: {tiny_pipeline_dir}\n")
    return run


def step_of(lora: Path) -> float:
    tensors = load_file(lora)
    key = next(k for k in tensors if k.endswith("lora_A.weight"))
    return round(float((tensors[key.replace("lora_A", "lora_B")] @ tensors[key])[0, 0]), 5)


@each_path
def test_load(run_dir: Path, place: str, step: int) -> None:
    group = dreamtune.load(tiny_unet(), run_dir / place).groups[0]
    up, down = group.adapter.factors(group.weight)
    assert round(float((up @ down)[0, 0, 0, 0]), 5) == step


@each_path
def test_export(run_dir: Path, place: str, step: int, tmp_path: Path) -> None:
    assert step_of(dreamtune.export(run_dir / place, tmp_path / "out")) == step


@each_path
def test_export_command(run_dir: Path, place: str, step: int, tmp_path: Path) -> None:
    assert main(["export", str(run_dir / place), str(tmp_path / "out")]) == 0
    assert step_of(tmp_path / "out" / "pytorch_lora_weights.safetensors") == step


@each_path
def test_generate(
    run_dir: Path, place: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seen(Exception):
        pass

    def load(pipe: object, path: Path, scale: float) -> None:
        raise Seen(path)

    monkeypatch.setattr(pipeline, "load", load)
    with pytest.raises(Seen) as seen:
        generate(run_dir / place, ["a dog"])
    assert step_of(dreamtune.export(seen.value.args[0], tmp_path / "out")) == step


def test_native_before_lora_and_a_lora_where_it_is_alone(run_dir: Path) -> None:
    assert adapter_file(run_dir) == run_dir / "best" / "adapter.safetensors"
    (run_dir / "best" / "adapter.safetensors").unlink()
    assert adapter_file(run_dir) == run_dir / "best" / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("name", ["adapter_kohya.safetensors", "of_a_tool.safetensors"])
def test_hidden_files_are_no_adapters(run_dir: Path, tmp_path: Path, name: str) -> None:
    """Such as a file manager's `._name` beside each file, and one that is being downloaded."""
    shutil.copyfile(run_dir / "best" / "pytorch_lora_weights.safetensors", tmp_path / name)
    (tmp_path / f"._{name}").write_bytes(b"no tensors")
    assert adapter_file(tmp_path) == tmp_path / name
    shutil.copyfile(tmp_path / name, tmp_path / f"2{name}")
    with pytest.raises(ValueError, match=f"several adapters: give one of 2{name}, {name}$"):
        adapter_file(tmp_path)


def test_a_checkpoint_without_its_adapter_is_not_its_best(run_dir: Path) -> None:
    (run_dir / "checkpoint-6" / "adapter.safetensors").unlink()
    with pytest.raises(
        ValueError, match="no `adapter.safetensors` or `pytorch_lora_w.* in it, and no L"
    ):
        adapter_file(run_dir / "checkpoint-6")


def test_settings_and_base_of_a_run(run_dir: Path, tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    for place in ("adapter.safetensors", "best/adapter.safetensors", "checkpoint-6/best/x"):
        assert base_of_run(run_dir / place) == str(tiny_pipeline_dir)
    assert run_settings(tmp_path / "x.safetensors") == {}
    with pytest.raises(ValueError, match="does not lie in the folder of a run: name its base w"):
        base_of_run(tmp_path / "x.safetensors")


@pytest.mark.parametrize("said", ["embedded", "ann/other-base"])
def test_the_base_that_a_file_says(tmp_path: Path, said: str) -> None:
    """The package's is taken; nothing is downloaded because a file says so."""
    adapter = dreamtune.inject(tiny_unet(), "lora", rank=1)
    native = adapter.save(tmp_path / "a.safetensors", metadata={"base": said})
    lora = dreamtune.export(adapter, tmp_path, metadata={"base": said})
    for file in (native, lora):
        if said == "embedded":
            assert base_of_run(file) == "embedded"
        else:
            with pytest.raises(ValueError, match=f"base .the file says `{said}`. with --pretr"):
                base_of_run(file)
