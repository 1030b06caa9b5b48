"""Independent work side by side: on streams of their own where a CUDA graph is recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

STREAMS = 2  # more were no faster, and each has a workspace of its own for products

Result = TypeVar("Result", bound="Sequence[Tensor | None]")


@cache
def streams_of(device: torch.device) -> list[torch.cuda.Stream]:
    """Always the same ones: each stream that multiplies holds memory for it."""
    return [torch.cuda.Stream(device) for _ in range(STREAMS)]


def beside(tasks: Sequence[Callable[[], Result]], device: torch.device) -> list[Result]:
    """The results of the tasks. While a CUDA graph is recorded, each runs on a stream of its own,
    and so does its backward.

    A task is a chain of small kernels that wait for each other, most of the GPU idle; in a replay
    such chains run at the same time. Run eagerly they would wait for Python all the same.
    """
    recording = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if not recording or len(tasks) == 1:
        return [task() for task in tasks]
    here = torch.cuda.current_stream(device)
    streams = streams_of(here.device)
    results = []
    for index, task in enumerate(tasks):
        stream = streams[index % STREAMS]
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            results.append(task())
    for stream in streams:
        here.wait_stream(stream)
    for result in results:
        for x in result:
            if x is not None:
                x.record_stream(here)  # its memory is not for its own stream to reuse meanwhile
    return results
