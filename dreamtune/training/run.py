"""One subject's run: its settings, folder, history, best checkpoint and files."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dreamtune.config import Config, Settings
from dreamtune.configfile import absolute, continued
from dreamtune.data.photos import KEPT_SIDE, changed, hold_out, read_folder, statement
from dreamtune.data.words import validation_prompts
from dreamtune.evaluation.overfit import overfitting
from dreamtune.evaluation.selection import Choice, choose_best, stale
from dreamtune.evaluation.validation import Evaluator, load_scorers
from dreamtune.files.export import export
from dreamtune.files.whole import whole, whole_folder
from dreamtune.metrics.table import scores_of, scores_text
from dreamtune.models.base import Base
from dreamtune.training import records, run_folder
from dreamtune.training.cache import build_cache
from dreamtune.training.class_images import check_class_folder, class_images
from dreamtune.training.defaults import (
    resolve,
    sampling_of,
    subject_of,
    unnamed,
    with_subject,
)
from dreamtune.training.lock import FolderLock
from dreamtune.training.output import say
from dreamtune.training.reporting import report_of
from dreamtune.training.resume import find_checkpoint, resumed_folder
from dreamtune.training.run_folder import TrainResult as TrainResult
from dreamtune.training.slots import Slot
from dreamtune.training.speed import choose_speed, not_captured, speed_up
from dreamtune.training.tracker import Tracker

BAD_STEPS_IN_A_ROW = 25
CONFIG_NOTE = (
    "# To go on with this run here: it has paths of this machine. To share: best/, report.html."
)


class Run:
    """One subject's record, in order of being made: cheap refusals first, models last.

    What trains it, a slot of a wave, is handed to the methods that read or write it.

    read: names of files in the photo folder that were read for other ends.
    """

    def __init__(self, config: Config, read: Sequence[str] = ()) -> None:
        self.checkpoint: Path | None = None
        self.start = 0
        self.lock: FolderLock | None = None
        self.tracker = Tracker("none", Path())
        self.resumed = config.resume_from_checkpoint is not None
        try:
            self.prepare(config, read)
        except BaseException:
            self.close()
            raise

    def prepare(self, config: Config, read: Sequence[str]) -> None:
        """All that can be refused without a model; the folder is this run's from here on."""
        from dreamtune.adapters import find_method, resolve_options
        from dreamtune.injection.targets import check_entries

        config = absolute(config)
        if config.resume_from_checkpoint is not None:
            config = self.go_on(config, config.resume_from_checkpoint)
        self.method = find_method(config.method)
        resolve_options(self.method, config.options)
        if config.target_modules is not None:
            check_entries(self.method, config.target_modules, config.options)
        self.given, photo_dir = with_subject(config)
        folder = read_folder(photo_dir, side=max(KEPT_SIDE, config.resolution or 0))
        folder = hold_out(folder, config.holdout)
        self.subject = subject_of(self.given, folder.photos)
        self.speed = choose_speed(config)
        name = config.name or f"{photo_dir.resolve().name}-{config.method}".replace(" ", "-")
        if self.lock is None:
            self.lock = run_folder.take(config.output_dir, name)
            self.dir = self.lock.folder
            run_folder.refuse_planted(self.dir)
            run_folder.sweep(self.dir)
        if self.checkpoint:
            saved = records.read_state(self.checkpoint)
            other = changed(saved, folder.photos, folder.held_out)
            if other:
                raise ValueError(
                    f"{other} in `{photo_dir}` are not those that {self.dir} was started with."
                )
        check_class_folder(self.given, folder.photos)
        self.photos, self.images = folder.photos, [p.image for p in folder.photos]
        self.held_out = [p.image for p in folder.held_out]
        self.info: dict[str, Any] = statement(folder.photos, folder.held_out)
        self.history: list[dict[str, Any]] = []
        self.choice, self.warned = Choice(0, 0, ""), False
        self.config: Settings  # from `open` on
        folder = replace(folder, skipped=[n for n in folder.skipped if n not in read])
        say(f"Subject {self.subject.summary()}: {folder.summary()}. Run: {self.dir}")
        if warning := unnamed(self.subject, folder.photos):
            say(warning)

    def go_on(self, config: Config, resume: str) -> Config:
        """Takes the folder of an earlier run; gives its settings."""
        self.dir = resumed_folder(resume, config.output_dir)
        self.lock = FolderLock(self.dir)
        run_folder.refuse_planted(self.dir)
        run_folder.sweep(self.dir)
        self.checkpoint = find_checkpoint(resume, self.dir)
        if self.checkpoint:
            records.check_settings(self.checkpoint, self.dir / run_folder.CONFIG)
            self.start = run_folder.step_of(self.checkpoint)
        elif not (self.dir / run_folder.CONFIG).is_file():
            if config.instance_data_dir is None:  # not the package's fox in another run's place
                raise ValueError(
                    f"`{self.dir}` holds no settings of a run yet, and no photos are named: give "
                    "all that the run was started with beside --resume_from_checkpoint latest."
                )
            return replace(config, resume_from_checkpoint=None)
        return continued(config, self.dir / run_folder.CONFIG)

    def open(self, base: Base, scorers: Any = None) -> None:
        """What needs the base: the rest of the settings, and what scores."""
        self.base, self.info["base"] = base, base.id
        if self.resumed and self.checkpoint is None:
            run_folder.clear(self.dir)
        self.speed = not_captured(self.speed, base.uncaptured, self.given)
        speed_up(base, self.speed)
        c = self.config = resolve(self.given, base, self.subject, self.dir)
        base.check_side(c.resolution)
        base.scheduler_for(c.sampler), base.process(c.snr_gamma)  # before the work that is in vain
        if c.gradient_checkpointing and base.uncheckpointed:
            raise ValueError(
                f"`gradient_checkpointing` must be off for `{base.id}`: {base.uncheckpointed}."
            )
        if self.start > c.max_train_steps:
            raise ValueError(
                f"`max_train_steps` is {c.max_train_steps}, and the run is at step {self.start}: "
                "it cannot go back. Start a new run with another --output_dir."
            )
        self.info["settings"] = records.hashes_of_settings(c.to_dict())
        prompts, plain = validation_prompts(
            self.subject, c.validation_prompt, c.num_validation_images
        )
        say(f"First validation prompt: `{prompts[0]}`; without the identifier: `{plain[0]}`")
        self.evaluator = Evaluator(
            base,
            prompts,
            plain,
            [c.validation_seed + i for i in range(len(prompts))],
            sampling=sampling_of(c),
            folder=self.dir / "samples",
            scorers=scorers or load_scorers(c.to_dict(), base.device),
            photos=self.images,
            held_out=self.held_out,
        )
        self.tracker = Tracker(self.config.report_to, self.dir)
        self.write_config()

    def fill_cache(self) -> None:
        c = self.config
        classes = class_images(c, self.base) if c.with_prior_preservation else []
        self.cache, self.pools = build_cache(c, self.base, self.photos, classes)
        self.evaluator.encode()

    def begin(self) -> None:
        """From here on its seconds count."""
        self.began = time.perf_counter()

    def resume(self, slot: Slot) -> None:
        """A resumed run goes back to its checkpoint, once."""
        if self.checkpoint:
            run_folder.restore(self.checkpoint, self.dir, slot)
            self.checkpoint = None
            self.history = records.read_metrics(self.dir)
            self.rank()

    def write_config(self) -> None:
        import yaml

        place = os.path.abspath(self.dir)
        values = {**absolute(self.config).to_dict(), "output_dir": place}
        text = yaml.safe_dump({**values, "resume_from_checkpoint": None}, sort_keys=False)
        with whole(self.dir / run_folder.CONFIG) as partial:
            partial.write_text(f"{CONFIG_NOTE}\n{text}", encoding="utf-8")

    def check(self, slot: Slot, k: int) -> float:
        """The loss, to the tracker too. Raises ValueError if training has come apart."""
        loss, bad = slot.loss, slot.skipped_now
        self.tracker.log({"loss": loss, "learning_rate": self.learning_rate(slot)}, k)
        if bad >= BAD_STEPS_IN_A_ROW:
            raise ValueError(
                f"the last {bad} steps up to {k} gave no finite loss or gradient (last loss "
                f"{loss}); the adapter was left as it was before them. Lower `learning_rate`, or "
                "use --mixed_precision bf16 or no."
            )
        return loss

    def learning_rate(self, slot: Slot) -> float:
        return self.config.learning_rate * slot.learning_rate

    def score_text(self) -> str:
        last = self.history[-1] if self.history else {}
        text = scores_text(last)
        skipped = self.skipped_text()
        if not text and not skipped:
            return ""
        best = f"{text}, best {self.best_step}" if text else ""
        return f" | at {last['step']}: {', '.join(x for x in (best, skipped) if x)}"

    def skipped_since(self, record: Mapping[str, Any]) -> tuple[int, int]:
        """(skipped, steps) from the scoring before that record to it. Not counted are those that
        only found the scale of fp16's gradients.
        """
        before = [r for r in self.history if r["step"] < record["step"]][-1:]
        skipped, step = (before[0]["skipped_steps"], before[0]["step"]) if before else (0, 0)
        return record["skipped_steps"] - skipped, record["step"] - step

    def skipped_text(self) -> str:
        skipped, steps = self.skipped_since(self.history[-1]) if self.history else (0, 0)
        return f"{skipped} of {steps} steps skipped" if skipped else ""

    def scoring_due(self, k: int) -> bool:
        every, scored = self.config.validation_steps, {r["step"] for r in self.history}
        return k not in scored and (
            k in (0, self.config.max_train_steps) or bool(every and k % every == 0)
        )

    def saving_due(self, k: int) -> bool:
        every = self.config.checkpointing_steps
        return bool(every and k % every == 0 and k > self.start) or self.done(k)

    def done(self, k: int) -> bool:
        """The last step is reached, or no scoring has ranked better for `early_stop` scorings."""
        stopping = stale(self.history, self.best_step, self.config.early_stop)
        return k >= self.config.max_train_steps or stopping

    def record(self, slot: Slot, k: int, images: Sequence[Any], loss: float, began: float) -> None:
        """Scores the images and keeps all: samples/, metrics.jsonl, best/. loss: the mean since
        the last scoring, nan without a step. began: when the scoring did.
        """
        self.check_folder()
        record = {
            "step": k,
            **self.evaluator.judge(k, list(images)),
            "loss": loss if math.isfinite(loss) else None,
            "learning_rate": self.learning_rate(slot),
            "skipped_steps": slot.skipped,
            "seconds": round(time.perf_counter() - self.began, 2),
            "scoring_seconds": round(time.perf_counter() - began, 2),
        }
        self.history.append(record)
        self.rank()
        if not self.warned and (warning := overfitting(self.history)):
            self.warned = True
            say(f"Warning: {warning}")
        if self.best_step == k:
            self.save_files(slot, self.dir / run_folder.BEST, record)
        records.append_metrics(self.dir, record)
        self.tracker.log(record, k, images)
        skipped, steps = self.skipped_since(record)
        if (skipped - slot.scalings) * 2 > steps:
            raise ValueError(
                f"{skipped} of the {steps} steps up to {k} gave no finite loss or gradient: what "
                "was not skipped is no training. A photo may be damaged; else lower "
                "`learning_rate`, or use --mixed_precision bf16 or no."
            )

    def rank(self) -> None:
        """The best scoring so far: what best/, the page and the result say."""
        if self.history:
            self.choice = choose_best(self.history, identity_at_start=self.method.identity_at_start)

    @property
    def best_step(self) -> int:
        return self.choice.step

    def has_lora(self, slot: Slot) -> bool:
        """Whether a plain LoRA holds what is trained."""
        groups = slot.adapter.groups
        return not any(self.method.no_plain_lora(group.adapter.options) for group in groups)

    def save_files(self, slot: Slot, folder: Path, record: dict[str, Any]) -> None:
        """adapter.safetensors and the LoRA file, whole or not at all."""
        metadata = {
            "base": self.base.id,
            "prompt": self.config.instance_prompt,
            "identifier": self.subject.identifier,
            "step": record["step"],
            "scores": scores_of(record),
        }
        with whole_folder(folder) as place:
            slot.save(place / run_folder.ADAPTER, metadata)
            if self.has_lora(slot):
                export(slot.adapter, place, slot=slot.index, metadata=metadata, overwrite=True)

    def check_folder(self) -> None:
        """Before each write. Raises ValueError where the folder is no longer there."""
        assert self.lock is not None
        self.lock.check()

    def save(self, slot: Slot, k: int) -> Path:
        self.check_folder()
        return run_folder.save_checkpoint(self.dir, k, slot, self.info)

    def rotate(self, k: int) -> None:
        run_folder.rotate(self.dir, k, self.config.checkpoints_total_limit)

    def finish(self, slot: Slot) -> TrainResult:
        """Final files at the top level, the report, and what to tell the user."""
        self.check_folder()
        final = self.dir / ".final"
        try:
            self.save_files(slot, final, self.history[-1])
            for path in final.iterdir():
                os.replace(path, self.dir / path.name)
        finally:
            shutil.rmtree(final, ignore_errors=True)
        if self.evaluator.scorers is not None:
            page = report_of(
                self.dir, self.config, self.evaluator, self.history, self.choice,
                title=self.subject.name, photos=self.images,
            )  # fmt: skip
            say(page)
        best = self.dir / run_folder.BEST
        lora = best / run_folder.LORA if self.has_lora(slot) else None
        say(f"{self.choice.reason}\nBest: {lora or best / run_folder.ADAPTER}")
        if skipped := slot.skipped:
            say(f"{skipped} steps were skipped: their loss or gradient was not finite.")
        return TrainResult(
            self.dir,
            best / run_folder.ADAPTER,
            lora,
            self.best_step,
            self.history[self.choice.index],
            self.history,
            self.choice.reason,
        )

    def close(self) -> None:
        """Lets the folder go. May be called twice."""
        self.tracker.close()
        if self.lock is not None:
            self.lock.release()
