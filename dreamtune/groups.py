"""Which layers are adapted, and how the layers of one shape share one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dreamtune.adapters import Adapter
from dreamtune.layer import AdaptedLinear

TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass
class Group:
    """Same-shape layers: their adapter, and their frozen weights as one tensor."""

    adapter: Adapter
    names: list[str]  # module paths, in the order of the stack
    layers: list[AdaptedLinear]
    weight: Tensor  # (L, out, in); the layers' weights are views of its rows

    @property
    def key(self) -> str:
        return "x".join(map(str, self.weight.shape[-2:]))

    def restack(self) -> None:
        """Follows a model that was moved or cast: stacks its weights again, moves the adapter."""
        self.weight = stack_weights(self.layers)
        self.adapter.to(self.weight.device)


def stack_weights(layers: Sequence[nn.Linear]) -> Tensor:
    """One tensor (L, out, in) of the layers' weights, which become views of its rows."""
    if len(layers) == 1:
        return layers[0].weight.data.unsqueeze(0)
    stacked = torch.stack([layer.weight.data for layer in layers])
    for layer, row in zip(layers, stacked):
        layer.weight.data = row
    return stacked


def find_targets(
    model: nn.Module, target_modules: Sequence[str] = TARGET_MODULES
) -> dict[str, nn.Linear]:
    """Module path -> layer, for the named projections of every attention module of the model."""
    found: dict[str, nn.Linear] = {}
    missing = set(target_modules)
    attentions = 0
    for path, module in model.named_modules():
        if not all(hasattr(module, name) for name in ("to_q", "to_k", "to_v")):
            continue
        attentions += 1
        if getattr(module, "fused_projections", False):
            raise ValueError(f"`{path}` is fused: call `unfuse_qkv_projections()` first")
        for target in target_modules:
            try:
                layer = module.get_submodule(target)
            except AttributeError:
                continue
            name = f"{path}.{target}" if path else target
            if type(layer) is AdaptedLinear:
                raise ValueError(f"`{name}` is adapted already: call `eject()` or `merge()` first")
            if hasattr(layer, "base_layer"):
                raise ValueError(f"`{name}` carries a PEFT adapter: unload or fuse it first")
            if type(layer) is not nn.Linear:
                raise ValueError(f"`{name}` must be a torch `Linear`, got `{type(layer).__name__}`")
            missing.discard(target)
            found[name] = layer
    if missing or not found:
        looked = ", ".join(f"`{name}`" for name in target_modules if name in missing) or "nothing"
        raise ValueError(
            f"no {looked} found in the {attentions} attention modules (those with `to_q`, `to_k`"
            f" and `to_v`) of `{type(model).__name__}`"
        )
    return found
