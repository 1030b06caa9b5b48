"""The processes of training jobs as forks of the one that tests run in, and held or ended where a
test wants it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked

from dreamtune.serving.jobs import child, process
from dreamtune.serving.jobs.process import LOG

Act = Callable[[Any, int], None]  # of a wave, after step k


class Fork:
    """What `subprocess.Popen` would be."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code


class Children:
    """Takes the place of `process.spawn`. acts: what each child does after its steps, the last for
    all further ones; works: instead of training."""

    def __init__(self, *acts: Act | None, work: Callable[[], Any] | None = None) -> None:
        self.acts, self.work = list(acts) or [None], work
        self.started: list[Fork] = []

    def spawn(self, folder: Path) -> Fork:
        act = self.acts[min(len(self.started), len(self.acts) - 1)]

        def work() -> None:
            handle = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            if self.work is not None:
                return self.work()
            if act is not None:
                plain = child.JobWave.show

                def show(wave: Any, k: int) -> None:
                    plain(wave, k)
                    act(wave, k)

                child.JobWave.show = show  # type: ignore[method-assign]
            raise SystemExit(child.main([str(folder)]))

        self.started.append(Fork(forked.start(work, folder / "fork.txt")))
        return self.started[-1]

    def into(self, patch: Any) -> Children:
        patch.setattr(process, "spawn", self.spawn)
        return self


def until(true: Callable[[], Any], seconds: float = 120.0) -> Any:
    """The first true answer."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)
    return found
