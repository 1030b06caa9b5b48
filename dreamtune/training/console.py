"""What a run shows of itself: the progress bar, the report, the table of several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dreamtune.metrics.table import scored

if TYPE_CHECKING:
    from dreamtune.training.run_folder import TrainResult


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
