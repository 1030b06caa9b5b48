"""What a base says of itself is obeyed; what it does not say is said to be assumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import edit
from safetensors.torch import load_file, save_file
from single_file_layout import write_configs, write_single_file

from dreamtune.config import Config
from dreamtune.models import single_file
from dreamtune.models.load import load_base
from dreamtune.models.stated import Stated, read_modelspec, read_stated
from dreamtune.training.train import train


@pytest.fixture
def base(tiny_pipeline_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pipeline_dir, tmp_path / "copy"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    write_single_file(folder / "m.safetensors", write_configs(folder / "configs"))
    return folder


YAML = (
    'model:\n  params:\n    parameterization: "v"\n    linear_start: 0.001\n    scale_factor: 0.2\n'
)
KEYS = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
SPEC = {"modelspec.prediction_type": "v", "modelspec.resolution": "768x768"}


def test_a_single_files_own_statements(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single_file, "CONFIGS", folder / "configs")
    tensors, file = load_file(folder / "m.safetensors"), tmp_path / "m.safetensors"
    save_file({**tensors, **KEYS}, file)
    marked = load_base(str(file))
    assert (marked.prediction_type, marked.zero_snr, marked.notes) == ("v_prediction", True, ())
    assert marked.process().alpha_bar[-1] == 0
    assert marked.scheduler.config.timestep_spacing == "trailing"
    other = load_base(str(file), prediction_type="epsilon")
    assert other.prediction_type == "epsilon"
    assert other.notes == (
        "--prediction_type epsilon is used, although `m.safetensors` says v_prediction (its key "
        "`v_pred`).",
    )
    save_file(tensors, file, metadata=SPEC)
    spec = load_base(str(file))
    assert (spec.prediction_type, spec.resolution, spec.notes) == ("v_prediction", 768, ())
    save_file(tensors, file)
    file.with_suffix(".yaml").write_text(YAML)
    beside = load_base(str(file))
    assert (beside.prediction_type, beside.vae.config.scaling_factor) == ("v_prediction", 0.2)
    assert beside.process().alpha_bar[0] == pytest.approx(0.999, abs=1e-6)
    save_file(tensors, file, metadata={"modelspec.prediction_type": "epsilon"})
    with pytest.raises(ValueError, match=r"contradicts itself: .*Choose by --prediction_type"):
        load_base(str(file))


def test_a_single_file_that_says_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one whose suffix is in capitals."""
    monkeypatch.setattr(single_file, "CONFIGS", folder / "configs")
    file = tmp_path / "M.SAFETENSORS"
    shutil.copy(folder / "m.safetensors", file)
    found = load_base(str(file))
    assert (found.prediction_type, found.resolution) == ("epsilon", 512)
    assert found.notes == (
        "`M.SAFETENSORS` does not say what it predicts: a Stable Diffusion 1.x single file is read "
        "as epsilon; --prediction_type v_prediction otherwise.",
    )


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"modelspec.prediction_type": "x0"}, "`modelspec.prediction_type` must be one of .* 'x0'"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "is a stable-diffusion-v1/lora"),
        ({"modelspec.architecture": "stable-diffusion-v1-inpainting"}, "inpainting"),
    ],
)
def test_statements_that_cannot_be_obeyed(metadata: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_modelspec(Path("m.safetensors"), metadata, Stated())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {params: {parameterization: x0}}", "`parameterization` must be one of"),
        ("model: {params: {linear_start: 2}}", "`linear_start` must be below 1"),
        ("a: 1", "has no `model: params:`: move it away"),
        ("model: !!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_yaml_beside_that_is_not_understood(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_stated(tmp_path / "m.safetensors", [], {})


def test_a_run_says_what_it_assumes(
    settings: dict[str, Any], base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = base / "scheduler/scheduler_config.json"
    config = json.loads(file.read_text())
    del config["prediction_type"], config["beta_end"]
    file.write_text(json.dumps(config))
    few = {"max_train_steps": 1, "validation_steps": 0, "pretrained_model_name_or_path": str(base)}
    train(Config(**{**settings, **few}))
    assert (
        "scheduler_config.json` does not say, and it is assumed: beta_end 0.02, prediction_type "
        "epsilon (--prediction_type v_prediction otherwise)." in capsys.readouterr().out
    )


def test_the_users_prediction_type_wins_and_is_said(tiny_v_pipeline_dir: Path) -> None:
    assert load_base(str(tiny_v_pipeline_dir), prediction_type="v_prediction").notes == ()
    base = load_base(str(tiny_v_pipeline_dir), prediction_type="epsilon")
    assert base.prediction_type == "epsilon"
    assert ["although" in note and "says v_prediction" in note for note in base.notes] == [True]


def test_the_defaults_of_the_schedulers_own_class(base: Path) -> None:
    """Before: DDPM's linear betas up to 0.02, where LCM's are Stable Diffusion's own."""
    from diffusers import LCMScheduler

    edit(base / "model_index.json", scheduler=["diffusers", "LCMScheduler"])
    (base / "scheduler/scheduler_config.json").write_text("{}")
    found = load_base(str(base))
    assert torch.allclose(found.process().alpha_bar, LCMScheduler().alphas_cumprod)
    assert "beta_schedule scaled_linear" in " ".join(found.notes)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (["diffusers", "NewestScheduler"], "is not in this diffusers"),
        (["my_module", "EulerX"], "is no scheduler of diffusers"),
        (["diffusers", "LMSDiscreteScheduler"], None),
    ],
)
def test_a_scheduler_that_is_not_here(base: Path, named: list[str], message: str | None) -> None:
    """Its betas are all that training needs."""
    before = load_base(str(base)).process().alpha_bar
    edit(base / "model_index.json", scheduler=named)
    found = load_base(str(base))
    assert torch.equal(found.process().alpha_bar, before)
    assert message is None or message in " ".join(found.notes)
    (base / "scheduler/scheduler_config.json").write_text('{"beta_start": 0.1}')
    if message:
        with pytest.raises(ValueError, match="does not say beta_end, beta_schedule"):
            load_base(str(base))


def test_a_tokenizer_without_a_length_or_with_a_longer_one(base: Path) -> None:
    file = base / "tokenizer/tokenizer_config.json"
    for length, said in ((None, "says no length"), (10**30, "says no length"), (99, "of 99")):
        edit(file, model_max_length=length)
        found = load_base(str(base))
        assert found.encode_prompts(["a dog"])["prompt_embeds"].shape == (1, 16, 24)
        assert said in " ".join(found.notes)
    edit(file, model_max_length=8)
    assert load_base(str(base)).encode_prompts(["a"])["prompt_embeds"].shape == (1, 8, 24)
    edit(base / "text_encoder/config.json", vocab_size=10)
    with pytest.raises(ValueError, match="text_encoder"):
        load_base(str(base))


def test_a_base_without_a_size(base: Path) -> None:
    for size, message in ((None, "has no `sample_size`"), ([8, 16], r"of \[8, 16\]")):
        edit(base / "unet/config.json", sample_size=size)
        with pytest.raises(ValueError, match=f"{message}.*--resolution 512"):
            _ = load_base(str(base)).resolution
    edit(base / "unet/config.json", sample_size=[8, 8])
    assert load_base(str(base)).resolution == 16


def test_indices_that_editors_and_other_pipelines_wrote(base: Path) -> None:
    file = base / "model_index.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    load_base(str(base))
    index = json.loads(file.read_text("utf-8-sig"))
    absent = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    image = {**index, **absent, "_class_name": "StableDiffusionImg2ImgPipeline"}
    file.write_text(json.dumps(image))
    load_base(str(base))
    for changes, message in (
        ({"_class_name": "LatentConsistencyModelPipeline"}, "is a LatentConsistencyModelPipeline"),
        (
            {"_class_name": ["pipeline", "X"]},
            "model_index.json`: `_class_name` must be of type str",
        ),
        ({"vae": [None, None]}, "model_index.json`: `vae` cannot be empty"),
        ({"unet": ["a"]}, "`unet`: it must be a list of two"),
    ):
        file.write_text(json.dumps({**index, **changes}))
        with pytest.raises(ValueError, match=message):
            load_base(str(base))
    del index["scheduler"]
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="model_index.json`: `scheduler` is missing"):
        load_base(str(base))


@pytest.mark.parametrize(
    ("says", "used", "said"),
    [
        ("1", "1", None), ("", "1", None), ("2", "1", "clip skip 2: here the last layer of"),
        ("2", "2", None), ("1", "2", "clip skip 1: here the last layer but one of"),
    ],
)  # fmt: skip
def test_another_layer_of_the_text_encoder_is_said(
    says: str, used: str, said: str | None, tmp_path: Path
) -> None:
    """XL is always told the last but one."""
    about = {"modelspec.encoder_layer": says}
    notes = read_stated(tmp_path / "m.safetensors", [], about, used).notes
    assert notes == [] if said is None else said in notes[0]
