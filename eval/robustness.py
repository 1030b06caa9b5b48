"""How robust the methods are to the learning rate and to more steps, on the embedded base.

    python eval/robustness.py --work DIR --minutes 9 --parts defaults  # on development subjects
    python eval/robustness.py --work DIR --minutes 9                   # parts a b c d, in turn
    python eval/robustness.py --work DIR --minutes 0                   # the plan, and results.json
    accelerate launch --multi_gpu --num_processes 2 eval/robustness.py --work DIR --minutes 9

    python eval/robustness.py --work DIR --minutes 5 --parts a --variants lora delora \
        --multipliers 1 4 --subjects 1 --steps 4 --prompts 2             # small, on the CPU

a: LoRA, DeLoRA, ETHER, ETHER+ at 6 rates, 1/16 to 64 times each one's best of the part `defaults`
(its own where DIR does not have that part), on 25 reporting subjects, scored at the last step; b:
the four at 16 times the steps on 5 of these subjects, scored along the way; c: relatives and
ablations at the 6 rates on the 5; d: two more seeds of a. Around each one's own rate: defaults: the
6 rates on the development subjects; time: the four at 3 rates on these, scored every few steps;
lambda: DeLoRA's starts and strengths on these; steps: the relatives, as in time; choice: all at 3
rates, 3 seeds; confirm: what was chosen, on the 25 reporting subjects; starts: DeLoRA's starts at
lambda 4 and 15 and 4 rates on the 25.

Runs train stacked, one variant a wave, each slot with its own rate, subject and seed. What the
device does is measured first and kept in DIR; then the plan is fitted to the minutes and what does
not fit is listed with its cost: run again it goes on, and no finished run is done again. A run that
gives nothing finite is recorded as diverged, without scores. DIR holds a few flat files and no
adapters; DIR/results.json is what `robustness_report.py` reads. Processes deal the subjects; the
first writes the results, so after several `--minutes 0` gathers what all have done.
"""

from __future__ import annotations

import time

BEGAN = time.perf_counter()

import argparse  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "eval"), str(ROOT)]

from robustness_bench import Bench  # noqa: E402
from robustness_costs import MARGIN, Costs, Wave, fitted, plan_text, waves_of  # noqa: E402
from robustness_plan import (  # noqa: E402
    MULTIPLIERS,
    PARTS,
    TUNED,
    VARIANTS,
    Chosen,
    Run,
    Settings,
    runs_of,
    subjects_of,
)
from robustness_state import (  # noqa: E402
    CALIBRATION,
    State,
    append,
    read_state,
    settled,
    write_results,
)
from robustness_stats import Results, best_rate  # noqa: E402
from robustness_wave import calibrated, train_wave  # noqa: E402

from dreamtune.files.whole import whole  # noqa: E402

SIZES = {"cuda": (16, 64, 128), "cpu": (1, 2)}


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Settings]:
    """Raises ValueError for what cannot be."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder of all that is made; goes on where it is")
    add("--minutes", type=float, required=True, help="of this start, all that it does counted in")
    add("--parts", nargs="+", choices=PARTS, default=["a", "b", "c", "d"])
    add("--variants", nargs="+", choices=VARIANTS, help="[default: all of a part]")
    add("--multipliers", nargs="+", type=float, help="of the rate [default: all of a part]")
    add("--subjects", type=int, help="the first so many of a part's")
    add("--at_once", type=int, help="slots of a wave at most [default: by what is measured]")
    add(
        "--centres",
        nargs="+",
        default=[],
        metavar="VARIANT=RATE",
        help="rate of multiplier 1 in these parts [default: a b c d the best of `defaults`, which "
        "is to be done first; else the method's own]",
    )
    add("--steps", type=int, default=Settings.steps, help="of a usual run")
    add("--prompts", type=int, default=Settings.prompts, help="scored images of a run")
    add("--unrelated", type=int, default=Settings.unrelated, help="prompts for the drift")
    args = parser.parse_args(argv)
    for name in ("subjects", "at_once", "steps", "prompts", "unrelated"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} must be 1 or more, got {value}.")
    if args.minutes < 0:
        raise ValueError(f"--minutes must be 0 or more, got {args.minutes:g}.")
    for value in args.multipliers or ():
        if value not in MULTIPLIERS:
            known = ", ".join(f"{m:g}" for m in MULTIPLIERS)
            raise ValueError(f"--multipliers must be of {known}; got {value:g}.")
    args.centres = dict(centre(text) for text in args.centres)
    return args, Settings(args.steps, args.prompts, args.unrelated)


def centre(text: str) -> tuple[str, float]:
    """`lora=6e-4` -> ("lora", 6e-4)."""
    name, _, value = text.partition("=")
    try:
        rate = float(value)
    except ValueError:
        rate = 0.0
    if name not in VARIANTS or not 0 < rate < float("inf"):
        raise ValueError(
            f"--centres must be VARIANT=RATE with a rate above 0 and one of {', '.join(VARIANTS)}; "
            f"got {text!r}."
        )
    return name, rate


def measured(work: Path, bench: Bench, most: int | None) -> dict[str, Any]:
    """The calibration of this device, kept in the folder."""
    path = work / CALIBRATION
    sizes = [n for n in SIZES[bench.base.device.type] if most is None or n <= most] or [most or 1]
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text())
        known = {int(n) for n in found["seconds_a_step"]}
        if found["device"] == bench.device_name and known >= set(sizes):
            return found
    found = calibrated(bench, sizes)
    with whole(path) as partial:
        partial.write_text(json.dumps(found, indent=1))
    return found


def tuned(state: State, parts: Sequence[str]) -> dict[str, float | None]:
    """The best rate of each variant on the development subjects, None where some of its runs there
    are to be done; {} where that part was not begun and is not asked for. parts: asked for."""
    part, found = PARTS[TUNED], {}
    every = set(itertools.product(subjects_of(part, None), part.multipliers))
    there = Results({}, list(state.rows.values()), state.base, {})
    if TUNED not in parts and not there.of(TUNED):
        return {}
    for variant in part.variants:
        own = {(r["subject"], r["multiplier"]) for r in there.of(TUNED) if r["variant"] == variant}
        found[variant] = best_rate(there, variant, TUNED) if own >= every else None
    return found


def centres_text(settings: Settings, parts: Sequence[str]) -> str:
    found = []
    for part in parts:
        own = {v: settings.centre(part, v) for v in PARTS[part].variants}
        moved = [f"{v} {rate:.3g}" for v, rate in own.items() if rate != VARIANTS[v].rate]
        found.append(f"{part}: {', '.join(moved) or 'none'}")
    return f"Centred on another rate than the method's own: {'; '.join(found)}."


def mine(runs: Sequence[Run], rank: int, world: int) -> list[Run]:
    """Whole subjects, the same whatever is done already: processes need not wait for each other."""
    subjects = list(dict.fromkeys(run.subject for run in runs))
    return [run for run in runs if subjects.index(run.subject) % world == rank]


def do(
    path: Path,
    bench: Bench,
    found: dict[str, Any],
    waves: Sequence[Wave],
    state: State,
    until: float,
) -> list[str]:
    """The waves in their order, each if it fits by what the ones before have shown; a wave's lines
    are written when it is whole. found: the calibration. Returns why waves failed: the others do
    not wait for them."""
    failed = []
    for wave in waves:
        start = time.perf_counter()
        wave = Costs(found, bench.settings, state).again(wave)
        if wave.seconds * MARGIN > until - start:
            print(f"{wave.name}: {wave.seconds:.0f} s, {until - start:.0f} s left: not now")
            continue
        try:
            lines = train_wave(bench, wave.runs)
        except (RuntimeError, ValueError) as error:
            failed.append(f"{wave.name}: {type(error).__name__}: {error}")
            print(f"failed: {failed[-1]}", flush=True)
            bench.clear()
            continue
        append(path, lines)
        for line in lines:
            state.take(line)
        bad = len({(n["rate"], n["subject"], n["seed"]) for n in lines if n.get("diverged")})
        print(
            f"{wave.name}: {time.perf_counter() - start:.1f} s, thought {wave.seconds:.1f}"
            + (f"; {bad} diverged" if bad else ""),
            flush=True,
        )
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    args, asked = parse(sys.argv[1:] if argv is None else argv)
    until = (BEGAN if argv is None else time.perf_counter()) + 60 * args.minutes
    # The trainer's parts refuse several processes: here each has its own subjects.
    world, rank = int(os.environ.pop("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world > 1 and torch.cuda.is_available():  # captured steps run on the current device
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    state = read_state(work)
    best = tuned(state, args.parts)
    settings = settled(work, asked, args.parts, args.centres, best, args.variants or VARIANTS)
    print(centres_text(settings, args.parts))
    chosen = Chosen(args.parts, args.variants, args.multipliers, args.subjects)
    runs = [r for r in mine(runs_of(chosen, settings), rank, world) if not state.is_done(r)]
    failed: list[str] = []
    if not runs:
        print("All that is asked for is done.")
    elif args.minutes:
        bench = Bench(settings)
        found = measured(work, bench, args.at_once)
        print(f"Measured: {json.dumps(found)}", flush=True)
        waves = waves_of(runs, Costs(found, settings, state), args.at_once)
        seconds = max(until - time.perf_counter(), 0.0)
        print(plan_text(*fitted(waves, seconds), seconds), flush=True)
        failed = do(work / f"scores-{rank}.jsonl", bench, found, waves, state, until)
    elif (work / CALIBRATION).is_file():
        costs = Costs(json.loads((work / CALIBRATION).read_text()), settings, state)
        print(plan_text([], waves_of(runs, costs, args.at_once), 0.0))
    else:
        print(f"{len(runs)} runs are to be done; what they cost is not measured yet.")
    if rank == 0:
        print(f"Results: {write_results(work)}")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"robustness: {error}")
