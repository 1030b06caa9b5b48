"""Inject, eject, merge: the only code that edits a module tree."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dreamtune.adapters import Adapter, find_method, resolve_options
from dreamtune.injection.adapter_file import AdapterFile
from dreamtune.injection.attention import JointProjections, joint_layers, project_jointly
from dreamtune.injection.group import TARGET_MODULES, Group, find_targets
from dreamtune.injection.layer import AdaptedLinear
from dreamtune.injection.streams import beside


def inject(
    unet: nn.Module,
    method: str = "delora",
    *,
    slots: int = 1,
    target_modules: Sequence[str] = TARGET_MODULES,
    seed: int | Sequence[int] = 0,
    **options: Any,
) -> InjectedAdapter:
    """Freezes the model and adapts the projections of its attention modules.

    Args:
        unet: a diffusers UNet, or any module with attention modules that have `to_q`, `to_k`,
            `to_v`.
        method: a name in `METHODS`.
        slots: number of independent adapters; the batch is that many equal blocks, in order, or
            rows that `route` gives to slots. Without gradients several slots need a route.
        target_modules: paths of the layers below each attention module.
        seed: of the adapter's start; one for all slots, or one a slot. A slot starts as it would
            alone.
        options: of the method; unknown ones are a ValueError that names the nearest.
    """
    cls = find_method(method)
    options = resolve_options(cls, options)
    seeds = [seed] * slots if isinstance(seed, int) else list(seed)
    if len(seeds) != slots:
        raise ValueError(f"`seed` must be one number or one a slot, got {len(seeds)} for {slots}")
    targets = find_targets(unet, target_modules)
    dtypes = {layer.weight.dtype for layer in targets.values()}
    if len(dtypes) > 1:
        raise ValueError(f"the layers must be of one dtype, got {sorted(map(str, dtypes))}")
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, layer in targets.items():
        by_shape.setdefault(tuple(layer.weight.shape), []).append(name)
    made = []
    for shape, names in by_shape.items():  # every adapter is made before the model is touched
        like = torch.stack([targets[name].weight.data for name in names])
        generators = [_generator(s, shape) for s in seeds]
        made.append((names, cls(like, slots=slots, generator=generators, **options)))
        del like
    return InjectedAdapter(unet, method, made, tuple(target_modules), targets)


def _generator(seed: int, shape: tuple[int, ...]) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {shape}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class InjectedAdapter:
    """An adapter in a model: its parameters, strength, routing, files, and the way out.

    Attributes:
        model: the adapted model; frozen, its keys unchanged, an adapted layer an `AdaptedLinear`,
            which is a torch `Linear`.
        method, options, slots: as injected, options with defaults filled in.
        groups: the same-shape layers with their parameters.
        scale: strength, linear in the change; a number, or a tensor with one a slot.
        name: a label for the caller.
    """

    # How a file is written; set by the native format, which builds on this module.
    write: ClassVar[Callable[[AdapterFile, str | Path], Path] | None] = None

    def __init__(
        self,
        model: nn.Module,
        method: str,
        made: Sequence[tuple[list[str], Adapter]],
        target_modules: tuple[str, ...],
        layers: Mapping[str, nn.Linear],
    ) -> None:
        self.model, self.method, self.target_modules = model, method, target_modules
        self.options = dict(made[0][1].options)
        self.slots = made[0][1].slots
        self.scale: float | Tensor = 1.0
        self.name = "default"
        self._rows: Tensor | None = None
        self._fresh: tuple[object, ...] | None = None  # what the layers' factors were computed from
        self._originals = dict(layers)
        self._trained = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
        self.groups: list[Group] = []
        for names, adapter in made:
            adapted = {name: AdaptedLinear.of(layers[name]) for name in names}
            joint = joint_layers(model, names, layers)
            parts = [[adapted[name] for name in part] for part in joint]
            self.groups.append(Group(adapter, names, parts))
            for name, layer in adapted.items():
                _replace(model, name, layer)
        self._attentions = project_jointly(model)
        self._hook = model.register_forward_pre_hook(lambda module, args: self._before_forward())
        with torch.no_grad():
            self.refresh()

    # Parameters

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trainable tensors by group and name: `320x320.A`, (L, S, ...)."""
        for group in self.groups:
            for name, parameter in group.adapter.named_parameters():
                if parameter.requires_grad:
                    yield f"{group.key}.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        for _, parameter in self.named_parameters():
            yield parameter

    @property
    def num_parameters(self) -> int:
        """Trainable values of one slot."""
        return sum(p.numel() for p in self.parameters()) // self.slots

    def parameter_groups(
        self, learning_rate: float | None = None, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Groups for a torch optimizer, with the method's own rates and exemptions from decay."""
        cls = find_method(self.method)
        rate = cls.learning_rate if learning_rate is None else learning_rate
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for full, parameter in self.named_parameters():
            name = full.rpartition(".")[2]
            decay = 0.0 if name in cls.no_decay else weight_decay
            key = (cls.own_learning_rates.get(name, rate), decay)
            groups.setdefault(key, []).append(parameter)
        return [
            {"params": params, "lr": lr, "weight_decay": decay}
            for (lr, decay), params in groups.items()
        ]

    # Forward

    def refresh(self) -> None:
        """Computes the factors of every layer, a group at a time.

        Runs before each forward of the model: always while training, else when something changed.
        Call it by hand only where parameters or weights were changed behind autograd's back (a CUDA
        graph's replay, `.data`).
        """
        for group in self.groups:
            group.constants(anew=True)
        self._refresh()

    def _refresh(self) -> None:
        training, self._fresh = self._training(), None
        for group in self.groups:
            group.clear()  # a graph of an earlier step would decide on which stream gradients run
        tasks = [partial(self._factors, group) for group in self.groups]
        made = beside(tasks, self.groups[0].weight.device)
        for group, (up, down) in zip(self.groups, made):
            group.set(up, down, self._rows is not None, training)
        # Factors that carry a graph belong to one step: the next forward computes them again.
        self._fresh = None if training else self._state()

    def _factors(self, group: Group) -> tuple[Tensor | None, Tensor]:
        """The group's (up, down) with strength, routing and the compute dtype applied, (L, ...)."""
        up: Tensor | None
        if group.adapter.low_rank:
            up, down = group.adapter.factors(group.weight, *group.constants())
            down = self._scaled(down)
        else:
            up, base = None, group.weight.unsqueeze(1)
            down = group.adapter.merged(group.weight)
            if isinstance(self.scale, Tensor) or self.scale != 1:
                down = base + self._scaled(down - base)

        def finish(x: Tensor) -> Tensor:
            if self._rows is not None:
                x = x.index_select(1, self._rows.to(x.device))
            elif self.slots == 1:
                x = x.squeeze(1)
            return x.to(group.weight.dtype)

        return None if up is None else finish(up), finish(down)

    def _scaled(self, x: Tensor) -> Tensor:
        if isinstance(self.scale, Tensor):
            return x * self.scale.to(x).reshape(-1, 1, 1)
        return x if self.scale == 1 else x * self.scale

    def _training(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())

    def _state(self) -> tuple[object, ...]:
        scale = self.scale
        strength = (id(scale), scale._version) if isinstance(scale, Tensor) else scale
        versions = tuple(
            p._version for g in self.groups for p in g.adapter.state_dict(keep_vars=True).values()
        )
        return strength, id(self._rows), torch.is_inference_mode_enabled(), versions

    def _before_forward(self) -> None:
        if self.slots > 1 and self._rows is None and not torch.is_grad_enabled():
            # equal blocks would give the half without the prompt to the first slots
            raise ValueError(
                f"an adapter of {self.slots} slots needs `route(rows)`, the slot of each row of the"
                " batch, for a forward without gradients. A pipeline's batch under guidance holds"
                " all rows without the prompt, then all with it: `route(rows.repeat(2))`"
            )
        for group in self.groups:
            first = group.layers[0].weight
            moved = first.data_ptr() != group.weight.data_ptr()
            if moved or first.dtype != group.weight.dtype or first.device != group.weight.device:
                group.restack()
                self._fresh = None
        if self._fresh is None or self._training() or self._fresh != self._state():
            self._refresh()

    def route(self, rows: Tensor | None) -> None:
        """Sets the slot of each batch row, (batch,) long; None: S equal blocks, in order, which
        needs gradients where S > 1.

        A pipeline's batch under guidance has all rows twice: `route(rows.repeat(2))`.
        """
        if rows is not None:
            if rows.dim() != 1 or rows.dtype != torch.long:
                raise ValueError(f"`rows` must be 1-D long, got {rows.dtype} {tuple(rows.shape)}")
            if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self.slots:
                raise ValueError(f"`rows` must be slots 0 to {self.slots - 1}, got {rows.tolist()}")
        self._rows, self._fresh = rows, None

    # Files

    def state_dict(self, slot: int = 0) -> dict[str, Tensor]:
        """`<module path>.<name>` -> tensor of one slot: parameters, and constants to be saved."""
        return {name: tensor.clone() for name, tensor in self._slot_tensors(slot)}

    def _slot_tensors(self, slot: int) -> Iterator[tuple[str, Tensor]]:
        """The same as views: what is written to them is written to the adapter."""
        if not 0 <= slot < self.slots:
            raise ValueError(f"`slot` must be 0 to {self.slots - 1}, got {slot}")
        for group in self.groups:
            for name, tensor in group.adapter.state_dict().items():
                for path, row in zip(group.names, tensor[:, slot]):
                    yield f"{path}.{name}", row

    def load_state_dict(self, state: Mapping[str, Tensor], slot: int = 0) -> None:
        """Copies a slot in. A missing, unexpected or misshapen key: ValueError, nothing changed."""
        own = dict(self._slot_tensors(slot))
        problems = [
            *(f"missing `{k}`" for k in own if k not in state),
            *(f"unexpected `{k}`" for k in state if k not in own),
            *(
                f"`{k}` must be {tuple(own[k].shape)}, got {tuple(state[k].shape)}"
                for k in own
                if k in state and own[k].shape != state[k].shape
            ),
        ]
        if problems:
            shown = "; ".join(problems[:5])
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ValueError(f"state does not fit `{self.method}`: {shown}{more}")
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(state[key])
        self._fresh = None

    def weights(self) -> dict[str, Tensor]:
        """Module path -> frozen weight (out, in) of every adapted layer."""
        return {name: w for group in self.groups for name, w in zip(group.names, group.weight)}

    def file(self, slot: int = 0, metadata: Mapping[str, Any] | None = None) -> AdapterFile:
        """One slot as data. metadata: JSON values to keep, no paths and no user names."""
        weights = self.weights()
        return AdapterFile(
            method=self.method,
            options=self.groups[0].adapter.options_of(slot),
            target_modules=self.target_modules,
            tensors=self.state_dict(slot),
            metadata=dict(metadata or {}),
            shapes={name: (w.shape[0], w.shape[1]) for name, w in weights.items()},
            weights=weights,
        )

    def save(
        self, path: str | Path, slot: int = 0, metadata: Mapping[str, Any] | None = None
    ) -> Path:
        """Writes the native file of one slot: to `path`, or into it as `adapter.safetensors`."""
        write = type(self).write
        assert write is not None, "`dreamtune.inject` brings the format"
        return write(self.file(slot, metadata), path)

    # The way out

    def eject(self) -> None:
        """Takes the adapter out: the model is as it was, the adapter keeps its parameters."""
        self._hook.remove()
        for attn in self._attentions:
            if type(attn.processor) is JointProjections:
                attn.processor = attn.processor.original
        for group in self.groups:
            for name, layer in zip(group.names, group.layers):
                original = self._originals[name]
                original.weight, original.bias = layer.weight, layer.bias
                original.train(layer.training)
                original.weight.data = original.weight.data.clone()  # not a piece of the stack
                _replace(self.model, name, original)
        for parameter in self._trained:
            parameter.requires_grad_(True)

    def merge(self) -> None:
        """Bakes the change, at the present strength, into the weights and takes the adapter out."""
        if self.slots > 1:
            raise ValueError(f"`merge` needs one slot, got {self.slots}")
        with torch.no_grad():
            for group in self.groups:
                merged = group.adapter.merged(group.weight)
                if isinstance(self.scale, Tensor) or self.scale != 1:
                    base = group.weight.unsqueeze(1)
                    merged = base + self._scaled(merged - base)
                group.weight.copy_(merged.squeeze(1))
        self.eject()


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
