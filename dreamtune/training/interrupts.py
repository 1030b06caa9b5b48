"""Ctrl-C and SIGTERM, at a moment when a run can be saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(KeyboardInterrupt):
    """The run was stopped and saved; the message says how to go on."""


class Interrupts:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt, but not in the middle of a `held` block: there,
    after it.
    """

    def __init__(self) -> None:
        self.holding = self.pending = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.handle)
        except ValueError:
            pass  # not the main thread: there are no signals to catch
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: object) -> None:
        if self.holding:
            self.pending = True
        else:
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
        if self.pending:
            self.pending = False
            raise KeyboardInterrupt
