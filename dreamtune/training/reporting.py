"""The page of a run, from its history and the pictures that are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dreamtune.config import STACKED
from dreamtune.configfile import absolute

if TYPE_CHECKING:
    from dreamtune.training.run import Run

HIDDEN = ("output_dir", "name", "resume_from_checkpoint", "validation_prompt", *STACKED)


def report_of(run: Run) -> str:
    """Writes report.html; gives the line that says where, or why there is none."""
    from dreamtune.evaluation.report import write_report

    c, steps = run.config, [r["step"] for r in run.history]
    grids = {s: g for s in steps if (g := run.evaluator.saved(s)) is not None}
    if lost := [step for step in (0, run.best_step) if step not in grids]:
        place = run.evaluator.folder
        return f"No report: the images of step {lost[0]} in {place} are gone or damaged."
    guidance = run.base.guidance_options(c.guidance_scale)
    options: dict[str, Any] = {"num_inference_steps": c.num_inference_steps, **guidance}
    if c.guidance_rescale:
        options["guidance_rescale"] = c.guidance_rescale
    path = write_report(
        run.dir,
        title=run.subject.name,
        photos=run.images,
        prompts=run.evaluator.prompts,
        base_images=grids[0],
        adapted_images=grids[run.best_step],
        history=run.history,
        choice=run.choice,
        settings={k: v for k, v in absolute(c).to_dict().items() if k not in HIDDEN},
        base=run.base.id,
        example_prompt=run.evaluator.prompts[0],
        sample_settings=options,
        progress=[(s, g[0]) for s, g in grids.items()],
        protocol=run.evaluator.scorers.protocol,
    )
    return f"Report: {path}"
