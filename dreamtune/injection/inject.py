"""The way in: an adapter for the projections of a model's attention modules."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dreamtune.adapters import find_method, resolve_options
from dreamtune.injection.injected import InjectedAdapter as InjectedAdapter
from dreamtune.injection.targets import TARGET_MODULES, find_places, unwrapped, weight_of


def inject(
    unet: nn.Module,
    method: str = "delora",
    *,
    slots: int = 1,
    target_modules: Sequence[str] = TARGET_MODULES,
    seed: int | Sequence[int] = 0,
    _fast: bool = False,
    **options: Any,
) -> InjectedAdapter:
    """Freezes the model and adapts the projections of its attention modules.

    The layers stay what and where they are, and add the change: whatever torch, accelerate,
    diffusers and PEFT do to the model, before or after, they follow, or a ValueError says what
    cannot be.

    Args:
        unet: a diffusers UNet, or any module with attention modules that have `to_q`, `to_k`,
            `to_v`. A compiled or otherwise wrapped one stands for the model in it.
        method: a name in `METHODS`.
        slots: number of independent adapters; the batch is that many equal blocks, in order, or
            rows that `route` gives to slots. Without gradients several slots need a route.
        target_modules: paths of the layers below each attention module.
        seed: of the adapter's start; one for all slots, or one a slot. A slot starts as it would
            alone.
        options: of the method; unknown ones are a ValueError that names the nearest.
    """
    # _fast: for who owns the model, the trainer: weights restacked, projections joint, and nobody
    # else to follow.
    cls = find_method(method)
    options = resolve_options(cls, options)
    seeds = [seed] * slots if isinstance(seed, int) else list(seed)
    if len(seeds) != slots:
        raise ValueError(f"`seed` must be one number or one a slot, got {len(seeds)} for {slots}")
    model = unwrapped(unet)
    places = find_places(model, target_modules)
    weights = {name: weight_of(place.layer) for name, place in places.items()}
    dtypes = {weight.dtype for weight in weights.values()}
    if len(dtypes) > 1:
        raise ValueError(f"the layers must be of one dtype, got {sorted(map(str, dtypes))}")
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, weight in weights.items():
        by_shape.setdefault(tuple(weight.shape), []).append(name)
    made = []
    for shape, names in by_shape.items():  # every adapter is made before the model is touched
        like = torch.stack([weights[name] for name in names])
        generators = [_generator(s, shape) for s in seeds]
        adapter = cls(like, slots=slots, generator=generators, **options)
        made.append(({name: places[name] for name in names}, adapter))
        del like
    return InjectedAdapter(model, method, made, tuple(target_modules), _fast)


def _generator(seed: int, shape: tuple[int, ...]) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {shape}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
