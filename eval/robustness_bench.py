"""The embedded base with what scores, and each subject's photos, prompts and references: what all
waves of `robustness.py` share."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from robustness_plan import VARIANTS, Run, Settings
from torch import Tensor

from dreamtune.config import Config
from dreamtune.config import Settings as Resolved
from dreamtune.data.photos import hold_out, read_folder
from dreamtune.data.words import validation_prompts
from dreamtune.evaluation.prompts import unrelated
from dreamtune.evaluation.validation import Evaluator
from dreamtune.injection.inject import InjectedAdapter
from dreamtune.metrics import Features, Scorers, TextExtractor
from dreamtune.metrics.scorers import References
from dreamtune.training.cache import Cache, Pools, build_cache
from dreamtune.training.defaults import resolve, sampling_of, subject_of, with_subject
from dreamtune.training.speed import choose_speed, speed_up
from dreamtune.training.train import base_of
from dreamtune.training.wave import release

KEYS = ("dino", "clip_i", "clip_t", "dino_held_out", "dino_nearest", "dino_drift")
KEPT = (*KEYS, "clip_t_shuffled")  # of a record
SAMPLING_STEPS = 25  # whatever the default is: pictures of all parts are sampled alike
SAMPLED_AT_ONCE = {"cuda": 256, "cpu": 8}


@dataclass
class Material:
    """What all runs of a subject share. evaluator: its prompts, then the unrelated ones; own: how
    many are its. base: features of the base's images by extractor, once they are made."""

    resolved: Resolved
    cache: Cache
    pools: Pools
    evaluator: Evaluator
    references: References
    own: int
    base: dict[str, Tensor] | None = None


class Bench:
    """The base, what scores, and the subjects' materials, each made once."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        config = Config()
        self.base, self.speed = base_of(config), choose_speed(config)
        speed_up(self.base, self.speed)
        self.materials: dict[str, Material] = {}

    @cached_property
    def scorers(self) -> Scorers:
        weights = {"dino": "embedded", "clip": "embedded"}
        return Scorers.load(weights, KEYS, self.base.device)

    @cached_property
    def device_name(self) -> str:
        cuda = self.base.device.type == "cuda"
        return torch.cuda.get_device_name(self.base.device) if cuda else "cpu"

    def material(self, subject: str) -> Material:
        if subject not in self.materials:
            self.materials[subject] = self.made(subject)
        return self.materials[subject]

    def made(self, subject: str) -> Material:
        config = Config(instance_data_dir=f"embedded:{subject}", num_inference_steps=SAMPLING_STEPS)
        config, place = with_subject(config)
        folder = hold_out(read_folder(place), config.holdout)
        words = subject_of(config, folder.photos)
        c = resolve(config, self.base, words, Path("run"))
        own, plain = validation_prompts(
            words, c.validation_prompt[: self.settings.prompts], c.num_validation_images
        )
        others = unrelated("ours", words.class_noun, True)[: self.settings.unrelated]
        prompts = [*own, *others]
        evaluator = Evaluator(
            self.base,
            prompts,
            [*plain, *others],
            [c.validation_seed + i for i in range(len(prompts))],
            sampling=replace(
                sampling_of(c), batch_size=SAMPLED_AT_ONCE[self.base.device.type]
            ),
            folder=Path("samples"),
            scorers=None,
            photos=[],
        )  # fmt: skip
        photos = [p.image for p in folder.photos]
        references = self.scorers.references(photos, [p.image for p in folder.held_out])
        cache, pools = build_cache(c, self.base, folder.photos, [])
        return Material(c, cache, pools, evaluator, references, len(own))

    def resolved(self, run: Run) -> Resolved:
        """The settings of a run, as `dreamtune train` would have them."""
        from dreamtune.adapters import find_method, resolve_options

        variant = VARIANTS[run.variant]
        options = resolve_options(find_method(variant.method), dict(variant.options))
        return replace(
            self.material(run.subject).resolved,
            method=variant.method,
            options=options,
            learning_rate=run.rate,
            max_train_steps=run.steps,
            seed=run.seed,
        )

    def clear(self) -> None:
        """Takes out what a wave that failed has left in the base."""
        for adapter in InjectedAdapter.of(self.base.network):
            adapter.eject()
        release(self.base)

    def clock(self) -> float:
        if self.base.device.type == "cuda":
            torch.cuda.synchronize(self.base.device)
        return time.perf_counter()


def scores_of(
    scorers: Scorers, material: Material, rows: Mapping[str, Tensor]
) -> dict[str, float | None]:
    """Means over the images, by key of the table of metrics. rows: features by extractor of the
    images of the evaluator's prompts, the unrelated ones last."""
    own, plain = material.own, material.evaluator.plain
    distinct = list(dict.fromkeys(plain[:own]))
    index = torch.tensor([distinct.index(text) for text in plain[:own]])
    found: dict[str, float | None] = {}
    for metric in scorers.metrics:
        name = metric.extractor.name
        extractor, images = scorers.extractors[name], rows[name]
        base = None if material.base is None else material.base[name]
        features = Features(
            images=images[own:] if metric.unrelated else images[:own],
            photos=material.references.photos[name],
            index=index,
            texts=extractor.texts(distinct) if isinstance(extractor, TextExtractor) else None,
            held_out=material.references.held_out.get(name),
            base=None if base is None or not metric.unrelated else base[own:],
        )
        for key, value in metric.values(features).items():
            if key in KEPT:
                value = value.mean().item() if isinstance(value, Tensor) else value
                found[key] = None if value is None else round(value, 5)
    return found


def judged(
    bench: Bench, images: Mapping[Run, Sequence[Image.Image]]
) -> dict[Run, dict[str, float | None]]:
    """The scores of each run; all images are embedded together."""
    if not images:
        return {}
    together = [image for own in images.values() for image in own]
    rows = {name: e.images(together, 256) for name, e in bench.scorers.extractors.items()}
    found, start = {}, 0
    for run, own in images.items():
        part = {name: x[start : start + len(own)] for name, x in rows.items()}
        found[run] = scores_of(bench.scorers, bench.material(run.subject), part)
        start += len(own)
    return found
