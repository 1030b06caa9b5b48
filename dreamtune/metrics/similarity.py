"""The two kinds that most metrics are: cosines with the photos, and with the prompts."""

from __future__ import annotations

from torch import Tensor

from dreamtune.metrics.extractor import Extractor, TextExtractor
from dreamtune.metrics.features import (
    matched,
    mean_among,
    mean_among_error,
    mean_to_set,
    shuffled,
)
from dreamtune.metrics.table import Comparison, Features, Metric

PHOTOS = Comparison(
    suffix="photos",
    title="photos among themselves",
    score=lambda f: mean_among(f.photos),
    pairing="mean cosine of all pairs of different photos",
    constant=True,
    error=lambda f: mean_among_error(f.photos),
)


def _other_prompts(f: Features) -> Tensor | None:
    assert f.texts is not None
    return shuffled(f.images, f.texts, f.index)


def _own_prompt(f: Features) -> Tensor:
    assert f.texts is not None
    return matched(f.images, f.texts[f.index])


SHUFFLED = Comparison(
    suffix="shuffled",
    title="with other prompts",
    score=_other_prompts,
    pairing="mean cosine of an image and each other distinct prompt",
    constant=False,
)


def photo_similarity(key: str, title: str, extractor: type[Extractor]) -> Metric:
    """Each image with each photo, against the photos among themselves."""
    return Metric(
        key,
        title,
        extractor,
        score=lambda f: mean_to_set(f.images, f.photos),
        pairing="mean cosine of all (generated image, photo) pairs",
        comparison=PHOTOS,
    )


def prompt_similarity(key: str, title: str, extractor: type[TextExtractor]) -> Metric:
    """Each image with its own prompt, against the other prompts."""
    return Metric(
        key,
        title,
        extractor,
        score=_own_prompt,
        pairing="mean cosine of an image and its own prompt without the identifier, not scaled",
        comparison=SHUFFLED,
    )
