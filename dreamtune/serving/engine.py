"""The base with its adapters, which draws rows of several requests as one routed batch."""

from __future__ import annotations

import gc
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from dreamtune.config import EMBEDDED, Config
from dreamtune.files.find import adapter_file
from dreamtune.models.base import Base
from dreamtune.models.load import load_base
from dreamtune.models.sample import sample
from dreamtune.pipeline.adapters import get_adapters, route, unload
from dreamtune.pipeline.load import network_of
from dreamtune.pipeline.many import load_many
from dreamtune.pipeline.speed import speed_up_where_possible
from dreamtune.serving.backend import Adapter, Backend, Known, Row, Shape
from dreamtune.serving.folder import look
from dreamtune.serving.settings import Settings
from dreamtune.training.defaults import device_and_dtype
from dreamtune.training.output import say

# Rows of a batch on a GPU, which is filled up to the next: each number is a recording of its own,
# of which 12 are kept; at most a third of the rows is drawn for nothing.
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
GPU_BATCH, CPU_BATCH = 16, 4
REMEMBERED = 600.0  # seconds: what lacks the memory may be another process, which ends
WARNING = "warning"  # in a picture's `info`: what of the request it does not show


class Most(NamedTuple):
    """Rows that the memory was seen to hold; until: by the monotonic clock, in seconds."""

    rows: int
    until: float


class Engine(Backend):
    """Attributes:
    pipe: a pipeline of the base, with everything on its device.
    lock: held while anything is drawn or an adapter comes or goes.
    """

    base: Base

    def __init__(
        self,
        base: Base,
        pipe: Any,
        sizes: Sequence[int] = (),
        max_batch: int | None = None,
        tell: Callable[[str], None] = say,
    ) -> None:
        """Raises ValueError for a size that the base cannot draw."""
        super().__init__(tell)
        self.base, self.pipe = base, pipe
        self.sizes = tuple(sizes) or (base.resolution,)
        for size in self.sizes:
            base.check_side(size)
        self.empty_is_none = base.empty_is_none
        self.takes_negatives = base.takes_negatives
        self.on_gpu = base.device.type == "cuda"
        self.max_batch = max_batch or (GPU_BATCH if self.on_gpu else CPU_BATCH)
        self.rescale = base.sampling_defaults(self.sizes[0]).guidance_rescale
        self.lock = threading.RLock()
        self.most: dict[int, Most] = {}  # by size of the pictures

    @classmethod
    @contextmanager
    def opened(cls, settings: Settings, tell: Callable[[str], None] = say) -> Iterator[Engine]:
        """By the settings, with the adapters of their folder; on a GPU sped up. Raises ValueError
        as `load_base`, and for a folder that is not there.
        """
        folder = look(Path(settings.adapters).expanduser())
        device, dtype = device_and_dtype(Config(pretrained_model_name_or_path=EMBEDDED))
        base = load_base(
            settings.base,
            revision=settings.revision,
            variant=settings.variant,
            prediction_type=settings.prediction_type,
            device=device,
            dtype=dtype,
        )
        for note in base.notes:
            tell(note)
        size = settings.resolution[0] if settings.resolution else base.resolution
        with base.sampling(base.sampling_defaults(size).sampler) as pipe:
            engine = cls(base, pipe, settings.resolution, settings.max_batch, tell)
            engine.add_all(folder)
            if engine.on_gpu:
                speed_up_where_possible(pipe, tell)
            yield engine

    @property
    def guidance_scale(self) -> float:
        return self.base.sampling_defaults(self.sizes[0]).guidance_scale

    # Adapters

    def add(self, name: str, path: str | Path) -> Known:
        with self.lock:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                load_many(self.pipe, {name: adapter_file(Path(path))})  # never the hub's
            entry: Any = get_adapters(self.pipe)[name]
            told = " ".join(str(w.message) for w in said if w.category is UserWarning) or None
            rank, stated = entry.options.get("rank"), entry.metadata
            prompt, identifier = (
                text if isinstance(text := stated.get(key), str) else None
                for key in ("prompt", "identifier")
            )
            known = Known(name, entry.method, rank, prompt, identifier, told)
            self.adapters = {**self.adapters, name: known}
        if told:
            self.tell(f"Warning, `{name}`: {told}")
        return known

    def remove(self, name: str) -> None:
        """Raises ValueError where there is none of that name."""
        with self.lock:
            if name not in self.adapters:
                raise ValueError(f"no adapter `{name}` is served")
            self.adapters = {n: known for n, known in self.adapters.items() if n != name}
            unload(self.pipe, name)

    # Pictures

    def draw(self, rows: Sequence[Row], shape: Shape) -> list[Image.Image | Exception]:
        """A batch that fails is drawn in halves, and so on: an error is of the rows that cause
        it.
        """
        held = self.most.get(shape.size)
        if held is not None and time.monotonic() > held.until:
            del self.most[shape.size]
            held = None
        most = self.max_batch if held is None else held.rows
        if len(rows) > most:
            return self._in_parts(rows, shape, most)
        try:
            return list(self._drawn(rows, shape))
        except Exception as error:  # of whatever kind: the other rows are not to know of it
            error.__traceback__ = None  # which holds the tensors of the batch
            if self._is_end(error) or len(rows) == 1:
                return [error] * len(rows)
            half = (len(rows) + 1) // 2
            short = lacks_memory(error)
        if short:
            self.most[shape.size] = Most(half, time.monotonic() + REMEMBERED)
            self.tell(f"Too little memory for {len(rows)} pictures at once: at most {half} now")
            self._release()
        return self._in_parts(rows, shape, half)

    def _in_parts(
        self, rows: Sequence[Row], shape: Shape, most: int
    ) -> list[Image.Image | Exception]:
        parts = (rows[i : i + most] for i in range(0, len(rows), most))
        return [picture for part in parts for picture in self.draw(part, shape)]

    def _drawn(self, rows: Sequence[Row], shape: Shape) -> list[Image.Image]:
        count = len(rows)
        if self.on_gpu:
            allowed = (n for n in COUNTS if count <= n <= self.max_batch)
            rows = [*rows, *[rows[-1]] * (next(allowed, count) - count)]
        with self.lock:
            plain = not get_adapters(self.pipe)  # then there is nothing to be routed
            routes = [row.adapter for row in rows]
            with nullcontext() if plain else route(self.pipe, routes):
                images = sample(
                    self.pipe,
                    [row.prompt for row in rows],
                    [row.seed for row in rows],
                    negative_prompts=[r.negative_prompt for r in rows] if shape.negated else None,
                    steps=shape.steps,
                    size=shape.size,
                    guidance_scale=shape.guidance_scale,
                    guidance_rescale=self.rescale,
                    batch_size=len(rows),
                )
            for image, row in zip(images[:count], rows):
                told = self.base.unseen(row.prompt) or self.base.unseen(row.negative_prompt)
                if told:
                    image.info[WARNING] = told
        return images[:count]

    def _is_end(self, error: Exception) -> bool:
        """Whether the GPU answers nothing from now on: a fault in a kernel ends its context."""
        fault = getattr(torch, "AcceleratorError", None)
        if fault is not None and isinstance(error, fault) and not lacks_memory(error):
            self.broken = str(error).splitlines()[0]
            self.tell(f"The GPU failed, start the server again: {self.broken}")
        return self.broken is not None

    def _release(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def warm_up(self, guidance_scale: float) -> None:
        """On a GPU every number of rows is drawn, by all adapters in turn, and so recorded: the
        first requests need not wait for it.
        """
        if not self.on_gpu:
            return
        names: list[Adapter] = [*self.adapters] or [None]
        for count in [n for n in COUNTS if n <= self.max_batch]:
            rows = [Row("", "", names[i % len(names)], 0) for i in range(count)]
            for result in self.draw(rows, Shape(self.sizes[0], 2, guidance_scale)):
                if isinstance(result, Exception):
                    self.tell(f"Warning: a picture drawn to warm up failed: {result}")
                    return

    @property
    def device(self) -> str:
        network = network_of(self.pipe)
        found = next(network.parameters()).device
        return torch.cuda.get_device_name(found) if found.type == "cuda" else found.type


def lacks_memory(error: Exception) -> bool:
    """Whether fewer rows at once may do."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
    )
