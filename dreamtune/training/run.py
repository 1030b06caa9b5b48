"""What the training loop touches: made in order, stepped, scored, saved, finished."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamtune.config import STACKED, Config
from dreamtune.configfile import continued
from dreamtune.data.photos import read_folder
from dreamtune.evaluation.selection import Choice, choose_best
from dreamtune.evaluation.validation import Evaluator, at_step
from dreamtune.fast import ops
from dreamtune.fast.graphs import choose, drive, reason_against
from dreamtune.metrics.table import scores_of, scores_text
from dreamtune.models.load import load_base
from dreamtune.models.stable_diffusion import Base
from dreamtune.training import run_folder
from dreamtune.training.assemble import build_step
from dreamtune.training.cache import build_cache
from dreamtune.training.class_images import class_images
from dreamtune.training.console import options_text, progress_bar
from dreamtune.training.defaults import device_and_dtype, resolve, subject_of, with_subject
from dreamtune.training.run_folder import TrainResult as TrainResult
from dreamtune.training.step import Step
from dreamtune.training.sweep import PROMPT_FILE, SETTINGS_FILE
from dreamtune.training.tracker import Tracker

if TYPE_CHECKING:
    from dreamtune.injection.inject import InjectedAdapter

BAD_STEPS_IN_A_ROW = 25
SYNC_EVERY = 10  # rounds between reads of the loss: each waits for the device


class Run:
    """One subject's run, in order of being made: cheap refusals first, models last.

    `slot` of `adapter` and of the step is this run's. Alone it makes them itself; in a stacked run
    `open`, `fill_cache` and `attach` are called from outside.
    """

    def __init__(self, config: Config, alone: bool = True) -> None:
        from dreamtune.adapters import find_method, resolve_options

        self.began = time.perf_counter()
        self.checkpoint, self.start = None, 0
        if config.resume_from_checkpoint is not None:
            self.checkpoint = run_folder.find_checkpoint(
                config.resume_from_checkpoint, config.output_dir
            )
            config = continued(config, self.checkpoint.parent / run_folder.CONFIG)
            self.start = run_folder.read_state(self.checkpoint)["step"]
        resolve_options(find_method(config.method), config.options)
        self.config, photo_dir = with_subject(config)
        folder = read_folder(photo_dir)
        self.subject = subject_of(self.config, folder.photos)
        device = device_and_dtype(config)[0]
        self.against = reason_against(device, config.gradient_checkpointing)
        self.capturing = choose("capture", config.capture, self.against)
        self.unfused = ops.reason_against(device, config.gradient_checkpointing)
        self.fusing = choose("fused", config.fused, self.unfused)
        name = config.name or f"{photo_dir.resolve().name}-{config.method}".replace(" ", "-")
        self.dir = (
            self.checkpoint.parent
            if self.checkpoint
            else run_folder.choose_run_dir(config.output_dir, name)
        )
        digests = [p.digest for p in folder.photos]
        if self.checkpoint and run_folder.read_state(self.checkpoint)["photos"] != digests:
            raise ValueError(
                f"the photos in `{photo_dir}` are not those that {self.dir} was started with."
            )
        self.photos, self.images = folder.photos, [p.image for p in folder.photos]
        self.info: dict[str, Any] = {"photos": digests}
        self.history: list[dict[str, Any]] = []
        if not alone:  # what `sweep.words` has read was not skipped
            others = [n for n in folder.skipped if n not in (PROMPT_FILE, SETTINGS_FILE)]
            folder = replace(folder, skipped=others)
        print(f"Subject `{self.subject.name}`: {folder.summary()}. Run: {self.dir}")
        self.choice, self.slot = Choice(0, 0, ""), 0
        self.bar: Any = None
        if alone:
            self.open(base_of(self.config))
            self.fill_cache()
            self.make_step()

    def open(self, base: Base, scorers: Any = None) -> None:
        """What needs the base: the rest of the settings, and what scores."""
        self.base, self.info["base"] = base, base.id
        base.speed_up(self.fusing, self.config.compile)
        self.config = resolve(self.config, base, self.subject, self.dir)
        self.evaluator = Evaluator(self.config, base, self.subject, self.images, scorers)
        self.tracker = Tracker(self.config.report_to, self.dir)
        self.write_config()

    def fill_cache(self) -> None:
        c = self.config
        classes = class_images(c, self.base) if c.with_prior_preservation else []
        self.cache, self.pools = build_cache(c, self.base, self.photos, classes)

    def make_step(self) -> None:
        c = self.config
        adapter, step = build_step(self.base, [c], [self.cache], [self.pools])
        self.attach(adapter, step, 0)
        self.do_step, self.replayed = drive(adapter, step, self.capturing)
        self.began, self.prepared = time.perf_counter(), time.perf_counter() - self.began
        print(
            f"{c.method} {options_text(c.options)}: {adapter.num_parameters:,} "
            f"parameters on {self.base.device.type}, {c.max_train_steps} steps; "
            f"ready after {self.prepared:.1f} s"
        )
        if self.base.device.type == "cuda" and not self.capturing:
            print(f"Steps are not captured: {self.against or '`capture` is off'}.")
        if self.base.device.type == "cuda" and not self.fusing:
            print(f"The UNet runs unfused: {self.unfused or '`fused` is off'}.")
        self.bar = progress_bar(self.start, c.max_train_steps or 0)

    def attach(self, adapter: InjectedAdapter, step: Step, slot: int) -> None:
        """Trains in `slot` from here on; a resumed run goes back to its checkpoint, once."""
        self.adapter, self._step, self.slot = adapter, step, slot
        if self.checkpoint:
            run_folder.restore(self.checkpoint, self.dir, adapter, step.load_state_dict, slot)
            self.checkpoint = None
            self.history = run_folder.read_metrics(self.dir)
            self.choose()

    def write_config(self) -> None:
        import yaml

        self.dir.mkdir(parents=True, exist_ok=True)
        values = {**self.config.to_dict(), "resume_from_checkpoint": None}
        (self.dir / run_folder.CONFIG).write_text(yaml.safe_dump(values, sort_keys=False))

    def step(self, k: int, factor: float) -> None:
        self.do_step(k, factor)

    def show(self, k: int) -> None:
        """Progress bar and tracker, now and then. Raises ValueError if training has come apart."""
        self.bar.update(1)
        if k % SYNC_EVERY == 0 or k == self.config.max_train_steps:
            loss = self.check(k)
            self.bar.set_postfix_str(f"loss {loss:.3f}{self.score_text()}")

    def check(self, k: int) -> float:
        """The loss, to the tracker too. Raises ValueError if training has come apart."""
        loss = self._step.loss[self.slot].item()
        bad = self._step.skipped_now[self.slot].item()
        self.tracker.log({"loss": loss, "learning_rate": self.learning_rate()}, k)
        if bad >= BAD_STEPS_IN_A_ROW:
            raise ValueError(
                f"the last {bad:.0f} steps up to {k} gave no finite loss or gradient (last loss "
                f"{loss}); the adapter "
                "was left as it was before them. Lower `learning_rate`, or use --mixed_precision "
                "bf16 or no."
            )
        return loss

    def learning_rate(self) -> float:
        return float(self.config.learning_rate or 0) * self._step.optimizer.schedule.item()

    def score_text(self) -> str:
        last = self.history[-1] if self.history else {}
        text = scores_text(last)
        return f" | at {last['step']}: {text}, best {self.best_step}" if text else ""

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
        since = sum(r["step"] > self.best_step for r in self.history)
        stopping = self.config.early_stop is not None and since >= self.config.early_stop
        return k >= (self.config.max_train_steps or 0) or stopping

    def score(self, k: int) -> None:
        """Images and scores of the adapter after k steps; best/ if it is the best so far."""
        self.bar.set_postfix_str(
            f"sampling {len(self.evaluator.prompts)} images{self.score_text()}"
        )
        began = time.perf_counter()
        with at_step(self.adapter, k), self.replayed():
            images = self.evaluator.sample()
        self.record(k, images, self._step.take_mean()[0], began)
        self.bar.set_postfix_str(self.score_text().lstrip(" |"))

    def record(self, k: int, images: list[Any], loss: float, began: float) -> None:
        """Scores the images and keeps all: samples/, metrics.jsonl, best/. loss: the mean since
        the last scoring, nan without a step.
        """
        scores = self.evaluator.judge(k, images)
        record = {
            "step": k,
            **scores,
            "loss": loss if loss == loss else None,
            "learning_rate": self.learning_rate(),
            "skipped_steps": int(self._step.skipped[self.slot].item()),
            "seconds": round(time.perf_counter() - self.began, 2),
            "scoring_seconds": round(time.perf_counter() - began, 2),
        }
        self.history.append(record)
        self.choose()
        if self.best_step == k:
            self.save_files(self.dir / run_folder.BEST, record)
        run_folder.append_metrics(self.dir, record)
        self.tracker.log(record, k, images)

    def choose(self) -> None:
        """The best scoring so far: what best/, the page and the result say."""
        from dreamtune.adapters import find_method

        if self.history:
            start = find_method(self.config.method).identity_at_start
            self.choice = choose_best(self.history, identity_at_start=start)

    @property
    def best_step(self) -> int:
        return self.choice.step

    def save_files(self, folder: Path, record: dict[str, Any]) -> None:
        """adapter.safetensors and the LoRA file, whole or not at all."""
        metadata = {
            "base": self.base.id,
            "prompt": self.config.instance_prompt,
            "identifier": self.subject.identifier,
            "step": record["step"],
            "scores": scores_of(record),
        }

        def fill(place: Path) -> None:
            from dreamtune.files.export import export

            self.adapter.save(place / run_folder.ADAPTER, self.slot, metadata=metadata)
            if self.exportable():
                export(self.adapter, place, slot=self.slot, overwrite=True)

        run_folder.replace_folder(folder, fill)

    def exportable(self) -> bool:
        from dreamtune.adapters import find_method

        return find_method(self.config.method).low_rank

    def save(self, k: int) -> Path:
        state, limit = self._step.state_dict(self.slot), self.config.checkpoints_total_limit
        return run_folder.save_checkpoint(
            self.dir, k, self.adapter, state, self.info, limit, self.slot
        )

    def finish(self) -> TrainResult:
        """Final files at the top level, the report, and what to tell the user."""
        if self.bar is not None:
            self.bar.close()
        final = self.dir / ".final"
        self.save_files(final, self.history[-1])
        for path in final.iterdir():
            os.replace(path, self.dir / path.name)
        shutil.rmtree(final)
        if self.evaluator.scorers is not None:
            self.write_report()
        best = self.dir / run_folder.BEST
        lora = best / run_folder.LORA if self.exportable() else None
        scores = self.history[self.choice.index]
        print(f"{self.choice.reason}\nBest: {lora or best / run_folder.ADAPTER}")
        if skipped := self._step.skipped[self.slot].item():
            print(f"{skipped:.0f} steps were skipped: their loss or gradient was not finite.")
        return TrainResult(
            self.dir,
            best / run_folder.ADAPTER,
            lora,
            self.best_step,
            scores,
            self.history,
            self.choice.reason,
        )

    def write_report(self) -> None:
        from dreamtune.evaluation.report import write_report

        c, steps = self.config, [r["step"] for r in self.history]
        grids = {s: g for s in steps if (g := self.evaluator.saved(s)) is not None}
        options = {"num_inference_steps": c.num_inference_steps, "guidance_scale": c.guidance_scale}
        if c.guidance_rescale:
            options["guidance_rescale"] = c.guidance_rescale
        hidden = ("output_dir", "name", "resume_from_checkpoint", "validation_prompt", *STACKED)
        path = write_report(
            self.dir,
            title=self.subject.name,
            photos=self.images,
            prompts=self.evaluator.prompts,
            base_images=grids[0],
            adapted_images=grids[self.best_step],
            history=self.history,
            choice=self.choice,
            settings={k: v for k, v in c.to_dict().items() if k not in hidden},
            base=self.base.id,
            example_prompt=self.evaluator.prompts[0],
            sample_settings=options,
            progress=[(s, g[0]) for s, g in grids.items()],
            protocol=self.evaluator.scorers.protocol,
        )
        print(f"Report: {path}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.tracker.close()


def base_of(config: Config) -> Base:
    device, dtype = device_and_dtype(config)
    return load_base(
        config.pretrained_model_name_or_path,
        revision=config.revision,
        variant=config.variant,
        prediction_type=config.prediction_type,
        dtype=dtype,
        device=device,
    )
