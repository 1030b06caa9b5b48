"""What must not hang: a test of it fails instead of standing still. Not a measure of speed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

LIMIT = 60  # seconds: far from any machine's time for it, near none of what never ends


@contextmanager
def no_hang(seconds: int = LIMIT) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> NoReturn:
        raise TimeoutError(f"it had not ended after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
