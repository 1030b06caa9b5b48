"""What an adapter does to one layer: the change `up (down x)`, and the factors of it.

Forward is `apply`, of what `factors_of` computes for one layer or for a group of them; merge is
`merged`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamtune.adapters import Adapter


class Factors(NamedTuple):
    """Of one layer, in the dtype of its weight: up (out, R) and down (R, in); with several slots,
    or routed rows, one of each a block of the batch: (K, out, R), (K, R, in). For a method that is
    not low rank `up` is None and `down` the whole change, (out, in) or (K, out, in).
    """

    up: Tensor | None
    down: Tensor


@dataclass
class Use:
    """How an adapter is used: by all its changes alike.

    Attributes:
        slots: adapters in the parameters.
        scale: strength, a number or a tensor with one a slot.
        call: strength for one call of the model, `cross_attention_kwargs={"scale": ...}`.
        rows: slot of each row of the batch, (batch,) long; None: equal blocks.
    """

    slots: int
    scale: float | Tensor = 1.0
    call: float = 1.0
    rows: Tensor | None = None

    def state(self) -> tuple[object, ...]:
        """Differs where something was set or written to."""
        return (_mark(self.scale), self.call, _mark(self.rows))

    def scaled(self, x: Tensor) -> Tensor:
        if isinstance(self.scale, Tensor):
            x = x * self.scale.to(x).reshape(-1, 1, 1)
        elif self.scale != 1:
            x = x * self.scale
        return x if self.call == 1 else x * self.call

    def whole(self) -> bool:
        """Whether `scaled` changes nothing."""
        return not isinstance(self.scale, Tensor) and self.scale == 1 and self.call == 1

    def finish(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(L, S, ...) -> (L, [K,] ...) in the dtype of the weights."""
        if self.rows is not None:
            x = x.index_select(1, self.rows.to(x.device))
        elif self.slots == 1:
            x = x.squeeze(1)
        return x.to(dtype)


def _mark(value: object) -> object:
    return (id(value), version(value)) if isinstance(value, Tensor) else value


def version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def factors_of(adapter: Adapter, weight: Tensor, use: Use, *constants: Tensor) -> Factors:
    """Those of a group, (L, [K,] ...), for its stacked weights (L, out, in). What the method takes
    of the weights, where it is not given, is that of the weights as they are now.
    """
    if adapter.low_rank:
        up, down = adapter.factors(weight, *constants)
        down = use.scaled(down)
        return Factors(use.finish(up, weight.dtype), use.finish(down, weight.dtype))
    change = adapter.merged(weight) - weight.unsqueeze(1)
    return Factors(None, use.finish(use.scaled(change), weight.dtype))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, changes: Sequence[Change]) -> Tensor:
    """`W x + b` and the changes, (batch, ..., out) for x (batch, ..., in)."""
    flat = x.reshape(-1, x.shape[-1])
    y = F.linear(flat, weight, bias)
    for change in changes:
        y = apply(y, flat, len(x), change.factors(weight), change.use.rows is not None)
    return y.view(*x.shape[:-1], y.shape[-1])


def apply(y: Tensor, x: Tensor, batch: int, factors: Factors, routed: bool) -> Tensor:
    """`y + up (down x)`, y is written to. x (T, in) and y (T, out) hold `batch` equal parts."""
    up, down = factors
    if down.dim() == 2:
        h = x @ down.mT
        if up is None:
            return y + h.to(y.dtype)
        if up.dtype != y.dtype:  # autocast chose another dtype than the weight's
            up, h = up.to(y.dtype), h.to(y.dtype)
        return y.addmm_(h, up.mT)
    blocks = blocks_of(batch, len(down), routed)
    h = x.view(blocks, -1, x.shape[-1]) @ down.mT
    change = h if up is None else h @ up.mT
    return y + change.reshape(y.shape).to(y.dtype)


@torch.no_grad()
def merged(adapter: Adapter, weight: Tensor, use: Use) -> Tensor:
    """The weight (out, in) with the change of an adapter of one slot in it, at the strength that is
    set; computed in float32 at least, and cast. adapter: of this layer alone, as `row` gives it.
    """
    base = weight.detach()[None]
    with torch.autocast(weight.device.type, enabled=False):
        changed = adapter.merged(base)
        if not use.whole():
            wide = base.unsqueeze(1).to(changed.dtype)
            changed = wide + use.scaled(changed - wide)
    return changed[0, 0].to(weight.dtype)


def rows_of(input: Tensor, blocks: int | None, routed: bool) -> Tensor:
    """(batch, ..., in) -> (T, in), or (blocks, T, in) for the factors of that many blocks."""
    if blocks is None:
        return input.reshape(-1, input.shape[-1])
    return input.reshape(blocks_of(len(input), blocks, routed), -1, input.shape[-1])


def blocks_of(batch: int, blocks: int, routed: bool) -> int:
    """`blocks`. ValueError where a batch does not have them."""
    if routed and batch != blocks:
        # twice as many may be guidance or two images a prompt: their rows lie differently
        raise ValueError(
            f"`route` was given {blocks} rows, but the batch has {batch}: each needs its slot,"
            " `rows.repeat(2)` in a pipeline under guidance"
        )
    if batch % blocks:
        raise ValueError(f"a batch of {batch} rows does not split into {blocks} equal slots")
    return blocks


def row(adapter: Adapter, index: int, device: torch.device) -> Adapter:
    """The adapter of one layer of the group, (1, S, ...): a view, for as long as a call."""
    view: Adapter = _view(adapter, index, device)
    return view


def _view(module: Any, index: int, device: torch.device) -> Any:
    # Not `functional_call`, which puts the tensors into the module itself: other threads read it.
    view = object.__new__(type(module))
    view.__dict__.update(module.__dict__)
    shared = module._non_persistent_buffers_set  # not saved: of all layers, without their dimension
    for kind in ("_parameters", "_buffers"):
        view.__dict__[kind] = {
            name: x if x is None else (x if name in shared else x[index : index + 1]).to(device)
            for name, x in module.__dict__[kind].items()
        }
    if module._modules:
        children = module._modules.items()
        inside = {name: m and _view(m, index, device) for name, m in children}
        view.__dict__["_modules"] = inside
    return view


def tensors_of(adapter: nn.Module) -> Iterator[Tensor]:
    """All that factors are computed from, but for the weights; as they are in it now."""
    for module in adapter.modules() if adapter._modules else (adapter,):
        yield from (x for x in module._parameters.values() if x is not None)
        yield from (x for x in module._buffers.values() if x is not None)


def sums(tensors: Sequence[Tensor]) -> list[float]:
    """A number for each that tells its values from others: what is written through `.data`, as
    PEFT's fusing and diffusers' EMA do, changes no version. Waits for the device, once.
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for x in tensors:
        if x.device.type != "meta":
            by_device.setdefault(x.device, []).append(x.detach())
    found: list[float] = []
    for device, some in by_device.items():
        dtype = torch.float64  # a small change of one of many layers shows in the whole stack
        if device.type == "mps":  # has no doubles
            dtype, some = torch.float32, [part for x in some for part in x]
        found += torch.stack(torch._foreach_norm(some, 2, dtype)).tolist()
    return found


@contextmanager
def constant() -> Iterator[None]:
    """What is kept carries no graph, and is no tensor of inference mode alone."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Change:
    """One adapter's change of one layer. Its factors are kept until something that they were
    computed from is another: the layer's weight, its place, dtype or device, the adapter's
    tensors, or how it is used.
    """

    def __init__(self, adapter: Adapter, index: int, use: Use) -> None:
        self.adapter, self.index, self.use = adapter, index, use
        self.kept: tuple[Any, tuple[object, ...], Factors] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": None}  # a copy computes its own

    def factors(self, weight: Tensor) -> Factors:
        if torch.compiler.is_compiling():  # the graph computes them anew: it cannot ask for these
            return self._compute(weight)
        state = self._state(weight)
        if self.kept is not None and self.kept[0]() is weight and self.kept[1] == state:
            return self.kept[2]
        if trains(self.adapter):  # they carry a graph of this call
            return self._compute(weight)
        with constant():
            factors = self._compute(weight)
        self.kept = ref(weight), state, factors
        return factors

    def keep(self, weight: Tensor, up: Tensor | None, down: Tensor) -> None:
        """As computed for the whole group, from the layer's weight as it is now."""
        self.kept = ref(weight), self._state(weight), Factors(up, down)

    def alone(self, device: torch.device) -> Adapter:
        """The adapter of this layer, (1, S, ...)."""
        return row(self.adapter, self.index, device)

    def _compute(self, weight: Tensor) -> Factors:
        with torch.autocast(weight.device.type, enabled=False):
            up, down = factors_of(self.alone(weight.device), weight[None], self.use)
        return Factors(None if up is None else up[0], down[0])

    def _state(self, weight: Tensor) -> tuple[object, ...]:
        own = ((x.data_ptr(), version(x)) for x in tensors_of(self.adapter))
        place = weight.data_ptr(), version(weight), weight.dtype, weight.device
        return trains(self.adapter), self.use.state(), *place, *own


def trains(adapter: nn.Module) -> bool:
    """Whether what is computed now carries gradients to the adapter."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors_of(adapter))
