"""Each base family on tiny weights: how it is written, and its loss in plain diffusers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import write_pipeline, write_sd3_pipeline, write_xl_pipeline
from torch import Tensor

Said = Callable[..., Tensor]


def _diffusion(pipe: Any, x: Tensor, drawn: Any, said: Said) -> Tensor:
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    x, noise, t = x * pipe.vae.config.scaling_factor, drawn.noise, drawn.timestep
    target = noise
    if schedule.config.prediction_type == "v_prediction":
        target = schedule.get_velocity(x, noise, t)
    return (said(schedule.add_noise(x, noise, t), t) - target).square()


def _sd3_flow(pipe: Any, x: Tensor, drawn: Any, said: Said) -> Tensor:
    """The prediction taken back to a picture, against that: `--precondition_outputs 1`."""
    x = (x - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    table = pipe.scheduler.timesteps
    place = (table[None] - drawn.timestep[:, None]).abs().argmin(1)
    sigma = pipe.scheduler.sigmas[place].view(-1, 1, 1, 1)
    noisy = (1 - sigma) * x + sigma * drawn.noise
    return (said(noisy, table[place]) * -sigma + noisy - x).square()


def _plain(encoded: tuple[Any, ...], sizes: Tensor) -> dict[str, Any]:
    return {"encoder_hidden_states": encoded[0]}


def _xl(encoded: tuple[Any, ...], sizes: Tensor) -> dict[str, Any]:
    added = {"text_embeds": encoded[2], "time_ids": sizes}
    return {"encoder_hidden_states": encoded[0], "added_cond_kwargs": added}


def _sd3(encoded: tuple[Any, ...], sizes: Tensor) -> dict[str, Any]:
    return {"encoder_hidden_states": encoded[0], "pooled_projections": encoded[2]}


@dataclass(frozen=True)
class Kit:
    """write: a folder for a prediction. told: arguments of the network beside x and t, of what
    `encode_prompt` returned and of the sizes (n, 6) that XL has. losses: of x and what was drawn,
    as diffusers' DreamBooth scripts have them. predictions: the ways there are. adapted: layers of
    the tiny network. formats: that its stock pipeline loads beside diffusers' own. other_prompts:
    arguments that `encode_prompt` must have.
    """

    write: Callable[[Path, str], Path]
    told: Callable[[tuple[Any, ...], Tensor], dict[str, Any]]
    losses: Callable[[Any, Tensor, Any, Said], Tensor] = _diffusion
    predictions: tuple[str, ...] = ("epsilon", "v_prediction")
    adapted: int = (2 + 2 + 4) * 2 * 4  # blocks down, in the middle and up
    formats: tuple[str, ...] = ("kohya",)
    other_prompts: tuple[str, ...] = ()


FAMILIES = {
    "sd": Kit(lambda folder, prediction: write_pipeline(folder, "kl", prediction), _plain),
    "xl": Kit(write_xl_pipeline, _xl),
    "sd3": Kit(
        write_sd3_pipeline,
        _sd3,
        _sd3_flow,
        ("flow",),
        adapted=(8 + 4) + (4 + 3),  # the last block's text is not seen again
        formats=(),
        other_prompts=("prompt_2", "prompt_3"),
    ),
}
CASES = [(name, prediction) for name, kit in FAMILIES.items() for prediction in kit.predictions]


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
    codes = pipe.vae.encode(pixels).latent_dist
    told = pipe.encode_prompt(
        list(captions),
        **dict.fromkeys(kit.other_prompts),
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    given = kit.told(told, torch.tensor(sizes, dtype=torch.float32))

    def said(noisy: Tensor, t: Tensor) -> Tensor:
        return network(noisy, timestep=t, **given).sample  # type: ignore[no-any-return]

    x = codes.mean + codes.std * drawn.latent_noise
    return kit.losses(pipe, x, drawn, said).mean((1, 2, 3))
