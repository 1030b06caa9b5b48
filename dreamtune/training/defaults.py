"""Before the loop: the subject of a run, and the defaults that depend on base and subject."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from dreamtune.config import Config, Settings
from dreamtune.data.photos import Photo, listed
from dreamtune.data.words import SubjectWords, fill, in_all, read_words
from dreamtune.models.base import Base
from dreamtune.models.sample import Sampling
from dreamtune.training.chosen import EMBEDDED, SCORINGS

# Of the 15 prompts that DreamBooth's evaluation asks of animals and of objects alike.
PROMPTS = (
    "a {} in the jungle",
    "a {} in the snow",
    "a {} on the beach",
    "a {} on a cobblestone street",
    "a {} on top of a wooden floor",
    "a {} with a city in the background",
    "a {} on top of a purple rug in a forest",
    "a red {}",
)
SMALL_RUN = 256  # pixels; up to here a step takes a fraction of a second


def with_subject(config: Config) -> tuple[Config, Path]:
    """The config with the words of an embedded subject, and the folder of the photos.

    `instance_data_dir` "embedded:ID", or nothing with the embedded base: a subject that ships with
    the package.
    """
    name = config.instance_data_dir
    if name is not None and not name.startswith("embedded:"):
        return config, Path(name).expanduser()
    from dreamtune import embedded

    subject = embedded.subject(name.partition(":")[2] if name else None)
    config = dataclasses.replace(
        config,
        instance_data_dir=f"embedded:{subject.id}",
        identifier=config.identifier or subject.identifier,
        instance_prompt=config.instance_prompt or fill("a {}", subject.name),
    )
    return config, subject.folder


def subject_of(config: Config, photos: Sequence[Photo]) -> SubjectWords:
    """The subject's words, from the prompts, else from the captions. Raises ValueError if there is
    no telling them.
    """
    captions = [p.words for p in photos]
    if config.instance_prompt is None and None in captions:
        missing = photos[captions.index(None)].path
        raise ValueError(
            f"`instance_prompt` is missing (for instance 'a sks dog'), and `{missing.name}` has no "
            "caption file."
        )
    return read_words(
        config.instance_prompt,
        config.class_prompt,
        config.identifier,
        [c for c in captions if c is not None],
        list(dict.fromkeys(p.folder_caption for p in photos if p.folder_caption)),
    )


def unnamed(subject: SubjectWords, photos: Sequence[Photo]) -> str | None:
    """A warning where captions lack the identifier: a photo teaches what its caption names."""
    own = [p for p in photos if p.caption is not None]
    without = [p.path.name for p in own if not in_all(subject.identifier, [p.caption or ""])]
    if not without:
        return None
    return (
        f"Warning: {len(without)} of {len(own)} captions lack the identifier "
        f"`{subject.identifier}`, which is not learned from their photos ({listed(without)}). Add "
        "it to them, or name another with --identifier."
    )


def resolve(config: Config, base: Base, subject: SubjectWords, run_dir: Path) -> Settings:
    """Every `None` with a default filled in. What is written to config.yaml."""
    from dreamtune.adapters import find_method, resolve_options
    from dreamtune.metrics import Clip, Dino

    method = find_method(config.method)
    resolution = config.resolution or base.resolution
    small = resolution <= SMALL_RUN
    chosen = EMBEDDED.get(method.name) if base.embedded else None
    steps = config.max_train_steps or (chosen.steps if chosen else 240 if small else 1000)
    scorers = (Dino.default, Clip.default)
    if base.embedded:
        scorers = ("embedded", "embedded")
    every = config.validation_steps
    if every is None:
        every = math.ceil(steps / SCORINGS) if base.embedded else max(1, steps // 4)
    defaults = {
        "resolution": resolution,
        "max_train_steps": steps,
        "validation_steps": every,
        "train_batch_size": 4 if small else 1,
        "learning_rate": chosen.learning_rate if chosen else method.learning_rate,
        "num_inference_steps": base.sampling_steps,
        "prediction_type": base.prediction_type,
        "target_modules": list(base.target_modules),
        "dino": scorers[0],
        "clip": scorers[1],
        **dataclasses.asdict(base.sampling_defaults(resolution)),
        "checkpointing_steps": every,
        "mixed_precision": PRECISIONS[base.dtype],
        "device": base.device.type,
    }
    if config.with_prior_preservation:
        defaults |= {
            "class_prompt": config.class_prompt or subject.class_prompt(config.instance_prompt),
            "class_data_dir": str(run_dir / "class"),
        }
    given = config.to_dict()
    filled = {k: v for k, v in defaults.items() if given[k] is None}
    settled = {
        "identifier": subject.identifier,
        "validation_prompt": templates_of(config, base.embedded),
        "output_dir": str(run_dir),
        "options": resolve_options(method, config.options),
    }
    return Settings(**given | filled | settled)


def templates_of(config: Config, ours: bool) -> list[str]:
    """Prompts of the scored images, with {} for the subject. ours: on the embedded base."""
    if config.validation_prompt or not ours:
        return config.validation_prompt or list(PROMPTS)
    from dreamtune import embedded

    return embedded.prompts()[::3][:8]  # every third, so that all sorts are among them


PRECISIONS = {torch.float32: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}


def device_and_dtype(config: Config) -> tuple[torch.device, torch.dtype]:
    """Where and in what precision the base computes. Raises ValueError for several processes, or a
    missing GPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "one process trains one subject: start without accelerate's --multi_gpu, or with "
            "--num_processes 1."
        )
    gpu = torch.cuda.is_available()
    name = config.device or (f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if gpu else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"`device` must be cpu, cuda or cuda:N, got {name!r}.") from None
    if device.type == "cuda" and not gpu:
        raise ValueError("`device` is cuda, but torch sees no GPU here.")
    named = {v: k for k, v in PRECISIONS.items()}
    if config.mixed_precision is not None:
        return device, named[config.mixed_precision]
    if device.type != "cuda":
        return device, torch.float32
    return device, torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def sampling_of(settings: Settings) -> Sampling:
    return Sampling(
        sampler=settings.sampler,
        steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        guidance_rescale=settings.guidance_rescale,
        size=settings.resolution,
        batch_size=settings.sample_batch_size,
    )
