"""Training beside a server: what is trained is served."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dreamtune.serving.backend import Backend
from dreamtune.serving.jobs.jobs import Jobs
from dreamtune.serving.settings import NO_JOBS, Settings
from dreamtune.training.output import say

OF_BASE = ("revision", "variant", "prediction_type")  # which base it is that jobs load again


@contextmanager
def trained(settings: Settings, engine: Backend) -> Iterator[Jobs | None]:
    """Jobs that train until the block ends; None where the settings have no folder for them.

    Raises ValueError for a folder that cannot be made or that another process has.
    """
    folder = settings.jobs_folder
    if folder is None:
        yield None
        return
    served: dict[str, Path] = {}

    def serve_new(name: str, path: Path) -> None:
        """May be called twice for the same: by what ended a server before it could note it."""
        if served.get(name) != path:
            engine.add(name, path)
            served[name] = path

    of_base = {name: getattr(settings, name) for name in OF_BASE}
    with writing(folder):
        jobs = Jobs(
            folder,
            settings.base,
            serve_new,
            settings={name: value for name, value in of_base.items() if value is not None},
            taken=lambda: list(engine.adapters),
        )
    for name, path in jobs.adapters().items():
        try:
            serve_new(name, path)
        except (ValueError, OSError) as error:
            say(f"Left out of what was trained: {name}: {error}")
    with jobs:
        yield jobs


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raises ValueError where the folder of jobs cannot be written."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"the folder of training jobs `{folder}` cannot be written: {error.strerror}. Name "
            f"another with --jobs, or train nothing: --jobs {NO_JOBS}."
        ) from None
