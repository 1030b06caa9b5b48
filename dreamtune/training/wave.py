"""Runs that train at once, each in a slot of one adapter; one run alone is a wave of one."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from PIL import Image

from dreamtune.evaluation.validation import BasePictures, at_step, sample_slots
from dreamtune.fast.graphs import drive
from dreamtune.models.base import Base
from dreamtune.training.console import progress_bar, wave_text
from dreamtune.training.optim import learning_rate_multiplier
from dreamtune.training.output import say
from dreamtune.training.run import Run
from dreamtune.training.run_folder import TrainResult
from dreamtune.training.slots import Slot, build_step
from dreamtune.training.speed import not_captured

SYNC_EVERY = 10  # rounds between reads of the loss: each waits for the device


class Wave:
    """Adapter and step of several runs. One that is finished, or failed, leaves; the rest is packed
    anew. `k`: steps done. began: when getting ready did, where that was before. pictures: of the
    base, shared with other waves.
    """

    def __init__(
        self,
        base: Base,
        runs: dict[str, Run],
        began: float | None = None,
        pictures: BasePictures | None = None,
    ) -> None:
        began = time.perf_counter() if began is None else began
        self.base, self.runs, self.config = base, runs, next(iter(runs.values())).config
        self.start = self.k = next(iter(runs.values())).start
        self.many = len(runs) > 1
        self.pictures = BasePictures() if pictures is None else pictures
        self.results: dict[str, TrainResult] = {}
        self.failed: dict[str, str] = {}  # label -> what went wrong
        self.slots: dict[str, Slot] = {}
        self.adapter: Any = None
        for run in runs.values():
            run.fill_cache()
        base.let_encoders_go()
        self.pack(list(runs))
        adapter, took = next(iter(self.slots.values())).adapter, time.perf_counter() - began
        say(wave_text(self.config, adapter, base.device, took))
        for note in next(iter(runs.values())).speed.notes(base.device):
            say(note)
        for run in runs.values():
            run.begin()
        self.bar = progress_bar(self.start, self.config.max_train_steps)

    def pack(self, labels: Sequence[str]) -> None:
        """An adapter and a step of these runs alone; each goes on where it was."""
        states = {label: self.slots[label].states() for label in labels if label in self.slots}
        if self.slots:
            self.unload()
        self.runs = {label: self.runs[label] for label in labels}
        if not labels:
            return
        kept = list(self.runs.values())
        self.adapter, self.step = build_step(
            self.base, [r.config for r in kept], [r.cache for r in kept], [r.pools for r in kept]
        )
        why = self.base.why_not_captured(self.step.cache.prompts)
        try:
            for run in kept:
                run.speed = not_captured(run.speed, why, run.given)
        except ValueError:
            self.adapter.eject()
            raise
        self.slots = {n: Slot(self.adapter, self.step, i) for i, n in enumerate(labels)}
        for label, run in self.runs.items():
            run.resume(self.slots[label])
            if label in states:
                self.slots[label].load(*states[label])
        self.do_step, self.replayed = drive(self.adapter, self.step, kept[0].speed.captured)

    def unload(self) -> None:
        """Takes the adapter out of the base and lets go of its memory."""
        self.adapter.eject()
        self.slots = {}
        del self.adapter, self.step, self.do_step, self.replayed
        self.adapter = None
        release(self.base)

    def score(self, k: int, held: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """Images and scores of the runs that are due; best/ where one is the best so far.

        held: around what must not be stopped half way, each run's record.
        """
        due = {n: r for n, r in self.runs.items() if n not in self.failed and r.scoring_due(k)}
        if not due:
            return
        began, count = time.perf_counter(), sum(len(r.evaluator.prompts) for r in due.values())
        self.bar.set_postfix_str(f"sampling {count} images{self.score_text()}")
        with at_step(self.adapter, k), self.replayed():
            images = self.sample(due)
        for label, pictures in images.items():
            slot = self.slots[label]
            with held():
                try:
                    due[label].record(slot, k, pictures, slot.mean_loss, began)
                except ValueError as error:
                    self.failed[label] = str(error)
                slot.forget_mean_loss()
        self.bar.set_postfix_str(self.score_text().lstrip(" |"))

    def sample(self, runs: dict[str, Run]) -> dict[str, list[Image.Image]]:
        """The images of each run, made together; one whose images are not finite has failed."""
        try:
            slots = [self.slots[label].index for label in runs]
            evaluators = [r.evaluator for r in runs.values()]
            if self.k:
                images = sample_slots(self.base, self.adapter, slots, evaluators)
            else:
                images = self.pictures.sample(self.base, self.adapter, evaluators)
            return dict(zip(runs, images, strict=True))
        except ValueError as error:
            if len(runs) == 1:
                base = "step 0 is the base without an adapter, so none diverged: "
                self.failed[next(iter(runs))] = f"{'' if self.k else base}{error}"
                return {}
        parts = [self.sample({label: run}) for label, run in runs.items()]
        return {label: images for part in parts for label, images in part.items()}

    def save(self, k: int) -> None:
        """Checkpoints of the runs that are due."""
        self.save_each([n for n, run in self.runs.items() if run.saving_due(k)])

    def save_all(self) -> None:
        """A checkpoint of every run, where it stands."""
        self.save_each(list(self.runs))

    def save_each(self, labels: Sequence[str]) -> None:
        """Older ones go when all are written, so that there is always a step that all have. A run
        whose adapter or optimizer is not finite has failed.
        """
        for label in labels:
            if label not in self.failed:
                try:
                    self.runs[label].save(self.slots[label], self.k)
                except ValueError as error:
                    self.failed[label] = str(error)
        for label in labels:
            if label not in self.failed:
                self.runs[label].rotate(self.k)

    def retire(self, k: int) -> None:
        """Final files and report of the runs that are done; packs the rest anew."""
        leaving = [n for n, r in self.runs.items() if n in self.failed or r.done(k)]
        if not leaving:
            return
        self.bar.clear()
        for label in leaving:
            run = self.runs[label]
            if label in self.failed:
                if self.many:
                    say(f"`{label}` failed: {self.failed[label]}")
                continue
            if self.many:
                say(f"`{label}`, step {k} of {run.config.max_train_steps}:")
            self.results[label] = run.finish(self.slots[label])
        gone = [self.runs[label] for label in leaving]
        self.pack([label for label in self.runs if label not in leaving])
        for run in gone:
            run.close()
            del run.cache, run.pools

    def advance(self, k: int) -> None:
        """One step of every run."""
        c = self.config
        share = learning_rate_multiplier(k, c.lr_scheduler, c.lr_warmup_steps, c.max_train_steps)
        self.do_step(k, share)
        self.k = k + 1

    def show(self, k: int) -> None:
        """Progress bar and trackers, now and then. A run that has come apart has failed."""
        self.bar.update(1)
        if k % SYNC_EVERY and k != self.config.max_train_steps:
            return
        losses = []
        for label, run in self.runs.items():
            try:
                losses.append(run.check(self.slots[label], k))
            except ValueError as error:
                self.failed[label] = str(error)
        shown = " ".join(f"{x:.3f}" for x in losses[:8])
        several = f"{len(losses)} runs, " if self.many else ""
        self.bar.set_postfix_str(f"{several}loss {shown}{self.score_text()}")

    def score_text(self) -> str:
        """The last scores, of one run: several have no room in a line."""
        return "" if self.many else "".join(run.score_text() for run in self.runs.values())

    def close(self) -> None:
        self.bar.close()
        for run in self.runs.values():
            run.close()
        if self.slots:
            self.unload()


def release(base: Base) -> None:
    if base.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
