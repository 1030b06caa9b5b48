"""Features of picture files: each distinct picture is decoded once, and encoded once by each
extractor, however often it occurs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dreamtune.data.picture import MAX_BYTES, decode
from dreamtune.metrics.extractor import Extractor
from dreamtune.metrics.feature_cache import FeatureCache
from dreamtune.metrics.preprocess import HALF, in_parallel, painted
from dreamtune.textfile import read_bytes

AT_ONCE = 64  # pictures that are open at a time
DARK = 8  # of 255; a picture without a brighter pixel is black
INSIDE, OUTSIDE = "inside", "outside"
BLACK, PLAIN = "black", "plain"


@dataclass(frozen=True)
class Picture:
    """A file by what it holds. name: for people, below the folder that was given; mask: of the
    subject, white on black, None where there is none."""

    path: Path
    name: str
    digest: str
    mask: Picture | None = None

    def key(self, part: str = "") -> tuple[str, str]:
        """Of its features: of the whole, or of one with a part painted over."""
        return self.digest, f"{part} {self.mask.digest}" if part and self.mask else ""


class FeatureStore:
    """Features by what a file holds, for as long as this object lives.

    seconds: decoding, and each extractor. black, plain: names of pictures that are black, or of a
    single colour: what a safety checker or a diverged adapter leaves.

    cache: a folder where features outlive the object, None for none.
    """

    def __init__(
        self,
        extractors: Mapping[str, Extractor],
        masked: Sequence[str] = (),
        cache: Path | None = None,
    ) -> None:
        self.extractors, self.masked = dict(extractors), set(masked)
        self.caches = (
            {}
            if cache is None
            else {
                name: FeatureCache(cache, extractor) for name, extractor in self.extractors.items()
            }
        )
        self.rows: dict[str, dict[tuple[str, str], Tensor]] = {n: {} for n in self.extractors}
        self.seconds = dict.fromkeys(("decode", *self.extractors), 0.0)
        self.looks: dict[str, str] = {}  # digest -> what was seen of a picture
        self._seen: set[tuple[str, str]] = set()

    def add(self, pictures: Sequence[Picture], extractors: Sequence[str] | None = None) -> None:
        """Decodes and encodes those that are new, by all extractors or those named.

        Raises ValueError, which names the file, for one that cannot be read, or a mask of another
        size than its picture.
        """
        names = list(self.extractors) if extractors is None else list(extractors)
        new: dict[tuple[str, str], Picture] = {}
        for picture in pictures:
            key = picture.key(INSIDE) if self.masked else picture.key()
            if key not in self._seen:
                new.setdefault(key, picture)
        waiting = self._not_kept(names, list(new.values()))
        for start in range(0, len(waiting), AT_ONCE):
            part = waiting[start : start + AT_ONCE]
            began = time.perf_counter()
            images = in_parallel(opened, part)
            masks = in_parallel(self._mask, part)
            for picture, image in zip(part, images, strict=True):
                self._look(picture, look_of(image))
            for picture, image, mask in zip(part, images, masks, strict=True):
                check_size(picture, image, mask)
                if picture.mask is not None and mask is not None:
                    self._look(picture.mask, look_of_mask(mask))
            self.seconds["decode"] += time.perf_counter() - began
            self._encode(names, part, images, masks)
        self._seen |= new.keys()

    def features(self, extractor: str, pictures: Sequence[Picture], part: str = "") -> Tensor:
        """(N, D) of pictures that were added; rows of nan for those without a mask, if `part`."""
        rows = self.rows[extractor]
        nothing = torch.full_like(next(iter(rows.values())), torch.nan)
        return torch.stack(
            [nothing if part and p.mask is None else rows[p.key(part)] for p in pictures]
        )

    def _mask(self, picture: Picture) -> Image.Image | None:
        return opened(picture.mask) if self.masked and picture.mask else None

    def _look(self, picture: Picture, look: str) -> None:
        if look:
            self.looks[picture.digest] = look

    def _keys(self, name: str, picture: Picture) -> list[tuple[str, str]]:
        """Of all rows that an extractor makes of a picture."""
        masked = name in self.masked and picture.mask is not None
        return [picture.key(part) for part in ("", INSIDE, OUTSIDE)[: 3 if masked else 1]]

    def _not_kept(self, names: Sequence[str], pictures: list[Picture]) -> list[Picture]:
        """The pictures that the cache lacks a row of; what it has is not made again."""
        if not self.caches:
            return pictures
        found = {
            name: self.caches[name].find(k for p in pictures for k in self._keys(name, p))
            for name in names
        }
        for name, kept in found.items():
            self.rows[name].update((key, own.row) for key, own in kept.items())
        waiting = []
        for picture in pictures:
            if any(k not in found[name] for name in names for k in self._keys(name, picture)):
                waiting.append(picture)
                continue
            look = found[names[0]][picture.key()].look
            self._look(picture, look if look in (BLACK, PLAIN) else "")
            for name in sorted(self.masked.intersection(names)) if picture.mask else ():
                assert picture.mask is not None
                look = found[name][picture.key(INSIDE)].look
                self._look(picture.mask, look if look in (BLACK, PLAIN) else "")
        return waiting

    def _encode(
        self,
        names: Sequence[str],
        pictures: Sequence[Picture],
        images: Sequence[Image.Image],
        masks: Sequence[Image.Image | None],
    ) -> None:
        for name in names:
            extractor = self.extractors[name]
            began = time.perf_counter()
            known = self.rows[name]
            todo = {p.key(): i for p, i in zip(pictures, images) if p.key() not in known}
            if name in self.masked:
                for picture, image, mask in zip(pictures, images, masks):
                    for part in (INSIDE, OUTSIDE):
                        if mask is not None and picture.key(part) not in known:
                            todo[picture.key(part)] = painted(
                                image, mask, extractor.mean_colour, subject=part == OUTSIDE
                            )
            if todo:
                made = dict(zip(todo, extractor.images(list(todo.values())), strict=True))
                known.update(made)
                if name in self.caches:
                    self.caches[name].keep(made, self.looks)
            self.seconds[name] += time.perf_counter() - began


def check_size(picture: Picture, image: Image.Image, mask: Image.Image | None) -> None:
    if picture.mask is None or mask is None or mask.size == image.size:
        return
    theirs, ours = (f"{i.width} x {i.height}" for i in (mask, image))
    raise ValueError(
        f"the mask `{picture.mask.path}` is of {theirs} pixels, and its picture `{picture.path}` "
        f"of {ours} (upright): make it from the picture as it is, resize it to {ours} if it shows "
        "the same, or take it away."
    )


def look_of(image: Image.Image) -> str:
    """BLACK, PLAIN or "" for neither."""
    extremes = image.getextrema()
    if all(high <= DARK for _, high in extremes):  # type: ignore[misc]
        return BLACK
    return PLAIN if all(low == high for low, high in extremes) else ""  # type: ignore[misc]


def look_of_mask(mask: Image.Image) -> str:
    """BLACK where it has no subject, PLAIN where it has nothing else, "" for neither."""
    low, high = mask.convert("L").getextrema()
    if high <= HALF:  # type: ignore[operator]
        return BLACK
    return PLAIN if low > HALF else ""  # type: ignore[operator]


def opened(picture: Picture) -> Image.Image:
    """8-bit sRGB. Raises ValueError, which names the file."""
    try:
        return decode(read_bytes(picture.path, MAX_BYTES))
    except ValueError as error:
        raise ValueError(f"cannot read the image `{picture.path}`: {error}.") from None
