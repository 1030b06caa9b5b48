"""Class images: kept in a folder, made by the base where they are short."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreamtune.config import Config, Settings
from dreamtune.data.photos import KEPT_SIDE, Photo, photo_folders, read_folder
from dreamtune.files.whole import whole
from dreamtune.models.base import Base
from dreamtune.models.conditioning import take
from dreamtune.models.sample import sample
from dreamtune.textfile import read_json
from dreamtune.training.defaults import sampling_of
from dreamtune.training.output import say
from dreamtune.training.step import mix

NOTE = ".dreamtune.json"


def check_class_folder(config: Config, photos: Sequence[Photo]) -> None:
    """Raises ValueError if the class images are to lie among the photos, by whatever path."""
    if not config.with_prior_preservation or config.class_data_dir is None:
        return
    folder = Path(config.class_data_dir).expanduser()
    places = photo_folders(folder) if folder.is_dir() else [(folder, None, 1)]
    theirs = {place.resolve() for place, _, _ in places}
    for photo in photos:
        if photo.path.parent.resolve() in theirs or photo.path.resolve().parent in theirs:
            raise ValueError(
                f"`class_data_dir` {folder} holds the photos of the subject ({photo.path.name}): "
                "images of the class would be made among them. Name another folder."
            )


def class_images(config: Settings, base: Base) -> list[Photo]:
    """The class images, made by the base where the folder holds too few. Image i depends on (seed,
    i) alone.

    Pictures are what they are in a folder of photos, those of kohya's folders (`1_dog`) too.
    """
    assert config.class_data_dir is not None and config.class_prompt is not None
    folder = Path(config.class_data_dir).expanduser()
    check_origin(config, base, folder)
    side = max(KEPT_SIDE, config.resolution)
    there = read_folder(folder, need=0, side=side).photos if folder.is_dir() else []
    missing = [
        i for i in range(config.num_class_images) if not (folder / f"class-{i:05d}.png").exists()
    ]
    missing = missing[: max(0, config.num_class_images - len(there))]
    if missing:
        make(config, base, folder, missing)
        there = read_folder(folder, side=side).photos
    return there[: config.num_class_images]


def origin(config: Settings, base: Base) -> dict[str, Any]:
    """What made images depend on."""
    return {
        "prompt": config.class_prompt,
        "base": base.id,
        "seed": config.seed,
        "resolution": config.resolution,
    }


def check_origin(config: Settings, base: Base, folder: Path) -> None:
    """Raises ValueError if the images of an earlier run were made otherwise."""
    if not (folder / NOTE).is_file():
        return
    was, now = read_json(folder / NOTE), origin(config, base)
    if not isinstance(was, dict):
        raise ValueError(f"`{folder / NOTE}` must hold how the images were made, got {was!r:.100}.")
    if was != now:
        differs = ", ".join(
            f"{k} {was.get(k)!r:.200}, now {v!r}" for k, v in now.items() if was.get(k) != v
        )
        raise ValueError(
            f"the class images in `{folder}` were made otherwise: {differs}. Name another "
            f"--class_data_dir."
        )


def make(config: Settings, base: Base, folder: Path, missing: Sequence[int]) -> None:
    """class-<i>.png for each i of `missing`."""
    assert config.class_prompt is not None
    say(f"Making {len(missing)} class images of `{config.class_prompt}` in {folder}")
    with whole(folder / NOTE) as partial:
        partial.write_text(json.dumps(origin(config, base)), encoding="utf-8")
    sampling = sampling_of(config)
    arguments = base.sampling_arguments([config.class_prompt] * sampling.batch_size)
    with base.sampling(sampling.sampler, prompts=False) as pipe:
        for start in range(0, len(missing), sampling.batch_size):
            part = missing[start : start + sampling.batch_size]
            images = sample(
                pipe,
                [config.class_prompt] * len(part),
                [mix(config.seed, i) for i in part],
                arguments=take(arguments, range(len(part))),
                **sampling.options(),
            )
            for i, image in zip(part, images, strict=True):
                # an image that was cut off must not be taken for one
                with whole(folder / f"class-{i:05d}.png") as partial:
                    image.save(partial, "PNG")
