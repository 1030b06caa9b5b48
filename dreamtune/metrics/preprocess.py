"""Pictures to the pixels that an encoder takes, with PIL's antialiased filters."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

WORKERS = min(8, os.cpu_count() or 1)
HALF = 127  # of 255; a mask above it is the subject
In = TypeVar("In")
Out = TypeVar("Out")


def in_parallel(function: Callable[[In], Out], items: Iterable[In]) -> list[Out]:
    """[function(item), ...] by threads: PIL lets go of Python's lock while it decodes and resizes.
    Not for torch's functions, which have threads of their own."""
    items = list(items)
    if min(WORKERS, len(items)) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(function, items))


class Resizing(NamedTuple):
    """What a protocol may ask of any encoder.

    mode: "shortest" resizes the shorter side to `resize` pixels and crops the centre of `crop`;
    "squash" resizes both sides to `crop`, whatever that does to the shape.
    """

    mode: Literal["shortest", "squash"]
    resize: int
    crop: int


@dataclass(frozen=True)
class Preprocess:
    """Pictures -> (N, 3, crop, crop) float32: resized, cropped, (x - mean) / std of x in [0, 1]."""

    resizing: Resizing
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: Image.Resampling

    def __call__(self, images: Sequence[Image.Image], device: torch.device | str = "cpu") -> Tensor:
        return normalized(in_parallel(self.small, images), self.mean, self.std, device)

    def small(self, image: Image.Image) -> Image.Image:
        """Resized and cropped."""
        from torchvision.transforms import functional as vision

        image = image.convert("RGB")
        mode, resize, crop = self.resizing
        if mode == "squash":
            return image.resize((crop, crop), self.resample)
        width, height = image.size
        scale = resize / min(width, height)
        size = (max(resize, round(width * scale)), max(resize, round(height * scale)))
        cropped: Image.Image = vision.center_crop(image.resize(size, self.resample), [crop, crop])
        return cropped

    def protocol(self) -> dict[str, Any]:
        return {
            "resize": self.resizing.resize,
            "crop": self.resizing.crop,
            "resize_mode": self.resizing.mode,
            "filter": f"PIL {self.resample.name.lower()}, antialiased",
            "mean": list(self.mean),
            "std": list(self.std),
        }


def normalized(
    images: Sequence[Image.Image],
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
) -> Tensor:
    """(N, 3, H, W) float32 of pictures of one size, computed where it is wanted: 8-bit pixels are a
    quarter of what has to get there. The numbers are torchvision's `to_tensor` and `normalize`."""
    from torchvision.transforms import functional as vision

    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).to(device)
    x = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return vision.normalize(x.div_(255), list(mean), list(std), inplace=True)


def painted(
    image: Image.Image, mask: Image.Image, mean: Sequence[float], subject: bool
) -> Image.Image:
    """The picture with the subject (mask above half, of the picture's size) painted in the colour
    `mean`, in [0, 1]; or with `subject` false, all but the subject."""
    cover = mask.convert("L").point(lambda level: 255 if (level > HALF) == subject else 0)
    colour = tuple(round(255 * level) for level in mean)
    return Image.composite(Image.new("RGB", image.size, colour), image.convert("RGB"), cover)
