"""Which layers are adapted, and how the layers of one shape share one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamtune.adapters import Adapter
from dreamtune.injection.layer import AdaptedLinear, Projection, Wide, wide_rank

TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0")


class Group:
    """Same-shape layers: their adapter, and their frozen weights as one tensor.

    Attributes:
        adapter: parameters (L, S, ...).
        names: module paths, in the order of the stack.
        parts: the projections, in the same order.
        weight: (L, out, in); the layers' weights are views of its rows.
    """

    def __init__(
        self, adapter: Adapter, names: list[str], parts: Sequence[Sequence[AdaptedLinear]]
    ) -> None:
        self.adapter, self.names = adapter, names
        self.parts = [Projection(part) for part in parts]
        self.layers = [layer for part in parts for layer in part]
        self.sizes = [len(part) for part in parts]
        self.restack()

    @property
    def key(self) -> str:
        return "x".join(map(str, self.weight.shape[-2:]))

    def restack(self) -> None:
        """Follows a model that was moved or cast: stacks its weights again, moves the adapter.

        Below each weight there is room for the `down` of one slot.
        """
        first = self.layers[0].weight
        self.adapter.to(first.device)
        room = self.room(torch.stack([m.weight.data for m in self.layers]))
        out, width = first.shape
        shape = (len(self.layers), out + room, width)
        self.stack = torch.zeros(shape, dtype=first.dtype, device=first.device)
        # .data: writing below the weights must not count as a change of them
        self.weight = self.stack.data[:, :out]
        for layer, row in zip(self.layers, self.weight):
            row.copy_(layer.weight.data)
            layer.weight.data = row
        self.kept: tuple[Tensor, ...] = ()
        self.kept_of: object = None  # the weights that `kept` was computed from
        self.places: dict[tuple[object, ...], Tensor] = {}
        # kept like the stack, so that a recorded forward finds the factors where they were
        self.ups = self.stack.new_zeros(len(self.layers), room, out)
        self.wides: list[Wide] = []
        for part, weight in zip(self.parts, self.weight.split(self.sizes)):
            part.weight, part.wide = weight, None
        if room:
            places = zip(self.parts, self.stack.split(self.sizes), self.ups.split(self.sizes))
            self.wides = [Wide(wide, part.bias, ups) for part, wide, ups in places]

    def constants(self, anew: bool = False) -> tuple[Tensor, ...]:
        """What the method takes of the frozen weights alone, computed where one of them changed.

        anew: also where no weight shows that it has, as after a write through `.data`. They stay
        where they are in memory, for a recorded step reads them there.
        """
        now = [(w.data_ptr(), 0 if w.is_inference() else w._version) for w in self.weights()]
        if anew or now != self.kept_of:
            with torch.inference_mode(False), torch.no_grad():
                new = self.adapter.constants(self.weight)
                for old, x in zip(self.kept, new):
                    old.copy_(x)
            self.kept, self.kept_of = self.kept or new, now
        return self.kept

    def weights(self) -> list[Tensor]:
        return [layer.weight for layer in self.layers]

    @torch.no_grad()
    def room(self, weight: Tensor) -> int:
        adapter = self.adapter
        if adapter.slots > 1 or not adapter.low_rank or weight.device.type == "meta":
            return 0
        return wide_rank(adapter.factors(weight)[1].shape[-2])

    def clear(self) -> None:
        """Lets go of the factors, and so of the graph that they carry."""
        for part in self.parts:
            part.up = part.wide = None
            part.__dict__.pop("down", None)

    def set(self, up: Tensor | None, down: Tensor, routed: bool, training: bool) -> None:
        """Gives the layers their factors, (L, [K,] out, R) and (L, [K,] R, in)."""
        room = self.ups.shape[1]
        wide = not training and up is not None and down.dim() == 3 and room > 0
        if not wide and not torch.is_grad_enabled():
            up, down = None if up is None else self.placed("up", up), self.placed("down", down)
        downs = down.split(self.sizes)
        ups = [None] * len(downs) if up is None else up.split(self.sizes)
        for part, u, d in zip(self.parts, ups, downs, strict=True):
            part.up, part.down, part.routed, part.wide = u, d, routed, None
        if not wide:
            return
        assert up is not None
        with torch.no_grad():
            below = F.pad(down, (0, 0, 0, room - down.shape[1]))
            self.stack[:, self.weight.shape[1] :] = below
            self.ups[:, : up.shape[-1]] = up.mT
            for part, kept in zip(self.parts, self.wides, strict=True):
                kept.load(part.bias)
                part.wide = kept

    def placed(self, name: str, x: Tensor) -> Tensor:
        """x without a gradient, always in the same place: a recorded forward reads it there."""
        key = (name, x.shape, x.dtype, x.is_inference())
        if key not in self.places:
            self.places[key] = x.detach().clone()
        return self.places[key].copy_(x.detach())


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
