"""Adapter and step of one or several runs on one base: their caches joined, a slot each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from dreamtune.config import Config
from dreamtune.models.stable_diffusion import Base
from dreamtune.training.cache import Cache, Pools, join
from dreamtune.training.optim import SlotAdamW
from dreamtune.training.step import Step, StepSettings

if TYPE_CHECKING:
    from dreamtune.injection.inject import InjectedAdapter


def build_step(
    base: Base, configs: Sequence[Config], caches: Sequence[Cache], pools: Sequence[Pools]
) -> tuple[InjectedAdapter, Step]:
    """Injects a slot for each config. They differ in seed, learning rate and the method's
    `per_slot` options only; what is common is read from the first.
    """
    from dreamtune.injection.inject import inject

    c = configs[0]
    if c.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    seeds = [x.seed for x in configs]
    adapter = inject(
        base.unet,
        c.method,
        slots=len(configs),
        target_modules=c.target_modules,
        seed=seeds,
        **stacked_options(c.method, [x.options for x in configs]),
    )
    base.unet.train()
    groups = [adapter.parameter_groups(x.learning_rate, x.adam_weight_decay) for x in configs]
    optimizer = SlotAdamW(groups, (c.adam_beta1, c.adam_beta2), c.adam_epsilon)
    settings = StepSettings(
        batch=c.train_batch_size or 1,
        accumulation=c.gradient_accumulation_steps,
        prediction=c.prediction_type or "epsilon",
        snr_gamma=c.snr_gamma,
        prior_weight=c.prior_loss_weight,
        max_grad_norm=c.max_grad_norm,
        loss_scale=2.0**16 if base.dtype == torch.float16 else 1.0,
    )
    cache, tickets = join(caches, pools)
    alpha_bar = base.alpha_bar()
    return adapter, Step(
        base.unet, optimizer, cache, tickets, alpha_bar, seeds, settings, base.dtype
    )


def stacked_options(method: str, options: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The options of all slots, a list where they differ."""
    from dreamtune.adapters import find_method

    merged = dict(options[0])
    for name in find_method(method).per_slot:
        values = [own[name] for own in options]
        if any(v != values[0] for v in values):
            merged[name] = values
    return merged
