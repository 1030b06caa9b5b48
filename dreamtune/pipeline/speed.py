"""A pipeline's network in fewer kernels, or recorded ones, where the caller asks for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from dreamtune.fast.served import Served, served
from dreamtune.fast.watch import why_not_recorded
from dreamtune.injection.bank import Bank, check_free, owners
from dreamtune.injection.inject import InjectedAdapter
from dreamtune.pipeline.load import network_of

_log = logging.getLogger("dreamtune")


def speed_up(pipe: Any) -> None:
    """The same pictures faster, until `slow_down`, for calls without gradients.

    On a GPU each kind of call (a batch, a size of picture) is recorded as a CUDA graph at its
    second time, with fused kernels where there are some (of UNets, Flux.2 and Z-Image), and
    replayed from then on: the base and any number of adapters, whose strengths and routes are
    values that the recorded work reads. A route or a strength that changes costs no recording. A
    UNet's weights become channels-last. What is recorded takes memory: that of a call, and per row
    of the batch as much as an adapter of the largest rank in use, rounded up to 16, 32, 64, ...

    On a CPU one adapter of `dreamtune.load` can be sped up, in all rows at strength 1: adapted
    weights are stacked, and query, key and value are one product.

    Where somebody else touches the model meanwhile (moves or offloads it, puts a LoRA, a hook or
    another processor into it), it is as it was at the next call, with a warning that says why.

    Args:
        pipe: a diffusers pipeline, or the network itself.

    Raises:
        ValueError: an offloaded, spread or compiled model; on a CPU no adapter, or others than one
        as above; or something is in the model that a joint projection would pass by: other
        processors than `AttnProcessor2_0`, hooks or LoRAs on the projections.
    """
    network = network_of(pipe)
    parameter = next(network.parameters(), None)
    if parameter is not None and parameter.device.type == "cuda":
        _record(network)
        return
    adapters = _adapters(network)
    check_free(network)
    if any(bank.paths for bank in owners(network, Bank)):
        raise ValueError(
            f"the network is on {parameter.device.type if parameter is not None else 'no device'},"
            " where adapters of `dreamtune.load_many` cannot be sped up: move it to a GPU, or bring"
            " one by `dreamtune.load`"
        )
    for adapter in adapters:
        adapter.speed_up()


def speed_up_where_possible(pipe: Any, tell: Callable[[str], None] = _log.warning) -> None:
    """For a pipeline that nobody else has: the same pictures, faster where `speed_up` can; else why
    they are not is told.
    """
    try:
        speed_up(pipe)
    except ValueError as error:
        tell(f"Pictures are drawn as fast as diffusers draws them: {error}")


def slow_down(pipe: Any) -> None:
    """Takes `speed_up` back: plain layers, each weight a tensor of its own. Raises ValueError where
    there is no adapter, and nothing is sped up.
    """
    network = network_of(pipe)
    recorder = served(network)
    if recorder is not None:
        with recorder.bank.lock:
            recorder.release()
            if not InjectedAdapter.of(network):
                recorder.bank.remove_unless_used()
        return
    for adapter in _adapters(network):
        adapter.slow_down()


def _record(network: nn.Module) -> None:
    if why := why_not_recorded(network):
        raise ValueError(f"the network cannot be sped up: {why}")
    bank = Bank.on(network, lambda: InjectedAdapter.of(network))
    with bank.lock:
        recorder = served(network)
        if recorder is not None and recorder.watch.touched() is None:
            return
        if recorder is not None:
            recorder.release()
        for adapter in InjectedAdapter.of(network):
            adapter.slow_down()
        Served(network, bank)


def _adapters(network: nn.Module) -> list[InjectedAdapter]:
    found = InjectedAdapter.of(network)
    shelves = [bank for bank in owners(network, Bank) if bank.paths]
    if not found and not shelves:
        raise ValueError(
            f"there is no adapter in this `{type(network).__name__}`: `dreamtune.load` brings one"
        )
    return found
