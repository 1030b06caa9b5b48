"""What early stopping costs and saves: runs to the end, and where each would have stopped.

    python eval/early_stopping.py --work DIR --methods lora delora --seeds 0 1 \
        --max_train_steps 480 --validation_steps 20

Trains the development subjects of the embedded base without early stopping, then reads each run's
scorings as `--early_stop N` would have: the checkpoint that it would have kept, beside the best of
the whole run, both by the same ratings. What is no flag here is one of `dreamtune train`. Run again
it goes on. Writes DIR/early_stopping.json and prints its table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from dreamtune import embedded  # noqa: E402
from dreamtune.adapters import find_method  # noqa: E402
from dreamtune.config import Config  # noqa: E402
from dreamtune.evaluation.results import within  # noqa: E402
from dreamtune.evaluation.selection import choose_best, stale  # noqa: E402
from dreamtune.evaluation.statistics import Estimate, estimate  # noqa: E402
from dreamtune.files.whole import whole  # noqa: E402
from dreamtune.flags import train_config  # noqa: E402
from dreamtune.training.records import read_metrics  # noqa: E402
from dreamtune.training.train import train_stacked  # noqa: E402

PATIENCE = (1, 2, 3, 4, 6)
OWN = ("subjects", "output_dir", "resume_from_checkpoint", "method", "seed", "sweep", "early_stop")
LOST = 0.05  # of the product of shares: a run that lost more stopped too early


@dataclass(frozen=True)
class Stopped:
    """One run under one patience. lost: product of the whole run's best minus that of the one kept;
    dino_lost: the same of the two checkpoints' DINO. steps: made, of all."""

    method: str
    subject: str
    seed: int
    patience: int
    steps: float
    lost: float
    dino_lost: float


def stopped(
    history: Sequence[Mapping[str, Any]], patience: int, identity_at_start: bool = True
) -> tuple[float, float, float]:
    """(share of the steps made, lost, dino_lost). identity_at_start: of the method, see
    `choose_best`. Raises ValueError for a run whose checkpoints have no product of shares."""
    whole_run = choose_best(history, identity_at_start)
    products = [rating.product for rating in whole_run.ratings]
    if not products or None in products:
        raise ValueError(f"what was lost cannot be told: {whole_run.reason}")
    end = len(history)
    for count in range(1, len(history)):
        seen = history[:count]
        if stale(seen, choose_best(seen, identity_at_start).step, patience):
            end = count
            break
    best, kept = whole_run.index, choose_best(history[:end], identity_at_start).index
    return (
        history[end - 1]["step"] / history[-1]["step"],
        (products[best] or 0.0) - (products[kept] or 0.0),
        history[best]["dino"] - history[kept]["dino"],
    )


def config_of(work: Path, method: str, seed: int, training: Sequence[str]) -> Config:
    """Of the trainer. Raises ValueError for flags that are set here, and without scores."""
    for flag in training:
        if flag.startswith("--") and flag[2:].partition("=")[0] in OWN:
            raise ValueError(f"{flag} is set for each run: use --methods, --seeds, --work.")
    out = work / "runs" / method / f"seed-{seed}"
    config = train_config([
        *training, "--subjects", str(work / "photos"), "--output_dir", str(out), "--seed",
        str(seed), "--method", method, "--resume_from_checkpoint", "latest",
    ])  # fmt: skip
    if config.early_stop:
        raise ValueError("`early_stop` is set in a file of settings: the runs must go to the end.")
    if "none" in (config.dino, config.clip):
        raise ValueError("the runs are read by their scores, but `dino` or `clip` is none.")
    return config


def train(work: Path, config: Config, training: Sequence[str]) -> dict[str, Path]:
    """Subject -> its run, trained to the end. Raises ValueError where it was by other flags."""
    assert config.output_dir is not None
    out = Path(config.output_dir)
    mark = out / "done.json"
    if not mark.is_file():
        for subject in embedded.subjects("dev"):
            shutil.copytree(subject.folder, work / "photos" / subject.id, dirs_exist_ok=True)
        if failed := train_stacked(config).failed:
            raise ValueError(f"`{config.method}`, seed {config.seed}: {failed}")
        with whole(mark) as partial:
            partial.write_text(json.dumps(list(training)))
    if (before := json.loads(mark.read_text())) != list(training):
        raise ValueError(
            f"`{out}` was trained by {before}, asked for is {list(training)}: name another --work."
        )
    return {s.id: out / s.id for s in embedded.subjects("dev")}


def table(rows: Sequence[Stopped]) -> str:
    lines = [
        f"| method | patience | runs | steps made | product lost | runs that lost > {LOST} |"
        " DINO lost |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, patience in dict.fromkeys((r.method, r.patience) for r in rows):
        own = [r for r in rows if (r.method, r.patience) == (method, patience)]
        late = sum(r.lost > LOST for r in own)
        cells = [shown(own, name) for name in ("steps", "lost", "dino_lost")]
        lines.append(
            f"| {method} | {patience} | {len(own)} | {cells[0]} | {cells[1]} | {late} | "
            f"{cells[2]} |"
        )
    return "\n".join(lines)


def shown(rows: Sequence[Stopped], name: str) -> str:
    """The mean with its 95% interval, clustered by subject."""
    found: Estimate = estimate(
        [getattr(r, name) for r in rows], [r.subject for r in rows], [r.seed for r in rows]
    )
    if name == "steps":
        found = within(found, (0.0, 1.0))
    if found.low is None or found.high is None:
        return f"{found.mean:.3f}"
    return f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of all that is made")
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args, training = parser.parse_known_args(argv)
    work, rows = args.work.resolve(), []
    configs = {
        (method, seed): config_of(work, method, seed, training)
        for method in args.methods
        for seed in args.seeds
    }
    for (method, seed), config in configs.items():
        identity = find_method(method).identity_at_start
        for subject, run in train(work, config, training).items():
            history = read_metrics(run)
            rows += [
                Stopped(method, subject, seed, patience, *stopped(history, patience, identity))
                for patience in PATIENCE
            ]
    with whole(work / "early_stopping.json") as partial:
        partial.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    print(table(rows))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"early_stopping: {error}")
