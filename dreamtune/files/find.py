"""Which adapter a path means, and what its run says of it: one answer for loading, exporting and
generating, from Python and from the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreamtune.configfile import read_run
from dreamtune.files.formats import formats, is_adapter

CONFIG, STATE, BEST = "config.yaml", "run_state.json", "best"


def adapter_file(path: str | Path) -> Path:
    """The file itself, or of a folder: the one in its best/, else its own, in the order of
    `formats`, the native first; else the one adapter under another name, as the tools call them
    that take any.

    A checkpoint-N folder (one with a run_state.json) means its own step, though it keeps a copy of
    best/, which is there to resume from. Raises ValueError where there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    if path.suffix == ".safetensors" and not path.is_dir():
        raise ValueError(f"no adapter file at `{path}`")
    places = [path] if (path / STATE).is_file() else [path / BEST, path]
    patterns = [f.file_name.format(name="*") for f in formats().values() if f.file_name]
    for place in places:
        for pattern in patterns:
            if found := files(place, pattern):
                return only(place, found)
    for place in places:
        if found := [path for path in files(place, "*.safetensors") if is_adapter(path)]:
            return only(place, found)
    also = " or in its best/" if len(places) > 1 else ""
    raise ValueError(
        f"no adapter at `{path}`: no {' or '.join(f'`{p}`' for p in patterns)} in it{also}, and no "
        "LoRA under another name. Give such a file, or the folder of a run"
    )


def files(place: Path, pattern: str) -> list[Path]:
    """Of a folder, by name; without hidden ones, which file managers and archives lay beside."""
    return [p for p in sorted(place.glob(pattern)) if p.is_file() and not p.name.startswith(".")]


def only(place: Path, found: Sequence[Path]) -> Path:
    """Raises ValueError where there are several."""
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise ValueError(f"`{place}` holds several adapters: give one of {names}")
    return found[0]


def run_of(file: Path) -> Path | None:
    """The folder of the run that a file lies in."""
    folders = list(file.resolve().parents)[:3]
    return next((folder for folder in folders if (folder / CONFIG).is_file()), None)


def run_settings(file: Path) -> dict[str, Any]:
    """config.yaml of the run that a file lies in, its fields checked, or {}."""
    folder = run_of(file)
    return read_run(folder / CONFIG) if folder else {}


def name_of(file: Path) -> str:
    """What tells an adapter from others in one folder: its run's name, and the step of a
    checkpoint; outside a run the file's own name.
    """
    folder = run_of(file)
    if folder is not None:
        inner = file.resolve().parent
        return (
            f"{folder.name}-{inner.name}" if inner.name.startswith("checkpoint-") else folder.name
        )
    patterns = [f.file_name for f in formats().values()]
    return "adapter" if file.name in patterns else file.stem


def base_of_run(file: Path) -> str:
    """The base of the run that a file lies in. Raises ValueError outside a run."""
    base = run_settings(file).get("pretrained_model_name_or_path")
    if base is None:
        raise ValueError(
            f"`{file}` does not lie in the folder of a run: name its base with "
            "--pretrained_model_name_or_path."
        )
    return str(base)
