"""What every method gives: parameters for stacked weights, and the factors of its change.

Shapes: `*L` are the layers of a stack (none for a single weight), `S` the slots (one adapter each:
a subject, a seed, a learning rate of a sweep), R the rank of the change. A weight is (*L, out, in),
a parameter (*L, S, ...), and everything is written with `...` so that it holds for any leading
dimensions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, wraps
from importlib.metadata import EntryPoint
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from dreamtune.adapters.maths import by_part, turns_parts
from dreamtune.configfile import NOT_OPTIONS, entry_points, wrong
from dreamtune.fields import checker, nearest, validated

Generators = torch.Generator | Sequence[torch.Generator] | None


class WeightChange(NamedTuple):
    """What a method makes of a weight: `W' = (1 + gain) W (I + D)ᵀ + up @ down`, row by row of W.

    For rows x: `y = (1 + gain) * ((x + x D) Wᵀ) + (x downᵀ) upᵀ`. All parts are zero where there is
    no change, so none loses accuracy in bf16 near the start; and strength is a factor on them, the
    change being linear in each. gain and rotation do not go together: it would not be.

    Attributes:
        up, down: (*L, S, out, R) and (*L, S, R, in); None for none.
        gain: (*L, S, out), of the rows of W.
        rotation: D, (*L, S, n, in / n, in / n): n blocks along the input. Where the weight is of P
            parts, rows below rows, each may have its own: (*L, S, P n, in / n, in / n).
    """

    up: Tensor | None = None
    down: Tensor | None = None
    gain: Tensor | None = None
    rotation: Tensor | None = None


def changed(weight: Tensor, change: WeightChange, heights: Sequence[int] = ()) -> Tensor:
    """W' of a weight (*L, out, in), (*L, S, out, in), in the dtype of the change. heights: rows of
    its parts, where it has some.
    """
    if turns_parts(change.rotation, weight.shape[-1]):
        parts = by_part(change, heights, weight.shape[-1])
        rows = zip(weight.split(list(heights), -2), parts, strict=True)
        return torch.cat([changed(own, WeightChange(*part)) for own, part in rows], -2)
    dtype = next(x for x in change if x is not None).dtype
    w = base = weight.unsqueeze(-3).to(dtype)
    if change.rotation is not None:
        blocks = base.unflatten(-1, change.rotation.shape[-3:-1]).movedim(-2, -3)
        turned = blocks @ change.rotation.mT  # (*L, S, n, out, in / n)
        w = w + turned.movedim(-3, -2).flatten(-2)
    if change.gain is not None:
        w = w + base * change.gain.unsqueeze(-1)
    if change.up is not None and change.down is not None:
        w = w + change.up @ change.down
    return w


class Adapter(nn.Module):
    """A `WeightChange` that a subclass computes from its parameters; most are `up @ down` alone.

    A subclass sets the class attributes, makes its parameters in `__init__` (its options are the
    keyword arguments there, checked by their annotations: `rank: PositiveInt`) and gives
    `factors`, or `change` where it is not low rank. Forward, merge, export, count and checkpoint
    are built on that. Parameters are float32, float64 for a float64 weight; buffers of a subclass
    are saved with them.

    Args:
        weight: the frozen weights of same-shape layers; only its values at construction are looked
            at.
        slots: number of independent adapters.
        generator: one CPU generator for all slots, or one a slot: then a slot starts as it would
            alone.
        options: the resolved options, kept in the adapter's file.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    identity_at_start: ClassVar[bool]
    low_rank: ClassVar[bool] = True  # False: overrides `change`, and no plain LoRA can hold it
    depends_on_weight: ClassVar[bool]  # True: the factors contain W, another base is refused
    learning_rate: ClassVar[float]  # recommended, for AdamW
    own_learning_rates: Mapping[str, float] = {}  # parameters with an absolute rate
    rate_factors: Mapping[str, float] = {}  # parameters whose rate is so many times the others'
    no_decay: ClassVar[frozenset[str]] = frozenset()
    per_slot: ClassVar[frozenset[str]] = frozenset()  # options that may be a list, one a slot
    heights: tuple[int, ...] = ()  # rows of the parts, where the weight is of several
    note: ClassVar[str] = ""  # what `dreamtune methods` says of the defaults

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "__init__" in vars(cls):
            cls.__init__ = _checking(cls.__init__)  # type: ignore[method-assign]

    def __init__(
        self, weight: Tensor, slots: int, generator: Generators, options: dict[str, Any]
    ) -> None:
        super().__init__()
        if weight.dim() < 2:
            raise ValueError(f"`weight` must be (..., out, in), got shape {tuple(weight.shape)}")
        if slots < 1:
            raise ValueError(f"`slots` must be at least 1, got {slots}")
        if isinstance(generator, Sequence) and len(generator) != slots:
            raise ValueError(f"`generator` must hold one a slot, got {len(generator)} for {slots}")
        self.leading = tuple(weight.shape[:-2])
        for name in self.per_slot:
            if isinstance(options[name], list) and len(options[name]) != slots:
                given = len(options[name])
                raise ValueError(f"`{name}` must hold one a slot, got {given} for {slots}")
        self.slots = slots
        self.options = options

    def options_of(self, slot: int) -> dict[str, Any]:
        """The options that the slot would have alone."""
        return self.one_slot(self.options, slot)

    @classmethod
    def one_slot(cls, options: Mapping[str, Any], slot: int) -> dict[str, Any]:
        """Of the options of several slots those of one."""
        return {
            name: value[slot] if name in cls.per_slot and isinstance(value, list) else value
            for name, value in options.items()
        }

    def constants(self, weight: Tensor) -> tuple[Tensor, ...]:
        """What `factors` takes of the frozen weight alone, computed without gradients.

        Whoever owns the weight keeps it, and computes it again when the weight changes: a method
        keeps nothing of a weight.
        """
        return ()

    def factors(self, weight: Tensor, *constants: Tensor) -> tuple[Tensor, Tensor]:
        """`(up, down)`, (*L, S, out, R) and (*L, S, R, in), in the dtype of the parameters.

        constants: those of this weight, where they are known; a method without any may leave them
        out of its signature.
        """
        raise NotImplementedError(f"`{self.name}` must give `factors` or `change`")

    def change(self, weight: Tensor, *constants: Tensor) -> WeightChange:
        """All that the method does to the weight; arguments as of `factors`."""
        return WeightChange(*self.factors(weight, *constants))

    def changes(self, weight: Tensor, *constants: Tensor) -> list[WeightChange]:
        """The same of each part of the weight; of one that has none, of all of it."""
        return [self.change(weight, *constants)]

    @property
    def asks_for_timestep(self) -> bool:
        """Whether the strength of the change is not the same at all timesteps."""
        return False

    def strength_at(self, timesteps: Tensor) -> Tensor:
        """The strength of the change at each row's timestep (batch,)."""
        return torch.ones_like(timesteps, dtype=torch.float32)

    @classmethod
    def no_plain_lora(cls, options: Mapping[str, Any]) -> str:
        """Why no plain LoRA holds the change, as the end of a sentence on it; "" where one does."""
        return "" if cls.low_rank else "is not a low-rank change"

    def share_of_bound(self, weight: Tensor) -> Tensor | None:
        """How much of what the method allows the change has used, (*L, S) in 0 to 1; None for a
        method that bounds nothing.
        """
        return None

    def merged(self, weight: Tensor) -> Tensor:
        """The changed weight, (*L, S, out, in)."""
        return changed(weight, self.change(weight), self.heights)

    def uniform(
        self, weight: Tensor, generator: Generators, shape: tuple[int, ...], bound: float
    ) -> Tensor:
        """Values uniform in ±bound, (*L, S, *shape), drawn on the CPU so that devices agree."""
        return self._drawn(
            weight, generator, shape, lambda x, g: x.uniform_(-bound, bound, generator=g)
        )

    def normal(
        self, weight: Tensor, generator: Generators, shape: tuple[int, ...], deviation: float
    ) -> Tensor:
        """Normal values of a standard deviation, as `uniform`."""
        return self._drawn(
            weight, generator, shape, lambda x, g: x.normal_(0, deviation, generator=g)
        )

    def _drawn(
        self,
        weight: Tensor,
        generator: Generators,
        shape: tuple[int, ...],
        draw: Callable[[Tensor, torch.Generator | None], Tensor],
    ) -> Tensor:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if weight.device.type == "meta":
            full = (*self.leading, self.slots, *shape)
            return torch.empty(full, dtype=dtype, device="meta")
        per_slot = generator if isinstance(generator, Sequence) else [generator] * self.slots
        drawn = [draw(torch.empty(*self.leading, *shape), g) for g in per_slot]
        return torch.stack(drawn, dim=len(self.leading)).to(weight.device, dtype)

    def constant(
        self, weight: Tensor, shape: tuple[int, ...], value: float | list[float]
    ) -> Tensor:
        """A filled tensor (*L, S, *shape); the value may be one a slot."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        full = (*self.leading, self.slots, *shape)
        if isinstance(value, list):
            values = torch.tensor(value, dtype=dtype, device=weight.device)
            return values.view(-1, *(1 for _ in shape)).expand(full).clone()
        return torch.full(full, value, dtype=dtype, device=weight.device)


_REGISTRY: dict[str, type[Adapter]] = {}


class _Methods(Mapping[str, type[Adapter]]):
    """The registered methods, and those of other packages, which are imported when looked up."""

    def __getitem__(self, name: str) -> type[Adapter]:
        if name not in _REGISTRY:
            _REGISTRY[name] = _load(entry_points()[name])
        return _REGISTRY[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*_REGISTRY, *entry_points()]))

    def __len__(self) -> int:
        return len(list(iter(self)))


METHODS: Mapping[str, type[Adapter]] = _Methods()


def register(method: type[Adapter]) -> type[Adapter]:
    """Class decorator: `METHODS[method.name]`. A taken name is an error."""
    if method.name in _REGISTRY:
        taken = _REGISTRY[method.name]
        raise ValueError(f"method `{method.name}` is taken by `{taken.__module__}`")
    _REGISTRY[method.name] = method
    return method


def _load(point: EntryPoint) -> type[Adapter]:
    try:
        method = point.load()
    except (ImportError, AttributeError) as error:
        raise wrong(point, str(error)) from error
    if not (isinstance(method, type) and issubclass(method, Adapter)):
        raise wrong(point, f"{method!r} is no `Adapter`")
    if method.name != point.name:
        raise wrong(point, f"the `name` of `{point.attr}` is {method.name!r}")
    return method


def find_method(name: str) -> type[Adapter]:
    """`METHODS[name]`; a ValueError that names the nearest ones for an unknown name."""
    if name not in METHODS:
        listed = ", ".join(sorted(METHODS))
        raise ValueError(f"unknown method `{name}`.{nearest(name, METHODS)} There are {listed}.")
    return METHODS[name]


def _checking(init: Callable[..., None]) -> Callable[..., None]:
    """The `__init__` of a method with its options checked first, whoever calls it."""

    @wraps(init)
    def checked(self: Adapter, *args: Any, **given: Any) -> None:
        options = {name: value for name, value in given.items() if name in options_of(init)}
        init(self, *args, **{**given, **validated(_rules(init), options)})

    return checked


@cache
def options_of(init: Callable[..., None]) -> dict[str, tuple[Any, Any]]:
    """option -> type with its range, default: the keyword arguments of an `__init__`."""
    found = {
        name: parameter
        for name, parameter in inspect.signature(init).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in NOT_OPTIONS
    }
    names = inspect.unwrap(init).__globals__
    kinds = {n: p.annotation for n, p in found.items()}
    kinds = {n: eval(k, names) if isinstance(k, str) else k for n, k in kinds.items()}
    nothing = inspect.Parameter.empty
    return {n: (Any if kinds[n] is nothing else kinds[n], p.default) for n, p in found.items()}


@cache
def _rules(init: Callable[..., None]) -> TypeAdapter[dict[str, Any]]:
    return checker({name: kind for name, (kind, _) in options_of(init).items()})


def registered_signatures() -> dict[str, dict[str, tuple[Any, Any]]]:
    """method -> `options_of` it, for what this process has registered."""
    return {name: options_of(method.__init__) for name, method in _REGISTRY.items()}


def resolve_options(method: type[Adapter], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options in their types, with defaults filled in. A ValueError names the nearest for an
    unknown one, and option, rule and value for one that is out of range.
    """
    known = options_of(method.__init__)
    for name in options:
        if name not in known:
            listed = ", ".join(known) or "none"
            raise ValueError(
                f"`{method.name}` has no option `{name}`.{nearest(name, known)} There are {listed}."
            )
    defaults = {name: default for name, (_, default) in known.items()}
    return {**defaults, **validated(_rules(method.__init__), options)}
