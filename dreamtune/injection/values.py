"""Whether values are others than they were: what is written through `.data`, as PEFT's fusing and
diffusers' EMA do, changes no version.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Values:
    """A number for each of some tensors that tells its values from others, where the tensors are.

    `ask` compares two without waiting for a GPU; the answer is there when the GPU has come to it.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        by_device: dict[torch.device, list[Tensor]] = {}
        for x in tensors:
            if x.device.type != "meta":
                by_device.setdefault(x.device, []).append(x.detach())
        self.numbers = {device: _numbers(device, some) for device, some in by_device.items()}

    def ask(self, before: Values) -> Answer:
        return Answer(self, before)


class Answer:
    """Whether `values` are those of before; to be awaited once there is nothing better to do."""

    def __init__(self, values: Values, before: Values) -> None:
        self.known = values.numbers.keys() == before.numbers.keys()
        self.said: list[Tensor] = []
        self.events: list[torch.cuda.Event] = []
        for device, numbers in values.numbers.items() if self.known else ():
            old = before.numbers[device]
            if old.shape != numbers.shape:
                self.known = False
                return
            self._tell(numbers.ne(old).any())

    def _tell(self, differs: Tensor) -> None:
        if differs.device.type != "cuda":
            self.said.append(differs)
            return
        place = torch.empty((), dtype=torch.bool, pin_memory=True)
        self.said.append(place.copy_(differs, non_blocking=True))
        self.events.append(torch.cuda.Event())
        self.events[-1].record(torch.cuda.current_stream(differs.device))

    @property
    def soon(self) -> bool:
        """Whether there is something to wait for."""
        return bool(self.events)

    def same(self) -> bool:
        for event in self.events:
            event.synchronize()
        return self.known and not any(bool(x) for x in self.said)


def _numbers(device: torch.device, tensors: list[Tensor]) -> Tensor:
    """Norm and sum of each, which a change of signs alone does not both leave; as bits, so that a
    NaN is the same as itself.
    """
    dtype, bits = torch.float64, torch.int64  # one small change shows in the norm of a whole stack
    if device.type == "mps":  # has no doubles
        dtype, bits = torch.float32, torch.int32
        tensors = [part for x in tensors for part in x]
    by_dtype: dict[torch.dtype, list[Tensor]] = {}  # those of one dtype are few kernels
    for x in tensors:
        x = x if x.is_floating_point() else x.to(dtype)
        by_dtype.setdefault(x.dtype, []).append(x)
    numbers = [x for some in by_dtype.values() for x in torch._foreach_norm(some, 2, dtype)]
    numbers += [x.sum(dtype=dtype) for some in by_dtype.values() for x in some]
    return torch.stack(numbers).view(bits)
