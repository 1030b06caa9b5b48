"""The adapters of a model together: how much of each is in which row, and in the weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from dreamtune.injection.blend import placed
from dreamtune.injection.follow import strength_of_call
from dreamtune.injection.mix import Mix, Strength
from dreamtune.injection.places import is_parted, unwrapped, weight_of
from dreamtune.injection.shelf import Shelf
from dreamtune.injection.turns import Turns, caller
from dreamtune.injection.weights import InModel, Written, changed_weights, write

Kind = TypeVar("Kind")
Rows = Sequence[Mapping[str, Strength]]
Copies = Callable[[int], Sequence[bool] | None]
BATCHES = ("sample", "hidden_states", "latents", "x")  # what diffusers calls a model's input
_MAKING = threading.Lock()
MERGED = "merged into the weights: `dreamtune.unmerge(pipe)` takes it out again"


class Removable(Protocol):
    def remove(self) -> None: ...


class Bank:
    """Attributes:
    mix: shared by the adapted layers.
    lock: held by a route, and by each forward of the model: those of other threads wait.
    written: what a merge has written; None where the adapters are not in the weights.
    copies: of a batch of the model, how often it has each row: as often as that gives values,
        whether it is with the prompt. None, also as an answer: rows are those of the model's batch.
    under: of the routes that are open, what is set again when each is over.
    members: differs where an adapter came or went, and so maybe which layers are adapted.
    outside: who is around the calls of the compiled model. placed: whether it has set places now.
    watcher: who records the model's forwards; None where nobody does.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.mix = model, Mix()
        self.mix.parted = is_parted(model)
        self.copies: Copies | None = None
        self.under: list[tuple[Mapping[str, Strength], Rows | None, Copies | None]] = []
        self.written: list[Written] | None = None
        self.members = 0
        self.watcher: object | None = None
        self.outside: Removable | None = None
        self.placed = False
        self.lock = Turns()
        self.hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    @staticmethod
    def on(model: nn.Module, adapters: Callable[[], Sequence[InModel]]) -> Bank:
        """The model's, there from now on. adapters: those in it."""
        with _MAKING:  # of two threads that ask, one makes it
            found = owners(model, Bank)
            if not found:
                found = [Bank(unwrapped(model))]
                found[0].share(adapters())
            return found[0]

    def __getstate__(self) -> dict[str, Any]:
        without = {"lock": None, "copies": None, "watcher": None, "outside": None}
        under = [(strengths, rows, None) for strengths, rows, _ in self.under]
        return {**self.__dict__, **without, "under": under}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock = Turns()
        if self.under:  # a route is over in a copy, which nobody would end there
            self.mix.set(*self.under[0][:2])
            self.under = []

    @property
    def shelf(self) -> Shelf:
        """There from now on."""
        found = self.mix.shelf
        if found is None:
            found = self.mix.shelf = Shelf(self.model)
        assert isinstance(found, Shelf)
        return found

    @property
    def holds_nothing(self) -> bool:
        """Whether no adapter is on its shelf, and nothing is recorded."""
        empty = self.mix.shelf is None or not self.mix.shelf.entries
        return empty and self.watcher is None

    def share_shelf(self) -> None:
        """The same for the layers of its adapters."""
        for place in self.shelf.places.values():
            place.layer.mix = self.mix  # type: ignore[assignment]
        self.mix.state += 1
        self.members += 1

    def share(self, adapters: Sequence[InModel]) -> None:
        """Their layers go by the mix, and look anew at which changes they hold."""
        for adapter in adapters:
            for group in adapter.groups:
                for layer in group.layers:
                    layer.mix = self.mix
        self.mix.state += 1
        self.members += 1

    @property
    def paths(self) -> Mapping[nn.Module, str]:
        """Layers that adapters on the shelf change."""
        return {} if self.mix.shelf is None else self.shelf.paths

    def remove_unless_used(self) -> None:
        """Leaves the model. Of a shelf with adapters, and where forwards are recorded: nothing."""
        if self.holds_nothing:
            for hook in self.hooks:
                hook.remove()
            if self.outside is not None:
                self.outside.remove()

    @contextmanager
    def routed(self, rows: Rows, copies: Copies | None) -> Iterator[None]:
        with self.lock:
            self._free()
            self.under.append((self.mix.strengths, self.mix.rows, self.copies))
            self.copies = copies
            self.mix.set({}, rows)
            try:
                self._bring()
                with placed(self.model, self.mix):
                    yield
            finally:
                strengths, before, self.copies = self.under.pop()
                self.mix.set(strengths, before)

    def set(
        self,
        strengths: Mapping[str, Strength],
        rows: Rows | None = None,
        copies: Copies | None = None,
    ) -> None:
        """Raises ValueError inside a route, which would undo it, and where all is merged."""
        with self.lock:
            self._free()
            if self.under:
                raise ValueError(
                    "a route is open, at whose end the strengths from before come back: set them"
                    " outside of it, or open another route inside"
                )
            before = self.mix.strengths, self.mix.rows
            self.mix.set(strengths, rows)
            try:
                self._bring()
            except BaseException:
                self.mix.set(*before)
                raise
            self.copies = copies

    def _bring(self) -> None:
        """What is in use from the shelf, before the call that needs it."""
        if names := self.mix.from_shelf():
            self.shelf.bring(names)

    def _free(self) -> None:
        check_free(self.model)  # asked with the lock: another thread may have merged

    def rename(self, old: str, new: str | None) -> None:
        """What is set for an adapter is for its new name; for none where it is out."""

        def renamed(given: Mapping[str, Strength]) -> dict[str, Strength]:
            names = ((new if name == old else name, s) for name, s in given.items())
            return {name: s for name, s in names if name is not None}

        def each(rows: Rows | None) -> Rows | None:
            return None if rows is None else [renamed(row) for row in rows]

        with self.lock:
            self.members += 1
            self.under = [(renamed(s), each(rows), copies) for s, rows, copies in self.under]
            self.mix.set(renamed(self.mix.strengths), each(self.mix.rows))

    def take_out(self, name: str) -> None:
        """Off the shelf. Raises ValueError where an open route gives rows to it."""
        with self.lock:
            self.check_out(name)
            self.shelf.drop(name)
            self.rename(name, None)

    def check_out(self, name: str) -> None:
        """Raises ValueError where an open route gives rows to the adapter."""
        if self.under and any(name in row for row in self.mix.rows or ()):
            raise ValueError(f"a route that is open gives rows to `{name}`: end it first")

    # Around each forward

    def _before(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():  # neither locks nor looks at a batch
            if self.placed:
                return
            if self.mix.rows is not None or self.mix.from_shelf():
                raise ValueError(
                    "rows are routed, or adapters of `dreamtune.load_many` are in use, of a network"
                    " that is compiled. It follows them without gradients and regions, where"
                    " `route` or `set_adapters` was given the compiled network, or its pipeline"
                )
            return
        self.lock.acquire(caller())
        self.before(kwargs)
        self.spread(args, kwargs)

    def before(self, kwargs: Mapping[str, Any]) -> None:
        """A call with these begins."""
        if self.mix.shelf is not None:
            self.shelf.before_forward(strength_of_call(kwargs))
        if self.mix.off and strength_of_call(kwargs) != 1:
            raise ValueError(
                f"a strength for one call was given, but the adapters are {MERGED}: without it"
            )

    def spread(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Finds the row of each row of a call's batch."""
        if self.mix.rows is not None:
            named = (kwargs[name] for name in BATCHES if name in kwargs)
            given = [*args, *named, *kwargs.values()]
            first = next((x for x in given if isinstance(x, Tensor) and x.dim() > 0), None)
            if first is None:
                kind = type(self.model).__name__
                raise ValueError(f"`{kind}` was called without a tensor, whose rows are routed")
            self.mix.spread(self._order(len(self.mix.rows), len(first)))
            if self.mix.regions is not None:
                found = None if self.copies is None else self.copies(len(first))
                prompted = found or (True,)
                self.mix.regions.start(first, self.mix.order, prompted)

    def _after(self, model: nn.Module, args: Any, out: Any) -> None:
        if not torch.compiler.is_compiling():
            self.lock.release(caller())

    def _order(self, rows: int, batch: int) -> list[int]:
        """The row of each row of the batch: under guidance all without the prompt, then all with
        it, and in each the images of a prompt side by side.
        """
        found = None if self.copies is None else self.copies(batch)
        copies, alone = len(found or (True,)), found is None
        images, rest = divmod(batch, rows * copies)
        if rest or not images or (alone and images > 1):
            often = {2: "twice", 3: "three times"}.get(copies, f"{copies} times")
            told = f", each {often} under guidance: {rows * copies}" if copies > 1 else ""
            several = "" if alone else " or a multiple of it, images a prompt,"
            raise ValueError(
                f"{rows} rows are routed{told}{several} but the batch has {batch} rows: give an"
                f" entry {'a row of the network' if alone else 'a prompt'}"
            )
        return [row for row in range(rows) for _ in range(images)] * copies

    # In the weights

    def merge(self, adapters: Sequence[InModel]) -> None:
        """All at their strengths into the weights. Raises ValueError, with nothing changed, where
        no weight holds them or one cannot be written.
        """
        self._free()
        changed = changed_weights(self.model, adapters, self.mix)
        self.written = [
            Written(layer, path, weight_of(layer).cpu().clone(), new.cpu())
            for path, layer, new in changed
        ]
        for _, layer, new in changed:
            write(layer, new)
        self.mix.off = True

    def unmerge(self, force: bool = False) -> None:
        """The weights as they were, bit for bit. Raises ValueError where somebody has written to
        them since, unless forced.
        """
        for part in self.written or ():
            weight = weight_of(part.layer)
            if not force and not torch.equal(weight.cpu(), part.after.to(weight.dtype)):
                raise ValueError(
                    f"the weight of `{part.path}` was changed after `merge`, which `unmerge` would"
                    " undo: take that out first, or call `unmerge(pipe, force=True)`"
                )
        for part in self.written or ():
            write(part.layer, part.before)
        self.written, self.mix.off = None, False


def owners(model: nn.Module, kind: type[Kind]) -> list[Kind]:
    """Those of a kind that look at each forward of the model, in the order that they came."""
    hooks = unwrapped(model)._forward_pre_hooks.values()
    found = [getattr(hook, "__self__", None) for hook in hooks]
    return [owner for owner in found if isinstance(owner, kind)]


def check_free(model: nn.Module) -> None:
    """Raises ValueError where the adapters are in the weights: then nothing else can be done."""
    if any(bank.written is not None for bank in owners(model, Bank)):
        raise ValueError(f"the adapters are {MERGED}")
