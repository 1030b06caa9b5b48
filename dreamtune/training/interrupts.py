"""Ctrl-C and the signals that ask a process to end, at a moment when a run can be saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Ctrl-C; `kill`, docker stop; a terminal that closes; what Slurm's --signal is mostly set to.
SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
]


class Interrupted(KeyboardInterrupt):
    """The run was stopped; the message says what was saved and how to go on. signal: its number."""

    def __init__(self, message: str = "", signal: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signal = int(signal)


class Interrupts:
    """`SIGNALS` raise KeyboardInterrupt, but not in the middle of a `held` block: there, after it.

    signal: the number of the last one.
    """

    def __init__(self) -> None:
        self.holding = self.pending = False
        self.unheld = 0  # raised since the last `held` block
        self.signal = int(signal.SIGINT)
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in SIGNALS:
            # nohup: the run is to outlive its terminal
            if number != signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN:
                continue
            try:
                self.before[number] = signal.signal(number, self.handle)
            except ValueError:
                break  # not the main thread: there are no signals to catch
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if isinstance(error, KeyboardInterrupt) and not isinstance(error, Interrupted):
            raise Interrupted("Stopped before the first step.", self.signal) from None

    def handle(self, number: int, frame: object) -> None:
        self.signal = number
        if self.holding:
            self.pending = True
            return
        self.unheld += 1
        # Signals come in pairs (a launcher passes them on, a closing terminal sends two): a second
        # one must not fall between the first and the saving. A third is a person's.
        if self.unheld != 2:
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        self.holding, self.unheld = True, 0
        try:
            yield
        finally:
            self.holding = False
        if self.pending:
            self.pending = False
            raise KeyboardInterrupt
