"""The contract of what turns pictures, and texts where it can, into features."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
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
    """

    name: ClassVar[str]
    default: ClassVar[str]
    libraries: ClassVar[tuple[str, ...]] = ()
    protocol: dict[str, Any]
    mean_colour: tuple[float, ...] = (0.5, 0.5, 0.5)

    @abstractmethod
    def __init__(
        self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        """name: of the weights; ValueError with a way out if nothing loads by it."""

    @abstractmethod
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Features (N, D), float32 on the CPU; each row depends on its own picture alone."""


class TextExtractor(Extractor):
    """An extractor whose features of texts compare with those of pictures."""

    @abstractmethod
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features (N, D), float32 on the CPU, with the D of `images`."""


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
