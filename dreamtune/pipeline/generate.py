"""Images from a trained adapter on its base."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from dreamtune.fields import Seed, checker, validated
from dreamtune.files.find import adapter_file, base_of_run, run_settings
from dreamtune.files.whole import check_writable, whole
from dreamtune.models.load import load_base
from dreamtune.models.sample import grid, sample

_SEED = checker({"seed": Seed})


def generate(
    adapter: str | Path,
    prompts: Sequence[str],
    *,
    base: str | None = None,
    num_images: int = 4,
    scale: float = 1.0,
    seed: int = 0,
    resolution: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    output_dir: Path = Path("generated"),
) -> list[Path]:
    """`num_images` PNG files a prompt, with the run's sampling settings unless others are given.
    Returns the paths. Raises ValueError, before anything is loaded, for a number out of range.
    """
    for key, value in (("num_images", num_images), ("num_inference_steps", steps)):
        if value is not None and value < 1:
            raise ValueError(f"`{key}` must be at least 1, got {value}.")
    validated(_SEED, {"seed": seed})
    if resolution is not None and (resolution < 8 or resolution % 8):
        raise ValueError(f"`resolution` must be a multiple of 8, got {resolution}.")
    from dreamtune.config import Config
    from dreamtune.pipeline.load import load
    from dreamtune.pipeline.speed import speed_up_where_possible
    from dreamtune.training.defaults import device_and_dtype

    file = adapter_file(adapter)
    check_writable(output_dir)
    settings = run_settings(file)
    device, dtype = device_and_dtype(Config(pretrained_model_name_or_path="embedded"))
    model = load_base(
        base or base_of_run(file),
        revision=settings.get("revision"),
        variant=settings.get("variant"),
        prediction_type=settings.get("prediction_type"),
        dtype=dtype,
        device=device,
    )
    size = resolution or settings.get("resolution") or model.resolution
    model.check_side(size)
    usual = model.sampling_defaults(size)
    if steps is None:
        steps = settings.get("num_inference_steps") or model.sampling_steps
    if guidance_scale is None:
        stated = settings.get("guidance_scale")
        guidance_scale = usual.guidance_scale if stated is None else stated
    names, seeds = grid(prompts, range(seed, seed + num_images))
    sampler = settings.get("sampler") or usual.sampler
    with model.sampling(sampler) as pipe:
        load(pipe, file, scale=scale)
        speed_up_where_possible(pipe)
        images = sample(
            pipe,
            names,
            seeds,
            steps=steps,
            size=size,
            guidance_scale=guidance_scale,
            guidance_rescale=settings.get("guidance_rescale", usual.guidance_rescale),
        )
    return saved(images, output_dir)


def saved(images: Iterable[Image.Image], folder: Path) -> list[Path]:
    """Numbered PNG files, beside those that are there."""
    paths: list[Path] = []
    number = 0
    for image in images:
        while (path := folder / f"{number:04d}.png").exists():
            number += 1
        with whole(path) as partial:
            image.save(partial, "PNG")
        paths.append(path)
    return paths
