"""Scores alongside: fixed prompts and seeds -> images, grid, scores, tracker."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from dreamtune.base import Base
from dreamtune.config import Config
from dreamtune.prepare import Subject, sampling_options
from dreamtune.sample import sample

COLUMNS = 4


class Evaluator:
    """`evaluator(step)` samples, saves samples/<step>.png and returns (images, scores of
    metrics.jsonl).

    prompts: one an image. Without scorers ("none") the record is empty.
    """

    def __init__(
        self, config: Config, base: Base, subject: Subject, photos: Sequence[Image.Image]
    ) -> None:
        from dreamtune.metrics.scorers import without_identifier

        self.config, self.base = config, base
        self.prompts = [
            p.replace("{}", subject.name)
            for p in config.validation_prompt
            for _ in range(config.num_validation_images)
        ]
        self.seeds = [config.validation_seed + i for i in range(len(self.prompts))]
        # the identifier means nothing to a scorer
        self.plain = [without_identifier(p, subject.identifier) for p in self.prompts]
        self.scorers = load_scorers(config, base)
        self.references = self.scorers.references(list(photos)) if self.scorers else None
        self.embeds: Tensor | None = None
        self.folder = Path(config.output_dir or ".") / "samples"

    def __call__(self, step: int) -> tuple[list[Image.Image], dict[str, Any]]:
        if self.embeds is None:
            self.embeds = self.base.encode_prompts(self.prompts).to(self.base.dtype)
        with self.base.sampling(self.config.sampler or "base") as pipe:
            images = sample(
                pipe,
                self.prompts,
                self.seeds,
                prompt_embeds=self.embeds,
                batch_size=self.config.sample_batch_size,
                **sampling_options(self.config),
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        save_grid(images, self.folder / f"{step:06d}.png")
        record = (
            self.scorers.score(images, self.plain, self.references).record() if self.scorers else {}
        )
        return images, record

    def saved(self, step: int) -> list[Image.Image] | None:
        """The images of an earlier scoring, read back from its grid."""
        path = self.folder / f"{step:06d}.png"
        assert self.config.resolution is not None
        return (
            read_grid(path, len(self.prompts), self.config.resolution) if path.is_file() else None
        )


def load_scorers(config: Config, base: Base) -> Any:
    """The scorers, or None where both are "none". "embedded" is the package's own."""
    from dreamtune.metrics.scorers import Scorers

    names = {"dino": config.dino or "none", "clip": config.clip or "none"}
    if names["dino"] == names["clip"] == "none":
        return None
    if "none" in names.values():
        raise ValueError(
            "`dino` and `clip` go together: the best checkpoint is chosen by both. Set both to "
            "none to "
            "train without scores."
        )
    if "embedded" in names.values():
        from dreamtune import embedded

        names["dino"] = str(embedded.DINO) if names["dino"] == "embedded" else names["dino"]
        names["clip"] = (
            f"local-dir:{embedded.CLIP}" if names["clip"] == "embedded" else names["clip"]
        )
    noise = io.StringIO()  # transformers prints a loading bar
    with contextlib.redirect_stderr(noise):
        return Scorers.load(names["dino"], names["clip"], base.device)


def save_grid(images: Sequence[Image.Image], path: Path) -> None:
    """One PNG, COLUMNS images a row, no gaps: also the store that `read_grid` reads."""
    width, height = images[0].size
    rows = -(-len(images) // COLUMNS)
    sheet = Image.new("RGB", (width * min(COLUMNS, len(images)), height * rows), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % COLUMNS * width, i // COLUMNS * height))
    sheet.save(path)


def read_grid(path: Path, count: int, size: int) -> list[Image.Image]:
    sheet = Image.open(path).convert("RGB")
    corners = [(i % COLUMNS * size, i // COLUMNS * size) for i in range(count)]
    return [sheet.crop((x, y, x + size, y + size)) for x, y in corners]


class Tracker:
    """TensorBoard through accelerate's tracker, or nothing."""

    def __init__(self, kind: str, run_dir: Path) -> None:
        self.inner: Any = None
        if kind == "tensorboard":
            try:
                from accelerate import PartialState
                from accelerate.tracking import TensorBoardTracker

                PartialState()
                logging.getLogger("tensorboard").setLevel(logging.ERROR)
                self.inner = TensorBoardTracker("tensorboard", str(run_dir / "logs"))
                if hasattr(self.inner, "start"):
                    self.inner.start()
            except ImportError as error:
                raise ValueError(
                    "`report_to` tensorboard needs it installed: pip install "
                    "'dreamtune[tensorboard]' "
                    f"({error})."
                ) from None

    def log(self, values: dict[str, Any], step: int, images: Sequence[Image.Image] = ()) -> None:
        if self.inner is None:
            return
        import numpy as np

        self.inner.log(
            {k: v for k, v in values.items() if isinstance(v, (int, float)) and k != "step"},
            step=step,
        )
        if images:
            self.inner.writer.add_images(
                "samples", np.stack([np.asarray(i) for i in images]), step, dataformats="NHWC"
            )

    def close(self) -> None:
        if self.inner is not None:
            self.inner.finish()
