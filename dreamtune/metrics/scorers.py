"""The metrics of generated images against a subject's photos and their prompts, all in one go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dreamtune.metrics.extractor import Extractor, TextExtractor
from dreamtune.metrics.features import mean_error
from dreamtune.metrics.preprocess import Resizing
from dreamtune.metrics.table import Features, Metric, error_key, find_metrics

ERRORS = (
    "of a mean over the images, those of one prompt taken together; of pairs of photos by the "
    "jackknife over the photos"
)


@dataclass(frozen=True)
class References:
    """Features of the subject's photos by extractor, computed once: photos (M, D), and held_out
    (H, D) where some were given."""

    photos: Mapping[str, Tensor]
    held_out: Mapping[str, Tensor]


@dataclass(frozen=True)
class Scores:
    """Numbers by key of the record.

    means: over all images; None where there is nothing to compare, such as one photo among
    themselves. per_image: of each key that has one value an image, in the order of the images.
    errors: standard errors of the means, by `error_key`; None where there are too few images.
    """

    means: Mapping[str, float | None]
    per_image: Mapping[str, list[float]]
    errors: Mapping[str, float | None]

    def record(self) -> dict[str, float | None]:
        """The numbers of one line of metrics.jsonl; what `choose_best` reads."""
        return {**self.means, **self.errors}


class Scorers:
    """Metrics and their extractors; `protocol` says all that a score depends on."""

    def __init__(self, extractors: Mapping[str, Extractor], metrics: Sequence[Metric]) -> None:
        self.extractors, self.metrics = dict(extractors), list(metrics)
        libraries = [name for e in self.extractors.values() for name in e.libraries]
        self.protocol: dict[str, Any] = {
            **{name: extractor.protocol for name, extractor in self.extractors.items()},
            "pairing": {
                key: pairing
                for metric in self.metrics
                for key, (_, pairing) in metric.functions.items()
            },
            "standard_error": ERRORS,
            "versions": {name: version(name) for name in dict.fromkeys(["torch", *libraries])},
        }

    @classmethod
    def load(
        cls,
        weights: Mapping[str, str],
        metrics: Iterable[str] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        resizings: Mapping[str, Resizing] | None = None,
    ) -> Scorers:
        """Loads the extractors that the metrics need.

        Args:
            weights: by extractor, such as {"dino": "embedded", "clip": "ViT-B-32:openai"}; an
                extractor that is not in it loads its default.
            metrics: keys of the table; by default all that are computed while training.
            dtype: of the encoders; features are float32.
            resizings: by extractor, instead of its own.

        Raises:
            ValueError: no such metric, weights for an extractor that no metric here has, or a model
                that cannot be loaded, with what to do about it.
        """
        asked = find_metrics(metrics)
        classes = {metric.extractor.name: metric.extractor for metric in asked}
        if unknown := weights.keys() - classes.keys():
            raise ValueError(
                f"weights for `{min(unknown)}`, which none of the metrics asked for "
                f"({', '.join(m.key for m in asked)}) uses; they use {', '.join(classes)}"
            )
        extractors = {}
        asked_for = resizings or {}
        for name, kind in classes.items():
            own = {"resizing": asked_for[name]} if name in asked_for else {}
            extractors[name] = kind(weights.get(name, kind.default), device, dtype, **own)
        return cls(extractors, asked)

    def references(
        self, images: Sequence[Image.Image], held_out: Sequence[Image.Image] = ()
    ) -> References:
        """Features of the subject's photos. Decode them once and pass the same list to training.

        held_out: photos that nothing is trained on.
        """
        if not images:
            raise ValueError("no photos to score against")
        found = self.extractors.items()
        return References(
            {name: extractor.images(images) for name, extractor in found},
            {name: extractor.images(held_out) for name, extractor in found} if held_out else {},
        )

    def score(
        self, images: Sequence[Image.Image], prompts: Sequence[str], references: References
    ) -> Scores:
        """Scores of images[i], made from prompts[i], with the identifier already taken out of the
        prompts (`without_identifier`): encoders never saw it and would score its spelling."""
        if not images or len(images) != len(prompts):
            raise ValueError(
                f"one prompt an image and at least one image, got {len(images)} images and "
                f"{len(prompts)} prompts"
            )
        distinct = list(dict.fromkeys(prompts))
        index = torch.tensor([distinct.index(prompt) for prompt in prompts])
        features = {
            name: Features(
                images=extractor.images(images),
                photos=references.photos[name],
                index=index,
                texts=extractor.texts(distinct) if isinstance(extractor, TextExtractor) else None,
                held_out=references.held_out.get(name),
            )
            for name, extractor in self.extractors.items()
        }
        means: dict[str, float | None] = {}
        per_image: dict[str, Tensor] = {}
        errors: dict[str, float | None] = {}
        for metric in self.metrics:
            inputs = features[metric.extractor.name]
            for key, value in metric.values(inputs).items():
                if isinstance(value, Tensor):
                    per_image[key] = value
                    known = ~value.isnan()
                    errors[error_key(key)] = mean_error(value[known], index[known])
                    value = value[known].mean().item() if known.any() else None
                means[key] = value
            against = metric.comparison
            if against is not None and against.error is not None:
                errors[error_key(metric.comparison_key)] = against.error(inputs)
            if metric.key in per_image and metric.comparison_key in per_image:
                difference = per_image[metric.key] - per_image[metric.comparison_key]
                errors[error_key(metric.difference_key)] = mean_error(difference, index)
        return Scores(means, {key: v.tolist() for key, v in per_image.items()}, errors)
