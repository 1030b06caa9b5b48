"""A training step on the tiny UNet: three subjects of different size, rates and seeds."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from tiny import tiny_unet, tiny_xl_unet

from dreamtune import inject
from dreamtune.models import stable_diffusion, stable_diffusion_xl
from dreamtune.models.diffusion import Diffusion
from dreamtune.training.cache import Cache
from dreamtune.training.optim import SlotAdamW
from dreamtune.training.step import Step, StepSettings

DTYPE = torch.float64


RATES = [2e-3, 1e-2, 5e-4]


SEEDS = [3, 1, 4]


def cache(spread: bool = True, device: str = "cpu", xl: bool = False) -> Cache:
    g = torch.Generator().manual_seed(5)
    mean, std = torch.randn(2, 12, 4, 8, 8, generator=g, dtype=DTYPE)
    prompts = torch.randn(4, 5, 24, generator=g, dtype=DTYPE)
    mean, std, prompts = mean.to(device), std.to(device).abs() * 0.1, prompts.to(device)
    caption = torch.arange(12, device=device) % 4
    told, pictures = {"prompt_embeds": prompts}, {}
    if xl:
        wide = torch.randn(4, 5, 40, generator=g, dtype=DTYPE).to(device)
        told = {"prompt_embeds": wide, "pooled_prompt_embeds": wide[:, 0, :10]}
        sizes = torch.tensor([[1024.0, 1024 + i, 0, i, 1024, 1024] for i in range(12)])
        pictures = {"time_ids": sizes.to(device)}
    return Cache(mean, std if spread else None, caption, told, pictures)


# three subjects of different size, and their class images
PHOTOS = [torch.arange(0, 2), torch.arange(2, 5), torch.tensor([5, 5, 6, 7])]


CLASSES = [torch.arange(8, 10), torch.arange(9, 12), torch.arange(8, 12)]


def process(timesteps: int) -> Diffusion:
    return Diffusion(torch.linspace(0.999, 0.001, timesteps))


def make(
    method: str, slots: list[int], device: str = "cpu", xl: bool = False, **settings: Any
) -> tuple[Any, Step]:
    unet = (tiny_xl_unet if xl else tiny_unet)(DTYPE).to(device)
    family = stable_diffusion_xl if xl else stable_diffusion
    seeds = [SEEDS[s] for s in slots]
    adapter = inject(unet, method, slots=len(slots), seed=seeds, _fast=True)  # as the trainer
    groups = [adapter.parameter_groups(RATES[s], 0.01) for s in slots]
    pools = [[pool[s].to(device) for s in slots] for pool in (PHOTOS, CLASSES)]
    alpha_bar = torch.linspace(0.999, 0.001, 50, dtype=DTYPE, device=device)
    options = StepSettings(**{"train_batch_size": 2, "max_grad_norm": 1e-3, **settings})
    step = Step(
        partial(family.predict, unet, DTYPE),
        SlotAdamW(groups),
        cache(device=device, xl=xl),
        pools,
        Diffusion(alpha_bar, snr_gamma=5.0),
        [SEEDS[s] for s in slots],
        options,
    )
    return adapter, step
