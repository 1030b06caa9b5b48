"""Changes in the weights themselves: what a merge writes, and whether it can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dreamtune.injection.group import Group
from dreamtune.injection.layer import AdaptedLayer
from dreamtune.injection.mix import Mix
from dreamtune.injection.places import holders, weight_of


class InModel(Protocol):
    """Of an adapter, what a bank looks at."""

    groups: list[Group]

    @property
    def name(self) -> str: ...

    def check(self) -> None: ...


class Written(NamedTuple):
    """A weight before and after a merge, on the CPU."""

    layer: AdaptedLayer
    path: str
    before: Tensor
    after: Tensor


def changed_weights(
    model: nn.Module, adapters: Sequence[InModel], mix: Mix
) -> list[tuple[str, AdaptedLayer, Tensor]]:
    """(module path, layer, its weight with the changes at their strengths), of all layers. Raises
    ValueError where no weight holds them, one would not be finite or cannot be written, or
    something else stands for the layers.
    """
    if mix.rows is not None:
        raise ValueError("rows of a batch have changes of their own: no weight holds them")
    for adapter in adapters:
        adapter.check()
        changes = [change for group in adapter.groups for change in group.changes]
        used = any(mix.strength(adapter.name, change.path) != 0 for change in changes)
        if used and adapter.groups[0].adapter.asks_for_timestep:
            raise ValueError(
                f"the strength of `{adapter.name}` depends on the timestep here: no weight holds it"
            )
    held, found = holders(model), []
    layers = {p: layer for a in adapters for g in a.groups for p, layer in zip(g.names, g.layers)}
    if mix.shelf is not None and mix.from_shelf():
        layers |= {path: place.layer for path, place in mix.shelf.places.items()}  # type: ignore[misc]
    for path, layer in layers.items():
        weight = writable(path, layer, held)
        new = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for name, change in mix.changes(layer).items():
            if (strength := mix.strength(name, path)) != 0:
                new += strength * change.difference(weight)
        new = new.to(weight.dtype)
        if not torch.isfinite(new).all():
            raise ValueError(f"the merged weight of `{path}` would not be finite")
        found.append((path, layer, new))
    return found


def writable(path: str, layer: nn.Module, held: Mapping[int, list[str]]) -> Tensor:
    """The weight, to be written to. held: see `holders`. Raises ValueError where that would be
    lost, or change another layer.
    """
    weight = weight_of(layer)
    if layer._parameters.get("weight") is None:
        raise ValueError(
            f"the weight of `{path}` is made anew at each forward, and no change stays in it: call"
            " `remove_weight_norm`, `remove_spectral_norm` or `prune.remove` on the layer first"
        )
    if weight.data_ptr() != weight_of(layer).data_ptr() or weight.device.type == "meta":
        raise ValueError(f"the weight of `{path}` is offloaded to where none is written")
    if len(tied := held.get(id(layer.weight), [])) > 1:
        raise ValueError(
            f"{' and '.join(f'`{m}`' for m in tied)} have one weight, which a merge would change"
            " for both: untie them first, `layer.weight = nn.Parameter(layer.weight.clone())`"
        )
    return weight


def write(layer: nn.Module, values: Tensor) -> None:
    """Into the layer's weight, where it is."""
    weight = weight_of(layer)
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        weight.copy_(values)
