"""The process that trains a wave: started, watched, asked to save and end; known again after the
server has been away.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

import psutil

from dreamtune.serving.jobs.store import read_object, write_json

RECORD, LOG, ROOM = "wave.json", "log.txt", "room.json"
SAME = 1.0  # seconds that a start time may differ by when it is read again
TAIL, TAIL_BYTES = 12, 3000


class Spawned(Protocol):
    """Of subprocess.Popen what is needed."""

    pid: int

    def poll(self) -> int | None: ...


def spawn(folder: Path) -> Spawned:
    """Its own session: what a terminal sends to the server does not reach it by itself."""
    root = str(Path(__file__).parents[3])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TQDM_DISABLE": "1"}
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "dreamtune.serving.jobs.child", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


class Child:
    """A wave's process. folder: of the wave; log_start: bytes of its log before this process."""

    def __init__(self, folder: Path, record: dict[str, Any], own: Spawned | None = None) -> None:
        self.folder, self.record, self.own = folder, record, own
        self.pid, self.created = int(record["pid"]), float(record["created"])
        self.code: int | None = None

    @classmethod
    def start(cls, folder: Path, jobs: list[str]) -> Child:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ROOM).unlink(missing_ok=True)
        log = folder / LOG
        record: dict[str, Any] = {"jobs": jobs, "interrupted": False}
        record["log_start"] = log.stat().st_size if log.is_file() else 0
        write_json(folder / RECORD, record)
        own = spawn(folder)
        created = 0.0
        with contextlib.suppress(psutil.Error):  # it has ended already
            created = psutil.Process(own.pid).create_time()
        record |= {"pid": own.pid, "created": created}
        write_json(folder / RECORD, record)
        return cls(folder, record, own)

    @classmethod
    def again(cls, folder: Path) -> Child | None:
        """The process that an earlier server started, None where it had not got so far."""
        record = read_object(folder / RECORD)
        return cls(folder, record) if record and "pid" in record else None

    def alive(self) -> bool:
        if self.own is not None:
            self.code = self.own.poll()
            return self.code is None
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) <= SAME  # ids are used again
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    @property
    def interrupted(self) -> bool:
        return bool(self.record.get("interrupted"))

    def interrupt(self) -> None:
        """It saves every run where it stands, and ends."""
        self.record["interrupted"] = True
        write_json(self.folder / RECORD, self.record)
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """What it saved before is what its jobs go on from."""
        if self.alive():
            with contextlib.suppress(psutil.Error):
                psutil.Process(self.pid).kill()

    def forget(self) -> None:
        """It has ended, and what it left has been seen to."""
        (self.folder / RECORD).unlink(missing_ok=True)

    def end_text(self) -> str:
        """How it ended, and the last lines that it said."""
        how = "ended early"
        if self.code is not None:
            how = f"ended by signal {-self.code}" if self.code < 0 else f"status {self.code}"
        with contextlib.suppress(OSError), (self.folder / LOG).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(int(self.record.get("log_start", 0)), size - TAIL_BYTES))
            text = file.read(TAIL_BYTES).decode("utf-8", "replace")
            how += "; it said last:\n" + "\n".join(text.strip().splitlines()[-TAIL:])
        return how
