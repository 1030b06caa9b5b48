"""The process that trains a wave of jobs: `python -m dreamtune.serving.jobs.child FOLDER`.

FOLDER/wave.json names the jobs, each with its own folder beside. What it tells lies in files: the
run's own, progress.json between its scorings, outcome.json at the end of each job, and room.json
with what it needs. Signals save and end it, as `dreamtune train`; started again it goes on.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path

import psutil
import torch

from dreamtune.config import Config
from dreamtune.evaluation.validation import BasePictures
from dreamtune.metrics.table import scores_of
from dreamtune.models.base import Base
from dreamtune.serving.jobs.asked import config_of
from dreamtune.serving.jobs.memory import PROCESS
from dreamtune.serving.jobs.process import RECORD, ROOM
from dreamtune.serving.jobs.store import (
    CANCEL,
    JOB,
    OUTCOME,
    PHOTOS,
    PROGRESS,
    RUN,
    read_object,
    write_json,
)
from dreamtune.training.defaults import device_and_dtype
from dreamtune.training.fit import USABLE, one_sampling, one_step, peak
from dreamtune.training.interrupts import Interrupted, Interrupts
from dreamtune.training.lock import FolderLock
from dreamtune.training.output import say
from dreamtune.training.resume import together
from dreamtune.training.run import Run
from dreamtune.training.train import base_of, train_wave, waves
from dreamtune.training.wave import Wave

CANCELLED = "cancelled"
NO_ROOM = 75  # exit status, EX_TEMPFAIL
EVERY = 1.0  # seconds between two words of progress


class NoRoom(Exception):
    """The device has too little memory free. needed: bytes, at least."""

    def __init__(self, needed: float, free: int) -> None:
        super().__init__(f"One slot needs {needed:,.0f} bytes or more, {free:,} are free.")
        self.needed = int(needed)


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0])
    with waited(folder):
        record = read_object(folder / RECORD) or {}
        jobs = {id: folder.parents[1] / id for id in record["jobs"]}
        jobs = {id: place for id, place in jobs.items() if not (place / OUTCOME).is_file()}
        try:
            train_jobs(jobs, folder / ROOM)
            return 0
        except Interrupted as error:
            say(str(error))
            return 128 + error.signal
        except NoRoom as error:
            write_json(folder / ROOM, {"needed": error.needed + PROCESS["cuda"], "short": True})
            say(str(error))
            return NO_ROOM
        except ValueError as error:  # of others the server keeps the last lines
            say(" ".join([str(error), *getattr(error, "__notes__", [])]))
            return 1


@contextlib.contextmanager
def waited(folder: Path) -> Iterator[None]:
    """Until another process of this wave has ended: one whose server was killed before it had
    noted that it had started it.
    """
    while True:
        try:
            lock = FolderLock(folder)
            break
        except ValueError:
            time.sleep(0.2)
    try:
        yield
    finally:
        lock.release()


def train_jobs(folders: Mapping[str, Path], room_file: Path) -> None:
    """Trains them as slots of waves; a job that cannot be trained fails alone."""
    with Interrupts() as interrupts, ExitStack() as stack:
        runs: dict[str, Run] = {}
        for id, place in folders.items():
            if cancelled(place):
                continue
            with failing(place):
                job = read_object(place / JOB) or {}
                config = config_of(job["settings"], str(place / PHOTOS), str(place / RUN))
                runs[id] = stack.enter_context(closing(Run(config)))
        together(runs.values())
        if not runs:
            return
        common = next(iter(runs.values())).given
        base, free = loaded(common, [folders[id] for id in runs])
        runs = opened(runs, base, folders)
        if not runs:
            return
        if base.device.type == "cuda":
            check_room(base, next(iter(runs.values())), free, room_file)
        pictures = BasePictures((r.evaluator.prompts, r.evaluator.seeds) for r in runs.values())
        for part in waves(common, base, runs):
            left = {id: run for id, run in part.items() if not cancelled(folders[id])}
            if left:
                try:
                    train_wave(JobWave(base, left, folders, pictures), interrupts)
                except KeyboardInterrupt:
                    raise Interrupted("Stopped, saved.", interrupts.signal) from None
        if base.device.type == "cpu":
            write_json(room_file, {"needed": peak_of_process()})


def loaded(config: Config, places: list[Path]) -> tuple[Base, int]:
    """The base, and the bytes that were free on its device before. One that cannot be loaded fails
    every job; one that does not fit, none.
    """
    device, _ = device_and_dtype(config)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    with ExitStack() as stack:
        for place in places:
            stack.enter_context(failing(place, go_on=False))
        try:
            return base_of(config), free
        except torch.OutOfMemoryError:
            raise NoRoom(free, free) from None
    raise AssertionError


def opened(runs: Mapping[str, Run], base: Base, folders: Mapping[str, Path]) -> dict[str, Run]:
    """Those that can be trained on the base."""
    found: dict[str, Run] = {}
    for id, run in runs.items():
        first = next(iter(found.values()), None)
        with failing(folders[id]):
            run.open(base, first.evaluator.scorers if first else None)
            found[id] = run
    return found


def check_room(base: Base, run: Run, free: int, room_file: Path) -> None:
    """Measures one slot's step and sampling, and notes what is needed for the server. free: bytes
    before the base, with this process's own context. Raises NoRoom where they do not fit.
    """
    held = free - torch.cuda.mem_get_info(base.device)[0]
    try:
        needed = held + peak(base, lambda: one_sampling(base, run))
        needed += peak(base, lambda: one_step(base, [run]))
    except torch.OutOfMemoryError:
        raise NoRoom(free, free) from None
    if needed > free * USABLE:
        raise NoRoom(needed, free)
    write_json(room_file, {"needed": int(needed) + PROCESS["cuda"]})


def peak_of_process() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().rss)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (
        0 if sys.platform == "darwin" else 10
    )


@contextlib.contextmanager
def failing(place: Path, go_on: bool = True) -> Iterator[None]:
    """A ValueError inside is the end of that job, and of no other."""
    try:
        yield
    except ValueError as error:
        fail(place, str(error))
        if not go_on:
            raise


def cancelled(place: Path) -> bool:
    """Whether the job was cancelled; then that is its outcome."""
    if not (place / CANCEL).is_file():
        return False
    write_json(place / OUTCOME, {"state": CANCELLED})
    return True


def fail(place: Path, message: str) -> None:
    say(f"{place.name} failed: {message}")
    write_json(place / OUTCOME, {"state": "failed", "message": message})


class JobWave(Wave):
    """A wave that jobs leave when they are cancelled, and that tells how each goes and ends."""

    def __init__(
        self, base: Base, runs: dict[str, Run], folders: Mapping[str, Path], pictures: BasePictures
    ) -> None:
        self.folders, self.told = folders, 0.0  # at once after the first step
        super().__init__(base, runs, pictures=pictures)
        self.first = time.monotonic()

    def show(self, k: int) -> None:
        super().show(k)
        for id in self.runs:
            if id not in self.failed and (self.folders[id] / CANCEL).is_file():
                self.failed[id] = CANCELLED
        now = time.monotonic()
        if now - self.told >= EVERY:
            self.told = now
            self.progress(now - self.first)

    def progress(self, seconds: float) -> None:
        total = self.config.max_train_steps
        left = seconds / (self.k - self.start) * (total - self.k)
        for id, slot in self.slots.items():
            loss = slot.loss if math.isfinite(slot.loss) else None
            values = {"step": self.k, "steps": total, "loss": loss, "seconds_left": round(left, 1)}
            write_json(self.folders[id] / PROGRESS, values)

    def retire(self, k: int) -> None:
        before = {*self.results, *self.failed}
        there = set(self.runs)
        super().retire(k)
        for id, result in self.results.items():
            if id not in before:
                outcome = {"state": "done", "step": result.best_step, "reason": result.reason}
                outcome["scores"] = scores_of(result.scores)
                write_json(self.folders[id] / OUTCOME, outcome)
        for id in there & self.failed.keys():
            if self.failed[id] == CANCELLED:
                write_json(self.folders[id] / OUTCOME, {"state": CANCELLED})
            else:
                fail(self.folders[id], self.failed[id])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
