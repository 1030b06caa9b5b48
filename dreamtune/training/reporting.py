"""The page of a run, from its history and the pictures that are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dreamtune.config import STACKED, Settings
from dreamtune.configfile import absolute
from dreamtune.evaluation.selection import Choice
from dreamtune.evaluation.validation import Evaluator

HIDDEN = ("output_dir", "name", "resume_from_checkpoint", "validation_prompt", *STACKED)


def report_of(
    folder: Path,
    config: Settings,
    evaluator: Evaluator,
    history: Sequence[Mapping[str, Any]],
    choice: Choice,
    title: str,
    photos: Sequence[Image.Image],
) -> str:
    """Writes report.html; gives the line that says where, or why there is none."""
    from dreamtune.evaluation.report import write_report

    steps = [r["step"] for r in history]
    grids = {s: g for s in steps if (g := evaluator.saved(s)) is not None}
    if lost := [step for step in (0, choice.step) if step not in grids]:
        place = evaluator.folder
        return f"No report: the images of step {lost[0]} in {place} are gone or damaged."
    guidance = evaluator.base.guidance_options(config.guidance_scale)
    options: dict[str, Any] = {"num_inference_steps": config.num_inference_steps, **guidance}
    if config.guidance_rescale:
        options["guidance_rescale"] = config.guidance_rescale
    path = write_report(
        folder,
        title=title,
        photos=photos,
        prompts=evaluator.prompts,
        base_images=grids[0],
        adapted_images=grids[choice.step],
        history=history,
        choice=choice,
        settings={k: v for k, v in absolute(config).to_dict().items() if k not in HIDDEN},
        base=evaluator.base.id,
        example_prompt=evaluator.prompts[0],
        sample_settings=options,
        progress=[(s, g[0]) for s, g in grids.items()],
        protocol=evaluator.scorers.protocol,
    )
    return f"Report: {path}"
