"""Class images: kept in a folder, made by the base where they are short."""

from __future__ import annotations

import json
from pathlib import Path

from dreamtune.config import Settings
from dreamtune.data.photos import Photo, read_folder
from dreamtune.files.whole import whole
from dreamtune.models.base import Base
from dreamtune.models.sample import sample
from dreamtune.training.defaults import sampling_of
from dreamtune.training.output import say
from dreamtune.training.step import mix


def class_images(config: Settings, base: Base) -> list[Photo]:
    """The class images, made by the base where the folder holds too few. Image i depends on (seed,
    i) alone.
    """
    assert config.class_data_dir is not None and config.class_prompt is not None
    folder = Path(config.class_data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / ".dreamtune.json"
    origin = {
        "prompt": config.class_prompt,
        "base": base.id,
        "seed": config.seed,
        "resolution": config.resolution,
    }
    if note.is_file() and json.loads(note.read_text()) != origin:
        was = json.loads(note.read_text())
        differs = ", ".join(
            f"{k} {was.get(k)!r}, now {v!r}" for k, v in origin.items() if was.get(k) != v
        )
        raise ValueError(
            f"the class images in `{folder}` were made otherwise: {differs}. Name another "
            f"--class_data_dir."
        )
    own = [p for p in folder.iterdir() if p.name.startswith("class-") and p.suffix == ".png"]
    others = [
        p for p in folder.iterdir() if p not in own and not p.name.startswith(".") and p.is_file()
    ]
    have = len(own) + len([p for p in others if p.suffix.lower() != ".txt"])
    missing = [
        i for i in range(config.num_class_images) if not (folder / f"class-{i:05d}.png").exists()
    ]
    missing = missing[: max(0, config.num_class_images - have)]
    if missing:
        say(f"Making {len(missing)} class images of `{config.class_prompt}` in {folder}")
        note.write_text(json.dumps(origin))
        sampling = sampling_of(config)
        arguments = base.sampling_arguments([config.class_prompt] * sampling.batch_size)
        with base.sampling(sampling.sampler, prompts=False) as pipe:
            for start in range(0, len(missing), sampling.batch_size):
                part = missing[start : start + sampling.batch_size]
                images = sample(
                    pipe,
                    [config.class_prompt] * len(part),
                    [mix(config.seed, i) for i in part],
                    arguments={name: x[: len(part)] for name, x in arguments.items()},
                    **sampling.options(),
                )
                for i, image in zip(part, images, strict=True):
                    # an image that was cut off must not be taken for one
                    with whole(folder / f"class-{i:05d}.png") as partial:
                        image.save(partial, "PNG")
    return read_folder(folder).photos[: config.num_class_images]
