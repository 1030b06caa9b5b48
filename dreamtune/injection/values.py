"""Whether values are others than they were: what is written through `.data`, as PEFT's fusing and
diffusers' EMA do, changes no version.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from torch import Tensor

ASKED_BEFORE = 3  # times of the same tensors, and the question is recorded


class Values:
    """The values of some tensors, as a few numbers of each that tell them from others."""

    def __init__(self) -> None:
        self.known = False
        self.parts: dict[torch.device, _Part] = {}

    def forget(self) -> None:
        self.known = False

    def ask(self, tensors: Sequence[Tensor], often: bool = False) -> Answer:
        """Whether they are the same as when they were last not, or were forgotten. A GPU answers
        when it has come to it; nothing waits for that.

        often: the same tensors will be asked for again and again, so that a GPU's work is recorded
            once: to launch it piece by piece costs more than to do it.
        """
        by_device: dict[torch.device, list[Tensor]] = {}
        for x in tensors:
            if x.device.type != "meta" and x.numel():
                by_device.setdefault(x.device, []).append(x)
        same = self.known and by_device.keys() == self.parts.keys()
        same = same and all(self.parts[d].is_of(some) for d, some in by_device.items())
        if same:
            return Answer([self.parts[d].ask(some, often) for d, some in by_device.items()])
        answer = Answer([], same=not self.known)
        kept = {d: part for d, part in self.parts.items() if part.is_of(by_device.get(d, []))}
        self.parts = {d: kept.get(d) or _Part(some) for d, some in by_device.items()}
        for device, some in by_device.items():
            self.parts[device].remember(some)
        self.known = True
        return answer


class Answer:
    def __init__(
        self, differs: list[tuple[Tensor, torch.cuda.Event | None]], same: bool = True
    ) -> None:
        self.differs, self._same = differs, same

    @property
    def late(self) -> bool:
        """Whether there is something to wait for."""
        return any(event is not None for _, event in self.differs)

    def same(self) -> bool:
        for _, event in self.differs:
            if event is not None:
                event.synchronize()
        return self._same and not any(bool(x) for x, _ in self.differs)


class _Part:
    """Tensors of one device. They are not held: a model that moves away leaves no memory here, but
    for those of a recorded question, which are in a stack.
    """

    @torch.inference_mode(False)
    def __init__(self, tensors: list[Tensor]) -> None:
        self.places = [_place(x) for x in tensors]
        self.recorded: list[Tensor] = []
        self.device = tensors[0].device
        self.on_gpu = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if self.on_gpu else None
        self.before: Tensor | None = None
        self.differs = torch.empty((), dtype=torch.bool, pin_memory=self.on_gpu)
        self.asked = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def is_of(self, tensors: list[Tensor]) -> bool:
        return [_place(x) for x in tensors] == self.places

    @torch.inference_mode(False)
    @torch.no_grad()
    def remember(self, tensors: list[Tensor]) -> None:
        now = _numbers(tensors)
        self.before = now if self.before is None else self.before.copy_(now)

    @torch.inference_mode(False)
    @torch.no_grad()
    def ask(self, tensors: list[Tensor], often: bool) -> tuple[Tensor, torch.cuda.Event | None]:
        """A place, and when the answer is in it."""
        if self.stream is None:
            self._compare(tensors)
            return self.differs, None
        self.asked += 1
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):  # beside the forward, which leaves the GPU gaps
            if self.graph is None and often and self.asked > ASKED_BEFORE:
                self.graph = self._record(tensors)
            if self.graph is None:
                self._compare(tensors)
            else:
                self.graph.replay()
            event = torch.cuda.Event()
            event.record()
        return self.differs, event

    def _compare(self, tensors: list[Tensor]) -> None:
        assert self.before is not None
        self.differs.copy_(_numbers(tensors).ne(self.before).any(), non_blocking=True)

    def _record(self, tensors: list[Tensor]) -> torch.cuda.CUDAGraph:
        self.recorded = [x.detach() for x in tensors]
        graph = torch.cuda.CUDAGraph()
        collecting = gc.isenabled()
        gc.disable()  # what a collection would free now could end the recording
        try:
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._compare(self.recorded)
            finally:
                graph.capture_end()
        finally:
            if collecting:
                gc.enable()
        return graph


def _place(x: Tensor) -> tuple[object, ...]:
    return x.data_ptr(), x.shape, x.dtype


def _numbers(tensors: Sequence[Tensor]) -> Tensor:
    """Norm and sum of each, which a change of signs alone does not both leave; as bits, so that a
    NaN is the same as itself. Of 16-bit weights, which are many, the sum of all bits, two values at
    a time: a quarter of the work.
    """
    dtype, bits = torch.float64, torch.int64  # one small change shows in the norm of a whole stack
    if tensors[0].device.type == "mps":  # has no doubles
        dtype, bits = torch.float32, torch.int32
        tensors = [part for x in tensors for part in x]
    halves = [x for x in tensors if _in_pairs(x)]
    others = [x if x.is_floating_point() else x.to(dtype) for x in tensors if not _in_pairs(x)]
    by_dtype: dict[torch.dtype, list[Tensor]] = {}  # those of one dtype are few kernels
    for x in others:
        by_dtype.setdefault(x.dtype, []).append(x)
    numbers = [x for some in by_dtype.values() for x in torch._foreach_norm(some, 2, dtype)]
    numbers += [x.sum(dtype=dtype) for x in others]
    found = [x.view(torch.int32).sum(dtype=torch.int64).to(bits) for x in halves]
    return torch.stack([x.view(bits) for x in numbers] + found)


def _in_pairs(x: Tensor) -> bool:
    whole = x.dim() > 0 and bool(x.is_contiguous()) and x.shape[-1] % 2 == 0
    return whole and x.element_size() == 2 and int(x.storage_offset()) % 2 == 0
