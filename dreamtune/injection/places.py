"""The layers of a model and where they are, whatever others have put around them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor, nn

from dreamtune.adapters.in_parts import Parts
from dreamtune.injection.layer import KINDS, Adapted, has_own_forward
from dreamtune.injection.parts import parts_of

# What a compiled module and a layer of PEFT hold, and what tells these from others' children.
AROUND = {"_orig_mod": "dynamo_ctx", "base_layer": "get_base_layer"}
PROJECTIONS = ("to_q", "to_k", "to_v")  # of what counts as an attention module


class Place(NamedTuple):
    """A layer and where it is: `parent`'s child `name` is the layer, or what is around it.

    attention: of diffusers, that the layer is in; None for none. parts: see `parts_of`.
    """

    layer: nn.Linear | nn.Conv2d
    parent: nn.Module
    name: str
    attention: nn.Module | None
    parts: Parts = {}

    def around(self) -> list[nn.Module] | None:
        """What is put around the layer, outermost first; None where it is no longer there."""
        module, found = self.parent._modules.get(self.name), []
        while module is not None and module is not self.layer:
            found.append(module)
            module = _inside(module)
        return None if module is None else found


class Spot(NamedTuple):
    """A module of a model. path: as it would be without wrappers; order: in the walk; attention:
    the spot of the nearest one above.
    """

    path: str
    module: nn.Module
    parent: nn.Module
    name: str
    order: int
    attention: Spot | None

    def place(self) -> Place:
        """Raises ValueError for a layer that cannot be adapted."""
        attention = None if self.attention is None else self.attention.module
        if self.attention is not None and fused(attention):
            where = self.attention.path
            raise ValueError(f"`{where}` is fused: call `unfuse_qkv_projections()` first")
        layer = _adaptable(self)
        return Place(layer, self.parent, self.name, attention, parts_of(self.parent, self.name))


def check_in_place(places: Mapping[str, Place], attentions: Iterable[nn.Module]) -> None:
    """Raises ValueError where the model no longer calls the adapted layers."""
    if any(map(fused, attentions)):
        raise ValueError(
            "`fuse_qkv_projections()` put layers of the base in place of the adapted ones:"
            " call `unfuse_qkv_projections()`; to fuse with the adapter, `merge()` it first"
        )
    for name, place in places.items():
        if place.parent._modules.get(place.name) is not place.layer and place.around() is None:
            raise ValueError(
                f"`{name}` was replaced: the adapter is no longer in the model there. Call"
                " `eject()`, and load it again on the model as it is now"
            )


def attentions_of(places: Iterable[Place]) -> list[nn.Module]:
    """Each once."""
    return list({id(p.attention): p.attention for p in places if p.attention is not None}.values())


_WALKED: ContextVar[dict[nn.Module, list[Spot]] | None] = ContextVar("_WALKED", default=None)


@contextmanager
def unchanged(model: nn.Module, spots: list[Spot] | None = None) -> Iterator[list[Spot]]:
    """Inside, nobody puts modules into the model or takes them out: it is walked once. spots: of an
    earlier walk, which is as good where nothing has changed since. Gives those of this one.
    """
    if spots is None or not _still(model, spots):
        spots = _walk(model)
    token = _WALKED.set({model: spots})
    try:
        yield spots
    finally:
        _WALKED.reset(token)


def _still(model: nn.Module, spots: list[Spot]) -> bool:
    """Whether a walk would find the same."""
    counts = {model: 0}
    for spot in spots:
        child = spot.parent._modules.get(spot.name)
        if child is None or (child is not spot.module and innermost(child) is not spot.module):
            return False
        counts[spot.parent] = counts.get(spot.parent, 0) + 1
        counts.setdefault(spot.module, 0)
    own = {m: sum(c is not None for c in m._modules.values()) for m in counts}
    return own == counts


def walk(model: nn.Module) -> list[Spot]:
    """The modules below a model, each once, in its order."""
    walked = _WALKED.get() or {}
    return walked[model] if model in walked else _walk(model)


def _walk(model: nn.Module) -> list[Spot]:
    found: list[Spot] = []
    seen = {id(model)}

    def below(parent: nn.Module, path: str, attention: Spot | None) -> None:
        for name, child in parent._modules.items():
            module = None if child is None else innermost(child)
            if module is None or id(module) in seen:
                continue
            seen.add(id(module))
            spot = Spot(path + name, module, parent, name, len(found) + 1, attention)
            found.append(spot)
            below(module, f"{spot.path}.", spot if _attends(module) else attention)

    top = Spot("", model, model, "", 0, None)
    below(model, "", top if _attends(model) else None)
    return found


def _attends(module: nn.Module) -> bool:
    own = module._modules  # asking a module for what it lacks takes it ten times as long
    return PROJECTIONS[0] in own and all(hasattr(module, name) for name in PROJECTIONS)


def _inside(module: nn.Module) -> nn.Module | None:
    """What a wrapper is around."""
    for name, sign in AROUND.items():
        if name in module._modules and hasattr(module, sign):
            return module._modules[name]
    return None


def innermost(module: nn.Module) -> nn.Module:
    """The layer that compiled modules and layers of PEFT are around."""
    while (inside := _inside(module)) is not None:
        module = inside
    return module


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself where it was given compiled, in parallel, or as an average."""
    while True:
        if "_orig_mod" in model._modules:
            name = "_orig_mod"
        elif list(model._modules) == ["module"]:
            name = "module"
        else:
            return model
        inside = model._modules[name]
        assert inside is not None
        model = inside


def fused(attention: Any) -> bool:
    """Whether it computes with a projection in place of those that it has."""
    if not getattr(attention, "fused_projections", False):
        return False
    # diffusers' older attentions keep the mark, and go by the processor
    processor = type(getattr(attention, "processor", None)).__name__
    return hasattr(attention, "unfuse_projections") or "Fused" in processor


def fused_adapters(place: Place) -> list[str]:
    """Names of the adapters that PEFT has written into the layer's weight."""
    return [name for m in place.around() or () for name in getattr(m, "merged_adapters", ())]


def adaptable(module: nn.Module) -> bool:
    """Whether it is a layer of a kind that is adapted, or is one already."""
    return isinstance(module, tuple(KINDS))


def _adaptable(spot: Spot) -> nn.Linear | nn.Conv2d:
    layer, name = spot.module, spot.path
    if type(layer) not in KINDS and not isinstance(layer, Adapted):
        raise ValueError(
            f"`{name}` must be a torch `Linear` or `Conv2d`, got `{type(layer).__name__}`"
        )
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        raise ValueError(f"`{name}` is a `Conv2d` of {layer.groups} groups: only 1 is supported")
    kind, dtype = type(layer.weight.data), layer.weight.dtype
    if kind is not Tensor or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(
            f"the weight of `{name}` is a `{kind.__name__}` of {dtype}: quantized and sharded ones"
            " are not supported"
        )
    if has_own_forward(layer):
        raise ValueError(
            f"`{name}` has a forward of its own, which would not see the change: load the adapter"
            " first, and then what hooks into the layers"
        )
    if isinstance(spot.parent, nn.TransformerEncoderLayer) and _passed_by():
        raise ValueError(
            f"`{name}` is of torch's `TransformerEncoderLayer`, whose fast path takes its weights"
            " past the layers: call `torch.backends.mha.set_fastpath_enabled(False)` first"
        )
    return layer


def _passed_by() -> bool:
    import torch.backends.mha

    return bool(torch.backends.mha.get_fastpath_enabled())


def layer_at(model: nn.Module, path: str) -> nn.Module:
    """The layer of that path, inside whatever is around it and the modules above. AttributeError
    where there is none.
    """
    module = unwrapped(model)
    for part in path.split("."):
        module = innermost(module.get_submodule(part))
    return module


def holders(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter -> the modules that hold it; several where it is tied."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                found.setdefault(id(parameter), []).append(name)
    return found


def weight_of(layer: nn.Module) -> Tensor:
    """A layer's weight, also where accelerate's offload keeps it elsewhere between forwards."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if weight.device.type != "meta":
        return weight.detach()
    hook = getattr(layer, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        kept = getattr(each, "weights_map", None)
        if kept is not None:
            found: Tensor = kept["weight"]
            return found.detach()
    return weight.detach()


PARTED = ("Krea2Transformer2DModel",)  # its `layerwise_blocks` have a row for each token


def is_parted(model: nn.Module) -> bool:
    """Whether it has layers with several rows for each of its batch, one after the other."""
    return type(unwrapped(model)).__name__ in PARTED
