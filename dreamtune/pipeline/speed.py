"""Adapters of a pipeline in fewer kernels, where the caller asks for it."""

from __future__ import annotations

from typing import Any

from dreamtune.injection.inject import InjectedAdapter
from dreamtune.pipeline.load import network_of


def speed_up(pipe: Any) -> None:
    """Stacks the adapted weights, projects query, key and value in one product, and keeps adapter
    and base in one where there are no gradients: the same pictures in fewer kernels.

    The layers' weights become pieces of larger tensors until `slow_down`. Where somebody else
    touches the model meanwhile (moves or offloads it, puts a LoRA, a hook or another processor into
    it), the layers are plain again at the next call, with a warning that says why.

    Args:
        pipe: a diffusers pipeline with a UNet, or a UNet, with an adapter of `dreamtune.load` or
            `dreamtune.inject`.

    Raises:
        ValueError: no adapter in it; or something is in it that a joint projection would pass by:
        other processors than `AttnProcessor2_0`, hooks or LoRAs on the projections, an offload.
    """
    for adapter in _adapters(pipe):
        adapter.speed_up()


def slow_down(pipe: Any) -> None:
    """Takes `speed_up` back: plain layers, each weight a tensor of its own. Raises ValueError where
    there is no adapter.
    """
    for adapter in _adapters(pipe):
        adapter.slow_down()


def _adapters(pipe: Any) -> list[InjectedAdapter]:
    network = network_of(pipe)
    found = InjectedAdapter.of(network)
    if not found:
        raise ValueError(
            f"there is no adapter in this `{type(network).__name__}`: `dreamtune.load` brings one"
        )
    return found
