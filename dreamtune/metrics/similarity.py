"""The kinds that most metrics are: cosines with photos, with prompts, and with other pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamtune.metrics.extractor import Extractor, TextExtractor
from dreamtune.metrics.features import (
    diversity,
    matched,
    mean_among,
    mean_among_error,
    mean_to_set,
    nearest,
    nearest_among,
    retrieved,
    shuffled,
)
from dreamtune.metrics.table import Comparison, Features, Metric

RETRIEVAL = "_retrieval"  # ends the keys of the metrics that need a gallery

PHOTOS = Comparison(
    suffix="photos",
    title="photos among themselves",
    score=lambda f: mean_among(f.photos),
    pairing="mean cosine of all pairs of different photos",
    constant=True,
    error=lambda f: mean_among_error(f.photos),
)
NEAREST_PHOTOS = Comparison(
    suffix="photos",
    title="photos among themselves",
    score=lambda f: nearest_among(f.photos),
    pairing="mean over the photos of the largest cosine to another photo",
    constant=True,
)


def _other_prompts(f: Features) -> Tensor | None:
    assert f.texts is not None
    return shuffled(f.images, f.texts, f.index)


def _own_prompt(f: Features) -> Tensor:
    assert f.texts is not None
    return matched(f.images, f.texts[f.index])


COSINE, APART = (-1.0, 1.0), (0.0, 2.0)  # what a cosine can be, and 1 less it


SHUFFLED = Comparison(
    suffix="shuffled",
    title="with other prompts",
    score=_other_prompts,
    pairing="mean cosine of an image and each other distinct prompt",
    constant=False,
)


def photo_similarity(
    key: str, title: str, extractor: type[Extractor], while_training: bool = True
) -> Metric:
    """Each image with each photo, against the photos among themselves."""
    return Metric(
        key,
        title,
        extractor,
        score=lambda f: mean_to_set(f.images, f.photos),
        pairing="mean cosine of all (generated image, photo) pairs",
        comparison=PHOTOS,
        while_training=while_training,
        kind="subject",
        bounds=COSINE,
        pairs=lambda f: len(f.photos),
    )


def prompt_similarity(
    key: str, title: str, extractor: type[TextExtractor], while_training: bool = True
) -> Metric:
    """Each image with its own prompt, against the other prompts."""
    return Metric(
        key,
        title,
        extractor,
        score=_own_prompt,
        pairing="mean cosine of an image and its own prompt without the identifier, not scaled",
        comparison=SHUFFLED,
        while_training=while_training,
        kind="prompt",
        bounds=COSINE,
    )


def picture_metrics(key: str, title: str, extractor: type[Extractor]) -> list[Metric]:
    """What a scoring of finished pictures adds to a photo similarity, by its extractor's features.

    `<key>_held_out`, `<key>_own_photo`, `<key>_nearest`, `<key>_retrieval`, `<key>_diversity`,
    `<key>_drift` and `masked_<key>`.
    """

    def metric(name: str, named: str, score: object, pairing: str, **facts: object) -> Metric:
        facts |= {"while_training": False, "brief": False}
        return Metric(name, named, extractor, score, pairing, **facts)  # type: ignore[arg-type]

    return [
        metric(
            f"{key}_held_out",
            f"{title}, held-out photos",
            lambda f: None if f.held_out is None else mean_to_set(f.images, f.held_out),
            "mean cosine of all (generated image, photo held out of training) pairs",
            kind="subject",
            bounds=COSINE,
            pairs=lambda f: 1 if f.held_out is None else len(f.held_out),
        ),
        metric(
            f"{key}_own_photo",
            f"{title}, the prompt's own photo",
            own_photo,
            "cosine of an image and the held-out photo whose caption is its prompt",
            kind="subject",
            bounds=COSINE,
        ),
        metric(
            f"{key}_nearest",
            f"{title}, nearest training photo",
            lambda f: nearest(f.images, f.photos),
            "largest cosine of an image to a training photo",
            bounds=COSINE,
            comparison=NEAREST_PHOTOS,
        ),
        metric(
            f"{key}{RETRIEVAL}",
            f"{title}, subject found",
            found_subject,
            "share of images whose mean cosine to the photos of their own subject (held-out ones "
            "where there are) is above that to any other subject of the gallery",
            kind="subject",
            bounds=(0.0, 1.0),
        ),
        metric(
            f"{key}_diversity",
            f"{title}, diversity",
            lambda f: diversity(f.images, f.index),
            "1 - mean cosine of an image and the other images of its prompt",
            tied=True,
            bounds=APART,
        ),
        metric(
            f"{key}_drift",
            f"{title}, drift",
            lambda f: None if f.base is None else 1 - matched(f.images, f.base),
            "1 - cosine of an image of a prompt that does not name the subject and the base's "
            "image of that prompt and seed",
            unrelated=True,
            bounds=APART,
        ),
        metric(
            f"masked_{key}",
            f"{title}, masked",
            lambda f: (
                None
                if f.inside is None or f.photos_inside is None
                else mean_to_set(f.inside, f.photos_inside)
            ),
            "mean cosine of all (generated image, photo) pairs, both with all but the subject "
            "painted in the mean colour of the encoder",
            kind="subject",
            bounds=COSINE,
            pairs=lambda f: 1 if f.photos_inside is None else len(f.photos_inside),
            masked=True,
        ),
    ]


def masked_prompt(key: str, title: str, extractor: type[TextExtractor]) -> Metric:
    """Prompt following of what is around the subject."""

    def score(f: Features) -> Tensor | None:
        assert f.texts is not None
        return None if f.outside is None else matched(f.outside, f.texts[f.index])

    return Metric(
        f"masked_{key}",
        f"{title}, masked",
        extractor,
        score=score,
        pairing="mean cosine of an image with the subject painted in the mean colour of the "
        "encoder and its own prompt without the identifier, not scaled",
        while_training=False,
        kind="prompt",
        masked=True,
        bounds=COSINE,
    )


def own_photo(f: Features) -> Tensor | None:
    """(N,), nan for an image whose prompt is the caption of no held-out photo."""
    if f.held_out is None or f.own_photo is None or not (f.own_photo >= 0).any():
        return None
    cosines = matched(f.images, f.held_out[f.own_photo.clamp_min(0)])
    return torch.where(f.own_photo >= 0, cosines, torch.nan)


def found_subject(f: Features) -> Tensor | None:
    if f.others is None or f.owners is None or not len(f.others):
        return None
    own = f.photos if f.held_out is None else f.held_out
    return retrieved(f.images, own, f.others, f.owners)
