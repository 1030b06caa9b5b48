"""Where a run goes on: from its last whole checkpoint, or at its start; several runs of one wave at
the last step that all of them have.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from dreamtune.config import Config
from dreamtune.files import native
from dreamtune.training.output import say
from dreamtune.training.run_folder import (
    ADAPTER,
    CONFIG,
    LORA,
    METRICS,
    NAME,
    STATE,
    UNREADABLE,
    checkpoints,
    damage,
    refuse_file,
    refuse_taken,
    step_of,
)

FINISHED = (ADAPTER, LORA, "report.html")


class Resumed(Protocol):
    """A run before its models: where it goes on. given: its config."""

    dir: Path
    checkpoint: Path | None
    start: int
    given: Config


def resumed_folder(resume: str, output_dir: str | None) -> Path:
    """The folder of the run that `resume_from_checkpoint` names; with "latest" it may be empty.

    Raises ValueError if it is not there, or is not `output_dir`.
    """
    if resume == "latest":
        if output_dir is None:
            raise ValueError(
                "`resume_from_checkpoint latest` needs --output_dir, the folder of the run."
            )
        folder = Path(output_dir).expanduser()
        refuse_file(folder)
        return folder
    folder = Path(resume).expanduser()
    if not NAME.fullmatch(folder.resolve().name) or not (folder / STATE).is_file():
        there = ", ".join(p.name for p in checkpoints(folder)) or "none"
        raise ValueError(
            f"`{resume}` is not a checkpoint-N folder of a run (folders of that name in it: "
            f"{there})."
        )
    run_dir = Path(os.path.normpath(folder)).parent
    if output_dir is not None and Path(output_dir).expanduser().resolve() != run_dir.resolve():
        raise ValueError(
            f"a run goes on in its own folder: leave --output_dir out, or set it to {run_dir}."
        )
    return run_dir


def find_checkpoint(resume: str, folder: Path) -> Path | None:
    """The checkpoint to go on from in the folder of a run, None where it starts anew.

    With "latest" damaged ones are named and skipped. Raises ValueError where only damaged ones are
    there, where the one that is named is damaged, and where a finished run has none.
    """
    found = checkpoints(folder)
    if resume != "latest":
        named = folder / Path(resume).expanduser().resolve().name
        if why := damage(named):
            others = [p.name for p in found if p != named and damage(p) is None]
            way = f"{others[-1]} is whole." if others else "No other checkpoint is whole."
            raise ValueError(f"`{named}` is damaged: {why}. {way}")
        return named
    problems: list[str] = []
    for checkpoint in reversed(found):
        why = damage(checkpoint)
        if why is None:
            for problem in problems:
                say(f"Skipped, damaged: {problem}")
            return checkpoint
        problems.append(f"{checkpoint.name}: {why}.")
    if problems:
        raise ValueError(
            f"no checkpoint in `{folder}` is whole. {' '.join(problems)} Remove them to start anew."
        )
    if done := [name for name in FINISHED if os.path.lexists(folder / name)]:
        raise ValueError(
            f"`{folder}` holds a finished run ({', '.join(done)}) without a checkpoint-N folder: "
            "nothing to resume. Name another folder."
        )
    if not (folder / CONFIG).is_file():
        refuse_taken(folder)
    say(f"Nothing to resume in {folder} yet: the run starts at step 0.")
    return None


def together(runs: Iterable[Resumed]) -> None:
    """Runs that had begun and are not finished go on from the last step that all have a checkpoint
    of: together they were trained, and only so the numbers stay the same to the last bit.

    Where one was killed before its first checkpoint, those that had just saved theirs start with it
    at 0. Others without a common step go on each from its own.
    """
    waiting = [run for run in runs if unfinished(run)]
    if len({run.start for run in waiting}) < 2:
        return
    steps = {run.dir: whole_steps(run.dir) for run in waiting}
    common = set.intersection(*steps.values())
    # `given` holds what was resolved when the run began, as it comes from its config.yaml
    first = waiting[0].given.checkpointing_steps or 0
    if not common and max(s for found in steps.values() for s in found) > first:
        return
    step = max(common, default=0)
    for run in waiting:
        if run.start != step:
            say(f"{run.dir} goes back from step {run.start} to {step}, where the others are.")
            run.start = step
            run.checkpoint = run.dir / f"checkpoint-{step}" if step else None


def unfinished(run: Resumed) -> bool:
    if not (run.dir / METRICS).is_file():
        return False  # of a later wave
    try:
        file = native.load_adapter_file(run.dir / ADAPTER) if run.start else None
        return file is None or file.metadata["step"] != run.start
    except UNREADABLE:
        return True


def whole_steps(folder: Path) -> set[int]:
    return {step_of(p) for p in checkpoints(folder) if damage(p) is None}
