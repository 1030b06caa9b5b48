"""What a run is made of: typed, documented fields; YAML and flags fill them; what can be refused is
refused here.

Nothing heavy is imported, so that `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EMBEDDED = "embedded"
CPU_SLOTS = 4
# What makes several runs of one command; a run alone has none of it.
STACKED = ("subjects", "sweep", "slots")
AT_LEAST_1 = (
    "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "num_class_images",
    "resolution", "crops", "num_validation_images", "num_inference_steps", "sample_batch_size",
    "checkpoints_total_limit", "early_stop",
)  # fmt: skip
AT_LEAST_0 = (
    "lr_warmup_steps", "validation_steps", "checkpointing_steps", "prior_loss_weight", "seed",
    "validation_seed", "adam_weight_decay", "guidance_rescale",
)  # fmt: skip
ABOVE_0 = ("learning_rate", "max_grad_norm", "snr_gamma", "adam_epsilon", "guidance_scale")


def opt(default: Any, help: str, group: str, shown: str = "", choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field that carries its help, its group and, for a default that is computed, the
    words for it.
    """
    extra = {"help": help, "group": group, "shown": shown, "choices": choices}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=extra)
    return field(default=default, metadata=extra)


@dataclass
class Config:
    """A training run. `None` means the default that `--help` states; `prepare.resolve` fills it
    in.
    """

    pretrained_model_name_or_path: str = opt(
        EMBEDDED,
        "base: a Stable Diffusion 1.x/2.x folder, single .safetensors file, hub id, or 'embedded'",
        "base",
    )
    revision: str | None = opt(None, "revision of a hub id", "base", "the main branch")
    variant: str | None = opt(None, "weight variant, for instance fp16", "base", "none")
    prediction_type: str | None = opt(
        None,
        "what the base predicts, where its files do not say",
        "base",
        "the base's own; single file: epsilon for 1.x, v_prediction for 2.x",
        ("epsilon", "v_prediction"),
    )

    instance_data_dir: str | None = opt(
        None,
        "folder of photos of the subject; .txt files beside them are captions",
        "subject",
        "the package's default subject, with the embedded base",
    )
    instance_prompt: str | None = opt(
        None,
        "prompt of photos without a caption, for instance 'a sks dog'",
        "subject",
        "needed unless captions stand",
    )
    identifier: str | None = opt(
        None,
        "the rare word that names the subject",
        "subject",
        "sks if it stands there, else the words beyond --class_prompt",
    )
    resolution: int | None = opt(
        None, "side of the training images in pixels", "subject", "the base's own"
    )
    center_crop: bool = opt(
        True, "crop the middle of photos that are not square; off: random crops", "subject"
    )
    crops: int = opt(1, "random crops cached for each photo, with --no_center_crop", "subject")
    random_flip: bool = opt(False, "also train on mirrored photos", "subject")

    with_prior_preservation: bool = opt(
        False, "also train on the base's own pictures of the class", "prior"
    )
    class_prompt: str | None = opt(
        None, "prompt of the class", "prior", "--instance_prompt without the identifier"
    )
    class_data_dir: str | None = opt(
        None, "folder of class images, filled when short", "prior", "<output_dir>/class"
    )
    num_class_images: int = opt(100, "class images wanted", "prior")
    prior_loss_weight: float = opt(1.0, "weight of the class images' loss", "prior")

    method: str = opt("delora", "adapter: a name of `dreamtune methods`", "method")
    options: dict[str, Any] = opt({}, "options of the method (each is a flag of its own)", "method")
    target_modules: list[str] = opt(
        ["to_q", "to_k", "to_v", "to_out.0"], "projections to adapt", "method"
    )

    seed: int = opt(0, "seed of everything random; step k is a function of (seed, k)", "training")
    train_batch_size: int | None = opt(None, "photos a step", "training", "4 up to 256 px, else 1")
    gradient_accumulation_steps: int = opt(1, "batches a step", "training")
    max_train_steps: int | None = opt(
        None, "optimizer steps", "training", "240 up to 256 px, else 1000"
    )
    learning_rate: float | None = opt(None, "peak learning rate", "training", "the method's own")
    lr_scheduler: str = opt(
        "constant",
        "shape of the learning rate",
        "training",
        choices=("constant", "constant_with_warmup", "cosine", "linear"),
    )
    lr_warmup_steps: int = opt(0, "steps of linear warm-up", "training")
    max_grad_norm: float = opt(1.0, "gradient norm above which a step is scaled down", "training")
    snr_gamma: float | None = opt(None, "min-SNR weighting (5 is usual)", "training", "off")
    adam_beta1: float = opt(0.9, "AdamW's first decay", "training")
    adam_beta2: float = opt(0.999, "AdamW's second decay", "training")
    adam_weight_decay: float = opt(0.01, "AdamW's weight decay", "training")
    adam_epsilon: float = opt(1e-8, "AdamW's epsilon", "training")
    mixed_precision: str | None = opt(
        None,
        "precision of the frozen base; adapters are float32",
        "training",
        "bf16 on a GPU that has it, else fp16 on a GPU, no on the CPU",
        ("no", "fp16", "bf16"),
    )
    gradient_checkpointing: bool = opt(False, "recompute activations to save memory", "training")
    capture: str = opt(
        "auto",
        "run the training step as one CUDA graph; auto: on a GPU, where nothing prevents it",
        "training",
        choices=("auto", "on", "off"),
    )
    fused: str = opt(
        "auto",
        "run the frozen UNet's norms, activations and sums as fused kernels; auto: on a GPU with "
        "triton, without --gradient_checkpointing",
        "training",
        choices=("auto", "on", "off"),
    )
    compile: bool = opt(
        False,
        "also compile the transformer blocks: a few percent of a step for most of a minute of "
        "warm-up, less where a run before this one left its kernels",
        "training",
    )
    device: str | None = opt(
        None, "cpu, cuda or cuda:N", "training", "cuda if there is one, LOCAL_RANK honoured"
    )

    validation_prompt: list[str] = opt(
        [],
        "prompts of the scored images; {} stands for the subject",
        "scoring",
        "8 prompts for the base's domain",
    )
    num_validation_images: int = opt(1, "images a prompt", "scoring")
    validation_steps: int | None = opt(
        None,
        "steps between scorings; 0: only the start and the end",
        "scoring",
        "a quarter of --max_train_steps",
    )
    validation_seed: int = opt(1234, "seed of the scored images", "scoring")
    dino: str | None = opt(
        None,
        "image scorer: a transformers ViT folder or id, or 'none'",
        "scoring",
        "the package's with the embedded base, else facebook/dino-vits16",
    )
    clip: str | None = opt(
        None,
        "text and image scorer: open_clip 'NAME:PRETRAINED' or 'local-dir:FOLDER', or 'none'",
        "scoring",
        "the package's with the embedded base, else ViT-B-32:openai",
    )
    early_stop: int | None = opt(
        None, "stop after so many scorings in a row that are not the best so far", "scoring", "off"
    )
    sampler: str | None = opt(
        None,
        "sampler of the images",
        "scoring",
        "the base's own if its terminal SNR is zero, else dpm++",
        ("base", "dpm++"),
    )
    num_inference_steps: int = opt(25, "sampling steps", "scoring")
    guidance_scale: float | None = opt(
        None, "classifier-free guidance", "scoring", "4 up to 256 px, else 7.5"
    )
    guidance_rescale: float | None = opt(
        None, "guidance rescale", "scoring", "0.3 if the terminal SNR is zero, else 0"
    )
    sample_batch_size: int = opt(8, "images sampled at once", "scoring")

    output_dir: str | None = opt(None, "folder of the run", "output", "runs/<name>")
    name: str | None = opt(None, "name of the run", "output", "<subject folder>-<method>")
    checkpointing_steps: int | None = opt(
        None,
        "steps between checkpoints; 0: only on Ctrl-C and at the end",
        "output",
        "every scoring",
    )
    checkpoints_total_limit: int | None = opt(2, "checkpoints kept (the oldest go)", "output")
    resume_from_checkpoint: str | None = opt(
        None, "checkpoint folder, or 'latest' of --output_dir", "output", "none"
    )
    subjects: str | None = opt(
        None,
        "folder of photo folders, one a subject, trained at once; prompt.txt in a photo folder "
        "holds its prompt, and in a second line its class prompt",
        "stacked",
        "one run",
    )
    sweep: list[str] = opt(
        [],
        "NAME=VALUE,VALUE,...: a run for each value, for learning_rate, seed, method and its "
        "options; several: every combination",
        "stacked",
        "one run",
    )
    slots: str = opt(
        "auto", "runs trained at once", "stacked", f"on a GPU what fits, else {CPU_SLOTS}"
    )
    report_to: str = opt("none", "tracker", "output", choices=("none", "tensorboard"))

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            setattr(self, f.name, checked(f, getattr(self, f.name)))
        self.check_values()

    def check_values(self) -> None:
        """Raises ValueError for a value or a combination that cannot be trained."""
        for key in AT_LEAST_1:
            least(self, key, 1)
        for key in AT_LEAST_0:
            least(self, key, 0)
        for key in ABOVE_0:
            value = getattr(self, key)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"`{key}` must be above 0 and finite, got {value}.")
        for key in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"`{key}` must be in [0, 1), got {getattr(self, key)}.")
        if self.resolution is not None and self.resolution % 8:
            near = round(self.resolution / 8) * 8
            raise ValueError(
                f"`resolution` must be a multiple of 8, got {self.resolution}; the nearest is "
                f"{near}."
            )
        if self.crops > 1 and self.center_crop:
            raise ValueError("`crops` above 1 needs random crops: add --no_center_crop.")
        if not self.target_modules:
            raise ValueError(
                "`target_modules` is empty: name at least one projection, for instance to_q."
            )
        if self.class_prompt and not self.with_prior_preservation and self.class_data_dir:
            raise ValueError(
                "`class_data_dir` is set but no class image is used: add --with_prior_preservation."
            )
        default_base = self.pretrained_model_name_or_path == EMBEDDED
        if self.early_stop and "none" in (self.dino, self.clip):
            raise ValueError("`early_stop` goes by the scores, but `dino` or `clip` is none.")
        if self.slots != "auto" and not (self.slots.isdecimal() and int(self.slots) > 0):
            raise ValueError(f"`slots` must be auto or at least 1, got {self.slots!r}.")
        if self.subjects and self.instance_data_dir:
            raise ValueError("`subjects` and `instance_data_dir` are both set: leave one out.")
        photos = self.instance_data_dir or self.subjects
        if not (photos or default_base or self.resume_from_checkpoint):
            raise ValueError(
                "`instance_data_dir` is missing: name the folder of the subject's photos."
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


FIELDS = {f.name: f for f in dataclasses.fields(Config)}


def plain_default(name: str) -> Any:
    f = FIELDS[name]
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def least(config: Config, key: str, minimum: float) -> None:
    value = getattr(config, key)
    if value is not None and not minimum <= value < float("inf"):
        raise ValueError(f"`{key}` must be at least {minimum}, got {value}.")


def checked(f: dataclasses.Field[Any], value: Any) -> Any:
    """The value in the type of the field; ValueError that names field, rule and value. A YAML 1e-4
    is a string.
    """
    hint = HINTS[f.name]
    optional = type(None) in typing.get_args(hint)
    kind = (
        next((k for k in typing.get_args(hint) if k is not type(None)), hint)
        if is_union(hint)
        else hint
    )
    if value is None:
        if optional:
            return None
        raise ValueError(f"`{f.name}` cannot be empty.")
    origin = typing.get_origin(kind) or kind
    if f.metadata["choices"] and value not in f.metadata["choices"]:
        # YAML 1.1 reads bare `no` and `off` as false, `on` as true.
        words = {"no": False, "off": False, "on": True}
        value = next((w for w in f.metadata["choices"] if words.get(w) is value), value)
        if value not in f.metadata["choices"]:
            raise ValueError(
                f"`{f.name}` must be one of {', '.join(f.metadata['choices'])}; got {value!r}."
            )
    if origin is list:
        return [str(v) for v in ([value] if isinstance(value, str) else value)]
    if origin is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"`{f.name}` must be a number, got {value!r}.") from None
    if origin is int and isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            raise ValueError(f"`{f.name}` must be a whole number, got {value!r}.") from None
    if origin is str and isinstance(value, (Path, int)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, origin) or (origin is int and isinstance(value, bool)):
        raise ValueError(f"`{f.name}` must be of type {origin.__name__}, got {value!r}.")
    return value


def is_union(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union


HINTS = typing.get_type_hints(Config)
