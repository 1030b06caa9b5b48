"""What a run is made of: typed, documented fields; YAML and flags fill them; what can be refused is
refused here.

Nothing heavy is imported, so that `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pydantic import TypeAdapter

from dreamtune.fields import (
    Above0,
    AtLeast0,
    Count,
    CountOr0,
    Decay,
    Pixels,
    Seed,
    checker,
    one_part,
    opt,
    shown,
    validated,
)

EMBEDDED = "embedded"
CPU_SLOTS = 4

Switch = Literal["auto", "on", "off"]
Prediction = Literal["epsilon", "v_prediction"]
Precision = Literal["no", "fp16", "bf16"]
Sampler = Literal["base", "dpm++"]


def constant_rate(saved: Mapping[str, Any]) -> bool:
    """Whether more steps leave the earlier ones of that run as they were."""
    return str(saved.get("lr_scheduler")).startswith("constant")


@dataclass
class Config:
    """A training run. `None` means the default that `--help` states; `defaults.resolve` fills it
    in.
    """

    pretrained_model_name_or_path: str = opt(
        EMBEDDED,
        "base: a folder or hub id of Stable Diffusion, Flux, Z-Image or another family of the "
        "README, a single .safetensors file of Stable Diffusion 1.x, 2.x or XL, or 'embedded'",
        "base",
    )
    revision: str | None = opt(None, "revision of a hub id", "base", "the main branch")
    variant: str | None = opt(None, "weight variant, for instance fp16", "base", "none")
    prediction_type: Prediction | None = opt(
        None,
        "what the base predicts, where its files do not say",
        "base",
        "the base's own; single file: v_prediction for 2.x, else epsilon",
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
        own=True,
    )
    identifier: str | None = opt(
        None,
        "the rare word that names the subject",
        "subject",
        "sks if it stands there, else the words beyond --class_prompt",
        own=True,
    )
    resolution: Pixels | None = opt(
        None, "side of the training images in pixels", "subject", "the base's own"
    )
    center_crop: bool = opt(
        True, "crop the middle of photos that are not square; off: random crops", "subject"
    )
    crops: Count = opt(1, "random crops cached for each photo, with --no_center_crop", "subject")
    random_flip: bool = opt(False, "also train on mirrored photos", "subject")

    with_prior_preservation: bool = opt(
        False, "also train on the base's own pictures of the class", "prior"
    )
    class_prompt: str | None = opt(
        None, "prompt of the class", "prior", "--instance_prompt without the identifier", own=True
    )
    class_data_dir: str | None = opt(
        None,
        "folder of class images, filled when short",
        "prior",
        "<output_dir>/class",
        resume=True,
        own=True,
    )
    num_class_images: Count = opt(100, "class images wanted", "prior")
    prior_loss_weight: AtLeast0 = opt(1.0, "weight of the class images' loss", "prior")

    method: str = opt("delora", "adapter: a name of `dreamtune methods`", "method", swept=True)
    options: dict[str, Any] = opt({}, "options of the method (each is a flag of its own)", "method")
    target_modules: list[str] | dict[str, dict[str, Any]] | None = opt(
        None,
        "layers to adapt: ends of module paths, globs of whole paths ('*attn2.to_*'), expressions "
        "after re:; in YAML also a mapping of these to options of the method",
        "method",
        "the attention projections, to_q to_k to_v to_out.0 and what else the base's attention has",
    )

    seed: Seed = opt(
        0,
        "seed of everything random; step k is a function of (seed, k)",
        "training",
        own=True,
        swept=True,
    )
    train_batch_size: Count | None = opt(
        None, "photos a step", "training", "4 up to 256 px, else 1"
    )
    gradient_accumulation_steps: Count = opt(1, "batches a step", "training")
    max_train_steps: Count | None = opt(
        None,
        "optimizer steps",
        "training",
        "45 to 120 by method with the package's base, else 240 up to 256 px and 1000 above",
        resume=constant_rate,
    )
    learning_rate: Above0 | None = opt(
        None,
        "peak learning rate",
        "training",
        "the method's own, of OFT and HRA another with the package's base",
        own=True,
        swept=True,
    )
    lr_scheduler: Literal["constant", "constant_with_warmup", "cosine", "linear"] = opt(
        "constant", "shape of the learning rate", "training"
    )
    lr_warmup_steps: CountOr0 = opt(0, "steps of linear warm-up", "training")
    max_grad_norm: Above0 = opt(1.0, "gradient norm above which a step is scaled down", "training")
    snr_gamma: Above0 | None = opt(None, "min-SNR weighting (5 is usual)", "training", "off")
    adam_beta1: Decay = opt(0.9, "AdamW's first decay", "training")
    adam_beta2: Decay = opt(0.999, "AdamW's second decay", "training")
    adam_weight_decay: AtLeast0 = opt(0.01, "AdamW's weight decay", "training")
    adam_epsilon: Above0 = opt(1e-8, "AdamW's epsilon", "training")
    mixed_precision: Precision | None = opt(
        None,
        "precision of the frozen base; adapters are float32",
        "training",
        "bf16 on a GPU that has it, else fp16 on a GPU, no on the CPU",
    )
    gradient_checkpointing: bool = opt(False, "recompute activations to save memory", "training")
    capture: Switch = opt(
        "auto",
        "run the training step as one CUDA graph; auto: on a GPU, where nothing prevents it",
        "training",
        resume=True,
    )
    fused: Switch = opt(
        "auto",
        "run the frozen network through fused kernels (norms, sums, ...); auto: on a GPU with "
        "triton, without --gradient_checkpointing",
        "training",
        resume=True,
    )
    compile: bool = opt(
        False,
        "also compile the transformer blocks: a few percent of a step for most of a minute of "
        "warm-up, less where a run before this one left its kernels",
        "training",
        resume=True,
    )
    device: str | None = opt(
        None,
        "cpu, cuda or cuda:N",
        "training",
        "cuda if there is one, LOCAL_RANK honoured",
        resume=True,
    )

    validation_prompt: list[str] = opt(
        [],
        "prompts of the scored images; {} stands for the subject",
        "scoring",
        "8 prompts for the base's domain",
        own=True,
    )
    num_validation_images: Count = opt(1, "images a prompt", "scoring")
    holdout: str = opt(
        "0",
        "photos to score against that are not trained on, beside those in the folder's reference/; "
        "auto: one of at least 6, two of at least 10, none if reference/ has some",
        "scoring",
    )
    validation_steps: CountOr0 | None = opt(
        None,
        "steps between scorings; 0: only the start and the end",
        "scoring",
        "a quarter of --max_train_steps, a third with the package's base",
    )
    validation_seed: Seed = opt(1234, "seed of the scored images", "scoring")
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
    early_stop: Count | None = opt(
        None,
        "stop after so many scorings in a row that are not the best so far",
        "scoring",
        "off",
        resume=True,
    )
    sampler: Sampler | None = opt(
        None,
        "sampler of the images",
        "scoring",
        "the base's own for XL, flow matching, and if its terminal SNR is zero, else dpm++",
    )
    num_inference_steps: Count | None = opt(
        None, "sampling steps", "scoring", "12 with the package's base, else 25"
    )
    guidance_scale: AtLeast0 | None = opt(
        None,
        "classifier-free guidance, up to 1 none, of a base that adds it 0 (Z-Image); or the number "
        "that a distilled base is told (Flux.1 dev)",
        "scoring",
        "by the base, as its pipeline has it; for Stable Diffusion 1.x and 2.x 4 up to 256 px and "
        "7.5 above, for XL 5",
    )
    guidance_rescale: AtLeast0 | None = opt(
        None, "guidance rescale", "scoring", "0.3 if the terminal SNR is zero, else 0"
    )
    sample_batch_size: Count = opt(8, "images sampled at once", "scoring", resume=True)

    output_dir: str | None = opt(None, "folder of the run", "output", "runs/<name>", resume=True)
    name: str | None = opt(
        None, "name of the run", "output", "<subject folder>-<method>", resume=True
    )
    checkpointing_steps: CountOr0 | None = opt(
        None,
        "steps between checkpoints; 0: only on Ctrl-C and at the end",
        "output",
        "every scoring",
        resume=True,
    )
    checkpoints_total_limit: Count | None = opt(
        2, "checkpoints kept (the oldest go)", "output", resume=True
    )
    resume_from_checkpoint: str | None = opt(
        None, "checkpoint folder, or 'latest' of --output_dir", "output", "none", resume=True
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
    report_to: Literal["none", "tensorboard"] = opt("none", "tracker", "output", resume=True)

    def __post_init__(self) -> None:
        for name, value in validated(rules(), vars(self)).items():
            setattr(self, name, value)
        self.check_together()

    def check_together(self) -> None:
        """Raises ValueError for a combination that cannot be trained."""
        if self.crops > 1 and self.center_crop:
            raise ValueError("`crops` above 1 needs random crops: add --no_center_crop.")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError(
                "`target_modules` is empty: name at least one layer, for instance to_q."
            )
        if self.class_prompt and not self.with_prior_preservation and self.class_data_dir:
            raise ValueError(
                "`class_data_dir` is set but no class image is used: add --with_prior_preservation."
            )
        if self.name is not None and not one_part(self.name):
            raise ValueError(
                "`name` must be the name of a folder in runs/, not a path (that is `output_dir`); "
                f"got {shown(self.name)}."
            )
        default_base = self.pretrained_model_name_or_path == EMBEDDED
        if self.early_stop and "none" in (self.dino, self.clip):
            raise ValueError("`early_stop` goes by the scores, but `dino` or `clip` is none.")
        if self.slots != "auto" and not re.fullmatch("0*[1-9][0-9]{0,8}", self.slots):
            raise ValueError(f"`slots` must be auto or at least 1, got {shown(self.slots)}.")
        if not re.fullmatch("auto|[0-9]{1,9}", self.holdout):
            raise ValueError(f"`holdout` must be auto or at least 0, got {shown(self.holdout)}.")
        if self.subjects and self.instance_data_dir:
            raise ValueError("`subjects` and `instance_data_dir` are both set: leave one out.")
        photos = self.instance_data_dir or self.subjects
        if not (photos or default_base or self.resume_from_checkpoint):
            raise ValueError(
                "`instance_data_dir` is missing: name the folder of the subject's photos."
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Settings(Config):
    """A config with nothing left to guess, as `training.defaults.resolve` returns it."""

    identifier: str
    resolution: int
    max_train_steps: int
    validation_steps: int
    checkpointing_steps: int
    train_batch_size: int
    learning_rate: float
    mixed_precision: Precision
    device: str
    target_modules: list[str] | dict[str, dict[str, Any]]
    dino: str
    clip: str
    sampler: Sampler
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float
    output_dir: str

    def __post_init__(self) -> None:
        super().__post_init__()
        missing = [n for n in Settings.__annotations__ if getattr(self, n) is None]
        if missing:
            raise ValueError(f"not resolved: {', '.join(f'`{n}`' for n in missing)}.")


FIELDS = {f.name: f for f in dataclasses.fields(Config)}
HINTS = typing.get_type_hints(Config, include_extras=True)


@cache
def rules(others: bool = False) -> TypeAdapter[dict[str, Any]]:
    """others: names that are no fields pass, such as the options of a method."""
    return checker(HINTS, others=others)


def having(fact: str) -> tuple[str, ...]:
    """The fields with that fact: "own" or "swept"."""
    return tuple(name for name, f in FIELDS.items() if f.metadata[fact])


STACKED = tuple(name for name, f in FIELDS.items() if f.metadata["group"] == "stacked")


def plain_default(name: str) -> Any:
    f = FIELDS[name]
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
