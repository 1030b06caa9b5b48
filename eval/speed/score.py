"""How fast `dreamtune score` reads and encodes: images of 512 px from JPEG files, by DINO ViT-S/16
and CLIP ViT-B/32 of random weights.

    python eval/speed/score.py --photos PHOTOS --work DIR
    python eval/speed/score.py --work DIR --size tiny --count 8      # a check of this, in seconds

PHOTOS: a folder of photo folders, one a subject; without it pictures are drawn. The images are
seeded crops and colour changes of the photos: their content does not matter to the clock, the sizes
of their files do. Prints a line of JSON: seconds of decoding and of each encoder (with its
preprocessing), of all from the command to the page, and of the images alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "eval"), str(ROOT)]

from random_models import SIZES, build_clip, build_dino, write_photos  # noqa: E402

import dreamtune  # noqa: E402
from dreamtune.evaluation.prompts import OBJECT  # noqa: E402
from dreamtune.metrics.preprocess import in_parallel  # noqa: E402

SIDE = 512
KEPT = 6  # photos of a subject; the set of DreamBooth has 4 to 6


def changed(photo: Image.Image, seed: int) -> Image.Image:
    """A crop of 60 to 100% of the photo at SIDE px, with other colours."""
    random = np.random.default_rng(seed)
    edge = int(min(photo.size) * random.uniform(0.6, 1))
    left, top = (int(random.integers(0, length - edge + 1)) for length in photo.size)
    image = photo.crop((left, top, left + edge, top + edge)).resize((SIDE, SIDE))
    for kind in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
        image = kind(image).enhance(random.uniform(0.7, 1.3))
    return image


def copied(source: Path | None, work: Path) -> Path:
    """The photos by subject, at most KEPT of each."""
    root = work / "photos"
    for place in sorted(p for p in source.iterdir() if p.is_dir()) if source else ():
        for photo in sorted(place.glob("*.jpg"))[:KEPT]:
            (root / place.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(photo, root / place.name / photo.name)
    if source is None:
        for number in range(2):
            write_photos(root / f"drawn{number}", seed=number)
    return root


def write_images(photos: Path, root: Path, count: int) -> int:
    """`count` images, dealt over the subjects and their prompts; returns how many there are."""
    subjects = sorted(p for p in photos.iterdir() if p.is_dir())
    opened = {s.name: [Image.open(p).convert("RGB") for p in sorted(s.iterdir())] for s in subjects}

    def write(number: int) -> None:
        subject = subjects[number % len(subjects)].name
        prompt, seed = divmod(number // len(subjects), 4)
        text = OBJECT[prompt % len(OBJECT)].format("sks thing")
        folder = root / subject / (text if prompt < len(OBJECT) else f"{text} {prompt}")
        folder.mkdir(parents=True, exist_ok=True)
        own = opened[subject]
        changed(own[number % len(own)], number).save(folder / f"{seed}.jpg", quality=88)

    return len(in_parallel(write, range(count)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, help="photos by subject")
    parser.add_argument("--work", type=Path, required=True, help="a new folder for all files")
    parser.add_argument("--count", type=int, default=3000, help="images")
    parser.add_argument("--size", choices=SIZES, default="full", help="of the encoders")
    a = parser.parse_args(argv)
    if a.work.exists():
        raise SystemExit(f"score: `{a.work}` is there: name a new --work.")
    a.work.mkdir(parents=True)
    os.environ["DREAMTUNE_CACHE"] = str(a.work / "cache")  # empty, and written as any other
    photos = copied(a.photos, a.work)
    began = time.perf_counter()
    count = write_images(photos, a.work / "images", a.count)
    writing = time.perf_counter() - began
    build_dino(a.work / "dino", a.size)
    build_clip(a.work / "clip", a.size)
    weights = {"dino": str(a.work / "dino"), "clip": f"local-dir:{a.work / 'clip'}"}
    began = time.perf_counter()
    results = dreamtune.score(
        a.work / "images", photos=photos, protocol="paper" if a.size == "full" else "dreamtune",
        weights=weights, output_dir=a.work / "scores",
    )  # fmt: skip
    total = time.perf_counter() - began
    seconds = {name: round(value, 2) for name, value in results.seconds.items()}
    print(json.dumps({
        "images": count, "photos": sum(1 for _ in photos.glob("*/*")),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "write_s": round(writing, 2), **{f"{name}_s": value for name, value in seconds.items()},
        "decode_and_encode_s": round(sum(results.seconds.values()), 2), "all_s": round(total, 2),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
