"""Scores alongside: fixed prompts and seeds -> images, grid, scores, tracker."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dreamtune.config import Config
from dreamtune.data.words import SubjectWords
from dreamtune.evaluation.selection import NEEDED
from dreamtune.models.sample import sample
from dreamtune.models.stable_diffusion import Base
from dreamtune.training.defaults import sampling_options

COLUMNS = 4


class Evaluator:
    """`evaluator(step)` samples, saves samples/<step>.png and returns (images, scores of
    metrics.jsonl): `sample`, then `judge`. scorers: loaded already, by a stacked run.

    prompts: one an image. Without scorers ("none") the record is empty.
    """

    def __init__(
        self,
        config: Config,
        base: Base,
        subject: SubjectWords,
        photos: Sequence[Image.Image],
        scorers: Any = None,
    ) -> None:
        self.config, self.base = config, base
        self.prompts = [
            subject.prompt(p)
            for p in config.validation_prompt
            for _ in range(config.num_validation_images)
        ]
        self.seeds = [config.validation_seed + i for i in range(len(self.prompts))]
        # the identifier means nothing to a scorer
        self.plain = [subject.plain(p) for p in self.prompts]
        self.scorers = scorers or load_scorers(config, base)
        self.references = self.scorers.references(list(photos)) if self.scorers else None
        self.embeds: dict[str, Tensor] = {}
        self.folder = Path(config.output_dir or ".") / "samples"

    def __call__(self, step: int) -> tuple[list[Image.Image], dict[str, Any]]:
        images = self.sample()
        return images, self.judge(step, images)

    def embeddings(self) -> dict[str, Tensor]:
        """Arguments of `sample`: prompt_embeds (images, tokens, dim), negative_prompt_embeds (1,
        tokens, dim); encoded once.
        """
        if not self.embeds:
            encoded = self.base.encode_prompts(["", *self.prompts]).to(self.base.dtype)
            self.embeds = {"prompt_embeds": encoded[1:], "negative_prompt_embeds": encoded[:1]}
        return self.embeds

    def sample(self) -> list[Image.Image]:
        embeds = self.embeddings()
        with self.base.sampling(self.config.sampler or "base", prompts=False) as pipe:
            return sample(
                pipe,
                self.prompts,
                self.seeds,
                batch_size=self.config.sample_batch_size,
                **embeds,
                **sampling_options(self.config),
            )

    def judge(self, step: int, images: list[Image.Image]) -> dict[str, Any]:
        """Keeps the images and scores them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_grid(images, self.folder / f"{step:06d}.png")
        if self.scorers is None:
            return {}
        record: dict[str, Any] = self.scorers.score(images, self.plain, self.references).record()
        return record

    def saved(self, step: int) -> list[Image.Image] | None:
        """The images of an earlier scoring, read back from its grid."""
        path = self.folder / f"{step:06d}.png"
        assert self.config.resolution is not None
        return (
            read_grid(path, len(self.prompts), self.config.resolution) if path.is_file() else None
        )


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
    c = evaluators[0].config
    if adapter.slots == 1:
        return [e.sample() for e in evaluators]
    embeds = torch.cat([e.embeddings()["prompt_embeds"] for e in evaluators])
    nothing = evaluators[0].embeddings()["negative_prompt_embeds"]
    prompts = [p for e in evaluators for p in e.prompts]
    seeds = [s for e in evaluators for s in e.seeds]
    counts = torch.tensor([len(e.prompts) for e in evaluators])
    routes = torch.tensor(slots).repeat_interleave(counts).to(base.device)
    doubled = 2 if (c.guidance_scale or 0) > 1 else 1  # all rows without the prompt, then with it
    made: list[Image.Image] = []
    try:
        with base.sampling(c.sampler or "base", prompts=False) as pipe:
            for start in range(0, len(prompts), c.sample_batch_size):
                rows = slice(start, start + c.sample_batch_size)
                adapter.route(routes[rows].repeat(doubled))
                made += sample(
                    pipe,
                    prompts[rows],
                    seeds[rows],
                    prompt_embeds=embeds[rows],
                    negative_prompt_embeds=nothing,
                    batch_size=c.sample_batch_size,
                    **sampling_options(c),
                )
    finally:
        adapter.route(None)
    images = iter(made)
    return [[next(images) for _ in e.prompts] for e in evaluators]


def load_scorers(config: Config, base: Base) -> Any:
    """What scores while training, by the settings that are named like its extractors; None where
    those that the choice of the best needs are all "none".

    Raises ValueError if some of those are "none" and others are not.
    """
    from dreamtune.metrics import METRICS, Scorers, find_metrics

    metrics = find_metrics()
    names = dict.fromkeys(metric.extractor.name for metric in metrics)
    weights = {n: w for n in names if (w := getattr(config, n, None)) is not None}
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
    weights = {n: w for n, w in weights.items() if w != "none"}
    noise = io.StringIO()  # transformers prints a loading bar
    with contextlib.redirect_stderr(noise):
        return Scorers.load(weights, asked, base.device)


def save_grid(images: Sequence[Image.Image], path: Path) -> None:
    """One PNG, COLUMNS images a row, no gaps: also the store that `read_grid` reads."""
    width, height = images[0].size
    rows = -(-len(images) // COLUMNS)
    sheet = Image.new("RGB", (width * min(COLUMNS, len(images)), height * rows), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % COLUMNS * width, i // COLUMNS * height))
    sheet.save(path, compress_level=1)  # the default takes 4 times as long, for 10% of the size


def read_grid(path: Path, count: int, size: int) -> list[Image.Image]:
    sheet = Image.open(path).convert("RGB")
    corners = [(i % COLUMNS * size, i // COLUMNS * size) for i in range(count)]
    return [sheet.crop((x, y, x + size, y + size)) for x, y in corners]
