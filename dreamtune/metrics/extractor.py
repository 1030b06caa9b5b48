"""The contract of what turns pictures, and texts where it can, into features."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn


class Extractor(ABC):
    """Pictures to feature rows. A metric names its extractor, and each is loaded and run once for
    all metrics that name it.

    Class attributes:
        name: key of its protocol in result files; a setting of that name says which weights.
        default: the weights where nothing says which.
        libraries: distributions whose versions a result depends on.

    `protocol` holds, as plain data, all that a feature depends on: weights, preprocessing, dtype.
    `mean_colour` is what the encoder subtracts from a picture, in [0, 1]: what is painted with it
    is nothing to the encoder.

    A subclass gives `encode`, `preprocess`, `device` and `dtype`; or `images` as a whole.
    """

    name: ClassVar[str]
    default: ClassVar[str]
    libraries: ClassVar[tuple[str, ...]] = ()
    protocol: dict[str, Any]
    mean_colour: tuple[float, ...] = (0.5, 0.5, 0.5)
    preprocess: Callable[[Sequence[Image.Image], torch.device | str], Tensor]
    device: torch.device
    dtype: torch.dtype

    @abstractmethod
    def __init__(
        self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        """name: of the weights; ValueError with a way out if nothing loads by it."""

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image], batch_size: int = 32) -> Tensor:
        """Features (N, D), float32 on the CPU; each row depends on its own picture alone."""
        rows = []
        for start in range(0, len(images), batch_size):
            batch = self.preprocess(images[start : start + batch_size], self.device)
            rows.append(self.encode(batch.to(self.dtype)).float().cpu())
        return torch.cat(rows)

    def encode(self, pixels: Tensor) -> Tensor:
        """Features (N, D) of preprocessed pictures (N, 3, H, W), where they are."""
        raise NotImplementedError(f"{type(self).__name__} must give `encode` or `images`")


class TextExtractor(Extractor):
    """An extractor whose features of texts compare with those of pictures.

    A subclass gives `encode_texts`, or `texts` as a whole.
    """

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features (N, D), float32 on the CPU, with the D of `images`; each distinct text is
        encoded once in this object's life.
        """
        known = self.__dict__.setdefault("_texts", {})
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            known.update(zip(new, self.encode_texts(new).float().cpu()))
        return torch.stack([known[text] for text in texts])

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Features (N, D) of texts, where they are."""
        raise NotImplementedError(f"{type(self).__name__} must give `encode_texts` or `texts`")


def weights_hash(model: nn.Module) -> str:
    """Short hash of names, shapes and 64 spread values of every tensor, in float32.

    Tells two sets of weights apart without reading gigabytes twice.
    """
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        flat = value.detach().flatten()
        digest.update(f"{key}{tuple(value.shape)}".encode())
        if flat.numel():
            chosen = torch.linspace(0, flat.numel() - 1, 64, dtype=torch.float64).long()
            digest.update(flat[chosen.to(flat.device)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
