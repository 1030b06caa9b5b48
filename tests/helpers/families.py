"""Each base family on tiny weights: how it is written, and its loss in plain diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conftest import (
    write_klein_pipeline,
    write_pipeline,
    write_sd3_pipeline,
    write_xl_pipeline,
    write_z_image_pipeline,
)
from family_folders import (
    write_chroma_pipeline,
    write_flux_pipeline,
    write_krea2_pipeline,
    write_qwen_image_pipeline,
)
from torch import Tensor

Said = Callable[[Tensor, Tensor], Tensor]
SD = {"device": "cpu", "num_images_per_prompt": 1}
Told = tuple[Any, ...]  # what `encode_prompt` returned


def _diffusion(pipe: Any, x: Tensor, drawn: Any, said: Said) -> Tensor:
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    x, noise, t = x * pipe.vae.config.scaling_factor, drawn.noise, drawn.timestep
    target = noise
    if schedule.config.prediction_type == "v_prediction":
        target = schedule.get_velocity(x, noise, t)
    return (said(schedule.add_noise(x, noise, t), t) - target).square()


def _flow(pipe: Any, x: Tensor, drawn: Any) -> tuple[Tensor, ...]:
    """Latents, what the network sees of them, and sigmas and timesteps of the scheduler's table."""
    x = (x - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    table = pipe.scheduler.timesteps
    place = (table[None] - drawn.timestep[:, None]).abs().argmin(1)
    sigma = pipe.scheduler.sigmas[place].view(-1, 1, 1, 1)
    return x, (1 - sigma) * x + sigma * drawn.noise, sigma, table[place]


def _sd3_flow(pipe: Any, x: Tensor, drawn: Any, said: Said) -> Tensor:
    """The prediction taken back to a picture, against that: `--precondition_outputs 1`."""
    x, noisy, sigma, t = _flow(pipe, x, drawn)
    return (said(noisy, t) * -sigma + noisy - x).square()


def _z_flow(pipe: Any, x: Tensor, drawn: Any, said: Said) -> Tensor:
    """Time runs from noise, and the prediction is negated."""
    x, noisy, _, t = _flow(pipe, x, drawn)
    return (-said(noisy, (1000 - t) / 1000) - (drawn.noise - x)).square()


def _even_flow(pipe: Any, x: Tensor, drawn: Any, said: Said) -> Tensor:
    """In a table without a shift: that is the pipeline's, by the size of pictures."""
    x = (x - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    return _even(x, drawn, said)


def _frame_flow(pipe: Any, x: Tensor, drawn: Any, said: Said) -> Tensor:
    """Of a frame, by mean and deviation of each channel."""
    config = pipe.vae.config
    mean, std = (
        torch.tensor(y).view(1, -1, 1, 1) for y in (config.latents_mean, config.latents_std)
    )
    return _even((x - mean) / std, drawn, said)


def _even(x: Tensor, drawn: Any, said: Said) -> Tensor:
    sigma = (drawn.timestep / 1000).view(-1, 1, 1, 1)
    noisy = (1 - sigma) * x + sigma * drawn.noise
    return (said(noisy, drawn.timestep / 1000) - (drawn.noise - x)).square()


def _klein_flow(pipe: Any, x: Tensor, drawn: Any, said: Said) -> Tensor:
    """Of patches by the autoencoder's statistics, in a table without a shift."""
    n, c, h, w = x.shape
    patches = (
        x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, -1, h // 2, w // 2)
    )
    kept = pipe.vae.bn
    std = (kept.running_var + pipe.vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    x = (patches - kept.running_mean.view(1, -1, 1, 1)) / std
    sigma = (drawn.timestep / 1000).view(-1, 1, 1, 1)
    noisy = (1 - sigma) * x + sigma * drawn.noise
    return (said(noisy, drawn.timestep / 1000) - (drawn.noise - x)).square()


def _plain(network: Any, x: Tensor, t: Tensor, told: Told, sizes: Tensor) -> Tensor:
    return network(x, t, told[0]).sample  # type: ignore[no-any-return]


def _xl(network: Any, x: Tensor, t: Tensor, told: Told, sizes: Tensor) -> Tensor:
    added = {"text_embeds": told[2], "time_ids": sizes}
    return network(x, t, told[0], added_cond_kwargs=added).sample  # type: ignore[no-any-return]


def _sd3(network: Any, x: Tensor, t: Tensor, told: Told, sizes: Tensor) -> Tensor:
    return network(x, told[0], told[2], t).sample  # type: ignore[no-any-return]


def _places(height: int, width: int, axes: int) -> Tensor:
    """(0, down, across, ...) of the patches, row by row."""
    places = torch.zeros(height, width, axes)
    places[..., 1], places[..., 2] = torch.arange(height)[:, None], torch.arange(width)
    return places.reshape(-1, axes)


def _packed(x: Tensor) -> Tensor:
    """Of 2 latents a side: channel, down and across are one, in this order."""
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(n, h * w // 4, c * 4)


def _unpacked(x: Tensor, like: Tensor) -> Tensor:
    n, c, h, w = like.shape
    return x.view(n, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)


def _flux(network: Any, x: Tensor, t: Tensor, told: Told, sizes: Tensor) -> Tensor:
    """Where it is told a guidance, one of 1: `--guidance_scale=1`."""
    places = _places(x.shape[2] // 2, x.shape[3] // 2, 3)
    guidance = torch.ones(len(x)) if network.config.guidance_embeds else None
    return _unpacked(network(_packed(x), told[0], told[1], t, places, told[2], guidance).sample, x)


def _chroma(network: Any, x: Tensor, t: Tensor, told: Told, sizes: Tensor) -> Tensor:
    """The mask goes on over the picture."""
    n, _, h, w = x.shape
    places, mask = _places(h // 2, w // 2, 3), torch.cat([told[2], torch.ones(n, h * w // 4)], 1)
    return _unpacked(network(_packed(x), told[0], t, places, told[1], mask).sample, x)


def _qwen(network: Any, x: Tensor, t: Tensor, told: Told, sizes: Tensor) -> Tensor:
    """The mask is None where no token is filled up."""
    grid = [[(1, x.shape[2] // 2, x.shape[3] // 2)]] * len(x)
    return _unpacked(network(_packed(x), told[0], told[1], t, grid).sample, x)


def _krea2(network: Any, x: Tensor, t: Tensor, told: Told, sizes: Tensor) -> Tensor:
    """Text stands at the origin."""
    places = _places(x.shape[2] // 2, x.shape[3] // 2, 3)
    places = torch.cat([torch.zeros(told[0].shape[1], 3), places])
    return _unpacked(network(_packed(x), told[0], t, places, told[1]).sample, x)


def _klein(network: Any, x: Tensor, t: Tensor, told: Told, sizes: Tensor) -> Tensor:
    n, c, h, w = x.shape
    tokens = x.permute(0, 2, 3, 1).reshape(n, h * w, c)
    found = network(tokens, told[0], t, _places(h, w, 4), told[1][0]).sample
    return found.view(n, h, w, c).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


def _z_image(network: Any, x: Tensor, t: Tensor, told: Told, sizes: Tensor) -> Tensor:
    """A picture at a time, so that no text is filled up."""
    rows = zip(x.unsqueeze(2), t, told[0], strict=True)
    found = [network([picture], time[None], [text]).sample[0] for picture, time, text in rows]
    return torch.stack(found).squeeze(2)


@dataclass(frozen=True)
class Kit:
    """write: a folder for a prediction. said: the network's output for x and t, what it is told and
    the sizes (n, 6) that XL has. losses: of x and what was drawn, as diffusers' DreamBooth scripts
    have them. predictions: the ways there are. adapted: layers of the tiny network. formats: that
    its stock pipeline loads beside diffusers' own. encoding: arguments of `encode_prompt`.
    nothing: the negative prompt that this is called with for itself, None where it gives both.
    guidance: of the pipeline's call, a negative prompt for each that it is given. frames: whether
    the autoencoder is one of videos. told: the places in what `encode_prompt` returns of what the
    pipeline's call takes, where these are not all.
    """

    write: Callable[[Path, str], Path]
    said: Callable[[Any, Tensor, Tensor, Told, Tensor], Tensor]
    losses: Callable[[Any, Tensor, Any, Said], Tensor] = _diffusion
    predictions: tuple[str, ...] = ("epsilon", "v_prediction")
    adapted: int = (2 + 2 + 4) * 2 * 4  # blocks down, in the middle and up
    formats: tuple[str, ...] = ("kohya",)
    encoding: Mapping[str, Any] = field(default_factory=lambda: SD)
    nothing: str | None = None
    guidance: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 5.0})
    frames: bool = False
    told: tuple[int, ...] = ()

    def call(self, rows: int) -> dict[str, Any]:
        """`guidance`, of as many prompts."""
        return {k: x * rows if isinstance(x, list) else x for k, x in self.guidance.items()}


FAMILIES = {
    "sd": Kit(
        lambda folder, prediction: write_pipeline(folder, "kl", prediction),
        _plain,
        adapted=(1 + 2 + 1) * 2 * 4,  # attention on one of two levels
    ),
    "xl": Kit(write_xl_pipeline, _xl),
    "sd3": Kit(
        write_sd3_pipeline,
        _sd3,
        _sd3_flow,
        ("flow",),
        adapted=(8 + 4) + (4 + 3),  # the last block's text is not seen again
        formats=(),
        encoding={**SD, "prompt_2": None, "prompt_3": None},
    ),
    "klein": Kit(
        write_klein_pipeline,
        _klein,
        _klein_flow,
        ("flow",),
        adapted=8 + 2,  # of a block of two streams, and of one
        formats=("kohya", "comfyui"),
        nothing="",
    ),
    "flux": Kit(
        write_flux_pipeline,
        _flux,
        _even_flow,
        ("flow",),
        adapted=8 + 3,  # of a block of two streams, and of one
        formats=(),  # diffusers' reader of others knows blocks of one stream of 3072 alone
        encoding={**SD, "prompt_2": None},
        nothing=" ",
    ),
    "chroma": Kit(
        write_chroma_pipeline,
        _chroma,
        _even_flow,
        ("flow",),
        adapted=8 + 3,
        formats=(),
        told=(0, 2, 3, 5),
    ),
    "schnell": Kit(
        lambda folder, prediction: write_flux_pipeline(folder, prediction, guided=False),
        _flux,
        _even_flow,
        ("flow",),
        adapted=8,
        formats=("kohya", "comfyui"),
        encoding={**SD, "prompt_2": None},
        nothing=" ",
        guidance={"true_cfg_scale": 5.0, "negative_prompt": [" "]},
    ),
    "qwen_image": Kit(
        write_qwen_image_pipeline,
        _qwen,
        _frame_flow,
        ("flow",),
        adapted=8,
        formats=("kohya", "comfyui"),
        encoding=SD,
        nothing=" ",
        guidance={"true_cfg_scale": 5.0, "negative_prompt": [" "]},
        frames=True,
    ),
    "krea2": Kit(
        write_krea2_pipeline,
        _krea2,
        _frame_flow,
        ("flow",),
        adapted=5 + 5 + 5,  # of a block of all tokens, and of one for layers and one for text
        formats=(),
        encoding=SD,
        nothing="",
        frames=True,
    ),
    "z_image": Kit(
        write_z_image_pipeline,
        _z_image,
        _z_flow,
        ("flow",),
        adapted=(2 + 1 + 1) * 4,  # layers, and one to refine the picture and one the text
        formats=("kohya", "comfyui"),
        encoding={"device": "cpu"},
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
    codes = pipe.vae.encode(pixels.unsqueeze(2) if kit.frames else pixels).latent_dist
    told = pipe.encode_prompt(
        list(captions),
        **kit.encoding,
        **({"do_classifier_free_guidance": False} if kit.nothing is None else {}),
    )
    of_pictures = torch.tensor(sizes, dtype=torch.float32)

    def said(noisy: Tensor, t: Tensor) -> Tensor:
        return kit.said(network, noisy, t, told, of_pictures)

    x, std = (y.squeeze(2) if kit.frames else y for y in (codes.mean, codes.std))
    if drawn.latent_noise is not None:
        x = x + std * drawn.latent_noise
    return kit.losses(pipe, x, drawn, said).mean((1, 2, 3))
