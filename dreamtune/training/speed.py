"""What makes a run faster on this device, chosen before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from dreamtune.config import Config
from dreamtune.fast import fuse, graphs, ops
from dreamtune.models.base import Base
from dreamtune.models.quiet import quiet_diffusers
from dreamtune.training.defaults import device_and_dtype
from dreamtune.training.output import say


@dataclass(frozen=True)
class Speed:
    """`captured`: steps and sampling are replays of CUDA graphs; `fused`: the frozen network runs
    through our kernels; `compiled`: its blocks are compiled. `refusals`: option -> why it is not
    used, where it could have been.
    """

    captured: bool
    fused: bool
    compiled: bool
    refusals: dict[str, str]

    def notes(self, device: torch.device) -> Iterator[str]:
        """What a user should know of a GPU that is not made full use of."""
        if device.type == "cuda" and not self.captured:
            yield f"Steps are not captured: {self.refusals.get('capture', '`capture` is off')}."
        if device.type == "cuda" and not self.fused:
            yield f"The network runs unfused: {self.refusals.get('fused', '`fused` is off')}."


def choose_speed(config: Config) -> Speed:
    """Raises ValueError for an option that is "on" where it cannot be."""
    device, _ = device_and_dtype(config)
    against = {
        "capture": graphs.why_not_captured(device, config.gradient_checkpointing),
        "fused": ops.why_not_fused(device, config.gradient_checkpointing),
    }
    return Speed(
        captured=graphs.switched("capture", config.capture, against["capture"]),
        fused=graphs.switched("fused", config.fused, against["fused"]),
        compiled=config.compile,
        refusals={name: reason for name, reason in against.items() if reason is not None},
    )


def not_captured(speed: Speed, why: str, config: Config) -> Speed:
    """What is left of it where steps cannot be recorded; all of it where `why` is "". Raises
    ValueError where that is asked for.
    """
    if not why or not speed.captured:
        return speed
    captured = graphs.switched("capture", config.capture, why)
    return replace(speed, captured=captured, refusals={**speed.refusals, "capture": why})


def speed_up(base: Base, speed: Speed) -> None:
    """The network through fused kernels, its blocks compiled; what is done already stays. On a CPU
    its convolutions are channels-last: a step takes some 12% less.
    """
    if base.device.type == "cpu":
        base.network.to(memory_format=torch.channels_last)
    if speed.fused and not base.fused:
        with quiet_diffusers():
            done = fuse.fuse(base.network)
        base.fused = True
        if not done.modules:
            kind = type(base.network).__name__
            say(f"The network runs unfused: the kernels know no block of a {kind}.")
        elif done.left:
            say(f"{len(done.left)} blocks of the network run unfused, `{done.left[0]}` first.")
    if speed.compiled and not base.compiled:
        if not fuse.compile_blocks(base.network):
            kind = type(base.network).__name__
            raise ValueError(f"`compile` knows no block of a {kind}: leave it out.")
        base.compiled = True
