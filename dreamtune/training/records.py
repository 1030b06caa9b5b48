"""What a run writes of itself and reads back: metrics.jsonl, and a checkpoint's run_state.json,
which holds the hashes of all that the run goes on from.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import FiniteFloat, NonNegativeInt, PositiveInt

from dreamtune.config import FIELDS, plain_default
from dreamtune.configfile import fixed, read_yaml
from dreamtune.fields import UnreadableFile, checker, from_file, from_json, shown
from dreamtune.files.find import BEST, STATE
from dreamtune.files.tensors import hash_of_json, read_tensors
from dreamtune.files.whole import whole
from dreamtune.textfile import contents

if TYPE_CHECKING:
    from torch import Tensor

METRICS, OPTIMIZER = "metrics.jsonl", "optimizer.safetensors"
STATE_VERSION = 1
LOOSE = ("step.loss",)  # of a skipped step it is not finite
# Where things lie, which a run that is moved may change: the photos and the base are compared
# themselves.
PLACES = ("instance_data_dir", "pretrained_model_name_or_path")

_RECORD = checker(
    {
        "step": NonNegativeInt,
        "loss": FiniteFloat | None,
        "learning_rate": FiniteFloat,
        "skipped_steps": NonNegativeInt,
        "seconds": FiniteFloat,
        "scoring_seconds": FiniteFloat,
    },
    needed=("step",),
    others=True,
)
_VERSION = checker({"format_version": PositiveInt}, others=True)
_STATE = checker(
    {
        "step": NonNegativeInt,
        "photos": list[str],
        "base": str,
        "settings": dict[str, str],
        "files": dict[str, str],
        "metrics": str,
        "sha256": str,
    },
    needed=("step", "photos"),
    others=True,
)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The scorings so far. A last line that a crash cut off is left out.

    Raises UnreadableFile, which names the line, for any other that is no record of ours.
    """
    path = run_dir / METRICS
    if not os.path.lexists(path):
        return []
    *lines, last = contents(path).split(b"\n")
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        records.append(checked(from_json(line, where := f"line {number} of `{path}`"), where))
        if len(records) > 1 and records[-1]["step"] <= records[-2]["step"]:
            raise UnreadableFile(f"{where}: step {records[-1]['step']} follows a later one")
    try:
        return [*records, checked(from_json(last, "the end"), "the end")] if last else records
    except UnreadableFile:
        return records


def checked(record: Any, place: str) -> dict[str, Any]:
    """A scoring; what is not of the run itself is a score."""
    found = from_file(_RECORD, record, place)
    for name, value in found.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and math.isfinite(value)):
            raise UnreadableFile(f"{place}: `{name}` must be a finite number, got {shown(value)}")
    return found


def append_metrics(run_dir: Path, record: Mapping[str, Any]) -> None:
    """Raises ValueError for a score that is not finite."""
    line = json.dumps(checked(dict(record), f"the scoring of step {record['step']}"))
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(run_dir / METRICS, flags, 0o666), "a", encoding="utf-8") as f:
        f.write(line + "\n")


def truncate_metrics(run_dir: Path, step: int) -> None:
    """Drops what was scored after `step`."""
    kept = [r for r in read_metrics(run_dir) if r["step"] <= step]
    with whole(run_dir / METRICS) as partial:
        partial.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")


def hash_of_metrics(run_dir: Path, step: int) -> str:
    """Of the scorings up to that step."""
    return hash_of_json([r for r in read_metrics(run_dir) if r["step"] <= step])


def hashes_of_settings(values: Mapping[str, Any]) -> dict[str, str]:
    """Of each setting that the numbers of a run depend on, as config.yaml has it."""
    return {
        name: hash_of_json(values.get(name, plain_default(name)))[:16]
        for name in fixed(values)
        if name not in PLACES
    }


def write_state(folder: Path, run_dir: Path, step: int, info: Mapping[str, Any]) -> None:
    """run_state.json of a checkpoint whose other files are in the folder."""
    state = {
        "format_version": STATE_VERSION,
        "step": step,
        **info,
        "files": hashes_of_files(folder),
        "metrics": hash_of_metrics(run_dir, step),
    }
    text = json.dumps({**state, "sha256": hash_of_json(state)}, indent=1)
    (folder / STATE).write_text(text, encoding="utf-8")


def hashes_of_files(folder: Path) -> dict[str, str]:
    """Path below the folder -> SHA-256 of each file, but the state's."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != STATE)
    return {p.relative_to(folder).as_posix(): hash_of_file(p) for p in files}


def hash_of_file(path: Path) -> str:
    with path.open("rb") as file:
        found = hashlib.sha256()
        while block := file.read(1 << 20):
            found.update(block)
        return found.hexdigest()


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Raises UnreadableFile for one that is damaged, or was written by a newer version."""
    path = checkpoint / STATE
    place = f"`{checkpoint.name}/{STATE}`"
    found = from_json(contents(path), place)
    version = from_file(_VERSION, found, place).get("format_version", 0)
    if version > STATE_VERSION:
        raise UnreadableFile(
            f"{place} has format version {version}, this dreamtune reads up to {STATE_VERSION}: "
            "install a newer one"
        )
    state = from_file(_STATE, found, place)
    own = state.pop("sha256", None)
    rest = {name: value for name, value in found.items() if name != "sha256"}
    if (version or own is not None) and own != hash_of_json(rest):
        raise UnreadableFile(f"{place} is not what was written: it changed since")
    return state


def read_step(checkpoint: Path) -> dict[str, Tensor]:
    """What else a step changes. Raises UnreadableFile for what is not finite, or not as written."""
    file = read_tensors(checkpoint / OPTIMIZER, loose=LOOSE)
    if file.changed:
        raise UnreadableFile(f"`{OPTIMIZER}` is not what was written: {file.difference()} changed")
    return dict(file.tensors)


def check_written(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Raises UnreadableFile where files of a checkpoint, but its best/, or the scorings up to it
    are not those that it was written with. A state of an older version knows none.
    """
    for name, saved in state.get("files", {}).items():
        path = checkpoint / name
        if name.startswith(f"{BEST}/"):
            continue
        if not path.is_file() or hash_of_file(path) != saved:
            raise UnreadableFile(f"`{checkpoint.name}/{name}` is not what was written with it")
    run_dir = checkpoint.parent
    if state.get("metrics", now := hash_of_metrics(run_dir, state["step"])) != now:
        raise UnreadableFile(
            f"`{run_dir / METRICS}` up to step {state['step']} is not what {checkpoint.name} was "
            "written with"
        )


def is_best(folder: Path, state: Mapping[str, Any]) -> bool:
    """Whether a best/ has the files of the checkpoint's; of an older version's any has."""
    saved = {n: h for n, h in state.get("files", {}).items() if n.startswith(f"{BEST}/")}
    return all(
        (path := folder.parent / name).is_file() and hash_of_file(path) == found
        for name, found in saved.items()
    )


def check_settings(checkpoint: Path, config_file: Path) -> None:
    """Raises UnreadableFile that names the settings that are not those of the checkpoint."""
    saved = read_state(checkpoint).get("settings", {})
    here = hashes_of_settings(read_yaml(config_file))
    changed = [n for n in here if n in saved and here[n] != saved[n] and n in FIELDS]
    if changed:
        raise UnreadableFile(
            f"`{config_file}` is not what {checkpoint.name} was written with: "
            f"{', '.join(f'`{n}`' for n in changed)} changed since. Put the old values back, or "
            "start a new run with another --output_dir."
        )
