"""Sampling by recorded forwards: each kind of call is a CUDA graph, with fused kernels, and
adapters, strengths and routes are values in places that it reads.
"""

from __future__ import annotations

import inspect
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dreamtune.fast.fuse import patched
from dreamtune.fast.graphs import Pool, Recorded, kind_of, placed, recording
from dreamtune.fast.ops import why_not_fused
from dreamtune.fast.watch import Watch
from dreamtune.injection.bank import Bank
from dreamtune.injection.placing import Placing
from dreamtune.injection.rows import Tables

WAY_OUT = "Call `dreamtune.slow_down` on the pipeline"
GRAPHS = 12  # kept at once: each holds what it computes in, shared with the others


class Served:
    """The model's forward by replays, for calls without gradients; others run as they are. Of a new
    kind of call the first runs eagerly and the second is recorded.

    Where somebody else touches the model, it is as it was at the next call, with a warning.
    """

    def __init__(self, model: nn.Module, bank: Bank) -> None:
        self.model, self.bank = model, bank
        self.eager = model.forward
        self.own = model.__dict__.get("forward")
        names = list(inspect.signature(type(model).forward).parameters)
        self.timestep = names.index("timestep") - 1 if "timestep" in names else -1
        self.fused = not why_not_fused(next(model.parameters()).device)
        if self.fused:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.pool = Pool()
        self.graphs: OrderedDict[object, Recorded | None] = OrderedDict()
        self.placing = Placing(model, bank)
        self.replays = 0
        self.recorded = 0
        self._look()
        model.forward = Forward(self)  # type: ignore[method-assign, assignment]
        bank.watcher = self

    def release(self) -> None:
        """The model as it was."""
        model: Any = self.model
        if served(model) is self:
            del model.forward
            if self.own is not None:
                model.forward = self.own
        if self.fused:
            model.to(memory_format=torch.contiguous_format)
        self.graphs.clear()
        self.placing.kept.clear()
        self.bank.watcher = None

    def _look(self) -> None:
        """Sees the model as it is now, with the layers that are adapted."""
        self.graphs.clear()
        self.placing.look()
        self.watch = Watch(self.model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        other = torch.is_grad_enabled() or torch.compiler.is_compiling() or _autocast()
        if other or self.bank.mix.regions is not None:
            return self.eager(*args, **kwargs)
        if not self.placing.is_current():
            self._look()
        elif why := self.watch.touched():
            warnings.warn(
                f"dreamtune: the network is slowed down, for {why}; `dreamtune.speed_up` again"
                " makes it fast as it is now",
                stacklevel=2,
            )
            self.release()
            return self.model.forward(*args, **kwargs)
        tables = self.placing.tables()
        if tables is None:
            return self.eager(*args, **kwargs)
        device = next(self.model.parameters()).device
        leaves, spec = pytree.tree_flatten(self._called_with(args, kwargs, device))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        try:
            key = (tables, spec, torch.is_inference_mode_enabled(), *map(kind_of, leaves))
            known = key in self.graphs
        except TypeError:  # an argument that is no tensor and no value
            return self.eager(*args, **kwargs)
        if not known:
            self._remember(key, None)
            with self._placed(tables):
                return self.eager(*args, **kwargs)
        self.graphs.move_to_end(key)
        found = self.graphs[key]
        if found is None:
            found = self._record(leaves, spec, tables)
            self._remember(key, found)
        self.replays += 1
        return found(tensors)

    def _called_with(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device
    ) -> tuple[list[Any], dict[str, Any]]:
        """With the timestep as a tensor: a number would be a graph for each of its values."""
        given, named = list(args), dict(kwargs)
        at: Any = named if "timestep" in named else given if len(given) > self.timestep >= 0 else {}
        where: Any = "timestep" if at is named else self.timestep
        if at and isinstance(at[where], int | float):
            at[where] = torch.tensor(at[where], device=device)
        return given, named

    def _remember(self, key: object, found: Recorded | None) -> None:
        self.graphs[key] = found
        while len(self.graphs) > GRAPHS:
            self.graphs.popitem(last=False)

    def _record(self, leaves: Sequence[Any], spec: Any, tables: Tables) -> Recorded:
        device = next(self.model.parameters()).device
        filled, places = placed(leaves, device)
        args, kwargs = pytree.tree_unflatten(filled, spec)

        def run() -> tuple[Sequence[Any], Any]:
            with self._placed(tables):  # what patching computes is recorded too
                return pytree.tree_flatten(self.eager(*args, **kwargs))  # type: ignore[no-any-return]

        if not any(self.graphs.values()):  # none was yet, or the last was let go or failed
            self.pool.renew()
        replay, (out, of) = self._capture(run)
        self.recorded += 1
        return Recorded(replay, places, out, of)

    def _capture(
        self, run: Callable[[], tuple[Sequence[Any], Any]]
    ) -> tuple[Callable[[], None], tuple[Sequence[Any], Any]]:
        """(what does its work again, what it gave)."""
        graph = torch.cuda.CUDAGraph()
        device = next(self.model.parameters()).device
        # Other threads may use the GPU meanwhile: only this one is recorded.
        with (
            torch.cuda.device(device),
            recording(graph, "forward", self.pool.handle, mode="thread_local", way_out=WAY_OUT),
        ):
            found = run()
        return graph.replay, found

    @contextmanager
    def _placed(self, tables: Tables) -> Iterator[None]:
        with tables.placed(), patched(self.model) if self.fused else nullcontext():
            yield


def _autocast() -> bool:
    return torch.is_autocast_enabled("cuda")


class Forward:
    """What a sped-up model has as its `forward`. A copy of the model has its own, a plain one."""

    def __init__(self, served: Served) -> None:
        self.served = served

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.served.forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        model = self.served.model
        return _plain(memo.get(id(model), model))

    def __reduce__(self) -> Any:
        return _plain, (self.served.model,)


def _plain(model: nn.Module) -> Any:
    return types.MethodType(type(model).forward, model)


def served(model: nn.Module) -> Served | None:
    """Who records the model's forwards; None where nobody does."""
    found = model.__dict__.get("forward")
    return found.served if isinstance(found, Forward) else None
