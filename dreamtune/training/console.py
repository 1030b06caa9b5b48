"""What is shown of runs: the line before the first step, the progress bar, the table of several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dreamtune.metrics.table import scored
from dreamtune.training.output import Output

if TYPE_CHECKING:
    import torch

    from dreamtune.config import Settings
    from dreamtune.injection.inject import InjectedAdapter
    from dreamtune.training.run_folder import TrainResult


def wave_text(config: Settings, adapter: InjectedAdapter, device: torch.device, took: float) -> str:
    """What trains, before the first step. took: seconds of getting ready."""
    options = " ".join(f"{k}={v}" for k, v in config.options.items())
    each = " a run" if adapter.slots > 1 else ""
    return (
        f"{config.method} {options}: {adapter.num_parameters:,} parameters{each} on {device.type}, "
        f"{config.max_train_steps} steps; ready after {took:.1f} s"
    )


def progress_bar(start: int, total: int) -> Any:
    from tqdm import tqdm

    return tqdm(
        file=Output("stderr"),
        initial=start,
        total=total,
        unit="step",
        dynamic_ncols=True,
        bar_format="{l_bar}{bar:16}{r_bar}",
    )


def table(results: dict[str, TrainResult], failed: dict[str, str]) -> str:
    """One line a run: steps, best step, its scores."""
    width = max(map(len, [*results, *failed, "run"]))
    metrics = [m for m in scored(r.scores for r in results.values()) if m.brief]
    heads = ["steps", "best", *(m.title for m in metrics)]
    lines = ["  ".join([f"{'run':<{width}}", *(f"{h:>{max(len(h), 6)}}" for h in heads)])]
    for label, r in results.items():
        cells = [r.history[-1]["step"], r.best_step, *(m.text(r.scores, "-") for m in metrics)]
        shown = (f"{cell:>{max(len(h), 6)}}" for h, cell in zip(heads, cells))
        lines.append("  ".join([f"{label:<{width}}", *shown]))
    lines += [f"{label:<{width}}  failed: {why}" for label, why in failed.items()]
    return "\n".join(lines)
