"""Folders of photos as people have them -> square RGB tensors and captions.

Every photo is decoded once, before any model is loaded, so that a broken file stops the run in the
first second.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from dataclasses import dataclass, field
from math import gcd
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

IMAGE_SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".gif",
        ".bmp",
        ".tif",
        ".tiff",
        ".mpo",
        ".avif",
        ".heic",
        ".heif",
        ".jp2",
        ".ppm",
        ".tga",
    ]
)
KOHYA = re.compile(r"(\d+)_(.+)")


@dataclass(frozen=True)
class Photo:
    """One picture of a folder."""

    path: Path
    caption: str | None  # of its own .txt file
    folder_caption: str | None  # the words of a kohya folder
    repeats: int
    image: Image.Image = field(repr=False, compare=False)
    digest: str = field(repr=False)


@dataclass(frozen=True)
class Folder:
    """The pictures of a folder and the names of what was left out."""

    photos: list[Photo]
    skipped: list[str]

    def summary(self) -> str:
        text = f"{len(self.photos)} photo{'s' * (len(self.photos) != 1)}"
        if self.skipped:
            names = ", ".join(self.skipped[:5]) + (", ..." if len(self.skipped) > 5 else "")
            count = len(self.skipped)
            text += f", {count} other file{'s' * (count != 1)} skipped ({names})"
        return text


def read_folder(folder: str | Path, need: int = 1) -> Folder:
    """The photos of a folder, by name: its own files and those of kohya folders (`10_sks dog/`).

    A `.txt` (or `.caption`) file beside a photo is its caption; `views` falls back on the prompt,
    then on the words of a kohya folder. Raises ValueError for a folder that is missing or holds
    fewer than `need` photos, and for an unreadable image.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise ValueError(f"the photo folder `{root}` {what}.")
    photos: list[Photo] = []
    skipped: list[str] = []
    for path in sorted(root.iterdir()):
        kohya = KOHYA.fullmatch(path.name)
        if path.is_dir() and kohya:
            for inner in sorted(path.iterdir()):
                add_file(inner, root, photos, skipped, kohya[2].strip(), int(kohya[1]))
        else:
            add_file(path, root, photos, skipped, None, 1)
    photos = [p for p in photos if p.repeats]
    if len(photos) < need:
        found = (
            f"it holds {len(skipped)} other files ({', '.join(skipped[:5])})"
            if skipped
            else "it is empty"
        )
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(
            f"no photo in `{root}`: {found}. Looked for images ({suffixes}) in it and in folders "
            "named like `10_sks dog`."
        )
    return Folder(photos, skipped)


def add_file(
    path: Path,
    root: Path,
    photos: list[Photo],
    skipped: list[str],
    caption: str | None,
    repeats: int,
) -> None:
    """Appends the photo, or the name to `skipped`; a caption file of a photo is neither."""
    name = path.relative_to(root).as_posix()
    if path.is_dir():
        skipped.append(name + "/")
        return
    suffix = path.suffix.lower()
    if suffix in (".txt", ".caption") and any(
        other.suffix.lower() in IMAGE_SUFFIXES
        for other in path.parent.glob(glob_escape(path.stem) + ".*")
    ):
        return
    known = suffix in IMAGE_SUFFIXES and not path.name.startswith("._")
    if path.name.startswith(".") or (not known and suffix):
        skipped.append(name)
        return
    data = path.read_bytes()
    try:
        image = decode(data)
    except UnreadableImage as error:
        if not known:  # no suffix, and not an image: somebody's notes
            skipped.append(name)
            return
        hint = " Convert it to JPEG or PNG." if suffix in (".heic", ".heif") else ""
        raise ValueError(f"cannot read the image `{path}`: {error}.{hint}") from None
    photos.append(
        Photo(path, sidecar(path), caption, repeats, image, hashlib.sha256(data).hexdigest())
    )


def glob_escape(text: str) -> str:
    return re.sub(r"([\[\]*?])", r"[\1]", text)


def sidecar(path: Path) -> str | None:
    for suffix in (".txt", ".caption"):
        file = path.with_suffix(suffix)
        if file.is_file():
            text = " ".join(file.read_text(encoding="utf-8-sig", errors="replace").split())
            return text or None
    return None


class UnreadableImage(ValueError):
    """Bytes that are no picture, or a damaged one."""


def decode(data: bytes) -> Image.Image:
    """The first frame, upright, as 8-bit sRGB; transparent parts on white.

    Raises UnreadableImage with the reason.
    """
    if not data:
        raise UnreadableImage("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise UnreadableImage("it is not an image of a known format") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UnreadableImage(str(error) or type(error).__name__) from None


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        # 16-bit files carry 0..65535; a file that keeps to 0..255 in a wide mode means just that.
        # Float files: 0..1.
        top = (
            1.0
            if image.mode == "F" and values.max() <= 1
            else 65535.0
            if values.max() > 255
            else 255.0
        )
        image = Image.fromarray((values / top * 255).round().clip(0, 255).astype(np.uint8))
    transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    profile = image.info.get("icc_profile")
    if transparent:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if profile and image.mode in ("RGB", "RGBA", "CMYK"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if image.mode == "RGBA":
                image = image.convert("RGB")
            image = (
                ImageCms.profileToProfile(
                    image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
                )
                or image
            )
        except ImageCms.PyCMSError:
            pass  # a damaged profile: the numbers as they are
    return image.convert("RGB")


def square(image: Image.Image, size: int, crop: int | None = None, seed: int = 0) -> Image.Image:
    """The image with its short side at `size`, and a square of it: the middle, or the crop-th
    random one.
    """
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    if crop is not None:
        rng = np.random.default_rng([seed, crop])
        left, top = int(rng.integers(width - size + 1)), int(rng.integers(height - size + 1))
    return image.crop((left, top, left + size, top + size))


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


def views(
    photos: list[Photo],
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
        for image in shown:
            for mirrored in (False, True)[: 1 + flip]:
                pixels.append(to_tensor(ImageOps.mirror(image) if mirrored else image))
                captions.append(caption)
                weights.append(weight)
    return Views(torch.stack(pixels), captions, weights)
