"""Trains and scores the waves of `robustness.py`, in memory: what is kept of a run is a line a
scored step, and of a few runs one picture in it."""

from __future__ import annotations

import base64
import io
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from robustness_bench import KEPT, Bench, judged, scores_of
from robustness_plan import FEW, MAIN, PARTS, VARIANTS, Run, subjects_of
from torch import Tensor

from dreamtune.evaluation.analysis import relative_distance
from dreamtune.evaluation.validation import BasePictures, at_step, sample_slots
from dreamtune.fast.graphs import drive
from dreamtune.training.run import BAD_STEPS_IN_A_ROW
from dreamtune.training.slots import build_step
from dreamtune.training.wave import release

TIMED = 20  # steps of a calibration
PICTURED = ("a", "b", "c", "defaults")  # parts of which a picture of the first subject is kept


class Stack:
    """The runs of a wave in the slots of one adapter."""

    def __init__(self, bench: Bench, runs: Sequence[Run]) -> None:
        self.bench, self.runs = bench, list(runs)
        materials = [bench.material(run.subject) for run in runs]
        settings = [bench.resolved(run) for run in runs]
        self.adapter, self.step = build_step(
            bench.base, settings, [m.cache for m in materials], [m.pools for m in materials]
        )
        self.do_step, self.replayed = drive(self.adapter, self.step, bench.speed.captured)
        self.dead: dict[int, str] = {}  # slot -> why it has come apart
        self.new_subjects: list[str] = []  # whose base images this wave has made

    def close(self) -> None:
        self.adapter.eject()
        del self.adapter, self.step, self.do_step, self.replayed
        release(self.bench.base)

    def judge_slots(self, k: int) -> None:
        """Marks those that have come apart, by the rules of the trainer."""
        in_a_row, skipped = self.step.skipped_now.tolist(), self.step.skipped.tolist()
        finite = torch.stack(
            [p.isfinite().movedim(1, 0).flatten(1).all(1) for p in self.adapter.parameters()]
        )
        for slot, sound in enumerate(finite.all(0).tolist()):
            if not sound:
                self.dead.setdefault(slot, f"parameters are not finite at step {k}")
            elif in_a_row[slot] >= BAD_STEPS_IN_A_ROW or 2 * skipped[slot] > k:
                self.dead.setdefault(
                    slot, f"{skipped[slot]:.0f} of {k} steps gave no finite loss or gradient"
                )

    def images(self, k: int, slots: Sequence[int]) -> dict[int, list[Image.Image]]:
        """Of each slot; one whose images are not finite is marked and left out. Of several that
        fail together the halves are tried."""
        if not slots:
            return {}
        evaluators = [self.bench.material(self.runs[s].subject).evaluator for s in slots]
        try:
            made = sample_slots(self.bench.base, self.adapter, slots, evaluators)
            return dict(zip(slots, made, strict=True))
        except ValueError:
            if len(slots) == 1:
                self.dead.setdefault(slots[0], f"images are not finite at step {k}")
                return {}
        half = len(slots) // 2
        return self.images(k, slots[:half]) | self.images(k, slots[half:])

    def base_images(self) -> list[dict[str, Any]]:
        """The base's lines of the subjects whose features are not known yet."""
        bench = self.bench
        new = [
            s
            for s in dict.fromkeys(run.subject for run in self.runs)
            if bench.material(s).base is None
        ]
        if not new:
            return []
        evaluators = [bench.material(s).evaluator for s in new]
        with at_step(self.adapter, 0), self.replayed():
            made = BasePictures().sample(bench.base, self.adapter, evaluators)
        lines = []
        self.new_subjects = new
        for subject, images in zip(new, made, strict=True):
            material = bench.material(subject)
            material.base = {n: e.images(images) for n, e in bench.scorers.extractors.items()}
            scores = scores_of(bench.scorers, material, material.base)
            lines.append({"kind": "base", "subject": subject, **scores})
        return lines

    @torch.no_grad()
    def measures(self) -> list[dict[str, float | None]]:
        """Of each slot: `distance` and `share` as of `dreamtune analyse`, means over the layers;
        `strength`, the largest |lambda| of DeLoRA over its start, and `least_norm`, the smallest
        norm of a row of A or a column of B, over the usual one of the residual start."""
        parts: dict[str, list[Tensor]] = {}
        for group in self.adapter.groups:
            adapter, weight = group.adapter, group.weight.float()
            own = {"distance": relative_distance(adapter.merged(weight), weight)}
            if (share := adapter.share_of_bound(weight)) is not None:
                own["share"] = share
            for name, value in own.items():
                parts.setdefault(name, []).append(value.float().reshape(-1, len(self.runs)))
        found = {n: torch.cat(v).mean(0).tolist() for n, v in parts.items()}
        found |= self.norms()
        return [
            {
                n: float(f"{v[slot]:.5g}") if math.isfinite(v[slot]) else None
                for n, v in found.items()
            }
            for slot in range(len(self.runs))
        ]

    def norms(self) -> dict[str, list[float]]:
        """`strength` and `least_norm` of DeLoRA, else {}."""
        if VARIANTS[self.runs[0].variant].method != "delora":
            return {}
        strengths, least = [], []
        for group in self.adapter.groups:
            adapter: Any = group.adapter
            strengths.append(adapter.lambda_.abs().flatten(2).amax((0, 2)))
            for values, dim in ((adapter.A, -1), (adapter.B, -2)):
                norms = torch.linalg.vector_norm(values, dim=dim)  # (L, S, r)
                # of a uniform start in [-b, b]: b sqrt(n / 3), and b is 1 / sqrt(in), 1 / sqrt(r)
                width = values.shape[dim]
                bound = width if dim == -1 else values.shape[-1]
                least.append(norms.amin((0, 2)) / (width / 3 / bound) ** 0.5)
        start = float(self.adapter.options["lambda_init"])
        return {
            "strength": (torch.stack(strengths).amax(0) / start).tolist(),
            "least_norm": torch.stack(least).amin(0).tolist(),
        }


def train_wave(bench: Bench, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """All lines of a wave, which are whole only together: the base's where they were not known, a
    line of each run at each scored step, and the wave's seconds."""
    began = bench.clock()
    stack, at = Stack(bench, runs), runs[0].at
    train = score = 0.0
    try:
        lines = stack.base_images()
        setup = bench.clock() - began
        for k in range(at[-1]):
            if not k or k in at:
                mark = bench.clock()
            stack.do_step(k, 1.0)
            if k == 0 and bench.speed.captured:  # the first call records the step
                setup, mark = bench.clock() - began, bench.clock()
            if k + 1 in at:
                now = bench.clock()
                train += now - mark
                lines += scored(stack, k + 1, train)
                score += bench.clock() - now
    except BaseException:
        for subject in stack.new_subjects:  # their lines are lost with the wave's
            bench.material(subject).base = None
        raise
    finally:
        stack.close()
    wave = {
        "kind": "wave", "device": bench.device_name, "part": runs[0].part,
        "variant": runs[0].variant, "slots": len(runs), "steps": at[-1], "scorings": len(at),
        "setup_seconds": round(setup, 2), "step_seconds": round(train, 2),
        "scoring_seconds": round(score, 2),
    }  # fmt: skip
    return [*lines, wave]


def scored(stack: Stack, k: int, seconds: float) -> list[dict[str, Any]]:
    """A line of each run after k steps. seconds: of all the wave's steps so far."""
    stack.judge_slots(k)
    bench, runs = stack.bench, stack.runs
    alive = [slot for slot in range(len(runs)) if slot not in stack.dead]
    with at_step(stack.adapter, k), stack.replayed():
        images = stack.images(k, alive)
    scores = judged(bench, {runs[slot]: made for slot, made in images.items()})
    measures, skipped = stack.measures(), stack.step.skipped.tolist()
    lines = []
    for slot, run in enumerate(runs):
        line = {
            "kind": "run", **run.fields, "step": k, "diverged": stack.dead.get(slot),
            **{key: None for key in KEPT}, **scores.get(run, {}), **measures[slot],
            "skipped": round(skipped[slot]), "seconds": round(seconds / len(runs), 3),
        }  # fmt: skip
        if slot in images and is_pictured(run):
            line["picture"] = coded(images[slot][0])
        lines.append(line)
    return lines


def rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def is_pictured(run: Run) -> bool:
    first = subjects_of(PARTS[run.part], 1)[0]
    return run.part in PICTURED and run.seed == 0 and run.subject == first


def coded(image: Image.Image) -> str:
    """WebP in base64, some 2 KB."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


def calibrated(bench: Bench, sizes: Sequence[int], variant: str = "delora") -> dict[str, Any]:
    """What `Costs` goes by: seconds of a step at each number of slots, of scored images, at the
    last number, and of getting ready; and of a step of each of the main variants alone, for
    time to quality."""
    subjects = subjects_of(PARTS["a"], None)[:FEW]
    steps: dict[str, float] = {}
    images = setup = 0.0
    for n in sizes:
        began = bench.clock()
        stack = Stack(bench, calibrating(bench, variant, subjects, n))
        try:
            stack.do_step(0, 1.0)
            setup = bench.clock() - began
            steps[str(n)] = timed(bench, stack)
            with at_step(stack.adapter, 1), stack.replayed():
                # where it is captured the first is eager, and the second recorded
                for _ in range(3 if bench.speed.captured else 1):
                    began = bench.clock()
                    made = stack.images(1, range(n))
                    judged(bench, {stack.runs[slot]: own for slot, own in made.items()})
                    images = sum(map(len, made.values())) / (bench.clock() - began)
        finally:
            stack.close()
    alone = {}
    for name in MAIN:
        stack = Stack(bench, calibrating(bench, name, subjects, 1))
        try:
            stack.do_step(0, 1.0)
            alone[name] = round(timed(bench, stack), 6)
        finally:
            stack.close()
    return {
        "device": bench.device_name,
        "torch": torch.__version__,
        "variant": variant,
        "seconds_a_step": {n: round(s, 6) for n, s in steps.items()},
        "run_steps_a_second": {n: round(int(n) / s, 1) for n, s in steps.items()},
        "images_a_second": round(images, 2),
        "setup_seconds": round(setup, 2),
        "seconds_a_step_alone": alone,
    }


def calibrating(bench: Bench, variant: str, subjects: Sequence[str], n: int) -> list[Run]:
    rate = bench.settings.centre("a", variant)
    return [
        Run("a", variant, 1.0, rate, i, subjects[i % len(subjects)], (TIMED,)) for i in range(n)
    ]


def timed(bench: Bench, stack: Stack) -> float:
    """Seconds of a step: the median of three runs of steps, after the first step."""
    found = []
    count = TIMED if bench.speed.captured else 1
    for _ in range(3):
        began = bench.clock()
        for k in range(1, count + 1):
            stack.do_step(k, 1.0)
        found.append((bench.clock() - began) / count)
    return statistics.median(found)
