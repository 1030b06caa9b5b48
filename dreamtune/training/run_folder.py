"""What a run leaves on disk while it goes on: its folder, its checkpoints, its metrics.

A checkpoint is written into a hidden folder and renamed: whatever kills the process, `checkpoint-N`
is whole or not there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dreamtune.training.slots import Slot

from dreamtune.files import find

ADAPTER, LORA, CONFIG, STATE, BEST = find.ADAPTER, find.LORA, find.CONFIG, find.STATE, find.BEST
METRICS, OPTIMIZER = "metrics.jsonl", "optimizer.safetensors"
OURS = (CONFIG, METRICS, ADAPTER, LORA, "report.html", "samples", BEST)
NAME = re.compile(r"checkpoint-(\d+)")


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


def choose_run_dir(output_dir: str | None, name: str) -> Path:
    """A folder that holds no run: `output_dir` itself, or runs/<name>, runs/<name>-2, ...

    Raises ValueError if `output_dir` has a run's files in it.
    """
    if output_dir is not None:
        folder = Path(output_dir).expanduser()
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"`output_dir` {folder} is a file.")
        saved = [p.name for p in checkpoints(folder)]
        # a run that was stopped while it got ready left its settings and nothing else
        taken = [n for n in OURS if n != CONFIG and (folder / n).exists()] + saved
        if taken:
            way = "Continue it with --resume_from_checkpoint latest" if saved else "Remove it"
            raise ValueError(
                f"`output_dir` {folder} holds another run ({', '.join(taken[:4])}); nothing is "
                f"overwritten. {way}, or name another folder."
            )
        return folder
    number, folder = 2, Path("runs") / name
    while folder.exists() and any(folder.iterdir()):
        folder = Path("runs") / f"{name}-{number}"
        number += 1
    return folder


def checkpoints(folder: Path) -> list[Path]:
    """checkpoint-N folders by N."""
    if not folder.is_dir():
        return []
    found = [
        (int(m[1]), p) for p in folder.iterdir() if (m := NAME.fullmatch(p.name)) and p.is_dir()
    ]
    return [p for _, p in sorted(found)]


def find_checkpoint(resume: str, output_dir: str | None) -> Path:
    """The checkpoint folder that `resume_from_checkpoint` names.

    Raises ValueError if it is not there, or is not inside `output_dir`.
    """
    if resume == "latest":
        if output_dir is None:
            raise ValueError(
                "`resume_from_checkpoint latest` needs --output_dir, the folder of the run."
            )
        found = checkpoints(Path(output_dir).expanduser())
        if not found:
            raise ValueError(f"no checkpoint-N folder in `{output_dir}`: nothing to resume.")
        return found[-1]
    folder = Path(resume).expanduser()
    if not NAME.fullmatch(folder.resolve().name) or not (folder / STATE).is_file():
        there = ", ".join(p.name for p in checkpoints(folder)) or "none"
        raise ValueError(
            f"`{resume}` is not a checkpoint-N folder of a run (folders of that name in it: "
            f"{there})."
        )
    if (
        output_dir is not None
        and Path(output_dir).expanduser().resolve() != folder.resolve().parent
    ):
        raise ValueError(
            "a run goes on in its own folder: leave --output_dir out, or set it to "
            f"{folder.parent}."
        )
    return folder


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fills a hidden folder beside `folder` and renames it into place; an old one is removed after
    that.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    fill(partial)
    for path in [p for p in partial.rglob("*") if p.is_file()]:
        sync(path)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Onto the disk before the rename, else a power cut leaves a whole name with empty files."""
    with path.open("rb") as f:
        os.fsync(f.fileno())


def save_checkpoint(
    run_dir: Path, k: int, slot: Slot, info: Mapping[str, Any], limit: int | None
) -> Path:
    """checkpoint-k: adapter, what else the step changes, the best adapter so far; then the oldest
    beyond `limit` go.
    """
    from safetensors.torch import save_file

    def fill(folder: Path) -> None:
        slot.save(folder / ADAPTER, {"step": k})
        state = slot.step.state_dict(slot.index)
        save_file({n: t.detach().cpu().contiguous() for n, t in state.items()}, folder / OPTIMIZER)
        if (run_dir / BEST).is_dir():
            shutil.copytree(run_dir / BEST, folder / BEST)
        (folder / STATE).write_text(json.dumps({"step": k, **info}, indent=1))

    folder = run_dir / f"checkpoint-{k}"
    replace_folder(folder, fill)
    if limit is not None:
        for old in checkpoints(run_dir)[:-limit]:
            # renamed first: a half-removed folder must not look like a checkpoint
            doomed = old.with_name(f".{old.name}.old")
            shutil.rmtree(doomed, ignore_errors=True)
            os.replace(old, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
    return folder


def read_state(checkpoint: Path) -> dict[str, Any]:
    return dict(json.loads((checkpoint / STATE).read_text()))


def restore(checkpoint: Path, run_dir: Path, slot: Slot) -> None:
    """Puts adapter, step state, best/ and metrics.jsonl back to where the checkpoint was."""
    from safetensors.torch import load_file

    from dreamtune.files.native import load_adapter_file

    slot.load(load_adapter_file(checkpoint / ADAPTER).tensors, load_file(checkpoint / OPTIMIZER))
    if (checkpoint / BEST).is_dir():

        def fill(folder: Path) -> None:
            shutil.copytree(checkpoint / BEST, folder, dirs_exist_ok=True)

        replace_folder(run_dir / BEST, fill)
    else:
        shutil.rmtree(run_dir / BEST, ignore_errors=True)
    truncate_metrics(run_dir, read_state(checkpoint)["step"])


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The scorings so far. A last line that a crash cut off is left out."""
    path = run_dir / METRICS
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def append_metrics(run_dir: Path, record: Mapping[str, Any]) -> None:
    with (run_dir / METRICS).open("a") as f:
        f.write(json.dumps(record) + "\n")


def truncate_metrics(run_dir: Path, step: int) -> None:
    """Drops what was scored after `step`."""
    kept = [r for r in read_metrics(run_dir) if r["step"] <= step]
    partial = run_dir / f".{METRICS}.part"
    partial.write_text("".join(json.dumps(r) + "\n" for r in kept))
    os.replace(partial, run_dir / METRICS)
