"""Requests that wait to be drawn together: the oldest decides what is drawn, and those that can be
drawn with it go along.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from PIL import Image

from dreamtune.serving.backend import Row, Shape
from dreamtune.serving.errors import closing, full, late
from dreamtune.serving.metrics import Metrics

Draw = Callable[[Sequence[Row], Shape], Sequence[Image.Image | Exception]]


class Drawn(NamedTuple):
    """waited, drawn: seconds in the queue, and of the batch; batch: its rows."""

    image: Image.Image
    waited: float
    drawn: float
    batch: int


@dataclass(eq=False)
class Ticket:
    """A request that was accepted. answer: a `Drawn`, or an error. accepted: by the monotonic
    clock, in seconds, like `deadline`.
    """

    row: Row
    shape: Shape
    accepted: float
    deadline: float
    answer: Future[Drawn] = field(default_factory=Future)


class Queue:
    """Some threads draw, `workers` of them, a batch each; those of requests only wait.

    A batch is what waits in the shape of the oldest request, oldest first, at most `max_batch`. It
    is drawn when it is full, or when its oldest has waited for `wait` seconds; while all
    draw, the wait goes on. Whoever is too late, or has gone, is dropped before.
    """

    def __init__(
        self,
        draw: Draw,
        metrics: Metrics,
        *,
        wait: float,
        max_batch: int,
        max_queue: int,
        timeout: float,
        workers: int = 1,
    ) -> None:
        self.draw, self.metrics = draw, metrics
        self.wait, self.timeout = wait, timeout
        self.max_batch, self.max_queue = max_batch, max_queue
        self.waiting: list[Ticket] = []
        self.changed = threading.Condition()
        self.closed = False
        self.took = 1.0  # seconds of the last batch, for whoever is told to come back
        self.workers = [
            threading.Thread(target=self._work, name=f"dreamtune-drawing-{i}", daemon=True)
            for i in range(workers)
        ]
        metrics.watch_queue(lambda: len(self.waiting))

    def start(self) -> None:
        for worker in self.workers:
            worker.start()

    def submit(self, row: Row, shape: Shape) -> Ticket:
        """Raises Refused where too many wait, and once the queue is closed."""
        now = time.monotonic()
        ticket = Ticket(row, shape, now, now + self.timeout)
        with self.changed:
            if self.closed:
                raise closing()
            if len(self.waiting) >= self.max_queue:
                batches = -(-len(self.waiting) // self.max_batch)
                raise full(len(self.waiting), batches * self.took / len(self.workers))
            self.waiting.append(ticket)
            self.changed.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> bool:
        """Takes a request back; whether it was still waiting."""
        with self.changed:
            if ticket not in self.waiting:
                return False
            self.waiting.remove(ticket)
            ticket.answer.cancel()
            self.changed.notify_all()
        return True

    def close(self, patience: float | None = None) -> None:
        """No more are taken, and those that were are answered: within `patience` seconds, the rest
        by an error.
        """
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        until = None if patience is None else time.monotonic() + patience
        for worker in self.workers:
            if worker.is_alive():
                worker.join(None if until is None else max(0.0, until - time.monotonic()))
        with self.changed:
            left, self.waiting = self.waiting, []
        for ticket in left:
            if ticket.answer.set_running_or_notify_cancel():
                ticket.answer.set_exception(closing())

    @property
    def alive(self) -> bool:
        return all(worker.is_alive() for worker in self.workers)

    def _work(self) -> None:
        while batch := self._next():
            began = time.monotonic()
            try:
                found = self.draw([t.row for t in batch], batch[0].shape)
                if len(found) != len(batch):
                    raise RuntimeError(f"{len(found)} pictures of {len(batch)} rows")
            except BaseException as error:  # else everybody would wait for ever
                one = error if isinstance(error, Exception) else RuntimeError(repr(error))
                found = [one] * len(batch)
            self.took = took = time.monotonic() - began
            self.metrics.batch(len(batch), took)
            for ticket, picture in zip(batch, found):
                if isinstance(picture, Exception):
                    ticket.answer.set_exception(picture)
                    continue
                waited = began - ticket.accepted
                self.metrics.waited.observe(waited)
                ticket.answer.set_result(Drawn(picture, waited, took, len(batch)))

    def _next(self) -> list[Ticket]:
        """Waits for a batch; [] once the queue is closed and nothing waits."""
        with self.changed:
            while True:
                now = time.monotonic()
                self._drop_late(now)
                if not self.waiting:
                    if self.closed:
                        return []
                    self.changed.wait()
                    continue
                oldest = self.waiting[0]
                batch = [t for t in self.waiting if t.shape == oldest.shape][: self.max_batch]
                left = oldest.accepted + self.wait - now
                if left <= 0 or len(batch) == self.max_batch or self.closed:
                    break
                self.changed.wait(left)
            self.waiting = [t for t in self.waiting if t not in batch]
            # from here on it cannot be taken back: `cancel` holds the lock
            found = [t for t in batch if t.answer.set_running_or_notify_cancel()]
            return found or self._next()

    def _drop_late(self, now: float) -> None:
        for ticket in [t for t in self.waiting if t.deadline <= now]:
            self.waiting.remove(ticket)
            if ticket.answer.set_running_or_notify_cancel():
                ticket.answer.set_exception(late(self.timeout))
