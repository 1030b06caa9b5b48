"""Fixed prompts and seeds to images, each image independent of what else is in its batch."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image

from dreamtune.models.conditioning import NOTHING, Arguments, take


@dataclass(frozen=True)
class Sampling:
    """How images are made: a sampler by name (see `Base.pipeline`), and options of `sample`."""

    sampler: str
    steps: int
    guidance_scale: float
    guidance_rescale: float
    size: int
    batch_size: int

    def options(self) -> dict[str, Any]:
        """Of `sample`."""
        return {k: v for k, v in asdict(self).items() if k != "sampler"}


@torch.no_grad()
def sample_tensor(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 25,
    guidance_scale: float = 7.5,
    guidance_rescale: float = 0.0,
    size: int | tuple[int, int] | None = None,
    batch_size: int = 8,
    arguments: Arguments | None = None,
    negative_prompts: Sequence[str] | None = None,
) -> torch.Tensor:
    """Images of `sample` as one CPU tensor (N, 3, height, width), float32 in [0, 1].

    Args:
        pipe: a diffusers text-to-image pipeline (`StableDiffusionPipeline` call signature).
        prompts, seeds: of equal length N; image i belongs to (prompts[i], seeds[i]).
        size: pixels, a side or (height, width); by default what the UNet was made for.
        batch_size: images a batch; guidance doubles the rows the UNet sees.
        arguments: of the pipeline's call, a row an image, used instead of encoding `prompts` (see
            `Base.sampling_arguments`).
        negative_prompts: one an image, where `prompts` are encoded; by default the empty one.

    Raises:
        ValueError: lengths differ, `batch_size` < 1, an image has pixels that are not finite, or
            there are negative prompts for a network that is told its guidance as a number.
    """
    _check_lengths(prompts, seeds, batch_size, arguments, negative_prompts)
    # only where it does something: pipelines of flow matching have no such argument
    rescale = {"guidance_rescale": guidance_rescale} if guidance_rescale else {}
    height, width = (size, size) if isinstance(size, int) or size is None else size
    guidance = guidance_options(type(pipe), getattr(pipe, "transformer", None), guidance_scale)
    nothing = guidance.pop("negative_prompt", None)
    if nothing is not None and arguments is None and negative_prompts is None:
        negative_prompts = [nothing] * len(prompts)
    images = []
    with _quiet(pipe):
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            text: dict[str, Any] = {"prompt": list(prompts[rows])}
            if arguments is not None:
                text = take(arguments, range(len(prompts))[rows])
                if "true_cfg_scale" in guidance and nothing is None:  # it would be warned of
                    text = {n: x for n, x in text.items() if not n.startswith("negative_")}
            elif negative_prompts is not None:
                text |= _negatives(pipe, list(negative_prompts[rows]), guidance, nothing)
            output = pipe(
                **text,
                height=height,
                width=width,
                num_inference_steps=steps,
                **guidance,
                **rescale,
                # One CPU generator a row: the noise depends on the seed alone, on any device.
                generator=[torch.Generator("cpu").manual_seed(int(s)) for s in seeds[rows]],
                output_type="pt",
            )
            images.append(output.images.float().cpu())
    return _finite(images) if images else torch.empty(0, 3, height or 0, width or 0)


def _check_lengths(
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
    arguments: Arguments | None,
    negative_prompts: Sequence[str] | None,
) -> None:
    if len(prompts) != len(seeds):
        raise ValueError(
            f"`prompts` and `seeds` pair up and need equal lengths, got {len(prompts)} and "
            f"{len(seeds)}; for every prompt with every seed repeat them (see `grid`)"
        )
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}")
    given: dict[str, Any] = dict(arguments or {})
    if negative_prompts is not None:
        given["negative_prompts"] = negative_prompts
    for name, x in given.items():
        if len(x) != len(prompts):
            raise ValueError(f"`{name}` has {len(x)} rows for {len(prompts)} prompts")


def _finite(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """All batches in one. Raises ValueError for a picture with pixels that are not finite."""
    result = torch.cat(list(images))
    if not result.isfinite().all():
        bad = [i for i, image in enumerate(result) if not image.isfinite().all()]
        raise ValueError(
            f"image {bad[0]} ({len(bad)} of {len(result)}) has pixels that are not finite: the "
            "adapter diverged (lower the learning rate) or the base overflows in this dtype "
            "(use bf16 or float32)"
        )
    return result


def guidance_options(pipeline: type, network: Any, scale: float) -> dict[str, Any]:
    """Of the pipeline's call for a prompt: how strongly it is guided.

    A pipeline with a `true_cfg_scale` is guided by that, and with a negative prompt alone; its
    `guidance_scale` is a number that the network is told, if it is told any.
    """
    told = bool(getattr(getattr(network, "config", None), "guidance_embeds", False))
    if told or "true_cfg_scale" not in inspect.signature(pipeline.__call__).parameters:
        return {"guidance_scale": scale}
    none = {"negative_prompt": NOTHING} if scale > 1 else {}
    return {"true_cfg_scale": scale, **none}


def _negatives(
    pipe: Any, prompts: list[str], guidance: Mapping[str, Any], nothing: str | None
) -> dict[str, Any]:
    """An argument of the pipeline's call; where it takes embeddings alone, its own of them.

    guidance, nothing: `guidance_options`, and the negative prompt that stands for none in it.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    if "negative_prompt" not in parameters:
        return {"negative_prompt_embeds": pipe.encode_prompt(prompts)[0]}
    if "true_cfg_scale" not in parameters:
        return {"negative_prompt": prompts}
    if "true_cfg_scale" in guidance:
        return {} if nothing is None else {"negative_prompt": [p or nothing for p in prompts]}
    if said := next((p for p in prompts if p.strip()), None):
        raise ValueError(
            "there is no negative prompt for a base that is told its guidance as a number, as "
            f"Flux.1 dev: it has no guidance away from a prompt; got {said[:100]!r}. Leave it out."
        )
    return {}


def sample(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], **options: Any
) -> list[Image.Image]:
    """One RGB image for each pair (prompts[i], seeds[i]); the options are `sample_tensor`'s.

    An image is a function of its prompt, seed and the options: the batch size moves it only by
    float reordering.
    """
    pixels = sample_tensor(pipe, prompts, seeds, **options)
    array = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(image) for image in array]


def grid(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[list[str], list[int]]:
    """Every prompt with every seed, prompts outermost: the two paired lists `sample` takes."""
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    return [prompt for prompt, _ in pairs], [seed for _, seed in pairs]


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """The pipeline's own progress bars off, and back to what they were; without what it says of
    itself where it brings XL's autoencoder from fp16 to float32 and back.
    """
    casts = logging.getLogger("diffusers.models.modeling_utils")
    level = casts.level
    before = dict(getattr(pipe, "_progress_bar_config", None) or {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    casts.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`upcast_vae` is deprecated")
            yield
    finally:
        casts.setLevel(level)
        pipe.set_progress_bar_config(**before)
