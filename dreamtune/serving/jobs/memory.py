"""Whether there is memory for a wave. It is trained beside the server on its own copy of the base,
so what is free decides; what it takes is measured, and estimated until it has been.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from dreamtune import embedded
from dreamtune.config import EMBEDDED, Config, having
from dreamtune.files.tensors import hash_of_json
from dreamtune.serving.jobs.store import read_object, write_json
from dreamtune.training.defaults import device_and_dtype
from dreamtune.training.fit import USABLE

FILE = "memory.json"
GIB = 1 << 30
# Of the process itself: interpreter and libraries in main memory; a context and its libraries'
# kernels on a GPU.
PROCESS = {"cpu": 1 * GIB, "cuda": GIB // 2}
WEIGHTS = ("*.safetensors", "*.bin")
STEPS = "max_train_steps"  # more of them take no more memory


@dataclass(frozen=True)
class Room:
    """Bytes of a device."""

    free: int
    total: int


def room(device: torch.device) -> Room:
    if device.type == "cuda":
        return Room(*torch.cuda.mem_get_info(device))
    memory = psutil.virtual_memory()
    return Room(memory.available, memory.total)


def device_of(settings: Mapping[str, Any]) -> torch.device:
    named = {k: settings[k] for k in ("device", "mixed_precision") if k in settings}
    return device_and_dtype(Config(**named))[0]


def estimate(base: str, device: torch.device) -> int:
    """At least what a wave takes: the process, and the base's weights. Files are taken to be in
    half precision, in which a GPU holds them; the CPU has float32. A hub id counts nothing.
    """
    path = embedded.MODEL if base == EMBEDDED else Path(base).expanduser()
    files = [path] if path.is_file() else []
    if path.is_dir():
        parts = [path, *(p for p in path.iterdir() if p.is_dir())]
        files = [max(found, key=size) for p in parts if (found := weights_in(p))]
    return PROCESS[device.type] + sum(map(size, files)) * (1 if device.type == "cuda" else 2)


def weights_in(folder: Path) -> list[Path]:
    return [path for pattern in WEIGHTS for path in folder.glob(pattern)]


def size(path: Path) -> int:
    return path.stat().st_size


def kind_of(settings: Mapping[str, Any]) -> str:
    """What jobs have in common that may train in one wave: all but what is a subject's own."""
    own = having("own")
    return hash_of_json({k: v for k, v in settings.items() if k not in own})


class Needs:
    """What waves were measured to need, remembered in the folder of the jobs."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.found: dict[str, Any] = read_object(self.path) or {}

    def key(self, settings: Mapping[str, Any]) -> str:
        return kind_of({k: v for k, v in settings.items() if k != STEPS})[:16]

    def of(self, settings: Mapping[str, Any], device: torch.device) -> int:
        known = self.found.get(self.key(settings))
        return int(known) if known else estimate(settings["pretrained_model_name_or_path"], device)

    def learn(self, settings: Mapping[str, Any], needed: int) -> None:
        key = self.key(settings)
        if self.found.get(key) == needed:
            return
        self.found[key] = needed
        write_json(self.path, self.found)


def lacking(needed: int, here: Room, device: torch.device) -> tuple[str, bool] | None:
    """None where it fits; else what to say, and whether it never will: beyond the whole device."""
    if needed <= here.free * USABLE:
        return None
    never = needed > here.total * USABLE
    text = (
        f"training needs {needed / GIB:.1f} GiB on {device}, of which {here.free / GIB:.1f} GiB "
        f"are free (of {here.total / GIB:.1f}; {USABLE:.0%} of what is free is used)"
    )
    way = "train on a larger device, or a smaller base." if never else "it waits until there is."
    return f"{text}: {way}", never
