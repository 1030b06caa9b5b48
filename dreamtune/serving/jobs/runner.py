"""The thread that trains: one wave at a time, of all jobs that may train together."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dreamtune.fields import UnreadableFile
from dreamtune.serving.jobs.memory import Needs, Room, device_of, kind_of, lacking, room
from dreamtune.serving.jobs.process import LOG, RECORD, ROOM, Child
from dreamtune.serving.jobs.reports import Reports
from dreamtune.serving.jobs.store import (
    CANCEL,
    PROGRESS,
    RUN,
    WAVES,
    Job,
    Store,
    read_object,
)
from dreamtune.training.output import say
from dreamtune.training.records import METRICS
from dreamtune.training.run_folder import checkpoints, step_of

DEATHS = 3  # in a row without a step saved: then a job has failed
ALONE = 2  # deaths after which a job trains by itself: another of its wave may be to blame
ROOM_EVERY = 5.0  # seconds between looks at the memory while a wave waits for it
SILENT = 3600.0  # loading a base or sampling on a slow machine says nothing for long
LONGEST = 300.0  # the same, after waves that found too little when they began
PATIENCE = 5  # times `gather` that the first of a wave waits for others


class Runner(threading.Thread):
    """on_done: called with name and adapter file of each job that is done, by this thread.

    Args:
        wave: jobs at most.
        gather: seconds that a wave waits for more jobs after the last that came.
        silent: seconds without a sign of the process after which it hangs, and is ended.
        poll: seconds between looks at the process.
        room_of: what is free on a device.
    """

    def __init__(
        self,
        store: Store,
        on_done: Callable[[str, Path], None],
        *,
        wave: int,
        gather: float,
        silent: float = SILENT,
        poll: float = 0.25,
        room_of: Callable[[torch.device], Room] = room,
    ) -> None:
        super().__init__(name="dreamtune-jobs", daemon=True)
        self.store, self.room_of = store, room_of
        self.reports = Reports(store, on_done)
        self.wave, self.gather, self.poll, self.silent = wave, gather, poll, silent
        self.needs = Needs(store.folder)
        self.child: Child | None = None
        self.jobs: list[str] = []  # of the wave
        self.look_again, self.shorts = 0.0, 0  # when; waves in a row that had too little memory
        self.tidy()
        self.wake, self.ending = threading.Event(), threading.Event()

    def tidy(self) -> None:
        """Removes what is left of waves that none of the jobs is in any more."""
        used = {job.wave for job in self.store.all("running")}
        for folder in (self.store.folder / WAVES).glob("*"):
            with contextlib.suppress(UnreadableFile):
                child = Child.again(folder)
                if folder.name not in used and not (child and child.alive()):
                    shutil.rmtree(folder, ignore_errors=True)

    def run(self) -> None:
        while not self.ending.is_set():
            self.turn()
            self.wake.wait(self.poll)
            self.wake.clear()

    def turn(self) -> None:
        """One look. What goes wrong, such as a full disk, must not end the thread."""
        try:
            if self.child is None:
                self.begin()
            else:
                self.watch(self.child)
        except Exception:
            say(f"Training jobs: {traceback.format_exc()}")
            self.ending.wait(5)

    def stop(self, grace: float) -> None:
        """Asks the process to save and end, for at most `grace` seconds; its jobs stay running."""
        self.ending.set()
        self.wake.set()
        if self.is_alive():
            self.join()
        child = self.child
        if child is None:
            return
        child.interrupt()
        until = time.monotonic() + grace
        while child.alive() and time.monotonic() < until:
            time.sleep(0.05)
        self.report_all()
        for id in self.left():
            self.store.tell(id, "interrupted", message="the server stops; it goes on later")

    def begin(self) -> None:
        """The wave that was running when the server ended, else the oldest jobs that wait."""
        running = self.store.all("running")
        if running:
            wave = running[0].wave or new_wave()
            self.jobs = [job.id for job in running if (job.wave or wave) == wave]
            folder = self.store.folder / WAVES / wave
            with contextlib.suppress(UnreadableFile):
                self.child = Child.again(folder)
            if self.child is not None:  # alive or not: `watch` tells
                self.reports.recall(self.jobs)
                return
        else:
            wave, self.jobs = new_wave(), self.gathered()
        if self.jobs and self.has_room():
            self.launch(wave)

    def gathered(self) -> list[str]:
        """The oldest job and those of its kind, when none has come for a while."""
        waiting = self.store.all("waiting")
        if not waiting:
            return []
        first = waiting[0]
        if first.deaths >= ALONE:
            return [first.id]
        kind = kind_of(first.settings)
        found = [j for j in waiting if j.deaths < ALONE and kind_of(j.settings) == kind]
        found = found[: self.wave]
        until = min(found[-1].created + self.gather, first.created + PATIENCE * self.gather)
        if len(found) < self.wave and time.time() < until:
            return []
        return [job.id for job in found]

    def has_room(self) -> bool:
        """Whether the device has it; else the jobs wait or are refused, with the numbers."""
        if time.monotonic() < self.look_again:
            return False
        settings = self.store.get(self.jobs[0]).settings
        try:
            device = device_of(settings)
            here = self.room_of(device)
        except ValueError as error:  # the GPU that the server was started with is gone
            self.refuse(str(error))
            return False
        lack = lacking(self.needs.of(settings, device), here, device)
        if lack is None:
            return True
        text, never = lack
        if never:
            self.refuse(text)
        else:
            self.wait_for_room(text)
        return False

    def refuse(self, text: str) -> None:
        with self.store.mutex:
            for id in self.left():
                self.store.end(id, "failed", message=text)

    def wait_for_room(self, text: str) -> None:
        self.look_again = time.monotonic() + ROOM_EVERY
        with self.store.mutex:
            for id in self.left():
                before = self.store.get(id)
                self.store.change(id, message=text)
                if not before.message:  # the numbers change all the time
                    self.store.tell(id, "waiting", message=text)

    def launch(self, wave: str) -> None:
        """Jobs that ended meanwhile are left out."""
        with self.store.mutex:  # a job that is cancelled now is either left out, or told so
            for id in filter(self.cancelling, self.jobs):
                self.store.end(id, "cancelled")
            self.jobs = self.left()
            for id in self.jobs:
                job = self.store.get(id)
                values: dict[str, Any] = {"started": job.started or time.time()}
                self.store.change(id, state="running", wave=wave, message="", **values)
        if not self.jobs:
            return
        self.reports.recall(self.jobs)
        for id in self.jobs:  # of a process before, whose last steps are done again
            (self.store.place(id) / PROGRESS).unlink(missing_ok=True)
        self.child = Child.start(self.store.folder / WAVES / wave, self.jobs)
        for id in self.jobs:
            self.store.tell(id, "started", jobs=len(self.jobs), step=self.saved_step(id))

    def watch(self, child: Child) -> None:
        """Tells what is new. When the process has ended, so has the wave."""
        alive = child.alive()  # first: what it wrote before it ended is then seen below
        self.learn(child)  # on a GPU it is told before the first step
        self.report_all()
        if alive:
            if time.time() - self.last_sign(child) > self.silent:
                child.kill()
            return
        short = self.short(child)
        self.shorts = self.shorts + 1 if short else 0
        self.look_again = time.monotonic() + min(LONGEST, ROOM_EVERY * 2**self.shorts) * short
        with self.store.mutex:  # a job is cancelled before this, or after
            left = self.left()
            for id in left:
                self.left_by(child, id, short)
        child.forget()
        if not left:
            shutil.rmtree(child.folder, ignore_errors=True)
        self.child, self.jobs = None, []

    def last_sign(self, child: Child) -> float:
        """When the process last wrote something, or was started."""
        files = [child.folder / RECORD, child.folder / LOG]
        for id in self.jobs:
            place = self.store.place(id)
            files += [place / PROGRESS, place / RUN, place / RUN / METRICS]
        return max(file.stat().st_mtime for file in files if file.exists())

    def left(self) -> list[str]:
        """The jobs of the wave that are not over."""
        return [id for id in self.jobs if not self.store.get(id).over]

    def report_all(self) -> None:
        for id in self.left():
            self.reports.report(id)

    def learn(self, child: Child) -> None:
        """What the wave was measured to need."""
        with contextlib.suppress(UnreadableFile, KeyError, TypeError):
            if found := read_object(child.folder / ROOM):
                settings = self.store.get(self.jobs[0]).settings
                self.needs.learn(settings, int(found["needed"]))

    def left_by(self, child: Child, id: str, short: bool) -> None:
        """A job that its process did not bring to an end goes on with the next one."""
        job = self.store.get(id)
        if self.cancelling(id):
            self.store.end(id, "cancelled")
        elif short:
            self.store.change(id, state="waiting", wave=None)  # `has_room` has its numbers now
        elif not child.interrupted:
            self.died(job, self.store.told(child.end_text()))

    def short(self, child: Child) -> bool:
        """Whether it ended for want of memory, before it trained."""
        with contextlib.suppress(UnreadableFile):
            return bool((read_object(child.folder / ROOM) or {}).get("short"))
        return False

    def died(self, job: Job, how: str) -> None:
        step = self.saved_step(job.id)
        deaths = 1 if step > job.death_step else job.deaths + 1
        if deaths >= DEATHS:
            text = f"its process {how}\nIt was tried {deaths} times from step {step}."
            self.store.end(job.id, "failed", message=text, deaths=deaths)
            return
        values: dict[str, Any] = {"deaths": deaths, "death_step": step}
        if deaths >= ALONE:
            values |= {"state": "waiting", "wave": None}
        self.store.change(job.id, **values)
        self.store.tell(job.id, "retried", message=f"its process {how}", step=step)

    def cancelling(self, id: str) -> bool:
        return (self.store.place(id) / CANCEL).is_file()

    def saved_step(self, id: str) -> int:
        return max(map(step_of, checkpoints(self.store.place(id) / RUN)), default=0)


def new_wave() -> str:
    return uuid.uuid4().hex[:16]
