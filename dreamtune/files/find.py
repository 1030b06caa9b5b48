"""Which adapter a path means, and what its run says of it: one answer for loading, exporting and
generating, from Python and from the command line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dreamtune.configfile import read_yaml

ADAPTER, LORA = "adapter.safetensors", "pytorch_lora_weights.safetensors"
CONFIG, STATE, BEST = "config.yaml", "run_state.json", "best"


def adapter_file(path: str | Path) -> Path:
    """The file itself, or of a folder: the one in its best/, else its own; native before LoRA.

    A checkpoint-N folder (one with a run_state.json) means its own step, though it keeps a copy of
    best/, which is there to resume from. Raises ValueError where there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    if path.suffix == ".safetensors" and not path.is_dir():
        raise ValueError(f"no adapter file at `{path}`")
    places = [path] if (path / STATE).is_file() else [path / BEST, path]
    for place in places:
        for name in (ADAPTER, LORA):
            if (place / name).is_file():
                return place / name
    also = " or in its best/" if len(places) > 1 else ""
    raise ValueError(
        f"no adapter at `{path}`: no `{ADAPTER}` or `{LORA}` in it{also}. Give such a file, or the "
        "folder of a run"
    )


def run_settings(file: Path) -> dict[str, Any]:
    """config.yaml of the run that a file lies in, or {}."""
    for folder in list(file.resolve().parents)[:3]:
        if (folder / CONFIG).is_file():
            return read_yaml(folder / CONFIG)
    return {}


def base_of_run(file: Path) -> str:
    """The base of the run that a file lies in. Raises ValueError outside a run."""
    base = run_settings(file).get("pretrained_model_name_or_path")
    if base is None:
        raise ValueError(
            f"`{file}` does not lie in the folder of a run: name its base with "
            "--pretrained_model_name_or_path."
        )
    return str(base)
