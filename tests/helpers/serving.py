"""A tiny base with an adapter of each kind, as a server has them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from tiny import disturb, tiny_unet

import dreamtune
from dreamtune.serving import engine as module
from dreamtune.serving.engine import Engine
from dreamtune.serving.jobs.reports import adapter_of
from dreamtune.serving.jobs.store import Job, Store
from dreamtune.serving.settings import Settings

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dog": ("lora", {"rank": 4}),
    "cat": ("delora", {"rank": 2}),
    "cow": ("ether", {"blocks": 4}),
    "owl": ("oft", {"blocks": 2}),
}


def write_adapters(folder: Path) -> Path:
    """A file each, but for the cow, which is a folder with one."""
    folder.mkdir()
    for number, (name, (method, options)) in enumerate(KINDS.items()):
        adapter = dreamtune.inject(tiny_unet(), method, seed=number, **options)
        disturb(adapter)
        place = folder / name if name == "cow" else folder / f"{name}.safetensors"
        stated = {"prompt": f"a sks {name}", "identifier": "sks"}
        saved = adapter.save(folder / "made", metadata=stated)
        if name == "cow":
            place.mkdir()
            place /= "adapter.safetensors"
        saved.rename(place)
    shutil.rmtree(folder / "made")
    return folder


def done(folder: Path, name: str, adapter: Path, id: str) -> None:
    """A job that an earlier server has ended."""
    store = Store(folder)
    store.add(Job(id, name, "a sks dog", 1, {"method": "lora"}, time.time()), {"001.png": b""})
    file = adapter_of(store, id)
    file.parent.mkdir(parents=True)
    shutil.copy(adapter, file)
    store.end(id, "done", best_step=4, scores={"dino": 0.5})
    store.close()


def settings_of(base: Path, adapters: Path, **more: Any) -> Settings:
    options = {"num_inference_steps": 2, "max_batch": 4, "wait_ms": 0.0, "timeout_s": 60.0}
    return Settings(base=str(base), adapters=str(adapters), **{**options, **more})


@contextmanager
def engine_of(settings: Settings, device: str = "cpu") -> Iterator[Engine]:
    with computing_on(device), Engine.opened(settings, tell=lambda text: None) as engine:
        yield engine


def computing_on(device: str = "cpu") -> Any:
    """Inside, engines are of that device, in float32, whatever the machine has."""
    here = torch.device(device), torch.float32
    return patch.object(module, "device_and_dtype", lambda config: here)


def near(a: Image.Image, b: Image.Image) -> bool:
    """The same up to rounding: in 8 bits a value may fall to either side."""
    x, y = (np.asarray(image, dtype=np.int16) for image in (a, b))
    return x.shape == y.shape and int(np.abs(x - y).max()) <= 1
