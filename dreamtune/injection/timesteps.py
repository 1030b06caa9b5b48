"""The timestep of each row of a forward: of 1000, the noisiest last, whatever a network is told."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def _of_one(t: Tensor) -> Tensor:
    return t * 1000


# Of transformers, by what their pipelines tell them. UNets are told the timestep itself.
KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "SD3Transformer2DModel": lambda t: t,
    "ChromaTransformer2DModel": _of_one,
    "FluxTransformer2DModel": _of_one,
    "Flux2Transformer2DModel": _of_one,
    "QwenImageTransformer2DModel": _of_one,
    "Krea2Transformer2DModel": _of_one,
    "ZImageTransformer2DModel": lambda t: 1000 - t * 1000,
}


def timesteps(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], method: str
) -> Tensor:
    """(rows,), of a call of the model. Raises ValueError for a network whose timestep is not known.

    method: what asks, for the message.
    """
    kind = type(model).__name__
    names = ["sample", "timestep"]
    if kind in KNOWN:
        names = list(inspect.signature(type(model).forward).parameters)[1:]
    given = {**dict(zip(names, args)), **kwargs}
    rows, t = given.get(names[0]), given.get("timestep", given.get("t"))
    if not isinstance(rows, Tensor | list) or not len(rows) or t is None:
        raise ValueError(
            f"the strength of `{method}` depends on the timestep here, and `{kind}` was called"
            " without `sample` and `timestep`"
        )
    t = torch.as_tensor(t, device=rows[0].device).reshape(-1).expand(len(rows))
    return KNOWN[kind](t) if kind in KNOWN else t
