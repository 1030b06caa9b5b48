"""Small folders of photos and of generated images, in the layout that is scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreamtune.evaluation.layout import read_images, read_photos
from dreamtune.evaluation.protocol_file import find_protocol
from dreamtune.evaluation.task import Task

EVERY = find_protocol("dreamtune")  # all that is scored
SUBJECTS = ("backpack", "backpack_dog", "dog")  # names that contain each other
PROMPTS = ("a sks thing on the beach", "a sks thing in the snow")


def picture(seed: int, side: int = 40) -> Image.Image:
    """Smooth colours: random pixels would make every resize alike."""
    values = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((side, side), Image.Resampling.BICUBIC)


def mask(seed: int) -> Image.Image:
    values = np.zeros((40, 40), np.uint8)
    values[5 : 20 + seed % 10, 8:30] = 255
    return Image.fromarray(values)


def save(image: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def write_photos(root: Path, subjects=SUBJECTS, masks: bool = False) -> Path:
    """3, 4, 5, ... photos and 2 held-out ones a subject."""
    for number, subject in enumerate(subjects):
        for i in range(3 + number):
            save(picture(100 * number + i), root / subject / f"{i}.png")
            if masks:
                save(mask(i), root / subject / "masks" / f"{i}.png")
        for i in range(2):
            save(picture(100 * number + 50 + i), root / subject / "reference" / f"{i}.png")
    return root


def write_images(root: Path, subjects=SUBJECTS, seeds: int = 2, shift: int = 0) -> Path:
    """`seeds` images of each prompt and subject, and one of an unrelated prompt."""
    for number, subject in enumerate(subjects):
        for p, prompt in enumerate(PROMPTS):
            for k in range(seeds):
                name = 1000 + 100 * number + 10 * p + k + shift
                save(picture(name), root / subject / prompt / f"{k}.png")
        save(picture(5000 + number + shift), root / subject / "unrelated" / "a pizza" / "0.png")
    return root


def write_masked(root: Path) -> tuple[Path, Path, Path]:
    """(photos with masks, images of which one has a mask, the base's images)"""
    photos, images = write_photos(root / "photos", masks=True), write_images(root / "images")
    save(mask(3), images / "dog" / PROMPTS[0] / "masks" / "0.png")
    return photos, images, write_images(root / "base", shift=7)


def task_of(folders: tuple[Path, Path, Path], **changes: Any) -> Task:
    photos, images, base = folders
    found = {"images": read_images(images), "photos": read_photos(photos)[0],
             "source": {"kind": "a folder of images"}, "base": read_images(base)}  # fmt: skip
    return Task(**{**found, **changes})
