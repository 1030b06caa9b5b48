"""LoRA and DeLoRA under Prodigy (arXiv 2306.06101), which finds its rate, on the embedded base.

    pip install prodigyopt
    python eval/prodigy.py --out prodigy.jsonl --against results.json

The 5 development subjects, beside the runs of `robustness.py` in its results. One run at a time,
240 steps, scored as those are; a run that is in the file is not done again. Prodigy as diffusers'
DreamBooth scripts set it: rate 1, decoupled decay, bias correction, safeguarded warm-up. `d` of a
line is the rate that it has found.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "eval"), str(ROOT)]

from robustness_bench import Bench  # noqa: E402
from robustness_plan import FEW, Run, Settings, subjects_of  # noqa: E402
from robustness_plan import PARTS as ALL_PARTS  # noqa: E402
from robustness_stats import Row, mean_of, own_prompt  # noqa: E402
from robustness_wave import Stack, scored  # noqa: E402

from dreamtune.evaluation.selfcheck import interval  # noqa: E402
from dreamtune.training.optim import SlotAdamW  # noqa: E402

VARIANTS = ("lora", "delora")
SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)  # of the steps, at which a run is scored


class SlotProdigy(SlotAdamW):
    """Prodigy for the one slot of a step, behind the interface that the step has of AdamW. It has
    one rate for all: parameters with a rate of their own (DeLoRA's lambda) stay as they start.
    """

    def __init__(self, groups: Sequence[list[dict[str, Any]]], **more: Any) -> None:
        from prodigyopt import Prodigy

        super().__init__(groups, **more)
        (own,) = groups
        main = own[0]["lr"]
        self.prodigy = Prodigy(
            [{**group, "lr": float(group["lr"] == main)} for group in own],
            lr=1.0, betas=self.betas, decouple=True, use_bias_correction=True,
            safeguard_warmup=True,
        )  # fmt: skip

    @torch.no_grad()
    def step(self, flats: Sequence[Tensor], scale: Tensor, ok: Tensor) -> None:
        if not bool(ok):
            return
        for bundle, flat in zip(self.bundles, flats, strict=True):
            for p, gradient in zip(bundle.params, bundle.pieces(flat * scale[:, None])):
                p.grad = gradient.contiguous()
        self.prodigy.step()

    @property
    def found(self) -> float:
        return float(self.prodigy.param_groups[0]["d"])


class ProdigyStack(Stack):
    def __init__(self, bench: Bench, run: Run) -> None:
        super().__init__(bench, [run])
        c = bench.resolved(run)
        groups = [self.adapter.parameter_groups(c.learning_rate, c.adam_weight_decay)]
        self.step.optimizer = self.optimizer = SlotProdigy(groups)
        self.do_step = self.step  # it asks for values, which a recorded step cannot


def lines_of(bench: Bench, run: Run) -> list[dict[str, Any]]:
    stack = ProdigyStack(bench, run)
    lines, seconds = [], 0.0
    try:
        stack.base_images()
        for k in range(run.steps):
            began = bench.clock()
            stack.do_step(k, 1.0)
            seconds += bench.clock() - began
            if k + 1 in run.at:
                (line,) = scored(stack, k + 1, seconds)
                lines.append(line | {"optimizer": "prodigy", "d": stack.optimizer.found})
    finally:
        stack.close()
    return lines


def table(lines: Sequence[dict[str, Any]], against: Path | None) -> str:
    """Means over the subjects, with their 95% intervals, at each scored step; and of AdamW at the
    method's own rate where a file of `robustness.py` has it at that step.
    """
    rows = [(x["variant"], "Prodigy", x) for x in lines]
    if against is not None:
        found = json.loads(against.read_text())
        for values in found["rows"]:
            x = dict(zip(found["columns"], values))
            if x["part"] == "time" and x["variant"] in VARIANTS and x["multiplier"] == 1:
                rows.append((x["variant"], "AdamW", x))
    shown = {x["step"] for x in lines}
    titles = ("method", "optimizer", "step", "DINO", "prompt margin", "rate found", "n")
    text = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for key in sorted({(v, o, x["step"]) for v, o, x in rows if x["step"] in shown}):
        own = [x for v, o, x in rows if (v, o, x["step"]) == key]
        sound = [x for x in own if x["dino"] is not None]
        if not sound:
            text.append(f"| {' | '.join(map(str, key))} | diverged | | | {len(own)} |")
            continue
        dino = in_words(sound, lambda x: x["dino"])
        margin = in_words(sound, own_prompt)
        rates = [x["d"] for x in sound if "d" in x]
        rate = f"{min(rates):.1e} to {max(rates):.1e}" if rates else ""
        text.append(
            f"| {' | '.join(map(str, key))} | {dino} | {margin} | {rate} | {len(sound)} of "
            f"{len(own)} |"
        )
    return "\n".join(text)


def in_words(rows: Sequence[Row], value: Callable[[Row], float | None]) -> str:
    found = mean_of(rows, value)
    return "" if found is None else interval(found)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a line a scored step")
    parser.add_argument("--against", type=Path, help="results.json of robustness.py")
    parser.add_argument("--subjects", type=int, default=FEW)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    args = parser.parse_args()
    lines: list[dict[str, Any]] = []
    if args.out.is_file():
        lines = [json.loads(text) for text in args.out.read_text().splitlines()]
    done = {(x["variant"], x["subject"], x["steps"]) for x in lines}
    at = tuple(sorted({max(1, round(share * args.steps)) for share in SHARES}))
    bench = Bench(Settings(steps=args.steps))
    for subject in subjects_of(ALL_PARTS["defaults"], args.subjects):
        for name in VARIANTS:
            rate = bench.settings.centre("defaults", name)
            run = Run("time", name, 1.0, rate, 0, subject, at)
            if (name, subject, run.steps) in done:
                continue
            new = lines_of(bench, run)
            with args.out.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in new))
            lines += new
            print(f"{name}, {subject}: DINO {new[-1]['dino']}, d {new[-1]['d']:.2e}", flush=True)
    print(table(lines, args.against))
    return 0


if __name__ == "__main__":
    sys.exit(main())
