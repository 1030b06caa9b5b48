"""DINO, CLIP-I and CLIP-T of generated images against a subject's photos and their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dreamtune.metrics.extractors import Clip, Dino
from dreamtune.metrics.features import matched, mean_among, mean_to_set, shuffled

PAIRING = {
    "dino, clip_i": "mean cosine of all (generated image, photo) pairs",
    "dino_photos, clip_i_photos": "mean cosine of all pairs of different photos",
    "clip_t": "mean cosine of an image and its own prompt without the identifier, not scaled",
    "clip_t_shuffled": "mean cosine of an image and each other distinct prompt",
}


@dataclass(frozen=True)
class References:
    """Features of the subject's photos, computed once: dino (M, D), clip (M, E)."""

    dino: Tensor
    clip: Tensor
    dino_photos: float | None
    clip_i_photos: float | None


@dataclass(frozen=True)
class Scores:
    """Means, and the same per image, in the order of the images.

    `dino_photos` and `clip_i_photos` are the photos among themselves (None for one photo),
    `clip_t_shuffled` the images with each other's prompts (None for one prompt).
    """

    dino: float
    clip_i: float
    clip_t: float
    clip_t_shuffled: float | None
    dino_photos: float | None
    clip_i_photos: float | None
    dino_per_image: list[float]
    clip_i_per_image: list[float]
    clip_t_per_image: list[float]

    def record(self) -> dict[str, float | None]:
        """The numbers of one line of metrics.jsonl; what `choose_best` reads."""
        names = ("dino", "clip_i", "clip_t", "clip_t_shuffled", "dino_photos", "clip_i_photos")
        return {name: getattr(self, name) for name in names}


class Scorers:
    """The two extractors together; `protocol` says all that a score depends on."""

    def __init__(self, dino: Dino, clip: Clip) -> None:
        self.dino, self.clip = dino, clip
        self.protocol: dict[str, Any] = {
            "dino": dino.protocol,
            "clip": clip.protocol,
            "pairing": PAIRING,
            "versions": {
                name: version(name) for name in ("torch", "transformers", "open_clip_torch")
            },
        }

    @classmethod
    def load(
        cls,
        dino: str,
        clip: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Scorers:
        """Names as in `Dino` and `Clip`; `dtype` is the encoders', features are float32.

        Raises:
            ValueError: a model cannot be loaded, with what to do about it.
        """
        return cls(Dino(dino, device, dtype), Clip(clip, device, dtype))

    def references(self, images: Sequence[Image.Image]) -> References:
        """Features of the subject's photos. Decode them once and pass the same list to training."""
        if not images:
            raise ValueError("no photos to score against")
        dino, clip = self.dino.images(images), self.clip.images(images)
        return References(dino, clip, mean_among(dino), mean_among(clip))

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
        dino = mean_to_set(self.dino.images(images), references.dino)
        features = self.clip.images(images)
        clip_i = mean_to_set(features, references.clip)
        distinct = list(dict.fromkeys(prompts))
        index = torch.tensor([distinct.index(prompt) for prompt in prompts])
        texts = self.clip.texts(distinct)
        clip_t = matched(features, texts[index])
        other = shuffled(features, texts, index)
        return Scores(
            dino=dino.mean().item(),
            clip_i=clip_i.mean().item(),
            clip_t=clip_t.mean().item(),
            clip_t_shuffled=None if other is None else other.mean().item(),
            dino_photos=references.dino_photos,
            clip_i_photos=references.clip_i_photos,
            dino_per_image=dino.tolist(),
            clip_i_per_image=clip_i.tolist(),
            clip_t_per_image=clip_t.tolist(),
        )
