"""Pictures to the pixels that an encoder takes, with PIL's antialiased filters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from PIL import Image
from torch import Tensor


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
    """A picture -> (3, crop, crop) float32: resized, cropped, (x - mean) / std of x in [0, 1]."""

    resizing: Resizing
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: Image.Resampling

    def __call__(self, image: Image.Image) -> Tensor:
        from torchvision.transforms import functional as vision

        image = image.convert("RGB")
        mode, resize, crop = self.resizing
        if mode == "squash":
            image = image.resize((crop, crop), self.resample)
        else:
            width, height = image.size
            scale = resize / min(width, height)
            size = (max(resize, round(width * scale)), max(resize, round(height * scale)))
            image = vision.center_crop(image.resize(size, self.resample), [crop, crop])
        return vision.normalize(vision.to_tensor(image), self.mean, self.std)

    def protocol(self) -> dict[str, Any]:
        return {
            "resize": self.resizing.resize,
            "crop": self.resizing.crop,
            "resize_mode": self.resizing.mode,
            "filter": f"PIL {self.resample.name.lower()}, antialiased",
            "mean": list(self.mean),
            "std": list(self.std),
        }


def painted(
    image: Image.Image, mask: Image.Image, mean: Sequence[float], subject: bool
) -> Image.Image:
    """The picture with the subject (mask above half) painted in the colour `mean`, in [0, 1]; or
    with `subject` false, all but the subject."""
    cover = mask.convert("L").resize(image.size, Image.Resampling.NEAREST)
    cover = cover.point(lambda level: 255 if (level > 127) == subject else 0)
    colour = tuple(round(255 * level) for level in mean)
    return Image.composite(Image.new("RGB", image.size, colour), image.convert("RGB"), cover)
