"""The training step as one CUDA graph, and the forward of sampling as another: eager ones are bound
by launching their kernels one by one, a replay launches them all.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from dreamtune.injection.inject import InjectedAdapter

WARM_UP = 3  # steps, so that libraries have made their workspaces and chosen their kernels


def why_not_captured(device: torch.device, gradient_checkpointing: bool = False) -> str | None:
    """Why a step here cannot be captured, or None."""
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, this is {device.type}"
    if not hasattr(torch.cuda.CUDAGraph, "register_generator_state"):
        return f"torch {torch.__version__} cannot register generators with a CUDA graph"
    if gradient_checkpointing:
        return "gradient checkpointing saves the state of random generators, which a graph cannot"
    return None


def switched(option: str, value: str, against: str | None) -> bool:
    """Whether to, of `value` auto, on or off. ValueError for "on" where it cannot be."""
    if value == "on" and against is not None:
        raise ValueError(f"`{option}` is on, but {against}. Use auto or off.")
    return value != "off" and against is None


class StaticStep(Protocol):
    """A step as a function of static tensors: `prepare` talks to the host, `body` does the same
    work on the device every time.
    """

    generators: Sequence[torch.Generator]

    def prepare(self, k: int, multiplier: float) -> None: ...

    def body(self) -> None: ...

    def reads(self) -> list[Tensor]: ...

    def changes(self) -> list[Tensor]: ...


class CapturedStep:
    """`captured(k, multiplier)` is `step(k, multiplier)` by the replay of a CUDA graph.

    Captured at the first call, after warm-up steps whose effect is undone. The random numbers are
    those of the eager step: its generators are registered with the graph and seeded before every
    replay.

    The graph holds the addresses of everything that a step reads: after the first call parameters,
    weights, cache and optimizer state may be changed in place, not replaced.

    pool: memory shared with other graphs, whose replays must be over when this one runs.
    """

    def __init__(self, step: StaticStep, pool: Pool | None = None) -> None:
        self.step, self.pool = step, pool
        self.graph: Any = None
        self._addresses: list[int] = []
        self._changing: list[Tensor] = []

    def __call__(self, k: int, multiplier: float) -> None:
        if self.graph is None:
            self.graph = self._capture(k, multiplier)
            self._addresses, self._changing = self._where(), self.step.changes()
        elif self._where() != self._addresses:
            raise RuntimeError(
                "parameters, optimizer state or the cache were replaced after the step was captured"
            )
        self.step.prepare(k, multiplier)
        self.graph.replay()
        # autograd saw nothing of the replay; what is cached by version must be computed again
        for t in self._changing:
            _increment_version(t)

    def _where(self) -> list[int]:
        return [t.data_ptr() for t in (*self.step.reads(), *self.step.changes())]

    def _capture(self, k: int, multiplier: float) -> Any:
        step, changing = self.step, self.step.changes()
        device = changing[0].device
        with torch.cuda.device(device):
            before = [t.detach().cpu() for t in changing]  # here it would be the peak of memory
            # One stream for both: autograd runs a parameter's gradient on the stream that it was
            # first used on.
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    step.prepare(k, multiplier)
                    step.body()
                with torch.no_grad():
                    for t, old in zip(changing, before, strict=True):
                        t.copy_(old)
            torch.cuda.current_stream(device).wait_stream(stream)
            torch.cuda.synchronize(device)
            del before
            return self._record(stream, k, multiplier)

    def _record(self, stream: torch.cuda.Stream, k: int, multiplier: float) -> Any:
        graph = torch.cuda.CUDAGraph()
        for generator in self.step.generators:
            graph.register_generator_state(generator)
        self.step.prepare(k, multiplier)
        pool = None if self.pool is None else self.pool.handle
        with recording(graph, "training step", pool, stream):
            self.step.body()
        return graph


class Pool:
    """Memory that graphs share; one whose last graph is gone cannot be recorded into again, so
    whoever lets graphs go renews it.
    """

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()


Replayed = Callable[[], AbstractContextManager[None]]


def drive(
    adapter: InjectedAdapter, step: Any, capturing: bool
) -> tuple[Callable[[int, float], None], Replayed]:
    """What runs a step, and the block in which sampling is replayed: captured, in memory that both
    use by turns, or as they are.
    """
    if not capturing:
        return step, nullcontext
    forward = CapturedForward(adapter)
    return CapturedStep(step, forward.pool), forward.installed


class Recorded(NamedTuple):
    """A forward. places: of the tensors that it is called with; out: what it gives, flat."""

    replay: Callable[[], None]
    places: Sequence[Tensor]
    out: Sequence[Any]
    spec: Any

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        for place, x in zip(self.places, tensors, strict=True):
            place.copy_(x)
        self.replay()
        # some samplers keep what they are given
        out = [x.clone() if isinstance(x, Tensor) else x for x in self.out]
        return pytree.tree_unflatten(out, self.spec)


def kind_of(x: Any) -> object:
    """What calls share that one graph stands for: of a tensor its shape and dtype, else the value.
    Raises TypeError for what is neither.
    """
    if isinstance(x, Tensor):
        return x.shape, x.dtype
    if x is None or isinstance(x, bool | int | float | str):
        return type(x), x
    raise TypeError(f"{type(x)} cannot be told from another")


class CapturedForward:
    """Inside `with forward.installed():` the adapted model's calls are replays of CUDA graphs, one
    for each shape of its inputs: the first call of a shape runs eagerly, the second is recorded.

    For calls without gradients as pipelines make them, of tensors by position, by name, in lists
    and dictionaries; one with a number runs eagerly, each value would be a graph. The adapter's
    factors are computed before a replay as before any call, where strength, slots or parameters
    have changed.
    """

    def __init__(self, adapter: InjectedAdapter) -> None:
        self.adapter, self.model = adapter, adapter.model
        self.pool = Pool()
        self.graphs: dict[object, Recorded | None] = {}
        self._addresses: list[int] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        model: Any = self.model
        addresses = [p.data_ptr() for p in model.parameters()]
        if addresses != self._addresses:
            if any(self.graphs.values()):  # before that it may be the step's already
                self.pool.renew()
            self.graphs, self._addresses = {}, addresses
        with torch.no_grad():
            self.adapter.refresh()  # into the places that a graph reads
        self.eager, own = model.forward, model.__dict__.get("forward")
        model.forward = self._forward
        try:
            yield
        finally:
            del model.forward
            if own is not None:
                model.forward = own

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        numbers = any(type(x) in (int, float) for x in leaves)
        if kwargs.get("return_dict", True) or numbers or torch.is_grad_enabled():
            return self.eager(*args, **kwargs)
        try:
            state = self.adapter.routed, torch.is_inference_mode_enabled()
            key = (*state, spec, *map(kind_of, leaves))
            known = key in self.graphs
        except TypeError:  # an argument that is no tensor and no value
            return self.eager(*args, **kwargs)
        if not known:
            self.graphs[key] = None
            return self.eager(*args, **kwargs)
        found = self.graphs[key] = self.graphs[key] or self._record(leaves, spec)
        return found([x for x in leaves if isinstance(x, Tensor)])

    def _record(self, leaves: Sequence[Any], spec: Any) -> Recorded:
        device = next(self.model.parameters()).device
        filled, places = placed(leaves, device)
        args, kwargs = pytree.tree_unflatten(filled, spec)

        def run() -> tuple[Sequence[Any], Any]:
            return pytree.tree_flatten(self.eager(*args, **kwargs))  # type: ignore[no-any-return]

        replay, (out, of) = self._capture(run, device)
        return Recorded(replay, places, out, of)

    def _capture(
        self, run: Callable[[], tuple[Sequence[Any], Any]], device: torch.device
    ) -> tuple[Callable[[], None], tuple[Sequence[Any], Any]]:
        """(what does its work again, what it gave)."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), recording(graph, "forward of sampling", self.pool.handle):
            found = run()
        return graph.replay, found


def placed(leaves: Sequence[Any], device: torch.device) -> tuple[list[Any], list[Tensor]]:
    """The leaves with each tensor copied to the device, and these copies: where a graph reads."""
    places = [x.to(device, copy=True) for x in leaves if isinstance(x, Tensor)]
    given = iter(places)
    return [next(given) if isinstance(x, Tensor) else x for x in leaves], places


@contextmanager
def recording(
    graph: Any,
    what: str,
    pool: Any = None,
    stream: torch.cuda.Stream | None = None,
    mode: str = "global",
    way_out: str = "Start again with --capture off (or `capture: off`)",
) -> Iterator[None]:
    """What runs inside becomes the graph. Raises RuntimeError with the way out where it cannot.

    mode: of errors in other threads, `capture_error_mode` of torch.
    """
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()  # what a collection would free now could end the capture
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode):
            yield
    except RuntimeError as error:
        first = error.__context__ or error
        raise RuntimeError(
            f"the {what} could not be captured as a CUDA graph: {first}. {way_out}"
        ) from error
    finally:
        if collecting:
            gc.enable()


# by name: the stubs of some torch versions lack it
_increment_version: Any = importlib.import_module("torch.autograd.graph").increment_version
