"""What a run shows of itself: the progress bar, the report, the table of several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
