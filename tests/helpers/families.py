"""Each base family on tiny weights: how it is written, and its loss in plain diffusers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import write_pipeline, write_xl_pipeline
from torch import Tensor


@dataclass(frozen=True)
class Kit:
    """write: a folder for a prediction type. told: arguments of the network beside x and t, of
    what `encode_prompt` returned and of the sizes (n, 6) that XL has.
    """

    write: Callable[[Path, str], Path]
    told: Callable[[tuple[Any, ...], Tensor], dict[str, Any]]


def _plain(encoded: tuple[Any, ...], sizes: Tensor) -> dict[str, Any]:
    return {"encoder_hidden_states": encoded[0]}


def _xl(encoded: tuple[Any, ...], sizes: Tensor) -> dict[str, Any]:
    added = {"text_embeds": encoded[2], "time_ids": sizes}
    return {"encoder_hidden_states": encoded[0], "added_cond_kwargs": added}


FAMILIES = {
    "sd": Kit(lambda folder, prediction: write_pipeline(folder, "kl", prediction), _plain),
    "xl": Kit(write_xl_pipeline, _xl),
}


@torch.no_grad()
def plain_losses(
    kit: Kit,
    pipe: Any,
    network: Any,
    pixels: Tensor,
    captions: Sequence[str],
    sizes: Sequence[Sequence[int]],
    drawn: Any,
) -> Tensor:
    """(n,) mean squared errors as diffusers' DreamBooth scripts have them. pipe: a stock one;
    pixels (n, 3, h, w) in [-1, 1]; drawn: noises and timesteps of these rows.
    """
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    codes = pipe.vae.encode(pixels).latent_dist
    x = (codes.mean + codes.std * drawn.latent_noise) * pipe.vae.config.scaling_factor
    noise, t = drawn.noise, drawn.timestep
    told = pipe.encode_prompt(
        list(captions), device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    noisy = schedule.add_noise(x, noise, t)
    said = network(noisy, t, **kit.told(told, torch.tensor(sizes, dtype=torch.float32))).sample
    target = noise
    if schedule.config.prediction_type == "v_prediction":
        target = schedule.get_velocity(x, noise, t)
    return (said - target).square().mean((1, 2, 3))
