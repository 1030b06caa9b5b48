"""What an adapter does to one layer: the factors of its change, and a forward with them.

Forward is `combined`, of what `factors_of` computes for one layer or for a group of them; a merge
adds `difference`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamtune.adapters import Adapter
from dreamtune.adapters.in_parts import whole
from dreamtune.adapters.maths import by_part, turns_parts


class Factors(NamedTuple):
    """A `WeightChange` as a forward takes it, of a layer, in the dtype of its weight: up (out, R),
    down (R, in), gain (out), rotation (n, in / n, in / n), of P parts (P n, in / n, in / n); with
    several slots, or routed rows, one
    of each a block of the batch: (K, out, R), ... None for what the method has none of.
    """

    up: Tensor | None = None
    down: Tensor | None = None
    gain: Tensor | None = None
    rotation: Tensor | None = None

    @property
    def low_rank(self) -> bool:
        """Whether `up @ down` is all."""
        return self.gain is None and self.rotation is None

    def scaled(self, strength: float) -> Factors:
        """Linear in each but `down`, which `up` is with."""
        if strength == 1:
            return self
        up, down, gain, rotation = self
        up, gain, rotation = (None if x is None else x * strength for x in (up, gain, rotation))
        return Factors(up, down, gain, rotation)

    def unbind(self) -> list[Factors]:
        """(L, ...) of a group -> those of each layer."""
        some = next(x for x in self if x is not None)
        parts = [[None] * len(some) if x is None else x.unbind(0) for x in self]
        return [Factors(*rows) for rows in zip(*parts)]


@dataclass
class Use:
    """How an adapter is used: by all its changes alike.

    Attributes:
        slots: adapters in the parameters.
        scale: strength, a number or a tensor with one a slot.
        call: strength for one call of the model, `cross_attention_kwargs={"scale": ...}`.
        rows: slot of each row of the batch, (batch,) long; None: equal blocks.
        at: strength of each row of the batch, (batch,), of a method that asks for the timestep; or
        of each place in it, (batch, tokens), or (batch, h, w) of what a convolution gives.
        parted: whether a layer may have several rows for each of these, one after the other, as
        where a network takes each token of a prompt for a row.
    """

    slots: int
    scale: float | Tensor = 1.0
    call: float = 1.0
    rows: Tensor | None = None
    at: Tensor | None = None  # no factor depends on it
    parted: bool = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("scale", "rows"):  # by number: a tensor's id may be that of one before it
            self.__dict__["given"] = self.__dict__.get("given", 0) + isinstance(value, Tensor)
        object.__setattr__(self, name, value)

    def state(self) -> tuple[object, ...]:
        """Differs where something was set or written to."""
        return (_mark(self.scale), self.call, _mark(self.rows), self.__dict__["given"])

    def scaled(self, x: Tensor) -> Tensor:
        """x (L, S, ...)."""
        if isinstance(self.scale, Tensor):
            x = x * self.scale.to(x).reshape(-1, *(1 for _ in x.shape[2:]))
        elif self.scale != 1:
            x = x * self.scale
        return x if self.call == 1 else x * self.call

    def blocks(self, batch: int, blocks: int) -> int:
        """`blocks_of` a layer's batch."""
        return blocks_of(batch, blocks, self.rows is not None and not self.parted)

    def strengths(self, batch: int) -> Tensor:
        """`at`, of the rows of a layer's batch. ValueError where these are others."""
        assert self.at is not None
        if self.parted and batch % len(self.at) == 0:
            return self.at.repeat_interleave(batch // len(self.at), 0)
        if len(self.at) not in (1, batch):
            raise ValueError(
                f"{len(self.at)} rows have strengths of their own, but a layer was called with "
                f"{batch}"
            )
        return self.at

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
    return ("tensor", version(value)) if isinstance(value, Tensor) else value


def version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def factors_of(adapter: Adapter, weight: Tensor, use: Use, *constants: Tensor) -> Factors:
    """Those of a group, (L, [K,] ...), for its stacked weights (L, out, in). What the method takes
    of the weights, where it is not given, is that of the weights as they are now.
    """
    found = []
    for up, *rest in adapter.changes(weight, *constants):
        parts = [up, *(None if x is None else use.scaled(x) for x in rest)]
        found.append(Factors(*(None if x is None else use.finish(x, weight.dtype) for x in parts)))
    return Factors(*whole(found))  # of parts: in the dtype of the weights, half as large


def combined(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    changes: Sequence[tuple[Factors, Use]],
    heights: Sequence[int] = (),
) -> Tensor:
    """`W x + b` and the changes, (batch, ..., out) for x (batch, ..., in). Each is of W, none of
    another. heights: outputs of the parts of W, where it has some.
    """
    if any(turns_parts(factors.rotation, x.shape[-1]) for factors, _ in changes):
        return _part_by_part(x, weight, bias, changes, heights)
    flat, batch = x.reshape(-1, x.shape[-1]), len(x)
    inner = flat
    for factors, use in changes:
        if factors.rotation is not None:
            inner = inner + by_row(rotated(flat, factors.rotation, batch, use), batch, use)
    y = F.linear(inner, weight, bias)
    gains = [(f.gain, use) for f, use in changes if f.gain is not None]
    if gains:
        plain = y if inner is flat else F.linear(flat, weight, bias)
        if bias is not None:  # added first all the same: no gain, and it is the base to the bit
            plain = plain - bias.to(y.dtype)
        for gain, use in gains:
            y = y + by_row(gained(plain, gain, batch, use), batch, use)
    for factors, use in changes:
        y = apply(y, flat, batch, factors, use)
    return y.view(*x.shape[:-1], y.shape[-1])


def _part_by_part(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    changes: Sequence[tuple[Factors, Use]],
    heights: Sequence[int],
) -> Tensor:
    """`combined` where parts of W are told inputs that are rotated otherwise: a product each."""
    sizes, width = list(heights), x.shape[-1]
    own = [[(Factors(*f), use) for f in by_part(fs, sizes, width)] for fs, use in changes]
    biases = [None] * len(sizes) if bias is None else bias.split(sizes)
    rows = zip(weight.split(sizes), biases, zip(*own), strict=True)
    return torch.cat([combined(x, w, b, list(parts)) for w, b, parts in rows], -1)


def apply(y: Tensor, x: Tensor, batch: int, factors: Factors, use: Use) -> Tensor:
    """`y + up (down x)`, y may be written to. x (T, in) and y (T, out) hold `batch` equal parts."""
    up, down, *_ = factors
    if up is None or down is None:
        return y
    if down.dim() == 2:
        h = by_row(x @ down.mT, batch, use)
        if up.dtype != y.dtype:  # autocast chose another dtype than the weight's
            up, h = up.to(y.dtype), h.to(y.dtype)
        return y.addmm_(h, up.mT)
    h = in_blocks(x, len(down), batch, use) @ down.mT
    if use.at is None:
        up, h = up.to(y.dtype), h.to(y.dtype)
        return y.view(len(up), -1, y.shape[-1]).baddbmm_(h, up.mT).view(y.shape)
    change = by_row((h @ up.mT).reshape(y.shape), batch, use)
    return y + change.to(y.dtype)


def gained(y: Tensor, gain: Tensor, batch: int, use: Use) -> Tensor:
    """`gain * y`, (T, out)."""
    gain = gain.to(y.dtype)
    if gain.dim() == 1:
        return y * gain
    return (in_blocks(y, len(gain), batch, use) * gain.unsqueeze(1)).reshape(y.shape)


def rotated(x: Tensor, rotation: Tensor, batch: int, use: Use) -> Tensor:
    """`x D` block by block of the width, (T, in)."""
    blocks = (1, -1) if rotation.dim() == 3 else (len(rotation), -1)
    if rotation.dim() == 4:
        use.blocks(batch, len(rotation))
    parts = x.view(*blocks, *rotation.shape[-3:-1]).transpose(-3, -2)
    return (parts @ rotation).transpose(-3, -2).reshape(x.shape)


def by_row(x: Tensor, batch: int, use: Use) -> Tensor:
    """x (T, n) at the strength of each row of the batch, or of each place in it."""
    if use.at is None:
        return x
    at = use.strengths(batch)
    at = at.to(x).reshape(len(at), -1, 1)
    return (x.view(batch, -1, x.shape[-1]) * at).view(x.shape)


def in_blocks(x: Tensor, blocks: int, batch: int, use: Use) -> Tensor:
    """(T, n) -> (K, T / K, n)."""
    return x.view(use.blocks(batch, blocks), -1, x.shape[-1])


@torch.no_grad()
def difference(adapter: Adapter, weight: Tensor, use: Use) -> Tensor:
    """What an adapter of one slot, at the strength that is set, adds to a weight (out, in) or (out,
    in, kh, kw), in float32 at least. adapter: of this layer alone, as `row` gives it.
    """
    base = weight.detach().flatten(1)[None]
    with torch.autocast(weight.device.type, enabled=False):
        changed = adapter.merged(base)  # (1, 1, out, in)
    use = replace(use, call=1.0)  # that of a call is no longer set when the call is over
    return use.scaled(changed - base.to(changed.dtype)).view(weight.shape)


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


@contextmanager
def constant() -> Iterator[None]:
    """What is kept carries no graph, and is no tensor of inference mode alone."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class InLayer(Protocol):
    """A change of one layer, wherever it is kept."""

    @property
    def adapter(self) -> nn.Module: ...

    @property
    def use(self) -> Use: ...

    @property
    def path(self) -> str: ...

    def factors(self, weight: Tensor) -> Factors: ...

    def difference(self, weight: Tensor) -> Tensor: ...


class Change:
    """One adapter's change of one layer. Its factors are kept until something that they were
    computed from is another: the layer's weight, its place, dtype or device, the adapter's
    tensors, or how it is used.
    """

    def __init__(self, adapter: Adapter, index: int, use: Use, path: str) -> None:
        self.adapter, self.index, self.use, self.path = adapter, index, use, path
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

    def keep(self, weight: Tensor, factors: Factors) -> None:
        """As computed for the whole group, from the layer's weight as it is now."""
        self.kept = ref(weight), self._state(weight), factors

    def alone(self, device: torch.device) -> Adapter:
        """The adapter of this layer, (1, S, ...)."""
        return row(self.adapter, self.index, device)

    def difference(self, weight: Tensor) -> Tensor:
        """What it adds to the weight, see `difference`."""
        return difference(self.alone(weight.device), weight, self.use)

    def _compute(self, weight: Tensor) -> Factors:
        with torch.autocast(weight.device.type, enabled=False):
            matrix = weight.flatten(1)[None]
            (factors,) = factors_of(self.alone(weight.device), matrix, self.use).unbind()
        return factors

    def _state(self, weight: Tensor) -> tuple[object, ...]:
        own = ((x.data_ptr(), version(x)) for x in tensors_of(self.adapter))
        place = weight.data_ptr(), version(weight), weight.dtype, weight.device
        return trains(self.adapter), self.use.state(), *place, *own


def trains(adapter: nn.Module) -> bool:
    """Whether what is computed now carries gradients to the adapter."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors_of(adapter))
