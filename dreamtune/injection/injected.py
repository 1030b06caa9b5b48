"""An adapter in a model: its parameters, strength, routing, files, and the way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dreamtune.adapters import find_method
from dreamtune.adapters.in_parts import Parts
from dreamtune.injection.adapter_file import AdapterFile
from dreamtune.injection.bank import Bank, check_free, owners
from dreamtune.injection.change import Use
from dreamtune.injection.follow import Following
from dreamtune.injection.group import Group, Made
from dreamtune.injection.layer import AdaptedLayer
from dreamtune.injection.mix import Mix
from dreamtune.injection.places import is_parted
from dreamtune.injection.weights import changed_weights, write


class InjectedAdapter:
    """An adapter in a model: its parameters, strength, routing, files, and the way out.

    A copy of the model, by `deepcopy` or pickle, has a copy of the adapter in it: `of(copy)`.

    Attributes:
        model: the adapted model; frozen, its keys unchanged, an adapted layer an `AdaptedLinear` or
            `AdaptedConv2d`, which is a torch `Linear` or `Conv2d`.
        method, options, slots: as injected, options with defaults filled in.
        target_modules: the entries that chose the layers.
        groups: the layers of one shape, and of one set of options, with their parameters.
    """

    # How a file is written; set by the native format, which builds on this module.
    write: ClassVar[Callable[[AdapterFile, str | Path], Path] | None] = None

    def __init__(
        self,
        model: nn.Module,
        method: str,
        made: Sequence[Made],
        target_modules: tuple[str, ...],
        options: Mapping[str, Any],
        fast: bool = False,
        name: str = "default",
    ) -> None:
        self.model, self.method, self.target_modules = model, method, target_modules
        common = (part.adapter.options for part in made if not part.suffix)
        self.options = dict(next(common, options))
        self.slots = made[0].adapter.slots
        self._name = name
        self._use = Use(self.slots, parted=is_parted(model))
        self._out: str | None = None  # how it left the model
        self._trained = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
        self.groups = [Group(part, self._use) for part in made]
        for group in self.groups:
            for layer, change in zip(group.layers, group.changes):
                layer.changes[self.name] = change
        places = {name: place for part in made for name, place in part.places.items()}
        self._following = Following(model, self.groups, places, self._use)
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, prepend=True),
        ]
        if fast:
            self._following.stack(watched=False)
        for bank in owners(model, Bank):
            bank.share([self])

    @staticmethod
    def of(model: nn.Module) -> list[InjectedAdapter]:
        """The adapters in a model, in the order that they were put there."""
        return owners(model, InjectedAdapter)

    @property
    def name(self) -> str:
        """A label for the caller, and of the changes in the layers."""
        return self._name

    @name.setter
    def name(self, value: str) -> None:
        if self._out is None and value != self._name:
            check_name(self.model, value)
        for layer in self._inside():
            layer.changes[value] = layer.changes.pop(self._name)
        if self._out is None:
            for bank in owners(self.model, Bank):
                bank.rename(self._name, value)
        self._name = value

    def _inside(self) -> list[AdaptedLayer]:
        """The layers, for as long as the adapter is in them."""
        return [layer for group in self.groups for layer in group.layers if self._out is None]

    @property
    def scale(self) -> float | Tensor:
        """Strength, linear in the change; a number, or a tensor with one a slot."""
        return self._use.scale

    @scale.setter
    def scale(self, value: float | Tensor) -> None:
        self._use.scale = value

    @property
    def routed(self) -> bool:
        """Whether `route` has given the rows of the batch to slots."""
        return self._use.rows is not None

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
        for adapter in (group.adapter for group in self.groups):
            for full, parameter in adapter.named_parameters():
                name = full.rpartition(".")[2]
                decay = 0.0 if name in cls.no_decay else weight_decay
                usual = rate * adapter.rate_factors.get(name, 1.0)
                key = (adapter.own_learning_rates.get(name, usual), decay)
                if parameter.requires_grad:
                    groups.setdefault(key, []).append(parameter)
        return [
            {"params": params, "lr": lr, "weight_decay": decay}
            for (lr, decay), params in groups.items()
        ]

    # Forward

    def refresh(self) -> None:
        """Computes the factors of every layer, a group at a time.

        A forward of the model does what is needed, so call it by hand only where a layer is called
        alone after parameters or weights were written through `.data`.
        """
        self._following.refresh()

    def _before_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.before_call(args, kwargs)

    def before_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A call of the model with these begins."""
        self._following.before_forward(args, kwargs)

    def _after_forward(self, model: nn.Module, args: Any, out: Any) -> Any:
        return self.after_call()

    def after_call(self) -> Any:
        """The model's output, where it had to be computed again; else None."""
        return self._following.after_forward()

    def check(self) -> None:
        """Raises ValueError where the model no longer does what the adapter's layers do."""
        self._following.check()

    def speed_up(self) -> None:
        """The same in fewer kernels: weights stacked, projections joint. Where somebody else
        touches the model later, the layers are plain again, with a warning that says why.

        Raises ValueError where the model is not one that this stands for.
        """
        self._must_be_in()
        if any(bank.watcher is not None for bank in owners(self.model, Bank)):
            raise ValueError("the model's forwards are recorded: `dreamtune.slow_down(pipe)` first")
        self._following.speed_up()

    @property
    def is_fast(self) -> bool:
        """Whether `speed_up` holds."""
        return self._following.stacked is not None

    def slow_down(self) -> None:
        """The layers plain again, as `inject` leaves them."""
        self._following.slow_down()

    def route(self, rows: Tensor | None) -> None:
        """Sets the slot of each batch row, (batch,) long; None: S equal blocks, in order, which
        needs gradients where S > 1.

        A pipeline's batch under guidance has all rows twice: `route(rows.repeat(2))`.
        """
        if rows is not None:
            if not isinstance(rows, Tensor) or rows.dim() != 1 or rows.dtype != torch.long:
                got = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else f"{rows}"
                raise ValueError(f"`rows` must be a tensor, 1-D long, got {got}")
            if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self.slots:
                raise ValueError(f"`rows` must be slots 0 to {self.slots - 1}, got {rows.tolist()}")
        self._use.rows = rows

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
        self._following.forget()

    def weights(self) -> dict[str, Tensor]:
        """Module path -> frozen weight (out, in) of every adapted layer; of a convolution
        (out, in * kh * kw).
        """
        return {name: w for group in self.groups for name, w in zip(group.names, group.weights())}

    @property
    def parts(self) -> dict[str, Parts]:
        """Module path -> parts, of the layers that the method acts on part by part."""
        return {name: g.parts for g in self.groups for name in g.names if g.parts}

    def file(self, slot: int = 0, metadata: Mapping[str, Any] | None = None) -> AdapterFile:
        """One slot as data. metadata: JSON values to keep, no paths and no user names."""
        if self._out == "merged":
            raise ValueError("the adapter was merged: its base is gone, save it before `merge()`")
        check_free(self.model)
        options = find_method(self.method).one_slot(self.options, slot)
        layers = [(g, n, layer) for g in self.groups for n, layer in zip(g.names, g.layers)]
        own = {n: g.own_options(options, slot) for g, n, _ in layers}
        return AdapterFile(
            method=self.method,
            options=options,
            target_modules=self.target_modules,
            tensors=self.state_dict(slot),
            metadata=dict(metadata or {}),
            shapes={name: tuple(layer.weight.shape) for _, name, layer in layers},
            weights=self.weights(),
            layer_options={name: found for name, found in own.items() if found},
            parts=self.parts,
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
        """Takes the adapter out: the model is as it was, the adapter keeps its parameters.

        Raises ValueError where it is out already, or an open route gives rows to it.
        """
        self._must_be_in()
        for bank in owners(self.model, Bank):
            bank.check_out(self.name)
        self.slow_down()
        for hook in self._hooks:
            hook.remove()
        others, banks = InjectedAdapter.of(self.model), owners(self.model, Bank)
        for group in self.groups:
            group.forget()
        for layer in self._inside():
            del layer.changes[self._name]
            if not layer.changes and not any(layer in bank.paths for bank in banks):
                layer.release()
        if others:  # who leaves last leaves the model as it was
            others[0]._trained += self._trained
        else:
            for parameter in self._trained:
                parameter.requires_grad_(True)
            for bank in banks:
                bank.remove_unless_used()
        for bank in owners(self.model, Bank):
            bank.rename(self.name, None)
        self._out = "ejected"

    def merge(self) -> None:
        """Bakes the change, at the present strength, into the weights as they are now, where they
        are, and takes the adapter out.

        Raises ValueError where it is out already, for several slots, for weights that would not be
        finite or cannot be written, and where something else stands for the layers; then nothing
        was changed.
        """
        self._must_be_in()
        if self.slots > 1:
            raise ValueError(f"`merge` needs one slot, got {self.slots}")
        if len(InjectedAdapter.of(self.model)) > 1:
            raise ValueError(
                "there are other adapters in the model, whose changes are of its weights:"
                " `dreamtune.merge(pipe)` merges all"
            )
        self.slow_down()
        mix = next((bank.mix for bank in owners(self.model, Bank)), Mix())
        for _, layer, new in changed_weights(self.model, [self], mix):
            write(layer, new)
        self.eject()
        self._out = "merged"

    def _must_be_in(self) -> None:
        if self._out is not None:
            raise ValueError(f"the adapter `{self.name}` is not in the model: it was {self._out}")
        check_free(self.model)


def check_name(model: nn.Module, name: str) -> None:
    """Raises ValueError where an adapter in the model has it, or nothing can be added."""
    check_free(model)
    shelves = [bank.mix.shelf for bank in owners(model, Bank)]
    taken = [name for shelf in shelves if shelf is not None for name in shelf.entries]
    if name in [*taken, *(adapter.name for adapter in InjectedAdapter.of(model))]:
        raise ValueError(
            f"there is an adapter `{name}` in this `{type(model).__name__}`: give another `name`,"
            f" or take that one out, `dreamtune.unload(pipe, {name!r})`"
        )
