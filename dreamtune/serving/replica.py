"""One engine in a process of its own, which Ray starts, looks after and starts again."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from dreamtune.serving.backend import Known, Row, Shape, gpu_memory
from dreamtune.serving.engine import Engine, lacks_memory
from dreamtune.serving.folder import look
from dreamtune.serving.schema import usual_guidance
from dreamtune.serving.settings import NO_JOBS, Settings

AGAIN = 10.0  # seconds after which one that could not be opened is started anew
HANGS = 2.0  # times a request's longest, after which nobody waits for the batch any more


class Facts(NamedTuple):
    """Of a replica, or of all. refused: why it cannot draw; None. paths: of the adapters."""

    refused: str | None
    base_id: str = ""
    sizes: tuple[int, ...] = ()
    empty_is_none: bool = True
    takes_negatives: bool = True
    max_batch: int = 1
    guidance_scale: float = 0.0
    device: str = ""
    adapters: Mapping[str, Known] = {}
    left_out: Mapping[str, str] = {}
    paths: Mapping[str, str] = {}


class Reply(NamedTuple):
    """drawn: a picture or an error a row; process: host and number; memory: of its GPU, bytes."""

    drawn: list[Image.Image | Exception]
    process: tuple[str, int]
    memory: dict[str, int]


class Replica:
    """Its folder's adapters are there when it starts; others come with the first batch that has
    them, so that one that is started again has them as well.
    """

    def __init__(self, settings: Settings) -> None:
        self.timeout, self.began, self.drawing = settings.timeout_s, time.monotonic(), 0.0
        self.refused: str | None = None
        self.open = ExitStack()
        try:
            folder = look(Path(settings.adapters))
            check_jobs(settings)
            self.engine = self.open.enter_context(Engine.opened(settings))
        except ValueError as error:  # told, for Ray would try again and again
            self.refused = str(error)
            return
        self.engine.warm_up(usual_guidance(settings, self.engine))
        known = self.engine.adapters
        self.paths = {name: str(path) for name, path in folder.paths.items() if name in known}

    async def facts(self) -> Facts:
        if self.refused is not None:
            return Facts(self.refused)
        engine = self.engine
        return Facts(
            None,
            engine.base.id,
            engine.sizes,
            engine.empty_is_none,
            engine.takes_negatives,
            engine.max_batch,
            engine.guidance_scale,
            engine.device,
            engine.adapters,
            engine.left_out,
            self.paths,
        )

    async def add(self, name: str, path: str) -> Known | Exception:
        """The error is returned, for raised it would come with a traceback in its text."""
        lacking = await asyncio.to_thread(self.bring, {name: path})
        return lacking.get(name) or self.engine.adapters[name]

    async def draw(self, rows: Sequence[Row], shape: Shape, paths: Mapping[str, str]) -> Reply:
        """In a thread, so that Ray is answered meanwhile. paths: of the adapters in the rows.

        Raises RuntimeError where nothing can be drawn here any more.
        """
        if self.refused is not None:
            raise RuntimeError(self.refused)
        self.drawing = time.monotonic()
        try:
            drawn = await asyncio.to_thread(self.drawn, rows, shape, paths)
        finally:
            self.drawing = 0.0
        if self.engine.broken is not None:
            raise RuntimeError(self.engine.broken)
        return Reply(drawn, (os.uname().nodename, os.getpid()), gpu_memory())

    def drawn(
        self, rows: Sequence[Row], shape: Shape, paths: Mapping[str, str]
    ) -> list[Image.Image | Exception]:
        lacking = self.bring(paths)
        faults = [next((lacking[n] for n in row.names if n in lacking), None) for row in rows]
        left = [row for row, fault in zip(rows, faults) if fault is None]
        found = iter(self.engine.draw(left, shape) if left else ())
        pictures = [next(found) if fault is None else fault for fault in faults]
        return [portable(one) if isinstance(one, Exception) else one for one in pictures]

    def bring(self, paths: Mapping[str, str]) -> dict[str, Exception]:
        """Name -> why it is not served here, of those that cannot be."""
        lacking = {}
        for name, path in paths.items():
            if self.paths.get(name) == path:
                continue
            try:
                if self.paths.pop(name, None) is not None:
                    self.engine.remove(name)
                self.engine.add(name, path)
                self.paths[name] = path
            except Exception as error:
                lacking[name] = portable(error)
        return lacking

    def check_health(self) -> None:
        """Raises RuntimeError where another is to take its place."""
        now = time.monotonic()
        if self.refused is not None:
            if now - self.began > AGAIN:
                raise RuntimeError(self.refused)
            return
        if self.engine.broken is not None:
            raise RuntimeError(self.engine.broken)
        if self.drawing and now - self.drawing > HANGS * self.timeout:
            raise RuntimeError(f"a batch has taken {now - self.drawing:.0f} seconds")


def check_jobs(settings: Settings) -> None:
    """Raises ValueError where what will be trained cannot be read."""
    folder = settings.jobs_folder
    if folder is not None and not folder.is_dir():
        raise ValueError(
            f"`jobs`: a replica does not find the folder of training jobs `{folder}`, from which "
            "it is to serve. Name one with --jobs that every machine of the cluster has at the "
            f"same path, or train nothing: --jobs {NO_JOBS}."
        )


def portable(error: Exception) -> Exception:
    """Of a kind that every process can make again from its text, and that is told apart there."""
    if isinstance(error, ValueError):
        return ValueError(str(error))
    if lacks_memory(error):
        return MemoryError(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")
