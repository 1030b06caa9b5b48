"""Work side by side while a graph is recorded: on which streams, and what waits for what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from dreamtune.injection import streams
from dreamtune.injection.streams import beside

TASKS = 5


class Stream:
    """A stream of no device, which writes down what is asked of it."""

    def __init__(self, name: str, log: list[Any]) -> None:
        self.name, self.log, self.device = name, log, torch.device("cuda:0")

    def wait_stream(self, other: Stream) -> None:
        self.log.append((self.name, "waits for", other.name))


class Made:
    """A tensor of a task."""

    def __init__(self) -> None:
        self.recorded: list[str] = []

    def record_stream(self, stream: Stream) -> None:
        self.recorded.append(stream.name)


def recorded(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[list[Made]]]:
    """What happens where a graph is recorded, in order, and the results."""
    log: list[Any] = []
    current = [Stream("here", log)]
    others = [Stream(f"other {i}", log) for i in range(streams.STREAMS - 1)]

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(streams, "more_streams", lambda device: others)

    def task(index: int) -> list[Made]:
        log.append((index, "runs on", current[-1].name))
        return [Made()]

    tasks = [lambda index=index: task(index) for index in range(TASKS)]
    return log, beside(tasks, torch.device("cuda"))  # type: ignore[type-var]


def test_the_recording_stream_is_one_of_the_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each that multiplies holds a workspace: no more than there are kinds of work at once."""
    log, results = recorded(monkeypatch)
    places = {what[0]: what[2] for what in log if what[1] == "runs on"}
    assert [places[i] for i in range(TASKS)] == ["here", "other 0", "here", "other 0", "here"]
    assert [made.recorded for (made,) in results] == [[], ["here"], [], ["here"], []]


def test_the_other_stream_waits_for_what_was_before_and_for_no_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log, _ = recorded(monkeypatch)
    waits = [(i, what) for i, what in enumerate(log) if what[1] == "waits for"]
    assert waits == [
        (0, ("other 0", "waits for", "here")),
        (TASKS + 1, ("here", "waits for", "other 0")),
    ]


def test_eagerly_they_run_one_after_the_other() -> None:
    results = beside([lambda i=i: [torch.full((), i)] for i in range(3)], torch.device("cpu"))
    assert [int(x) for (x,) in results] == [0, 1, 2]
