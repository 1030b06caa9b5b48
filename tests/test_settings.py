"""One fact in one place: what stands on a field or in a signature holds for every way in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
import yaml
from pydantic import Field
from tiny import tiny_unet

import dreamtune
from dreamtune.adapters import METHODS, Adapter, resolve_options
from dreamtune.config import FIELDS, STACKED, Config, having
from dreamtune.configfile import continued
from dreamtune.fields import checker, validated
from dreamtune.flags import train_config
from dreamtune.training.sweep import expand

AT_LEAST_1 = (
    "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "num_class_images",
    "resolution", "crops", "num_validation_images", "num_inference_steps", "sample_batch_size",
    "checkpoints_total_limit", "early_stop",
)  # fmt: skip
AT_LEAST_0 = (
    "lr_warmup_steps", "validation_steps", "checkpointing_steps", "prior_loss_weight", "seed",
    "validation_seed", "adam_weight_decay", "guidance_rescale", "guidance_scale",
)  # fmt: skip
ABOVE_0 = ("learning_rate", "max_grad_norm", "snr_gamma", "adam_epsilon")
CHOICES = {
    "prediction_type": "epsilon or v_prediction",
    "lr_scheduler": "constant, constant_with_warmup, cosine or linear",
    "mixed_precision": "no, fp16 or bf16",
    "capture": "auto, on or off",
    "fused": "auto, on or off",
    "sampler": "base or dpm++",
    "report_to": "none or tensorboard",
}


def sentence(**values: Any) -> str:
    with pytest.raises(ValueError) as caught:
        Config(**values)
    assert type(caught.value) is ValueError
    return str(caught.value)


def test_every_range() -> None:
    for name in AT_LEAST_1:
        assert sentence(**{name: 0}) == f"`{name}` must be at least 1, got 0."
        assert sentence(**{name: "0"}) == f"`{name}` must be at least 1, got 0."
    for name in AT_LEAST_0:
        assert sentence(**{name: -1}) == f"`{name}` must be at least 0, got -1."
    for name in ABOVE_0:
        for value in (0, -1):
            assert sentence(**{name: value}) == f"`{name}` must be above 0 and finite, got {value}."
    for name in (*ABOVE_0, "prior_loss_weight", "adam_weight_decay", "guidance_rescale"):
        for number in ("inf", "nan"):
            assert sentence(**{name: float(number)}) == f"`{name}` must be finite, got {number}."
    for name in ("adam_beta1", "adam_beta2"):
        assert sentence(**{name: -0.5}) == f"`{name}` must be at least 0, got -0.5."
        assert sentence(**{name: 1}) == f"`{name}` must be below 1, got 1."
    for name, words in CHOICES.items():
        assert sentence(**{name: "x"}) == f"`{name}` must be one of {words}; got 'x'."


def test_every_type() -> None:
    assert sentence(seed=[1]) == "`seed` must be of type int, got [1]."
    assert sentence(seed=True) == "`seed` must be of type int, got True."
    assert sentence(learning_rate=True) == "`learning_rate` must be of type float, got True."
    assert sentence(seed=1.5) == "`seed` must be a whole number, got 1.5."
    assert sentence(seed=None) == "`seed` cannot be empty."
    assert sentence(learning_rate="fast") == "`learning_rate` must be a number, got 'fast'."
    assert sentence(random_flip="maybe") == "`random_flip` must be true or false, got 'maybe'."
    assert sentence(options=[]) == "`options` must be of type dict, got []."
    assert sentence(resolution=12, seed="x") == (
        "`resolution` must be a multiple of 8, got 12; the nearest is 16. "
        "`seed` must be a whole number, got 'x'."
    )
    config = Config(
        instance_data_dir=Path("p"),  # type: ignore[arg-type]
        learning_rate="1e-4",  # type: ignore[arg-type]
        validation_prompt="a {}",  # type: ignore[arg-type]
        mixed_precision=False,  # type: ignore[arg-type]  # what YAML makes of a bare `no`
        capture=True,  # type: ignore[arg-type]
        name=3,  # type: ignore[arg-type]
        resolution=None,
    )
    assert (config.instance_data_dir, config.learning_rate) == ("p", 1e-4)
    assert (config.validation_prompt, config.name) == (["a {}"], "3")
    assert (config.mixed_precision, config.capture, config.resolution) == ("no", "on", None)


def test_the_facts_on_the_fields() -> None:
    """The lists that stood in three modules."""
    free = {n for n, f in FIELDS.items() if f.metadata["resume"] is True}
    assert free == {
        "output_dir", "name", "resume_from_checkpoint", "checkpointing_steps",
        "checkpoints_total_limit", "report_to", "sample_batch_size", "class_data_dir", "device",
        "capture", "compile", "fused", "early_stop",
    }  # fmt: skip
    assert callable(FIELDS["max_train_steps"].metadata["resume"])
    assert set(having("own")) == {
        "instance_prompt", "class_prompt", "class_data_dir", "identifier", "validation_prompt",
        "learning_rate", "seed",
    }  # fmt: skip
    assert set(having("swept")) == {"learning_rate", "seed", "method"}
    assert set(STACKED) == {"subjects", "sweep", "slots"}


@pytest.mark.parametrize("name", FIELDS)
def test_a_continuation_may_change_what_the_field_says(name: str, tmp_path: Path) -> None:
    other: dict[str, Any] = {
        "pretrained_model_name_or_path": "x", "resolution": 8, "options": {"rank": 2}, "slots": "3",
        "lr_scheduler": "linear", "target_modules": ["to_q"], "validation_prompt": ["a"],
        "sweep": ["seed=1"], "prediction_type": "epsilon", "mixed_precision": "bf16",
        "sampler": "base", "capture": "on", "fused": "on", "report_to": "tensorboard",
        "center_crop": False, "adam_beta1": 0.5, "adam_beta2": 0.5, "checkpoints_total_limit": 3,
    }  # fmt: skip
    default = getattr(Config(), name)
    made = not default if isinstance(default, bool) else 7 if name != "method" else "lora"
    value = other.get(name, made)
    needed: dict[str, Any] = {"instance_data_dir": "p"} if value == "x" else {}
    needed |= {"center_crop": False} if name == "crops" else {}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(Config(**needed).to_dict()))
    changed = Config(**{**needed, name: value})
    if FIELDS[name].metadata["resume"]:
        assert getattr(continued(changed, file), name) == getattr(changed, name)
    else:
        with pytest.raises(ValueError, match=f"was started otherwise: `{name}` was"):
            continued(changed, file)


WRONG_OPTIONS = [
    ("delora", {"rank": 0}, "`rank` must be at least 1, got 0."),
    ("delora", {"rank": 1.5}, "`rank` must be a whole number, got 1.5."),
    ("delora", {"start": "zero"}, "`start` must be one of residual or peft; got 'zero'."),
    ("delora", {"lambda_init": "much"}, "`lambda_init` must be a number, got 'much'."),
    ("lora", {"alpha": "much"}, "`alpha` must be a number, got 'much'."),
    ("ether", {"blocks": -1}, "`blocks` must be at least 1, got -1."),
    ("ether", {"side": "left"}, "`side` must be one of input or output; got 'left'."),
    ("ether+", {"sides": 3}, "`sides` must be one of 1 or 2; got 3."),
]


@pytest.mark.parametrize(("method", "options", "text"), WRONG_OPTIONS)
def test_an_option_out_of_range_has_one_sentence(
    method: str, options: dict[str, Any], text: str, tmp_path: Path
) -> None:
    """In Python by three doors, by a flag, in YAML, in a sweep."""
    ((name, value),) = options.items()
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"method": method, **options}))
    nested = tmp_path / "nested.yaml"
    nested.write_text(yaml.safe_dump({"method": method, "options": options}))
    unet = tiny_unet()
    ways = [
        lambda: dreamtune.inject(unet, method, **options),
        lambda: METHODS[method](torch.zeros(8, 8), **options),
        lambda: resolve_options(METHODS[method], options),
        lambda: train_config(["--method", method, f"--{name}", str(value)]),
        lambda: train_config(["--config", str(file)]),
        lambda: train_config(["--config", str(nested)]),
        lambda: expand(Config(method=method, sweep=[f"{name}={value}"])),
    ]
    for way in ways:
        with pytest.raises(ValueError) as caught:
            way()
        assert str(caught.value) == text
    assert not any("AdaptedLinear" in type(m).__name__ for m in unet.modules())


def test_an_unknown_option_names_the_nearest_everywhere(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for line in ("rnk: 4", "options: {rnk: 4}"):
        file.write_text(line)
        with pytest.raises(ValueError, match="`rnk`. Did you mean `rank`"):
            train_config(["--config", str(file)])
    with pytest.raises(ValueError, match="--rnk. Did you mean `rank`"):
        train_config(["--rnk", "4"])
    with pytest.raises(ValueError, match="`rnk` cannot be swept. Did you mean `rank`"):
        expand(Config(sweep=["rnk=4"]))
    with pytest.raises(ValueError, match="`delora` has no option `rnk`. Did you mean `rank`"):
        dreamtune.inject(tiny_unet(), rnk=4)
    file.write_text("options: {blocks: 4}")
    with pytest.raises(ValueError, match="`blocks` is an option of ether, ether.*, not of delora"):
        train_config(["--config", str(file)])
    file.write_text("method: lorra")
    with pytest.raises(ValueError, match="unknown method `lorra`. Did you mean `lora`"):
        train_config(["--config", str(file)])


def test_options_come_in_their_types(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("lambda_init: 1e-1\nrank: '8'\n")  # YAML 1.1 reads 1e-1 as a word
    assert train_config(["--config", str(file)]).options == {"lambda_init": 0.1, "rank": 8}
    adapter = dreamtune.inject(tiny_unet(), "delora", rank="2", lambda_init=3)
    defaults = resolve_options(METHODS["delora"], {})
    assert adapter.options == {**defaults, "rank": 2, "lambda_init": 3.0}
    assert type(adapter.options["rank"]) is int and type(adapter.options["lambda_init"]) is float


@pytest.mark.parametrize(
    ("method", "option", "values"),
    [("delora", "lambda_init", [1.0, 2.5]), ("lora", "alpha", [4.0, None])],
)
def test_an_option_of_one_value_a_slot(method: str, option: str, values: list[Any]) -> None:
    adapter = dreamtune.inject(tiny_unet(), method, slots=2, rank=2, **{option: values})
    filled = [2.0 if v is None else v for v in values]
    assert adapter.options[option] == filled
    assert [g.adapter.options_of(1)[option] for g in adapter.groups] == [filled[1]] * len(
        adapter.groups
    )
    with pytest.raises(ValueError, match=f"`{option}` must hold one a slot, got 2 for 3"):
        dreamtune.inject(tiny_unet(), method, slots=3, **{option: values})
    with pytest.raises(ValueError, match=f"`{option}` must be a number, got 'x'"):
        dreamtune.inject(tiny_unet(), method, slots=2, **{option: [1.0, "x"]})


def test_a_signature_of_any_method_is_checked() -> None:
    """Of a class that is not registered, and of one that extends it."""

    class Toy(Adapter):
        name, per_slot = "toy", frozenset()
        identity_at_start = depends_on_weight = True

        def __init__(
            self,
            weight: torch.Tensor,
            *,
            slots: int = 1,
            generator: Any = None,
            share: Annotated[float, Field(ge=0, le=1)] = 0.5,
            kind: Literal["a", "b"] = "a",
            free=None,  # type: ignore[no-untyped-def]
        ) -> None:
            super().__init__(weight, slots, generator, {"share": share, "kind": kind, "free": free})

    class Same(Toy):
        name = "same"

    for method in (Toy, Same):
        assert method(torch.zeros(2, 2), share="1", free=()).options == {  # type: ignore[arg-type]
            "share": 1.0, "kind": "a", "free": (),
        }  # fmt: skip
        with pytest.raises(ValueError, match="`share` must be at most 1, got 1.5"):
            method(torch.zeros(2, 2), share=1.5)
        with pytest.raises(ValueError, match="`kind` must be one of a or b; got 'c'"):
            resolve_options(method, {"kind": "c"})


def test_the_deepest_error_of_a_union_is_told() -> None:
    rules = checker({"x": float | list[float] | None})
    assert validated(rules, {"x": [1, "2"]}) == {"x": [1.0, 2.0]}
    with pytest.raises(ValueError, match="^`x` must be a number, got 'a'.$"):
        validated(rules, {"x": [1, "a"]})
