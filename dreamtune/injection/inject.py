"""The way in: an adapter for layers of a model."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dreamtune.adapters import Adapter, find_method, resolve_options
from dreamtune.adapters.in_parts import make
from dreamtune.injection.group import Made
from dreamtune.injection.injected import InjectedAdapter as InjectedAdapter
from dreamtune.injection.injected import check_name
from dreamtune.injection.layer import Adapted
from dreamtune.injection.targets import (
    TARGET_MODULES,
    Choice,
    Targets,
    choose,
    entries_of,
    options_at,
    unwrapped,
    weight_of,
)


def inject(
    model: nn.Module,
    method: str = "delora",
    *,
    slots: int = 1,
    target_modules: Targets = TARGET_MODULES,
    seed: int | Sequence[int] = 0,
    _fast: bool = False,
    **options: Any,
) -> InjectedAdapter:
    """Freezes the model and adapts layers of it: torch's own `Linear`, and `Conv2d` of one group.
    A layer that is known to be several in one weight (`injection.parts`) is adapted part by part.

    The layers stay what and where they are, and add the change: whatever torch, accelerate,
    diffusers and PEFT do to the model, before or after, they follow, or a ValueError says what
    cannot be.

    Args:
        model: any module. A compiled or otherwise wrapped one stands for the model in it.
        method: a name in `METHODS`. It sees a convolution's weight as (out, in * kh * kw).
        slots: number of independent adapters; the batch is that many equal blocks, in order, or
            rows that `route` gives to slots. Without gradients several slots need a route.
        target_modules: which layers, by their module paths; by default the attention projections of
            a diffusers model. An entry is a name, the whole path or its end after a dot ("query",
            "to_out.0"); a glob of the whole path, where it has `*`, `?` or `[` ("*.attn1.*"); or an
            expression that matches the whole path, after `re:`. One entry, several, or a mapping
            entry -> options of the method for its layers, in place of `options`: the first entry
            that matches a layer decides. Of what a glob or an expression matches, layers of other
            kinds are passed over.
        seed: of the adapter's start; one for all slots, or one a slot. A slot starts as it would
            alone.
        options: of the method; unknown ones are a ValueError that names the nearest.

    Raises:
        ValueError: an entry that matches no layer, with what there is; a layer of another kind that
        is named; options that do not fit a layer.
    """
    # _fast: for who owns the model, the trainer: weights restacked, projections joint, and nobody
    # else to follow.
    find_method(method)
    model = unwrapped(model)
    entries = entries_of(target_modules)
    common = resolve_options(find_method(method), options)  # before the layers are looked for
    return adapt(
        model,
        method,
        choose(model, entries),
        tuple(entries),
        common,
        slots=slots,
        seed=seed,
        fast=_fast,
    )


def adapt(
    model: nn.Module,
    method: str,
    chosen: Mapping[str, Choice],
    target_modules: tuple[str, ...],
    options: Mapping[str, Any],
    *,
    slots: int = 1,
    seed: int | Sequence[int] = 0,
    fast: bool = False,
    beside: str | None = None,
) -> InjectedAdapter:
    """`inject` for layers that are chosen. target_modules: what chose them, for the file. beside:
    name of an adapter that may be added to others in the layers.
    """
    cls = find_method(method)
    if beside is not None:
        check_name(model, beside)
    elif taken := [n for n, choice in chosen.items() if isinstance(choice.place.layer, Adapted)]:
        raise ValueError(f"`{taken[0]}` is adapted already: call `eject()` or `merge()` first")
    seeds = [seed] * slots if isinstance(seed, int) else list(seed)
    if len(seeds) != slots:
        raise ValueError(f"`seed` must be one number or one a slot, got {len(seeds)} for {slots}")
    weights = {name: weight_of(choice.place.layer) for name, choice in chosen.items()}
    dtypes = {weight.dtype for weight in weights.values()}
    if len(dtypes) > 1:
        raise ValueError(f"the layers must be of one dtype, got {sorted(map(str, dtypes))}")
    common = resolve_options(cls, options)
    alike: dict[tuple[tuple[int, ...], tuple[tuple[str, int], ...], str], list[str]] = {}
    suffixes: dict[str, Mapping[str, Any]] = {}
    for name, choice in chosen.items():
        own = choice.options
        full = options_at(cls, common, choice.entry, own) if own else common
        differ = ",".join(f"{k}={v}" for k, v in sorted(full.items()) if v != common[k])
        suffix = f":{differ}" if differ else ""
        suffixes[suffix] = full
        key = tuple(weights[name].shape), tuple(choice.parts.items()), suffix
        alike.setdefault(key, []).append(name)
    made = []
    for (shape, parts, suffix), names in alike.items():  # all are made before the model is touched
        device = weights[names[0]].device
        like = torch.stack([weights[name].flatten(1).to(device) for name in names])
        told = f"{shape}{dict(parts) if parts else ''}{suffix}"
        generators = [_generator(s, told) for s in seeds]
        first = chosen[names[0]]
        adapter = _made(cls, like, first, slots, generators, suffixes[suffix], names[0])
        places = {name: chosen[name].place for name in names}
        made.append(Made(places, adapter, suffix, first.parts))
        del like
    _one_strength(made, chosen)
    if beside is not None:
        plainly(model)
    name = beside or "default"
    return InjectedAdapter(model, method, made, target_modules, common, fast, name)


def plainly(model: nn.Module) -> None:
    """Slows down what is sped up in the model, and says so: the fast way is for one adapter that is
    in all rows as it is.
    """
    for adapter in InjectedAdapter.of(model):
        if adapter.is_fast:
            warnings.warn(
                f"dreamtune: `{adapter.name}` is slowed down, for the fast way has one adapter, in"
                " all rows at one strength",
                stacklevel=3,
            )
            adapter.slow_down()


def _made(
    cls: type[Adapter],
    like: Tensor,
    choice: Choice,
    slots: int,
    generators: Sequence[torch.Generator],
    options: Mapping[str, Any],
    name: str,
) -> Adapter:
    """For the layers like that one. Raises ValueError that names it where its shape does not fit
    the options.
    """
    try:
        return make(cls, like, choice.parts, slots=slots, generator=generators, **options)
    except ValueError as error:
        size = "x".join(map(str, like.shape[1:]))
        raise ValueError(f"`{name}` ({size}), chosen by `{choice.entry}`: {error}") from None


def _one_strength(made: Sequence[Made], chosen: Mapping[str, Choice]) -> None:
    """Raises ValueError where the strength falls otherwise in some layers: a forward has one."""
    times = torch.linspace(0, 999, 4)
    first = made[0].adapter.strength_at(times)
    for part in made[1:]:
        if not torch.equal(part.adapter.strength_at(times), first):
            name = next(iter(part.places))
            raise ValueError(
                f"`target_modules`, `{chosen[name].entry}`: the strength must depend on the"
                f" timestep alike in all layers, in `{name}` it is another"
            )


def _generator(seed: int, kind: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {kind}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
