"""Flow matching: straight ways from pictures to noise, and how a scheduler's file spaces them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dreamtune.fields import UnreadableFile
from dreamtune.models.base import Process
from dreamtune.models.diffusion import rows
from dreamtune.models.folder import ModelFolder
from dreamtune.models.rules import FLOW_SCHEDULER
from dreamtune.models.scheduler import FILE
from dreamtune.models.weights import read_by_library

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
Density = Literal["uniform", "logit_normal"]


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """s σ / (1 + (s - 1) σ): more noise for larger pictures, arXiv 2403.03206, eq. 23."""
    return shift * sigma / (1 + (shift - 1) * sigma)


class FlowMatching(Process):
    """x_t = (1 - σ) x + σ ε, of which the network predicts ε - x: arXiv 2210.02747, 2403.03206.

    A timestep is σ times `steps`, in the units of the pipeline's scheduler, and one of its table:
    σ = 1, ..., 1 / steps, each shifted.

    Args:
        steps: of the table.
        shift: of the scheduler's config; 1 where it shifts by the size of pictures, as diffusers'
            training scripts have it.
        density: of the place in the table: "uniform", or "logit_normal", the logistic function of
            a standard normal (arXiv 2403.03206, eq. 19).
        of_picture: whether the loss is that of the picture that the prediction amounts to,
            x_t - σ v against x, which is σ² that of the velocity.
    """

    def __init__(
        self,
        steps: int = 1000,
        shift: float = 1.0,
        density: Density = "uniform",
        of_picture: bool = False,
    ) -> None:
        self.steps, self.shift, self.density, self.of_picture = steps, shift, density, of_picture

    def timesteps(self, u: Tensor) -> Tensor:
        if self.density == "logit_normal":
            u = torch.special.ndtri(u).sigmoid()
        place = (u * self.steps).floor().clamp_max(self.steps - 1)
        return shifted((self.steps - place) / self.steps, self.shift) * self.steps

    def noised(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        sigma = rows(t / self.steps, latents)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - latents

    def weight(self, t: Tensor) -> Tensor | None:
        return (t / self.steps).square() if self.of_picture else None

    @classmethod
    def of(cls, scheduler: Any, density: Density, of_picture: bool = False) -> FlowMatching:
        """With the steps and the shift of a pipeline's scheduler."""
        config = scheduler.config
        shift = 1.0 if config.use_dynamic_shifting else config.shift
        return cls(config.num_train_timesteps, shift, density, of_picture)


def load_scheduler(folder: ModelFolder, named: Sequence[str]) -> Any:
    """named: library and class, of model_index.json. Raises UnreadableFile for a scheduler of
    another kind, or one whose file says what it may not.
    """
    import diffusers

    place = folder.place("scheduler", FILE)
    if tuple(named) != ("diffusers", SCHEDULER):
        raise UnreadableFile(
            f"`{folder.place('', 'model_index.json')}` names the scheduler "
            f"{'.'.join(named)[:100]}; that of flow matching must be diffusers.{SCHEDULER}."
        )
    stated = folder.config("scheduler", FLOW_SCHEDULER, FILE)
    config = {k: v for k, v in stated.items() if not k.startswith("_")}
    with read_by_library(place):
        scheduler = getattr(diffusers, SCHEDULER).from_config(config)
        mu = 1.0 if scheduler.config.use_dynamic_shifting else None
        scheduler.set_timesteps(2, mu=mu)  # what it cannot do shows here, not after an hour
        return type(scheduler).from_config(scheduler.config)
