"""What a run shows of itself: the progress bar, the report, the table of several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dreamtune.config import STACKED
from dreamtune.metrics.table import scored

if TYPE_CHECKING:
    from dreamtune.run import Run
    from dreamtune.runstate import TrainResult


def write_run_report(run: Run) -> None:
    from dreamtune.report import write_report

    c, steps = run.config, [r["step"] for r in run.history]
    grids = {s: g for s in steps if (g := run.evaluator.saved(s)) is not None}
    options = {"num_inference_steps": c.num_inference_steps, "guidance_scale": c.guidance_scale}
    if c.guidance_rescale:
        options["guidance_rescale"] = c.guidance_rescale
    hidden = ("output_dir", "name", "resume_from_checkpoint", "validation_prompt", *STACKED)
    path = write_report(
        run.dir,
        title=run.subject.name,
        photos=run.images,
        prompts=run.evaluator.prompts,
        base_images=grids[0],
        adapted_images=grids[run.best_step],
        history=run.history,
        choice=run.choice,
        settings={k: v for k, v in c.to_dict().items() if k not in hidden},
        base=run.base.id,
        example_prompt=run.evaluator.prompts[0],
        sample_settings=options,
        progress=[(s, g[0]) for s, g in grids.items()],
        protocol=run.evaluator.scorers.protocol,
    )
    print(f"Report: {path}")


def options_text(options: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in options.items())


def progress_bar(start: int, total: int) -> Any:
    from tqdm import tqdm

    return tqdm(
        initial=start,
        total=total,
        unit="step",
        dynamic_ncols=True,
        bar_format="{l_bar}{bar:16}{r_bar}",
    )


def table(results: dict[str, TrainResult], failed: dict[str, str]) -> str:
    """One line a run: steps, best step, its scores."""
    width = max(map(len, [*results, *failed, "run"]))
    metrics = scored(r.scores for r in results.values())
    heads = ["steps", "best", *(m.title for m in metrics)]
    lines = ["  ".join([f"{'run':<{width}}", *(f"{h:>{max(len(h), 6)}}" for h in heads)])]
    for label, r in results.items():
        cells = [r.history[-1]["step"], r.best_step, *(m.text(r.scores, "-") for m in metrics)]
        shown = (f"{cell:>{max(len(h), 6)}}" for h, cell in zip(heads, cells))
        lines.append("  ".join([f"{label:<{width}}", *shown]))
    lines += [f"{label:<{width}}  failed: {why}" for label, why in failed.items()]
    return "\n".join(lines)
