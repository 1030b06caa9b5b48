"""An adapter as plain factors for one base: computed once, in one piece of memory, and no more.

Where many adapters are kept, few are in use, and none is trained.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dreamtune.adapters import Adapter, find_method, resolve_options
from dreamtune.adapters.in_parts import make
from dreamtune.injection.adapter_file import AdapterFile
from dreamtune.injection.change import Factors, Use, constant, factors_of

_NUMBERS = itertools.count()
ALIGN = 8  # values: where a piece begins


class Block(NamedTuple):
    """The layers of one shape and set of options. factors: (L, ...)."""

    paths: tuple[str, ...]
    factors: Factors


class Plain:
    """The factors of all layers.

    Attributes:
        number: tells it from every other.
        flat: all of them, 1-D.
        blocks: views of it.
        of: module path -> the factors of that layer, views too.
    """

    def __init__(self, flat: Tensor, shapes: Sequence[tuple[tuple[str, ...], Shapes]]) -> None:
        self.number = next(_NUMBERS)
        self.flat, self.shapes = flat, shapes
        self.blocks: list[Block] = []
        start = 0
        for paths, of_block in shapes:
            found: list[Tensor | None] = []
            for shape in of_block:
                size = 0 if shape is None else shape.numel()
                found.append(None if shape is None else flat[start : start + size].view(shape))
                start += _aligned(size)
            self.blocks.append(Block(paths, Factors(*found)))
        self.of = {
            path: own
            for paths, factors in self.blocks
            for path, own in zip(paths, factors.unbind(), strict=True)
        }

    @staticmethod
    def packed(blocks: Sequence[Block]) -> Plain:
        some = next(x for block in blocks for x in block.factors if x is not None)
        parts = [x for block in blocks for x in block.factors if x is not None]
        flat = some.new_zeros(sum(_aligned(x.numel()) for x in parts))
        shapes = [
            (paths, tuple(None if x is None else x.shape for x in factors))
            for paths, factors in blocks
        ]
        found = Plain(flat, shapes)
        for block, source in zip(found.blocks, blocks):
            for place, x in zip(block.factors, source.factors):
                if place is not None and x is not None:
                    place.copy_(x)
        return found

    def to(self, device: torch.device) -> Plain:
        """Itself where it is there."""
        if self.flat.device == device:
            return self
        with constant():
            return Plain(self.flat.to(device), self.shapes)

    def pinned(self) -> Plain:
        """Where a GPU fetches it fastest."""
        return Plain(self.flat.pin_memory(), self.shapes)

    @property
    def nbytes(self) -> int:
        return self.flat.nbytes


Layer = nn.Linear | nn.Conv2d
Shapes = tuple[torch.Size | None, ...]


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def plain_factors(file: AdapterFile, layers: Mapping[str, Layer]) -> Plain:
    """What an adapter's file comes to on these layers, at strength 1, in the dtype of their
    weights, on the CPU. layers: module path -> layer, of all that it changes.

    Raises ValueError for tensors that do not fit, and for a strength that depends on the timestep.
    """
    cls = find_method(file.method)
    common = resolve_options(cls, file.options)
    alike: dict[tuple[tuple[int, ...], str], list[str]] = {}
    for path, layer in layers.items():
        own = file.parts.get(path, {}), sorted(file.layer_options.get(path, {}).items())
        alike.setdefault((tuple(layer.weight.shape), repr(own)), []).append(path)
    by_path: dict[str, dict[str, Tensor]] = {path: {} for path in layers}
    for key, tensor in file.tensors.items():
        path, _, name = key.rpartition(".")
        while path not in by_path and "." in path:
            path, name = path.rpartition(".")[0], f"{path.rpartition('.')[2]}.{name}"
        by_path.setdefault(path, {})[name] = tensor
    if unknown := by_path.keys() - layers.keys():
        raise ValueError(f"tensors of `{min(unknown)}`, which is none of the layers")
    blocks = []
    for paths in alike.values():
        options = {**common, **file.layer_options.get(paths[0], {})}
        made = partial(make, cls, parts=file.parts.get(paths[0], {}), **options)
        weights = [layers[path].weight for path in paths]
        with constant():
            adapter, weight = _filled(made, cls, weights, [by_path[p] for p in paths], paths[0])
            if adapter.asks_for_timestep:
                raise ValueError(
                    "its strength depends on the timestep, which plain factors cannot hold: load"
                    " it by `dreamtune.load`"
                )
            factors = factors_of(adapter, weight, Use(1))
        found = Factors(*(None if x is None else x.cpu() for x in factors))
        blocks.append(Block(tuple(paths), found))
    packed = Plain.packed(blocks)
    total = packed.flat.sum(dtype=torch.promote_types(packed.flat.dtype, torch.float32))
    if not math.isfinite(total) and not torch.isfinite(packed.flat).all():
        raise ValueError(f"its factors are not finite in {packed.flat.dtype}")
    return packed


def _filled(
    made: Callable[[Tensor], Adapter],
    cls: type[Adapter],
    weights: Sequence[Tensor],
    tensors: Sequence[Mapping[str, Tensor]],
    path: str,
) -> tuple[Adapter, Tensor]:
    """The method's adapter with the tensors of these layers, and their weights (L, out, in)."""
    if cls.depends_on_weight or not cls.low_rank:
        weight = torch.stack([w.detach().flatten(1) for w in weights])
    else:  # of which shape and dtype are all that is looked at: the device has no part in it
        shape = len(weights), *weights[0].flatten(1).shape
        weight = torch.empty((), dtype=weights[0].dtype).expand(shape)
    # no start is drawn that the tensors would replace
    adapter = made(weight.to("meta"))
    if any(x.device.type == "meta" for x in _unsaved(adapter)):
        adapter = made(weight)
    expected = {name: tuple(x.shape[2:]) for name, x in adapter.state_dict().items()}
    for own in tensors:
        got = {name: tuple(x.shape) for name, x in own.items()}
        if got != expected:
            raise ValueError(f"`{path}`: `{cls.name}` has tensors {expected}, got {got}")
    state = {
        name: torch.stack([own[name] for own in tensors]).unsqueeze(1).to(weight.device)
        for name in expected
    }
    adapter.load_state_dict(state, assign=True)
    return adapter.requires_grad_(False), weight


def _unsaved(adapter: nn.Module) -> list[Tensor]:
    saved = {id(x) for x in adapter.state_dict(keep_vars=True).values()}
    return [x for x in adapter.buffers() if id(x) not in saved]
