"""Scores alongside: fixed prompts and seeds -> images, grid, scores, tracker."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dreamtune.evaluation.selection import NEEDED
from dreamtune.files.whole import whole
from dreamtune.models.base import Base
from dreamtune.models.conditioning import Arguments, take, together
from dreamtune.models.sample import Sampling, sample

COLUMNS = 4
# What is recorded beside the scores that choose: a hint of overfitting, and of what is beyond it.
WATCHED = ("dino_nearest", "dino_held_out")
OPTIONAL = ("dino_held_out", "dino_held_out_se")


class Evaluator:
    """`evaluator(step)` samples, saves samples/<step>.png and returns (images, scores of
    metrics.jsonl): `sample`, then `judge`.

    Args:
        prompts, plain, seeds: one an image; plain is what a scorer is asked, without the
            identifier.
        sampling: how images are made.
        folder: for the grids of images.
        scorers: None for none: then the record is empty.
        photos: what the images are scored against.
        held_out: photos that nothing is trained on, for a score of their own.
    """

    def __init__(
        self,
        base: Base,
        prompts: Sequence[str],
        plain: Sequence[str],
        seeds: Sequence[int],
        *,
        sampling: Sampling,
        folder: Path,
        scorers: Any,
        photos: Sequence[Image.Image],
        held_out: Sequence[Image.Image] = (),
    ) -> None:
        self.base, self.sampling, self.folder = base, sampling, folder
        self.prompts, self.plain, self.seeds = list(prompts), list(plain), list(seeds)
        self.scorers = scorers
        self.references = scorers.references(list(photos), list(held_out)) if scorers else None

    def __call__(self, step: int) -> tuple[list[Image.Image], dict[str, Any]]:
        images = self.sample()
        return images, self.judge(step, images)

    @cached_property
    def arguments(self) -> Arguments:
        """What the pipeline is told, a row an image; encoded once."""
        return self.base.sampling_arguments(self.prompts)

    def encode(self) -> None:
        """Encodes the prompts now: after this no text encoder is asked."""
        assert self.arguments

    def sample(self) -> list[Image.Image]:
        arguments = self.arguments
        with self.base.sampling(self.sampling.sampler, prompts=False) as pipe:
            options = self.sampling.options()
            return sample(pipe, self.prompts, self.seeds, arguments=arguments, **options)

    def judge(self, step: int, images: list[Image.Image]) -> dict[str, Any]:
        """Keeps the images and scores them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_grid(images, self.folder / f"{step:06d}.png")
        if self.scorers is None:
            return {}
        record: dict[str, Any] = self.scorers.score(images, self.plain, self.references).record()
        # a subject without held-out photos has no such score, rather than an empty one
        return {k: v for k, v in record.items() if v is not None or k not in OPTIONAL}

    def saved(self, step: int) -> list[Image.Image] | None:
        """The images of an earlier scoring, read back from its grid; None where it is lost."""
        path = self.folder / f"{step:06d}.png"
        if not path.is_file():
            return None
        with contextlib.suppress(OSError, ValueError, SyntaxError):  # what Pillow has for damage
            return read_grid(path, len(self.prompts), self.sampling.size)
        return None


@contextlib.contextmanager
def at_step(adapter: Any, k: int) -> Iterator[None]:
    """Step 0 is the base, also for a method that does not start there."""
    adapter.scale = 1.0 if k else 0.0
    try:
        yield
    finally:
        adapter.scale = 1.0


def sample_slots(
    base: Base, adapter: Any, slots: Sequence[int], evaluators: Sequence[Evaluator]
) -> list[list[Image.Image]]:
    """The images of each evaluator by its slot of the adapter, rows of several slots in a batch.

    Raises ValueError if an image of any is not finite.
    """
    if adapter.slots == 1:
        return [e.sample() for e in evaluators]
    sampling = evaluators[0].sampling
    arguments = together([e.arguments for e in evaluators])
    prompts = [p for e in evaluators for p in e.prompts]
    seeds = [s for e in evaluators for s in e.seeds]
    counts = torch.tensor([len(e.prompts) for e in evaluators])
    routes = torch.tensor(slots).repeat_interleave(counts).to(base.device)
    images = iter(routed(base, adapter, sampling, prompts, seeds, arguments, routes))
    return [[next(images) for _ in e.prompts] for e in evaluators]


def routed(
    base: Base,
    adapter: Any,
    sampling: Sampling,
    prompts: Sequence[str],
    seeds: Sequence[int],
    arguments: Arguments,
    routes: Tensor,
) -> list[Image.Image]:
    """Images, each by its slot of an adapter of several: routes (N,) on the base's device."""
    made: list[Image.Image] = []
    repeats = base.rows_per_image(sampling.guidance_scale)
    try:
        with base.sampling(sampling.sampler, prompts=False) as pipe:
            for start in range(0, len(prompts), sampling.batch_size):
                rows = slice(start, start + sampling.batch_size)
                if adapter.slots > 1:
                    adapter.route(routes[rows].repeat(repeats))
                part = take(arguments, range(len(prompts))[rows])
                options = sampling.options()
                made += sample(pipe, prompts[rows], seeds[rows], arguments=part, **options)
    finally:
        adapter.route(None)
    return made


class BasePictures:
    """What the base makes of prompts and seeds, for runs that ask for the same ones: made once,
    and kept until the last of the runs has them.

    asked: prompts and seeds of each run.
    """

    def __init__(self, asked: Iterable[tuple[Sequence[str], Sequence[int]]] = ()) -> None:
        self.waiting = Counter(key for prompts, seeds in asked for key in zip(prompts, seeds))
        self.images: dict[tuple[str, int], Image.Image] = {}

    def sample(
        self, base: Base, adapter: Any, evaluators: Sequence[Evaluator]
    ) -> list[list[Image.Image]]:
        """The images of each evaluator, by an adapter that is without effect (`at_step` 0). All
        sample alike. Raises ValueError if one is not finite."""
        new = {
            key: (e, row)
            for e in evaluators
            for row, key in enumerate(zip(e.prompts, e.seeds))
            if key not in self.images
        }
        if new:
            arguments = together([take(e.arguments, [row]) for e, row in new.values()])
            prompts, seeds = zip(*new)
            routes = torch.zeros(len(new), dtype=torch.long, device=base.device)
            sampling = evaluators[0].sampling
            made = routed(base, adapter, sampling, prompts, seeds, arguments, routes)
            self.images.update(zip(new, made, strict=True))
        found = [[self.images[key] for key in zip(e.prompts, e.seeds)] for e in evaluators]
        self.waiting.subtract(key for e in evaluators for key in zip(e.prompts, e.seeds))
        self.images = {key: image for key, image in self.images.items() if self.waiting[key] > 0}
        return found


def load_scorers(settings: Mapping[str, Any], device: torch.device) -> Any:
    """What scores while training, by the settings that are named like its extractors; None where
    those that the choice of the best needs are all "none".

    Raises ValueError if some of those are "none" and others are not.
    """
    from dreamtune.metrics import METRICS, Scorers, find_metrics

    metrics = find_metrics()
    names = dict.fromkeys(metric.extractor.name for metric in metrics)
    weights = {n: w for n in names if (w := settings.get(n)) is not None}
    needed = list(dict.fromkeys(METRICS[key].extractor.name for key in NEEDED))
    off = [n for n in needed if weights.get(n, "none") == "none"]
    if off == needed:
        return None
    if off:
        raise ValueError(
            f"{' and '.join(f'`{n}`' for n in needed)} go together: the best checkpoint is chosen "
            "by both. Set both to none to train without scores."
        )
    asked = [m.key for m in metrics if weights.get(m.extractor.name) != "none"]
    asked += [key for key in WATCHED if key not in asked]
    weights = {n: w for n, w in weights.items() if w != "none"}
    noise = io.StringIO()  # transformers prints a loading bar
    with contextlib.redirect_stderr(noise):
        return Scorers.load(weights, asked, device)


def save_grid(images: Sequence[Image.Image], path: Path) -> None:
    """One PNG, COLUMNS images a row, no gaps: also the store that `read_grid` reads."""
    width, height = images[0].size
    rows = -(-len(images) // COLUMNS)
    sheet = Image.new("RGB", (width * min(COLUMNS, len(images)), height * rows), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % COLUMNS * width, i // COLUMNS * height))
    with whole(path) as partial:  # the default level takes 4 times as long, for 10% of the size
        sheet.save(partial, "PNG", compress_level=1)


def read_grid(path: Path, count: int, size: int) -> list[Image.Image]:
    sheet = Image.open(path, formats=["PNG"]).convert("RGB")
    corners = [(i % COLUMNS * size, i // COLUMNS * size) for i in range(count)]
    return [sheet.crop((x, y, x + size, y + size)) for x, y in corners]
