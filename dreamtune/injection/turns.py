"""Whose turn it is, of the threads that use one model."""

from __future__ import annotations

import sys
import threading
from types import FrameType, TracebackType


class Turns:
    """A lock that its thread may take again, as `RLock`; a call holds it for no longer than it
    runs: torch calls no hook after a forward that a `KeyboardInterrupt` has ended.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.owner = 0
        self.holds: list[FrameType | None] = []  # of a block, until its end: None

    def acquire(self, call: FrameType | None = None) -> None:
        """call: the frame that holds it."""
        me = threading.get_ident()
        with self.changed:
            while self._held() and self.owner != me:
                self.changed.wait(0.2)  # nobody tells of a call that was ended
            self.owner = me
            self.holds.append(call)

    def release(self, call: FrameType | None = None) -> None:
        """Of a call that does not hold it: nothing."""
        with self.changed:
            if self.owner != threading.get_ident() or not self._held(call):
                return
            if self.holds[-1] is call:
                self.holds.pop()
            if not self.holds:
                self.changed.notify_all()

    def _held(self, call: FrameType | None = None) -> bool:
        """Whether somebody holds it, without those that no longer run. call: one that does."""
        if not self.holds or (call is not None and self.holds[-1] is call):
            return bool(self.holds)
        frame = sys._current_frames().get(self.owner)
        if frame is None:  # the thread is over
            self.holds.clear()
        running = set()
        while frame is not None:
            running.add(frame)
            frame = frame.f_back
        while self.holds and self.holds[-1] is not None and self.holds[-1] not in running:
            self.holds.pop()
        return bool(self.holds)

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.release()


def caller() -> FrameType:
    """The call of the model that runs the hook which asks."""
    frame = sys._getframe(2)
    if frame.f_code.co_name == "inner" and frame.f_back is not None:  # torch's, left before hooks
        return frame.f_back  # that are always called
    return frame
