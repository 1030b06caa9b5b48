"""What a run leaves on disk while it goes on: its folder, its checkpoints, its metrics.

A checkpoint is written into a hidden folder and renamed: whatever kills the process, `checkpoint-N`
is whole or not there.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamtune.adapters import find_method
from dreamtune.evaluation.selection import choose_best
from dreamtune.files import diffusers, find, native
from dreamtune.files.fingerprint import fingerprint, refuse_other_base
from dreamtune.files.tensors import write_tensors
from dreamtune.files.whole import remove_folder, whole_folder
from dreamtune.training.lock import FolderLock
from dreamtune.training.output import say
from dreamtune.training.records import (
    LOOSE,
    METRICS,
    OPTIMIZER,
    check_written,
    is_best,
    read_metrics,
    read_state,
    read_step,
    truncate_metrics,
    write_state,
)

if TYPE_CHECKING:
    from torch import Tensor

    from dreamtune.training.slots import Slot

CONFIG, STATE, BEST = find.CONFIG, find.STATE, find.BEST
ADAPTER, LORA = native.FORMAT.file_name, diffusers.FORMAT.file_name
FOLDERS = ("samples", BEST, "logs")
OURS = (CONFIG, METRICS, ADAPTER, LORA, "report.html", "samples", BEST)
NAME = re.compile(r"checkpoint-(\d+)")
# What `files.whole` leaves when it is killed.
HIDDEN = re.compile(
    r"\.(checkpoint-\d+|best|\.final)\.(old|part|gone)|\.final"
    r"|\.(?:config\.yaml|metrics\.jsonl|report\.html|\d+\.png|class-\d+\.png|\.dreamtune\.json)"
    r"\.\w+\.part"
)
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RecursionError)


@dataclass(frozen=True)
class TrainResult:
    """adapter, lora: the files of the best checkpoint (lora None for a method that no LoRA can
    hold).
    """

    run_dir: Path
    adapter: Path
    lora: Path | None
    best_step: int
    scores: dict[str, Any]
    history: list[dict[str, Any]]
    reason: str


def take(output_dir: str | None, name: str) -> FolderLock:
    """A folder that holds no run, made and locked: `output_dir` itself, or runs/<name>,
    runs/<name>-2, ... Making it is what decides between two that start together.

    Raises ValueError if `output_dir` has a run's files in it, or another process.
    """
    if output_dir is not None:
        folder = Path(output_dir).expanduser()
        refuse_taken(folder)
        lock = FolderLock(folder)
        try:
            refuse_taken(folder)  # a run may have ended meanwhile
        except ValueError:
            lock.release()
            raise
        return lock
    number, folder = 2, Path("runs") / name
    refuse_file(folder.parent)
    while True:
        # one that is there, of whatever kind, is not tried: only of the making an error is "taken"
        if not os.path.lexists(folder):
            with contextlib.suppress(FileExistsError):
                return FolderLock(folder, new=True)
        folder = Path("runs") / f"{name}-{number}"
        number += 1


def refuse_file(folder: Path) -> None:
    """Raises ValueError where the name of a run's folder, or of one above, is taken by a file."""
    there = next((p for p in (folder, *folder.parents) if os.path.lexists(p)), folder)
    if os.path.isdir(there) or not os.path.lexists(there):
        return
    kind = "a link that leads to no folder" if there.is_symlink() else "a file, not a folder"
    place = f"{folder} cannot be made: {there}" if there != folder else folder
    raise ValueError(f"`output_dir` {place} is {kind}.")


def refuse_planted(run_dir: Path) -> None:
    """Raises ValueError for what is under a name that the run writes to, and is no file or folder
    of its own. Of a link whoever may write into a shared folder would choose where it leads.
    """
    for path in sorted([*run_dir.iterdir(), *(run_dir / "samples").glob("*.png")]):
        saved = NAME.fullmatch(path.name)
        if path.parent == run_dir and path.name not in (*OURS, "logs") and not saved:
            continue
        if path.is_symlink():
            raise ValueError(f"`{path}` is a link, which is not followed: take it away.")
        folder = path.name in FOLDERS or saved
        if not (path.is_dir() if folder else path.is_file()):
            kind = "folder" if folder else "file"
            raise ValueError(f"`{path}` must be a {kind} of the run, and is none: take it away.")


def refuse_taken(folder: Path) -> None:
    """Raises ValueError for a file, and for a folder with a run's files."""
    refuse_file(folder)
    if not folder.is_dir():
        return
    # a run that was stopped while it got ready left its settings and nothing else
    taken = [n for n in OURS if n != CONFIG and os.path.lexists(folder / n)]
    taken += sorted(p.name for p in folder.iterdir() if NAME.fullmatch(p.name))
    if not taken:
        return
    way, latest = "Remove it, or name another folder.", "--resume_from_checkpoint latest"
    if checkpoints(folder):
        way = f"Continue it with {latest}, or name another folder."
    elif (folder / CONFIG).is_file():
        way += f" The same flags with {latest} begin anew."
    raise ValueError(
        f"`output_dir` {folder} holds another run ({', '.join(taken[:4])}); nothing is "
        f"overwritten. {way}"
    )


def checkpoints(folder: Path) -> list[Path]:
    """checkpoint-N folders by N."""
    if not folder.is_dir():
        return []
    return sorted(
        (p for p in folder.iterdir() if NAME.fullmatch(p.name) and p.is_dir()), key=step_of
    )


def step_of(checkpoint: Path) -> int:
    match = NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def damage(checkpoint: Path) -> str | None:
    """What keeps a run from going on from it; None if nothing does."""
    try:
        state = read_state(checkpoint)
        if (step := state["step"]) != step_of(checkpoint):
            return f"its {STATE} is of step {step}"
        adapter = native.load_adapter_file(checkpoint / ADAPTER)
        if (own := adapter.metadata.get("step", step)) != step:
            return f"its {ADAPTER} is of step {own}"
        read_step(checkpoint)
        check_written(checkpoint, state)
        return None if place_of_best(checkpoint) is not None else "its best/ is not whole"
    except UNREADABLE as error:
        return " ".join(str(error).split())


def place_of_best(checkpoint: Path) -> Path | None:
    """The best adapter as it was then: the checkpoint's copy, else the run's own best/ where it is
    of the step of the best scoring so far; the checkpoint itself where none had been scored.
    """
    run_dir, state = checkpoint.parent, read_state(checkpoint)
    scored = [r for r in read_metrics(run_dir) if r["step"] <= step_of(checkpoint)]
    for place in (checkpoint / BEST, run_dir / BEST):
        with contextlib.suppress(*UNREADABLE):
            file = native.load_adapter_file(place / ADAPTER)
            start = find_method(file.method).identity_at_start
            best = choose_best(scored, identity_at_start=start).step if scored else None
            if file.metadata["step"] == best and is_best(place, state):
                return place
    return None if scored else checkpoint


def save_checkpoint(run_dir: Path, k: int, slot: Slot, info: Mapping[str, Any]) -> Path:
    """checkpoint-k: adapter, what else the step changes, the best adapter so far.

    Raises ValueError, and writes nothing, where adapter or optimizer hold what is not finite.
    """
    folder = run_dir / f"checkpoint-{k}"
    state = {n: t.detach().cpu() for n, t in slot.step.state_dict(slot.index).items()}
    if broken := not_finite({**slot.adapter.state_dict(slot.index), **state}):
        raise ValueError(
            f"checkpoint-{k} is not written, training has come apart: {len(broken)} tensors of "
            f"adapter and optimizer are not finite, `{broken[0]}` first. {safe(run_dir)} Lower "
            "`learning_rate`."
        )
    with whole_folder(folder) as partial:
        slot.save(partial / ADAPTER, {"step": k})
        write_tensors(partial / OPTIMIZER, state, {"step": k})
        if (run_dir / BEST).is_dir():
            shutil.copytree(run_dir / BEST, partial / BEST)
        write_state(partial, run_dir, k, info)
    return folder


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of those that hold NaN or infinities. The loss of a skipped step may."""
    return [n for n, t in tensors.items() if n not in LOOSE and not bool(t.isfinite().all())]


def rotate(run_dir: Path, k: int, limit: int | None) -> None:
    """Of the checkpoints up to k the last `limit` stay."""
    if limit is not None:
        for old in [p for p in checkpoints(run_dir) if step_of(p) <= k][:-limit]:
            remove_folder(old)


def safe(run_dir: Path) -> str:
    """What is on the disk, for an error in the middle of a run."""
    whole = [p for p in checkpoints(run_dir) if damage(p) is None]
    if not whole:
        return f"No checkpoint had been saved in {run_dir}."
    return (
        f"{whole[-1].name} is whole: go on from it with --output_dir {run_dir} "
        "--resume_from_checkpoint latest."
    )


def restore(checkpoint: Path, run_dir: Path, slot: Slot) -> None:
    """Puts adapter, step state, best/ and metrics.jsonl back to where the checkpoint was."""
    file, step = native.load_adapter_file(checkpoint / ADAPTER), read_step(checkpoint)
    refuse_other_base(file.fingerprint, fingerprint(slot.adapter.weights()), run_dir)
    refuse_other_parts(file.parts, slot.adapter.parts, checkpoint)
    slot.load(file.tensors, step)
    best = place_of_best(checkpoint)
    if best == checkpoint / BEST:
        with whole_folder(run_dir / BEST) as partial:
            shutil.copytree(best, partial, dirs_exist_ok=True)
    elif best == run_dir / BEST:
        say(f"{checkpoint.name} has no whole best/: that of {run_dir}, of the same step, stays.")
    else:
        shutil.rmtree(run_dir / BEST, ignore_errors=True)
    truncate_metrics(run_dir, read_state(checkpoint)["step"])
    for later in checkpoints(run_dir):
        if step_of(later) > step_of(checkpoint):
            say(f"{later.name} is removed: the run goes on from {checkpoint.name}.")
            remove_folder(later)


def refuse_other_parts(
    saved: Mapping[str, Mapping[str, int]], here: Mapping[str, Mapping[str, int]], place: Path
) -> None:
    """Raises ValueError where the layers were trained in other parts: one weight each, before there
    were any.
    """
    for path in {**saved, **here}:
        before, now = (list(x.get(path, {}).items()) for x in (saved, here))
        if before != now:
            told = ", ".join(f"`{name}` {size}" for name, size in before) or "one weight"
            names = ", ".join(f"`{name}` {size}" for name, size in now) or "one weight"
            raise ValueError(
                f"`{place}` is of an earlier dreamtune, to which `{path}` was {told}; here it is"
                f" {names}. Its files load as they are, but the run cannot go on: end it with the"
                " dreamtune that began it, or start a new one."
            )


def clear(run_dir: Path) -> None:
    """Removes what a run left that is to start anew; class images stay."""
    for folder in (*checkpoints(run_dir), run_dir / BEST):
        if os.path.lexists(folder):
            remove_folder(folder)
    for path in (run_dir / METRICS, run_dir / "samples"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def sweep(run_dir: Path) -> None:
    """Takes away what a killed process left half written, and puts back the folder that it was
    about to replace.
    """
    own = [run_dir / name for name in ("samples", "class") if not (run_dir / name).is_symlink()]
    for path in [*run_dir.iterdir(), *(p for folder in own for p in folder.glob(".*.part"))]:
        if path.is_symlink() or not (match := HIDDEN.fullmatch(path.name)):
            continue
        if match[2] == "old" and not os.path.lexists(run_dir / match[1]):
            os.replace(path, run_dir / match[1])
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
