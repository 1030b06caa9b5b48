"""Independent work side by side: on streams of their own where a CUDA graph is recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

STREAMS = 2  # that which records is one; more were no faster

Result = TypeVar("Result", bound="Sequence[Tensor | None]")


@cache
def more_streams(device: torch.device) -> list[torch.cuda.Stream]:
    """Always the same ones: each stream that multiplies holds memory for it, 32 MiB on a large
    GPU.
    """
    return [torch.cuda.Stream(device) for _ in range(STREAMS - 1)]


def beside(tasks: Sequence[Callable[[], Result]], device: torch.device) -> list[Result]:
    """The results of the tasks. While a CUDA graph is recorded, they take turns on the stream that
    records it and on others, and so do their backwards.

    A task is a chain of small kernels that wait for each other, most of the GPU idle; in a replay
    such chains run at the same time. Run eagerly they would wait for Python all the same.
    """
    recording = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if not recording or len(tasks) == 1:
        return [task() for task in tasks]
    here = torch.cuda.current_stream(device)
    others = more_streams(here.device)
    for stream in others:
        stream.wait_stream(here)  # before a task is there, which they need not wait for
    results = []
    for index, task in enumerate(tasks):
        turn = index % STREAMS
        with torch.cuda.stream(others[turn - 1]) if turn else nullcontext():
            result = task()
        results.append(result)
        for x in result if turn else ():
            if x is not None:
                x.record_stream(here)  # its memory is not for its own stream to reuse meanwhile
    for stream in others:
        here.wait_stream(stream)
    return results
