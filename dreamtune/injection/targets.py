"""Which layers are adapted, and what others have put around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from dreamtune.injection.layer import AdaptedLinear, has_own_forward

TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0")
AROUND = ("_orig_mod", "base_layer")  # what a compiled module and one of PEFT hold


class Place(NamedTuple):
    """A layer and where it is: `parent`'s child `name` is the layer, or what is around it."""

    layer: nn.Linear
    parent: nn.Module
    name: str
    attention: nn.Module

    def around(self) -> list[nn.Module] | None:
        """What is put around the layer, outermost first; None where it is no longer there."""
        module, found = self.parent._modules.get(self.name), []
        while module is not None and module is not self.layer:
            found.append(module)
            module = _inside(module)
        return None if module is None else found


def _inside(module: nn.Module) -> nn.Module | None:
    """What a wrapper is around."""
    for name in AROUND:
        if name in module._modules:
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


def find_places(
    model: nn.Module, target_modules: Sequence[str] = TARGET_MODULES
) -> dict[str, Place]:
    """Module path -> place, for the named projections of every attention module of the model. The
    paths are those of the model as it would be without wrappers.
    """
    found: dict[str, Place] = {}
    missing = set(target_modules)
    attentions = 0
    for path, module in _attentions(unwrapped(model)):
        attentions += 1
        if fused(module):
            raise ValueError(f"`{path}` is fused: call `unfuse_qkv_projections()` first")
        for target in target_modules:
            above, _, child = target.rpartition(".")
            try:
                parent = module.get_submodule(above)
                layer = innermost(parent.get_submodule(child))
            except AttributeError:
                continue
            name = f"{path}.{target}" if path else target
            found[name] = Place(_adaptable(layer, name), parent, child, module)
            missing.discard(target)
    if missing or not found:
        looked = ", ".join(f"`{name}`" for name in target_modules if name in missing) or "nothing"
        raise ValueError(
            f"no {looked} found in the {attentions} attention modules (those with `to_q`, `to_k`"
            f" and `to_v`) of `{type(unwrapped(model)).__name__}`"
        )
    return found


def _attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if "_orig_mod" in module._modules:  # answers for the one in it
            continue
        if all(hasattr(module, name) for name in ("to_q", "to_k", "to_v")):
            yield ".".join(part for part in path.split(".") if part != "_orig_mod"), module


def _adaptable(layer: nn.Module, name: str) -> nn.Linear:
    if type(layer) is AdaptedLinear:
        raise ValueError(f"`{name}` is adapted already: call `eject()` or `merge()` first")
    if type(layer) is not nn.Linear:
        raise ValueError(f"`{name}` must be a torch `Linear`, got `{type(layer).__name__}`")
    if has_own_forward(layer):
        raise ValueError(
            f"`{name}` has a forward of its own, which would not see the change: load the adapter"
            " first, and then what hooks into the layers"
        )
    return layer


def find_targets(
    model: nn.Module, target_modules: Sequence[str] = TARGET_MODULES
) -> dict[str, nn.Linear]:
    """Module path -> layer, for the named projections of every attention module of the model."""
    return {name: place.layer for name, place in find_places(model, target_modules).items()}


def layer_at(model: nn.Module, path: str) -> nn.Module:
    """The layer of that path, inside whatever is around it and the modules above. AttributeError
    where there is none.
    """
    module = unwrapped(model)
    for part in path.split("."):
        module = innermost(module.get_submodule(part))
    return module


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
