"""What is on the disk of the jobs: a folder a job, named by its id.

    <id>/job.json       the job: written anew whole at each change
    <id>/events.jsonl   what has been told of it, a line an event, never rewritten
    <id>/photos/        as they came, under numbers
    <id>/run/           the run that trains it (`dreamtune train --resume_from_checkpoint latest`)
    waves/<wave>/       the process that trains several: wave.json, log.txt

Whatever ends the server, `job.json` is as it was before a change or as after it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import FiniteFloat, NonNegativeInt

from dreamtune.fields import UnreadableFile, checker, from_file, from_json
from dreamtune.files.whole import whole, whole_folder
from dreamtune.textfile import contents, read_json
from dreamtune.training.lock import FolderLock
from dreamtune.training.output import say

JOB, EVENTS, PHOTOS, RUN = "job.json", "events.jsonl", "photos", "run"
OUTCOME, PROGRESS, CANCEL = "outcome.json", "progress.json", "cancel"  # child, child, server
WAVES = "waves"
ID = re.compile("[0-9a-f]{16}")
HALF_MADE = re.compile(rf"\.{ID.pattern}\.(part|old)")
MAX_EVENTS = 1 << 26  # bytes of a job's file that are read

State = Literal["waiting", "running", "done", "failed", "cancelled"]
STATES: tuple[State, ...] = get_args(State)
ENDED = ("done", "failed", "cancelled")

_JOB = checker(
    {
        "id": str,
        "name": str,
        "prompt": str,
        "photos": NonNegativeInt,
        "settings": dict[str, Any],
        "created": FiniteFloat,
        "state": State,
        "started": FiniteFloat | None,
        "ended": FiniteFloat | None,
        "wave": str | None,
        "deaths": NonNegativeInt,
        "death_step": NonNegativeInt,
        "message": str,
        "best_step": NonNegativeInt | None,
        "scores": dict[str, FiniteFloat | None],
    },
    needed=("id", "name", "prompt", "photos", "settings", "created", "state"),
)
_EVENT = checker({"n": NonNegativeInt, "time": FiniteFloat, "kind": str}, others=True)


@dataclass(frozen=True)
class Job:
    """One subject that is to be trained. name: of the adapter, as it is served. settings: of the
    run, as `dreamtune train` takes them. created, started, ended: seconds since 1970. wave: of the
    process that trains it. deaths: how often in a row that ended without a step saved since
    `death_step`. message: why it waits or has failed.
    """

    id: str
    name: str
    prompt: str
    photos: int
    settings: dict[str, Any]
    created: float
    state: State = "waiting"
    started: float | None = None
    ended: float | None = None
    wave: str | None = None
    deaths: int = 0
    death_step: int = 0
    message: str = ""
    best_step: int | None = None
    scores: dict[str, float | None] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        return self.state in ENDED

    def public(self) -> dict[str, Any]:
        """What a client is told: no path, no process."""
        values = dataclasses.asdict(self)
        settings = values.pop("settings")
        for name in ("wave", "deaths", "death_step"):
            del values[name]
        return {
            **values,
            "method": settings.get("method"),
            "steps": settings.get("max_train_steps"),
            "seed": settings.get("seed"),
        }


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    with whole(path) as partial:
        partial.write_text(json.dumps(values, indent=1), encoding="utf-8")


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object that `write_json` wrote, None where there is no file. Raises UnreadableFile."""
    if not path.is_file():
        return None
    found = read_json(path, limit=1 << 20)
    if not isinstance(found, dict):
        raise UnreadableFile(f"`{path}` must hold names with values.")
    return found


class Events:
    """The events of one job, in memory and in its file: numbers from 1 on, without a gap."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.all: list[dict[str, Any]] = []
        if not path.is_file():
            return
        *lines, cut = contents(path, MAX_EVENTS).split(b"\n")
        for number, line in enumerate(lines, 1):
            place = f"line {number} of `{path}`"
            event = from_file(_EVENT, from_json(line, place), place)
            if event.get("n") != number:
                raise UnreadableFile(f"{place} has number {event.get('n')}.")
            self.all.append(event)
        if cut:  # by what ended the process that wrote it
            os.truncate(path, path.stat().st_size - len(cut))

    def add(self, kind: str, **data: Any) -> None:
        event = {"n": len(self.all) + 1, "time": round(time.time(), 3), "kind": kind, **data}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
        self.all.append(event)


class Store:
    """The jobs of a folder, by id in the order they came. Methods may be called by any thread.

    One process has the folder: ValueError where another does.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.mutex = threading.RLock()
        self.jobs: dict[str, Job] = {}
        self.logs: dict[str, Events] = {}  # of jobs that are not over
        try:
            self.held = FolderLock(self.folder)
        except ValueError as error:
            raise ValueError(
                f"the jobs in `{self.folder}` are another server's ({error}) Stop it, or name "
                "another folder."
            ) from None
        try:
            self.read()
        except BaseException:
            self.held.release()
            raise

    def read(self) -> None:
        """What an earlier server left. A job that cannot be read is named and left alone."""
        found: list[Job] = []
        for path in sorted(self.folder.iterdir()):
            if HALF_MADE.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)  # the client was not told of it
            if not ID.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
                continue
            try:
                values = from_file(_JOB, read_object(path / JOB), f"`{path / JOB}`")
                if values["id"] != path.name:
                    raise UnreadableFile(f"`{path / JOB}` is of another job.")
                self.logs[path.name] = Events(path / EVENTS)
                found.append(Job(**values))
            except ValueError as error:
                say(f"A job is left out: {error}")
        for job in sorted(found, key=lambda job: (job.created, job.id)):
            self.jobs[job.id] = job
            self.reconcile(job)

    def reconcile(self, job: Job) -> None:
        """The event of a change that the server was ended in the middle of."""
        told = [event["kind"] for event in self.logs[job.id].all]
        if not told:
            self.tell(job.id, "queued")
        if job.over:
            if job.state not in told:
                self.tell(job.id, job.state, **told_of(job))
            del self.logs[job.id]

    def place(self, id: str) -> Path:
        return self.folder / id

    def told(self, text: str) -> str:
        """A message for clients, without where the folder lies."""
        return text.replace(f"{self.folder}{os.sep}", "")

    def get(self, id: str) -> Job:
        """Waits for no other thread. Raises KeyError for an id that is none: a client's text is
        looked up, never a path.
        """
        return self.jobs[id]

    def all(self, *states: str) -> list[Job]:
        found = list(self.jobs.values())  # at once: others add meanwhile
        return [job for job in found if not states or job.state in states]

    def add(self, job: Job, photos: Mapping[str, bytes]) -> None:
        """A new job with its photos, file name -> contents: there whole, or not at all."""
        with self.mutex:
            with whole_folder(self.place(job.id)) as partial:
                (partial / PHOTOS).mkdir()
                for name, data in photos.items():
                    (partial / PHOTOS / name).write_bytes(data)
                write_json(partial / JOB, dataclasses.asdict(job))
            self.jobs[job.id] = job
            self.logs[job.id] = Events(self.place(job.id) / EVENTS)
            self.tell(job.id, "queued", name=job.name)

    def change(self, id: str, **values: Any) -> Job:
        with self.mutex:
            job = dataclasses.replace(self.jobs[id], **values)
            write_json(self.place(id) / JOB, dataclasses.asdict(job))
            self.jobs[id] = job
            return job

    def end(self, id: str, state: State, **values: Any) -> Job:
        """Done, failed or cancelled: the change, then its event; `read` mends what is between."""
        with self.mutex:
            job = self.change(id, state=state, ended=time.time(), **values)
            self.tell(id, state, **told_of(job))
            del self.logs[id]
            for name in (PROGRESS, CANCEL):
                with contextlib.suppress(OSError):
                    (self.place(id) / name).unlink()
            return job

    def tell(self, id: str, kind: str, **data: Any) -> None:
        with self.mutex:
            self.logs[id].add(kind, **data)

    def events(self, id: str, after: int = 0) -> list[dict[str, Any]]:
        """Those with a number above `after`. Raises KeyError for an id that is none."""
        with self.mutex:
            job = self.jobs[id]
            log = self.logs[id] if id in self.logs else Events(self.place(job.id) / EVENTS)
            return log.all[max(0, after) :]

    def close(self) -> None:
        self.held.release()


def told_of(job: Job) -> dict[str, Any]:
    """What the last event of a job says."""
    if job.state == "done":
        return {"name": job.name, "best_step": job.best_step, "scores": job.scores}
    return {"message": job.message}
