"""What is shown of runs: the line before the first step, the progress bar, the table of several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from dreamtune.config import Config
    from dreamtune.injection.inject import InjectedAdapter
    from dreamtune.training.run_folder import TrainResult


def wave_text(config: Config, adapter: InjectedAdapter, device: torch.device, took: float) -> str:
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
        initial=start,
        total=total,
        unit="step",
        dynamic_ncols=True,
        bar_format="{l_bar}{bar:16}{r_bar}",
    )


def table(results: dict[str, TrainResult], failed: dict[str, str]) -> str:
    """One line a run: best step, its scores, its folder."""
    width = max(map(len, [*results, *failed, "run"]))
    heads = f"{'steps':>5}  {'best':>5}  {'DINO':>6}  {'CLIP-I':>6}  {'CLIP-T':>6}"
    lines = [f"{'run':<{width}}  {heads}"]
    for label, r in results.items():
        scores = [r.scores.get(k) for k in ("dino", "clip_i", "clip_t")]
        shown = "  ".join(f"{'-' if s is None else format(s, '.3f'):>6}" for s in scores)
        last = r.history[-1]["step"]
        lines.append(f"{label:<{width}}  {last:>5}  {r.best_step:>5}  {shown}")
    lines += [f"{label:<{width}}  failed: {why}" for label, why in failed.items()]
    return "\n".join(lines)
