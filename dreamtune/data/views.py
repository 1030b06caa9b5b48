"""Photos -> the square RGB tensors that are trained on, and their captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dreamtune.data.photos import Photo
from dreamtune.models.base import Frame


def square(
    image: Image.Image, size: int, crop: int | None = None, seed: int = 0
) -> tuple[Image.Image, Frame]:
    """A square of the image with its short side at `size`, the middle or the crop-th random one;
    and where that lies.
    """
    shape = (image.height, image.width)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    if crop is not None:
        rng = np.random.default_rng([seed, crop])
        left, top = int(rng.integers(width - size + 1)), int(rng.integers(height - size + 1))
    return image.crop((left, top, left + size, top + size)), Frame(shape, (top, left), (size, size))


def mirrored(image: Image.Image, frame: Frame) -> tuple[Image.Image, Frame]:
    """Both from right to left."""
    (height, width), (top, left), (size, _) = frame
    whole = max(size, round(width * size / min(height, width)))
    return ImageOps.mirror(image), frame._replace(corner=(top, whole - size - left))


def to_tensor(image: Image.Image) -> Tensor:
    """(3, h, w) float32 in [-1, 1]."""
    return (
        torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1)
        .permute(2, 0, 1)
        .contiguous()
    )


def from_tensor(x: Tensor) -> Image.Image:
    """The inverse of `to_tensor`, rounded to 8 bits."""
    values = ((x.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())


@dataclass(frozen=True)
class Views:
    """What is encoded: one entry a photo, crop and flip."""

    pixels: Tensor  # (n, 3, size, size) in [-1, 1]
    captions: list[str]
    weights: list[int]  # how often each entry stands in an epoch
    paths: list[Path]  # of the photo of each entry
    # Where each entry lies in the photo as it is kept: a phone's is shrunk when it is read, to a
    # size nearer to that of the pictures that are asked for.
    frames: list[Frame]


def views(
    photos: Sequence[Photo],
    size: int,
    default_caption: str | None,
    *,
    crops: int = 0,
    flip: bool = False,
    seed: int = 0,
) -> Views:
    """The training views of photos. crops 0: the middle of each; n: n random crops of photos that
    are not square.

    Raises ValueError if a photo has no caption and there is no default.
    """
    pixels: list[Tensor] = []
    captions: list[str] = []
    weights: list[int] = []
    paths: list[Path] = []
    frames: list[Frame] = []
    common = gcd(*(p.repeats for p in photos))
    for number, photo in enumerate(photos):
        caption = photo.caption or default_caption or photo.folder_caption
        if caption is None:
            raise ValueError(
                f"`{photo.path}` has no caption file: set `instance_prompt`, or write one beside "
                f"it."
            )
        is_square = photo.image.width == photo.image.height
        chosen = [None] if not crops or is_square else list(range(crops))
        shown = [square(photo.image, size, c, seed * 1_000_003 + number) for c in chosen]
        # a square photo has one crop: it counts as often as the others' crops together
        weight = photo.repeats // common * (crops if crops and is_square else 1)
        for own in shown:
            for image, frame in (own, mirrored(*own))[: 1 + flip]:
                pixels.append(to_tensor(image))
                captions.append(caption)
                weights.append(weight)
                paths.append(photo.path)
                frames.append(frame)
    return Views(torch.stack(pixels), captions, weights, paths, frames)
