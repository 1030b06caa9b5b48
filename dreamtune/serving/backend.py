"""What a server draws with: an `Engine` of its own process, or `Replicas` of one."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image

from dreamtune.data.photos import listed
from dreamtune.serving.folder import Folder

Adapter = str | None | Mapping[str, float]


class Row(NamedTuple):
    """One picture. adapter: a name, None for the base, or name -> strength."""

    prompt: str
    negative_prompt: str
    adapter: Adapter
    seed: int

    @property
    def names(self) -> Collection[str]:
        """Of the adapters in it."""
        if self.adapter is None:
            return ()
        return (self.adapter,) if isinstance(self.adapter, str) else self.adapter.keys()


class Shape(NamedTuple):
    """What the pictures of a batch have in common. size: pixels a side; negated: whether they are
    given negative prompts, where an empty one and none differ.
    """

    size: int
    steps: int
    guidance_scale: float
    negated: bool = True


@dataclass(frozen=True)
class Known:
    """An adapter that is served, as its file states it. warning: what loading it gave."""

    name: str
    method: str
    rank: int | None
    prompt: str | None
    identifier: str | None
    warning: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Based(Protocol):
    """Of a base what answers name."""

    @property
    def id(self) -> str: ...


class Backend(ABC):
    """Attributes:
    base: whose `id` is told.
    sizes: of pictures that can be asked for, the usual one first.
    empty_is_none: whether an empty negative prompt and none make the same picture.
    takes_negatives: whether guidance can lead away from a prompt.
    max_batch: the most rows of a batch; workers: batches that are drawn at once.
    adapters: name -> what is served; left_out: file or folder -> why it is not.
    broken: why nothing can be drawn any more; None.
    coming: held while a folder is looked through, between whose adapters others draw.
    on_resend: called when a batch is sent again.
    """

    base: Based
    sizes: tuple[int, ...]
    empty_is_none: bool
    takes_negatives: bool
    max_batch: int
    workers = 1

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self.adapters: dict[str, Known] = {}
        self.left_out: dict[str, str] = {}
        self.broken: str | None = None
        self.coming = threading.Lock()
        self.on_resend: Callable[[], None] = lambda: None

    @abstractmethod
    def add(self, name: str, path: str | Path) -> Known:
        """Serves one more: a file, or a folder such as a run's. Raises ValueError as `load_many`,
        for a name that is taken too.
        """

    @abstractmethod
    def draw(self, rows: Sequence[Row], shape: Shape) -> list[Image.Image | Exception]:
        """A picture a row, the one that it is alone up to rounding; in its place the error of a row
        that fails alone too.
        """

    @property
    @abstractmethod
    def guidance_scale(self) -> float:
        """Of a request that does not say."""

    @property
    @abstractmethod
    def device(self) -> str: ...

    @abstractmethod
    def warm_up(self, guidance_scale: float) -> None:
        """What the first requests would wait for."""

    def running(self) -> int:
        """Processes that draw."""
        return 1

    def memory(self) -> dict[str, int]:
        """Bytes of GPU memory: now, kept by torch, and the most so far."""
        return gpu_memory()

    def add_all(self, folder: Folder) -> list[str]:
        """Those of a folder that are not served yet; the names that are new. What cannot be served
        is told and left out.
        """
        added, left_out = [], dict(folder.left_out)
        with self.coming:
            for name, path in folder.paths.items():
                if name in self.adapters:
                    continue
                try:
                    self.add(name, path)
                    added.append(name)
                except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
                    left_out[path.name] = str(error) or type(error).__name__
            self.left_out = left_out
        if folder.others:
            self.tell(f"Passed over, for no adapter has such a name: {listed(folder.others)}")
        for name, why in left_out.items():
            self.tell(f"Left out of the adapters: {name}: {why}")
        return added


def gpu_memory() -> dict[str, int]:
    """Of this process, as torch's allocator knows it without asking the GPU; 0 where there is
    none.
    """
    asked = {
        "allocated": torch.cuda.memory_allocated,
        "reserved": torch.cuda.memory_reserved,
        "peak": torch.cuda.max_memory_allocated,
    }
    there = torch.cuda.is_available()
    return {kind: int(ask()) if there else 0 for kind, ask in asked.items()}
