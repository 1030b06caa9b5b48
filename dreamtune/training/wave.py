"""train_stacked(config): several runs at once, as slots of one adapter on one base.

Each run is what it would be alone: its folder, scores, best checkpoint, early stop and files.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dreamtune.config import CPU_SLOTS, Config
from dreamtune.evaluation.validation import at_step, sample_slots
from dreamtune.fast.graphs import drive
from dreamtune.models.stable_diffusion import Base
from dreamtune.training import run_folder
from dreamtune.training.assemble import build_step
from dreamtune.training.console import progress_bar, table
from dreamtune.training.optim import learning_rate_factor
from dreamtune.training.run import SYNC_EVERY, Run, TrainResult, base_of
from dreamtune.training.sweep import alone, expand
from dreamtune.training.train import Interrupted, Interrupts


@dataclass(frozen=True)
class StackedResult:
    """By label: a subject's folder name, `learning_rate=1e-3,seed=0`, or both."""

    run_dir: Path
    results: dict[str, TrainResult]
    failed: dict[str, str]  # label -> what went wrong


class Wave:
    """Runs that train at once. One that is finished, or failed, leaves; the rest is packed anew."""

    def __init__(self, base: Base, runs: dict[str, Run]) -> None:
        self.base, self.runs, self.config = base, runs, next(iter(runs.values())).config
        self.start = self.k = next(iter(runs.values())).start
        self.results: dict[str, TrainResult] = {}
        self.failed: dict[str, str] = {}
        self.adapter: Any = None
        for run in runs.values():
            run.fill_cache()
        self.pack(list(runs))
        for run in runs.values():
            run.began = time.perf_counter()
        self.bar = progress_bar(self.start, self.config.max_train_steps or 0)

    def pack(self, labels: Sequence[str]) -> None:
        """An adapter and a step of these runs alone; each goes on where it was."""
        kept = [self.runs[n] for n in labels]
        states = []
        if self.adapter is not None:
            for r in kept:
                state = {n: t.clone() for n, t in r._step.state_dict(r.slot).items()}
                states.append((r.adapter.state_dict(r.slot), state))
            self.unload()
        self.runs = dict(zip(labels, kept, strict=True))
        if not kept:
            return
        self.adapter, self.step = build_step(
            self.base, [r.config for r in kept], [r.cache for r in kept], [r.pools for r in kept]
        )
        for slot, run in enumerate(kept):
            run.attach(self.adapter, self.step, slot)
        for slot, (adapter_state, step_state) in enumerate(states):
            self.adapter.load_state_dict(adapter_state, slot)
            self.step.load_state_dict(step_state, slot)
        self.do_step, self.replayed = drive(self.adapter, self.step, kept[0].capturing)

    def unload(self) -> None:
        """Takes the adapter out of the base and lets go of its memory."""
        self.adapter.eject()
        for run in self.runs.values():
            del run.adapter, run._step
        del self.adapter, self.step, self.do_step, self.replayed
        self.adapter = None
        release(self.base)

    def score(self, k: int) -> None:
        due = {n: r for n, r in self.runs.items() if r.scoring_due(k)}
        if not due:
            return
        began = time.perf_counter()
        self.bar.set_postfix_str(f"sampling for {len(due)} runs")
        with at_step(self.adapter, k), self.replayed():
            images = self.sample(due)
        losses = self.step.take_mean()
        for label, pictures in images.items():
            due[label].record(k, pictures, losses[due[label].slot], began)
        self.bar.set_postfix_str("")

    def sample(self, runs: dict[str, Run]) -> dict[str, list[Image.Image]]:
        """The images of each run, made together; one whose images are not finite has failed."""
        try:
            slots = [r.slot for r in runs.values()]
            evaluators = [r.evaluator for r in runs.values()]
            images = sample_slots(self.base, self.adapter, slots, evaluators)
            return dict(zip(runs, images, strict=True))
        except ValueError as error:
            if len(runs) == 1:
                self.failed[next(iter(runs))] = str(error)
                return {}
        parts = [self.sample({label: run}) for label, run in runs.items()]
        return {label: images for part in parts for label, images in part.items()}

    def save(self, k: int) -> None:
        for label, run in self.runs.items():
            if label not in self.failed and run.saving_due(k):
                run.save(k)

    def retire(self, k: int) -> None:
        """Final files and report of the runs that are done; packs the rest anew."""
        self.bar.clear()
        for label, run in self.runs.items():
            if label in self.failed:
                print(f"`{label}` failed: {self.failed[label]}")
            elif run.done(k):
                print(f"`{label}`, step {k} of {run.config.max_train_steps}:")
                self.results[label] = run.finish()
        rest = [n for n in self.runs if n not in self.results and n not in self.failed]
        if len(rest) < len(self.runs):
            gone = [r for n, r in self.runs.items() if n not in rest]
            self.pack(rest)
            for run in gone:
                run.close()
                del run.cache, run.pools

    def advance(self, k: int) -> None:
        c = self.config
        factor = learning_rate_factor(k, c.lr_scheduler, c.lr_warmup_steps, c.max_train_steps or 0)
        self.do_step(k, factor)

    def show(self, k: int) -> None:
        """As `Run.show`, but a run that has come apart fails alone."""
        self.bar.update(1)
        if k % SYNC_EVERY and k != self.config.max_train_steps:
            return
        losses = []
        for label, run in self.runs.items():
            try:
                losses.append(run.check(k))
            except ValueError as error:
                self.failed[label] = str(error)
        shown = " ".join(f"{x:.3f}" for x in losses[:8])
        self.bar.set_postfix_str(f"{len(losses)} runs, loss {shown}")

    def close(self) -> None:
        self.bar.close()
        for run in self.runs.values():
            run.close()
        if self.adapter is not None:
            self.unload()


def train_stacked(config: Config) -> StackedResult:
    """Runs what `subjects` and `sweep` ask for, in waves of `slots`, or goes on with it.

    Raises ValueError before any work for what cannot be done; Interrupted on Ctrl-C, after saving.
    """
    with Interrupts() as interrupts:
        root, runs, base = get_ready(config)
        results: dict[str, TrainResult] = {}
        failed: dict[str, str] = {}
        for part in waves(config, base, runs):
            wave = Wave(base, part)
            try:
                train_wave(wave, interrupts)
            except KeyboardInterrupt:
                with interrupts.held():
                    for run in wave.runs.values():
                        run.save(wave.k)
                raise Interrupted(
                    f"Stopped after step {wave.k}; saved in {root}. Go on with the same flags, "
                    f"--output_dir {root} --resume_from_checkpoint latest; or with one run alone: "
                    f"--output_dir {root}/NAME --resume_from_checkpoint latest"
                ) from None
            finally:
                wave.close()
            results |= wave.results
            failed |= wave.failed
        in_order = {n: results[n] for n in runs if n in results}
        print(table(in_order, failed))
        return StackedResult(root, in_order, failed)


def train_wave(wave: Wave, interrupts: Interrupts) -> None:
    """The loop of `train`, over the runs that are left. wave.k: steps done."""
    while True:
        wave.score(wave.k)
        with interrupts.held():
            wave.save(wave.k)
            wave.retire(wave.k)
        if not wave.runs:
            return
        with interrupts.held():
            wave.advance(wave.k)
            wave.k += 1
        wave.show(wave.k)


def get_ready(config: Config) -> tuple[Path, dict[str, Run], Base]:
    """The runs, refused before a model is loaded where they cannot be trained; then the base."""
    resume = config.resume_from_checkpoint
    if resume not in (None, "latest") or (resume and config.output_dir is None):
        raise ValueError(
            "stacked runs go on with --resume_from_checkpoint latest and the --output_dir of all; "
            "a single one with its own folder, without --subjects and --sweep."
        )
    configs = expand(config)
    source = Path(config.subjects or config.instance_data_dir or "default").name.split(":")[-1]
    name = config.name or f"{source}-{'sweep' if config.sweep else config.method}"
    root = Path(config.output_dir).expanduser() if config.output_dir else None
    root = root if resume and root else run_folder.choose_run_dir(config.output_dir, name)
    runs = {}
    for label, own in configs.items():
        try:
            there = bool(resume and run_folder.checkpoints(root / label))
            runs[label] = Run(alone(own, root / label, there), alone=False)
        except ValueError as error:
            raise ValueError(f"`{label}`: {error}") from error
    base = base_of(config)
    scorers = None
    for run in runs.values():
        run.open(base, scorers)
        scorers = run.evaluator.scorers
    return root, runs, base


def waves(config: Config, base: Base, runs: dict[str, Run]) -> Iterator[dict[str, Run]]:
    """Runs of one method, one step to start from and, but for its `per_slot` options, one set of
    options; at most `slots` each.
    """
    from dreamtune.adapters import find_method

    alike: dict[str, list[str]] = {}
    for label, run in runs.items():
        c, free = run.config, find_method(run.config.method).per_slot
        fixed = sorted((k, v) for k, v in c.options.items() if k not in free)
        key = repr((run.start, c.method, fixed))
        alike.setdefault(key, []).append(label)
    for labels in alike.values():
        group = {n: runs[n] for n in labels}
        size = int(config.slots) if config.slots != "auto" else fitting(base, group)
        for first in range(0, len(labels), size):
            part = labels[first : first + size]
            print(f"Training {len(part)} of {len(runs)} runs at once: {'; '.join(part)}")
            yield {n: runs[n] for n in part}


def fitting(base: Base, runs: dict[str, Run]) -> int:
    """How many of the runs fit on the device at once."""
    if base.device.type != "cuda":
        return min(CPU_SLOTS, len(runs))
    from dreamtune.training.fit import largest_wave

    return largest_wave(base, list(runs.values()))


def release(base: Base) -> None:
    if base.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
