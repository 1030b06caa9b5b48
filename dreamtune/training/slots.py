"""Adapter and step of one or several runs on one base: a slot each, their caches joined."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dreamtune.config import Settings
from dreamtune.models.base import Base
from dreamtune.training.cache import Cache, Pools, join
from dreamtune.training.optim import SlotAdamW
from dreamtune.training.step import Step, StepSettings

if TYPE_CHECKING:
    from dreamtune.injection.inject import InjectedAdapter


@dataclass(frozen=True)
class Slot:
    """One run's part of an adapter, and of the step that trains it."""

    adapter: InjectedAdapter
    step: Step
    index: int

    @property
    def loss(self) -> float:
        """Of the last step. Reading it waits for the device, as with all of these."""
        return float(self.step.loss[self.index].item())

    @property
    def learning_rate(self) -> float:
        """Of the last step, as a share of the peak."""
        return float(self.step.optimizer.schedule.item())

    @property
    def skipped(self) -> int:
        """Steps whose loss or gradient was not finite."""
        return int(self.step.skipped[self.index].item())

    @property
    def skipped_now(self) -> int:
        """The same, of the last steps in a row."""
        return int(self.step.skipped_now[self.index].item())

    @property
    def mean_loss(self) -> float:
        """Since `forget_mean_loss`, nan without a step."""
        return float(self.step.mean_loss()[self.index])

    def forget_mean_loss(self) -> None:
        self.step.forget_mean_loss(self.index)

    @property
    def scalings(self) -> int:
        """Of the skipped steps those that halved fp16's loss scale: at most, of a whole run."""
        now = float(self.step.loss_scale[self.index].item())
        return round(math.log2(self.step.settings.loss_scale / now))

    def states(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copies of the adapter's tensors, and of what else a step changes, as if it were alone."""
        step = self.step.state_dict(self.index)
        return self.adapter.state_dict(self.index), {k: t.clone() for k, t in step.items()}

    def load(self, adapter: Mapping[str, Tensor], step: dict[str, Tensor]) -> None:
        self.adapter.load_state_dict(adapter, self.index)
        self.step.load_state_dict(step, self.index)

    def save(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.adapter.save(path, self.index, metadata=metadata)


def build_step(
    base: Base, configs: Sequence[Settings], caches: Sequence[Cache], pools: Sequence[Pools]
) -> tuple[InjectedAdapter, Step]:
    """Injects a slot for each config. They differ in seed, learning rate and the method's
    `per_slot` options only; what is common is read from the first.
    """
    from dreamtune.injection.inject import inject

    c = configs[0]
    if c.gradient_checkpointing:
        base.network.enable_gradient_checkpointing()
    seeds = [x.seed for x in configs]
    adapter = inject(
        base.network,
        c.method,
        slots=len(configs),
        target_modules=c.target_modules,
        seed=seeds,
        _fast=True,
        **stacked_options(c.method, [x.options for x in configs]),
    )
    base.network.eval()  # dropout would draw from the global generator, which no seed of a run sets
    groups = [adapter.parameter_groups(x.learning_rate, x.adam_weight_decay) for x in configs]
    optimizer = SlotAdamW(groups, (c.adam_beta1, c.adam_beta2), c.adam_epsilon)
    settings = StepSettings.of(c, loss_scale=2.0**16 if base.dtype == torch.float16 else 1.0)
    cache, tickets = join(caches, pools)
    cache = replace(cache, prompts=base.for_step(cache.prompts))
    process = base.process(c.snr_gamma)
    return adapter, Step(base.predict, optimizer, cache, tickets, process, seeds, settings)


def stacked_options(method: str, options: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The options of all slots, a list where they differ."""
    from dreamtune.adapters import find_method

    merged = dict(options[0])
    for name in find_method(method).per_slot:
        values = [own[name] for own in options]
        if any(v != values[0] for v in values):
            merged[name] = values
    return merged
