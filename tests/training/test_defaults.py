"""The defaults that depend on the base, as `--help` states them."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dreamtune import embedded
from dreamtune.adapters import METHODS, resolve_options
from dreamtune.config import FIELDS, Config, Settings
from dreamtune.data.words import read_words
from dreamtune.models.stable_diffusion import StableDiffusion
from dreamtune.training.chosen import EMBEDDED
from dreamtune.training.defaults import resolve

WORDS = read_words("a sks apple")
RUN = Path("runs/apple")
# What stays None: it means "off", "none" or the base's own, or is settled before `resolve`.
STAY = {
    "revision", "variant", "snr_gamma", "early_stop", "name", "resume_from_checkpoint", "subjects",
}  # fmt: skip


def fake_base(**changes: Any) -> Any:
    plain = {
        "embedded": False,
        "resolution": 512,
        "prediction_type": "epsilon",
        "zero_snr": False,
        "dtype": torch.float32,
        "target_modules": StableDiffusion.target_modules,
        "device": torch.device("cpu"),
    }
    base = SimpleNamespace(**plain | changes)
    base.sampling_steps = StableDiffusion.sampling_steps.fget(base)  # type: ignore[attr-defined]
    base.sampling_defaults = partial(StableDiffusion.sampling_defaults, base)  # type: ignore[arg-type]
    return base


def resolved(base: Any, **settings: Any) -> Config:
    given = {"instance_data_dir": "photos", "instance_prompt": "a sks apple"}
    return resolve(Config(**given | settings), base, WORDS, RUN)


LARGE = {
    "resolution": 512, "max_train_steps": 1000, "validation_steps": 250,
    "checkpointing_steps": 250, "train_batch_size": 1, "guidance_scale": 7.5,
}  # fmt: skip
SMALL = {
    "resolution": 128, "max_train_steps": 240, "validation_steps": 60,
    "checkpointing_steps": 60, "train_batch_size": 4, "guidance_scale": 4.0,
}  # fmt: skip
PLAIN = {"sampler": "dpm++", "guidance_rescale": 0.0, "prediction_type": "epsilon"}
ZERO_SNR = {"sampler": "base", "guidance_rescale": 0.3, "prediction_type": "v_prediction"}


@pytest.mark.parametrize("size", [LARGE, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("noise", [PLAIN, ZERO_SNR], ids=["plain", "zero_snr"])
def test_defaults_by_size_and_noise(size: dict[str, Any], noise: dict[str, Any]) -> None:
    base = fake_base(
        resolution=size["resolution"],
        zero_snr=noise is ZERO_SNR,
        prediction_type=noise["prediction_type"],
    )
    config = resolved(base)
    expected = size | noise | {"dino": "facebook/dino-vits16", "clip": "ViT-B-32:openai"}
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.output_dir == str(RUN) and config.identifier == "sks"


@pytest.mark.parametrize(("side", "steps", "batch"), [(256, 240, 4), (264, 1000, 1)])
def test_small_ends_at_256_pixels_of_training(side: int, steps: int, batch: int) -> None:
    """By the side that is trained at, not the base's own."""
    config = resolved(fake_base(), resolution=side)
    assert (config.resolution, config.max_train_steps, config.train_batch_size) == (
        side, steps, batch,
    )  # fmt: skip
    assert config.guidance_scale == (4.0 if side == 256 else 7.5)


def test_the_help_says_the_defaults_of_the_embedded_base() -> None:
    stated = {f.name: f.metadata["shown"] for f in dataclasses.fields(Config)}
    steps = [chosen.steps for chosen in EMBEDDED.values()]
    assert stated["max_train_steps"].startswith(f"{min(steps)} to {max(steps)} by method")
    assert stated["num_inference_steps"].startswith("12 with the package's base")


@pytest.mark.parametrize("name", METHODS)
def test_what_the_development_subjects_chose_for_the_embedded_base(name: str) -> None:
    base = fake_base(embedded=True, resolution=128, zero_snr=True)
    given = resolved(base, method=name, max_train_steps=30, learning_rate=1.0)
    assert (given.max_train_steps, given.learning_rate, given.validation_steps) == (30, 1.0, 10)
    config = resolved(base, method=name)
    assert (config.max_train_steps, config.learning_rate) == EMBEDDED[name]
    assert config.validation_steps == config.max_train_steps // 3
    assert config.num_inference_steps == 12
    elsewhere = resolved(fake_base(), method=name)
    assert elsewhere.learning_rate == METHODS[name].learning_rate
    assert elsewhere.num_inference_steps == 25


@pytest.mark.parametrize(
    ("settings", "validation", "checkpoints"),
    [
        ({"max_train_steps": 100}, 25, 25),
        ({"max_train_steps": 3}, 1, 1),
        ({"validation_steps": 7}, 7, 7),
        ({"validation_steps": 0}, 0, 0),
        ({"validation_steps": 7, "checkpointing_steps": 9}, 7, 9),
        ({"checkpointing_steps": 0}, 250, 0),
    ],
)
def test_scorings_and_checkpoints(
    settings: dict[str, Any], validation: int, checkpoints: int
) -> None:
    config = resolved(fake_base(), **settings)
    assert (config.validation_steps, config.checkpointing_steps) == (validation, checkpoints)


@pytest.mark.parametrize(
    ("device", "dtype", "name"),
    [
        ("cpu", torch.float32, "no"),
        ("cuda", torch.float16, "fp16"),
        ("cuda", torch.bfloat16, "bf16"),
    ],
)
def test_device_and_precision_are_those_of_the_base(
    device: str, dtype: torch.dtype, name: str
) -> None:
    config = resolved(fake_base(device=torch.device(device), dtype=dtype))
    assert (config.device, config.mixed_precision) == (device, name)


@pytest.mark.parametrize("method", METHODS)
def test_learning_rate_and_options_are_the_methods_own(method: str) -> None:
    config = resolved(fake_base(), method=method)
    assert config.learning_rate == METHODS[method].learning_rate
    assert config.options == resolve_options(METHODS[method], {}) != {}
    assert resolved(fake_base(), method=method, learning_rate=0.5).learning_rate == 0.5


def test_validation_prompts() -> None:
    assert resolved(fake_base()).validation_prompt == [
        "a {} in the jungle",
        "a {} in the snow",
        "a {} on the beach",
        "a {} on a cobblestone street",
        "a {} on top of a wooden floor",
        "a {} with a city in the background",
        "a {} on top of a purple rug in a forest",
        "a red {}",
    ]
    own = resolved(fake_base(embedded=True))
    assert own.validation_prompt == [
        "a {} on a red background",
        "a {} on a black background",
        "a {} on a white and pink striped background",
        "a {} on a navy and teal gradient background",
        "a {} in the snow",
        "a {} next to a pizza on a green background",
        "a {} above a book on a teal background",
        "a big {} on a gray background",
    ]
    assert set(own.validation_prompt) <= set(embedded.prompts())
    assert (own.dino, own.clip) == ("embedded", "embedded")
    for base in (fake_base(), fake_base(embedded=True)):
        assert resolved(base, validation_prompt=["a {}"]).validation_prompt == ["a {}"]


@pytest.mark.parametrize(
    ("settings", "class_prompt"),
    [
        ({}, "an apple"),
        ({"instance_prompt": "photo of a sks apple on ice"}, "photo of an apple on ice"),
        ({"instance_prompt": None}, "an apple"),
        ({"class_prompt": "one apple"}, "one apple"),
    ],
)
def test_class_prompt(settings: dict[str, Any], class_prompt: str) -> None:
    """Before: "a apple"."""
    config = resolved(fake_base(), with_prior_preservation=True, **settings)
    assert config.class_prompt == class_prompt
    assert config.class_data_dir == str(RUN / "class")


def test_no_class_prompt_without_prior_preservation() -> None:
    config = resolved(fake_base())
    assert config.class_prompt is None and config.class_data_dir is None


def test_prior_preservation_without_a_class_is_refused() -> None:
    config = Config(
        instance_data_dir="x", instance_prompt="a photo of sks", with_prior_preservation=True
    )
    with pytest.raises(ValueError, match="set --class_prompt"):
        resolve(config, fake_base(), read_words("a photo of sks"), RUN)


def test_what_is_given_stays() -> None:
    given = {
        "resolution": 64, "max_train_steps": 5, "validation_steps": 2, "train_batch_size": 3,
        "learning_rate": 0.1, "prediction_type": "v_prediction", "dino": "none", "clip": "none",
        "sampler": "base", "guidance_scale": 2.0, "guidance_rescale": 0.1,
        "checkpointing_steps": 4, "mixed_precision": "bf16", "device": "cuda",
        "class_prompt": "one apple", "class_data_dir": "class",
    }  # fmt: skip
    config = resolved(fake_base(), with_prior_preservation=True, **given)
    assert {name: getattr(config, name) for name in given} == given


@pytest.mark.parametrize("resolution", [128, 512])
def test_every_other_setting_is_filled_in(resolution: int) -> None:
    config = resolved(fake_base(resolution=resolution), with_prior_preservation=True)
    empty = {name for name, value in dataclasses.asdict(config).items() if value is None}
    assert empty == STAY
    stated = {name for name, f in FIELDS.items() if f.default is None}
    assert all(FIELDS[name].metadata["shown"] for name in stated - {"checkpoints_total_limit"})


def test_resolve_leaves_nothing_to_guess() -> None:
    settings = resolved(fake_base(), with_prior_preservation=True)
    assert type(settings) is Settings
    assert type(dataclasses.replace(settings, seed=3)) is Settings
    assert all(getattr(settings, name) is not None for name in Settings.__annotations__)
    assert settings.to_dict().keys() == FIELDS.keys()


def test_settings_refuse_a_gap() -> None:
    values = resolved(fake_base()).to_dict()
    with pytest.raises(ValueError, match="not resolved: `device`, `clip`"):
        Settings(**{**values, "clip": None, "device": None})
    with pytest.raises(ValueError, match="`resolution` must be a multiple of 8, got 12"):
        Settings(**{**values, "resolution": 12})
