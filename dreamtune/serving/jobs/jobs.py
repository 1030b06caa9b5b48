"""Training jobs as a server offers them: submitted, listed, followed, cancelled, resumed.

with Jobs("jobs", "embedded", on_done=print) as jobs:
    job = jobs.submit([("1.jpg", data)], "a sks dog")
    for event in jobs.follow(job.id): ...
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dreamtune.serving.jobs import asked, memory
from dreamtune.serving.jobs.asked import Files, Limits
from dreamtune.serving.jobs.reports import adapter_of
from dreamtune.serving.jobs.runner import SILENT, Runner
from dreamtune.serving.jobs.store import CANCEL, RUN, Job, Store

GATHER = 2.0  # seconds


class Full(ValueError):
    """As many jobs wait as may: to be tried again later."""


class Over(ValueError):
    """A job that has ended cannot be cancelled."""


class Jobs:
    """All jobs of a folder, which this process alone has until `stop`.

    Args:
        folder: made where it is not there; a folder of it is a job's (`store`).
        base: what `dreamtune train` takes as a base.
        on_done: told name and adapter file of each job that is done, by the thread that watches.
        settings: of the runs, for all jobs: the names of `dreamtune.config.Config`.
        limits: of what is asked.
        taken: names that an adapter may not get, those that are served already.
        gather: seconds that a wave waits for more jobs after the last that came.
        silent: seconds without a sign of the process after which it is ended, and tried again.

    Raises ValueError for settings that no run can have, and for a folder that another process has.
    """

    def __init__(
        self,
        folder: str | Path,
        base: str,
        on_done: Callable[[str, Path], None],
        *,
        settings: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        taken: Callable[[], Collection[str]] = tuple,
        gather: float = GATHER,
        silent: float = SILENT,
        poll: float = 0.25,
        room_of: Callable[[torch.device], memory.Room] = memory.room,
    ) -> None:
        self.limits, self.taken = limits or Limits(), taken
        self.common = asked.settings(base, settings or {}, {}, self.limits)
        self.base = base
        self.stopping = threading.Event()  # who follows a job is let go
        self.checking = threading.Lock()  # one request's pictures are decoded at a time
        self.store = Store(folder)
        self.runner = Runner(
            self.store,
            on_done,
            wave=self.limits.wave,
            gather=gather,
            silent=silent,
            poll=poll,
            room_of=room_of,
        )

    def start(self) -> None:
        """Trains from here on, first what an earlier server left."""
        self.runner.start()

    def stop(self, grace: float = 60.0) -> None:
        """Nothing more is taken; what trains is saved and goes on with the next `Jobs` here."""
        self.stopping.set()
        self.runner.stop(grace)
        self.store.close()

    def __enter__(self) -> Jobs:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def submit(self, photos: Files, prompt: str, name: str | None = None, **more: Any) -> Job:
        """A new job, which waits for the next wave.

        Args:
            photos: file name of the client, contents; the name is for messages only.
            prompt: of the photos, with the identifier: "a sks dog".
            name: of the adapter.
            more: of `asked.ASKED`: `method`, `max_train_steps`, `seed`, ...

        Raises ValueError for what cannot be trained, before anything is written; `Full`.
        """
        more = {key: value for key, value in more.items() if value is not None}
        id = secrets.token_hex(8)
        words = asked.subject_words(prompt, more, self.limits)
        wanted = {**more, "instance_prompt": asked.one_line("prompt", prompt, self.limits)}
        settings = asked.settings(self.base, self.common, wanted, self.limits)
        device = memory.device_of(settings)
        needed = self.runner.needs.of(settings, device)
        lack = memory.lacking(needed, self.runner.room_of(device), device)
        if lack and lack[1]:
            raise ValueError(lack[0])
        asked.adapter_name(name, words, id, self.names())
        self.refuse_full()
        with self.checking:
            files = asked.photo_files(photos, self.limits)
        with self.store.mutex:  # again, with the door closed behind
            self.refuse_full()
            job = Job(
                id=id,
                name=asked.adapter_name(name, words, id, self.names()),
                prompt=wanted["instance_prompt"],
                photos=len(files),
                settings=settings,
                created=time.time(),
            )
            self.store.add(job, files)
        self.runner.wake.set()
        return job

    def refuse_full(self) -> None:
        waiting = len(self.store.all("waiting"))
        if waiting >= self.limits.waiting:
            raise Full(
                f"{waiting} jobs wait, at most {self.limits.waiting} may: try again when one has "
                "begun."
            )

    def names(self) -> set[str]:
        """Those that a new adapter may not get: of what is served, and of jobs that may yet be."""
        own = {job.name for job in self.store.all("waiting", "running", "done")}
        return own | set(self.taken())

    def list(self) -> list[Job]:
        """All, in the order they came."""
        return self.store.all()

    def get(self, id: str) -> Job:
        """Raises KeyError for an id that is none."""
        return self.store.get(id)

    def adapters(self) -> dict[str, Path]:
        """Name -> file of what has been trained: what a server that starts has to serve."""
        done = [(job.name, adapter_of(self.store, job.id)) for job in self.store.all("done")]
        return {name: path for name, path in done if path.is_file()}

    def sample(self, id: str, step: int) -> Path | None:
        """The sheet of sample pictures of a scoring, None where there is none."""
        path = self.store.place(self.get(id).id) / RUN / "samples" / f"{int(step):06d}.png"
        return path if path.is_file() else None

    def events(self, id: str, after: int = 0) -> Sequence[dict[str, Any]]:
        """What has happened to a job, of the events numbered above `after`; returns at once."""
        return self.store.events(id, after)

    def follow(
        self, id: str, after: int = 0, timeout: float | None = None
    ) -> Iterator[dict[str, Any]]:
        """The same as it happens, until the job is over; for threads. timeout: seconds in all."""
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            over = self.get(id).over  # before the events: the last is told when it is
            for event in self.events(id, after):
                after = event["n"]
                yield event
            if over or self.stopping.is_set() or (until is not None and time.monotonic() > until):
                return
            time.sleep(self.runner.poll)

    def cancel(self, id: str) -> Job:
        """A job that waits is cancelled at once; one that trains leaves its wave at the next step,
        the others go on. What it had saved stays.

        Raises KeyError for an id that is none, `Over` for a job that has ended.
        """
        with self.store.mutex:
            job = self.store.get(id)
            if job.over:
                raise Over(f"job {id} is {job.state}: it cannot be cancelled any more.")
            if job.state == "waiting":
                return self.store.end(id, "cancelled", message="before it began")
            (self.store.place(id) / CANCEL).touch()
            return job
