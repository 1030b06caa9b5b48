"""What the process of a wave writes, told as events of its jobs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamtune.fields import UnreadableFile
from dreamtune.metrics.table import scores_of
from dreamtune.serving.jobs.store import ENDED, OUTCOME, PROGRESS, RUN, Store, read_object
from dreamtune.training.output import say
from dreamtune.training.records import METRICS, read_metrics
from dreamtune.training.run_folder import ADAPTER, BEST

Told = tuple[str, dict[str, Any]]  # kind of an event, what it says


@dataclass
class Seen:
    """What has been told of a running job."""

    progress: int = 0  # the file's time
    metrics: int = 0  # the file's size
    scored: int = -1  # step


class Reports:
    """on_done: called with name and adapter file of each job that is done."""

    def __init__(self, store: Store, on_done: Callable[[str, Path], None]) -> None:
        self.store, self.on_done = store, on_done
        self.seen: dict[str, Seen] = {}

    def recall(self, ids: Sequence[str]) -> None:
        """What was told of the wave's jobs already, by the server before this one too."""
        self.seen = {}
        for id in ids:
            told = self.store.events(id)
            self.seen[id] = Seen(scored=max((e["step"] for e in told if "scores" in e), default=-1))

    def report(self, id: str) -> None:
        """What its process has written since the last look, as events in the order of its steps."""
        place, seen = self.store.place(id), self.seen[id]
        outcome = read_object(place / OUTCOME)  # first: all else was written before it
        told = [*self.progress(place / PROGRESS, seen), *self.scorings(place / RUN, seen)]
        for kind, data in sorted(told, key=lambda event: event[1]["step"]):
            self.store.tell(id, kind, **data)
        if outcome:
            self.finish(id, outcome)

    def progress(self, file: Path, seen: Seen) -> Iterator[Told]:
        with contextlib.suppress(OSError, UnreadableFile):
            if (changed := file.stat().st_mtime_ns) != seen.progress and (now := read_object(file)):
                seen.progress = changed
                yield "progress", now

    def scorings(self, run: Path, seen: Seen) -> Iterator[Told]:
        with contextlib.suppress(OSError, UnreadableFile):
            size = (run / METRICS).stat().st_size
            records = read_metrics(run) if size != seen.metrics else []
            seen.metrics = size
            for record in records:
                if (step := record["step"]) > seen.scored:
                    seen.scored = step
                    scores = scores_of(record)
                    yield "progress", {"step": step, "loss": record.get("loss"), "scores": scores}
                    yield "sample", {"step": step}

    def finish(self, id: str, outcome: dict[str, Any]) -> None:
        state = outcome.get("state")
        if state not in ENDED:
            raise UnreadableFile(f"the outcome of job {id} is of no kind: {state!r}.")
        if state != "done":
            self.store.end(id, state, message=self.store.told(outcome.get("message", "")))
            return
        job = self.store.get(id)
        served = ""
        try:
            self.on_done(job.name, adapter_of(self.store, id))
        except Exception as error:  # whoever serves it: the training is done all the same
            served = self.store.told(f"trained, but not served: {error}")
            say(f"Job {id}: {served}")
        scores = outcome.get("scores", {})
        self.store.end(id, "done", best_step=outcome["step"], scores=scores, message=served)


def adapter_of(store: Store, id: str) -> Path:
    """The file of its best step."""
    return store.place(id) / RUN / BEST / ADAPTER
