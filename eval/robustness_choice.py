"""Steps and learning rate of each method on the embedded base, from the development subjects.

    python eval/robustness_choice.py eval/results/2026-11-29-robustness/results.json

Of the runs of the part `choice`, 5 subjects x 3 seeds: a method's own rate where, at its best step,
it is within NEAR of the best of all rates and steps in mean DINO, else the best rate; then the
fewest steps within NEAR of that rate's best that keep the prompt, KEPT of the margin at that rate's
best. `dreamtune/training/chosen.py` is what comes out.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "eval"), str(ROOT)]

from robustness_plan import MAIN, VARIANTS  # noqa: E402
from robustness_stats import own_prompt  # noqa: E402

NEAR = 0.015  # of DINO: no more than the intervals of 25 subjects tell apart
KEPT = 0.97  # of the prompt's margin: CLIP-T with an image's own prompt minus with the others'

METHODS = (*MAIN, "dora", "oft", "hra", "deft", "norm_bounded")
Grid = dict[float, dict[int, tuple[float, float]]]  # rate -> step -> (DINO, margin)


def grid_of(results: Mapping[str, Any], variant: str) -> Grid:
    found: dict[tuple[float, int], list[tuple[float, float]]] = defaultdict(list)
    diverged = set()
    for values in results["rows"]:
        row = dict(zip(results["columns"], values))
        if row["part"] == "choice" and row["variant"] == variant:
            key = row["rate"], row["step"]
            dino, margin = row["dino"], own_prompt(row)
            if dino is None or margin is None:
                diverged.add(key)
            else:
                found[key].append((dino, margin))
    grid: Grid = defaultdict(dict)
    for (rate, step), scores in found.items():
        if (rate, step) not in diverged:
            grid[rate][step] = (
                statistics.mean(dino for dino, _ in scores),
                statistics.mean(margin for _, margin in scores),
            )
    return dict(grid)


def chosen(grid: Grid, own: float) -> tuple[int, float]:
    """(steps, rate). own: the method's rate."""

    def best(rate: float) -> float:
        return max(dino for dino, _ in grid[rate].values())

    top = max(map(best, grid))
    near = [rate for rate in grid if abs(rate / own - 1) < 1e-6 and best(rate) >= top - NEAR]
    rate = near[0] if near else max(grid, key=best)
    margin = KEPT * grid[rate][max(grid[rate], key=lambda step: grid[rate][step][0])][1]
    steps = [
        step
        for step, (dino, kept) in grid[rate].items()
        if dino >= best(rate) - NEAR and kept >= margin
    ]
    return min(steps), rate


def main() -> int:
    results = json.loads(Path(sys.argv[1]).read_text())
    print("| method | steps | rate | DINO | margin |\n|---|---|---|---|---|")
    for name in METHODS:
        grid = grid_of(results, name)
        steps, rate = chosen(grid, VARIANTS[name].rate)
        dino, margin = grid[rate][steps]
        print(f"| {VARIANTS[name].title} | {steps} | {rate:.3g} | {dino:.3f} | {margin:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
