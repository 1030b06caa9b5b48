"""What the training loop touches: made in order, stepped, scored, saved, finished."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dreamtune import runstate
from dreamtune.base import load_base
from dreamtune.capture import CapturedStep, choose, reason_against
from dreamtune.config import Config
from dreamtune.configfile import continued
from dreamtune.data import read_folder
from dreamtune.evaluate import Evaluator, Tracker
from dreamtune.optim import SlotAdamW
from dreamtune.prepare import (
    build_cache,
    class_images,
    device_and_dtype,
    resolve,
    subject_of,
    with_subject,
)
from dreamtune.step import Step, StepSettings

BAD_STEPS_IN_A_ROW = 25
SYNC_EVERY = 10  # rounds between reads of the loss: each waits for the device


@dataclass(frozen=True)
class TrainResult:
    """adapter, lora: the files of the best checkpoint (lora None for a method that no LoRA can
    hold).
    """

    run_dir: Path
    adapter: Path
    lora: Path | None
    best_step: int
    scores: dict[str, Any]
    history: list[dict[str, Any]]
    reason: str


class Run:
    """Everything the loop touches, in order of being made: cheap refusals first, models last."""

    def __init__(self, config: Config) -> None:
        from dreamtune.adapters import find_method, resolve_options

        began = time.perf_counter()
        checkpoint = None
        if config.resume_from_checkpoint is not None:
            checkpoint = runstate.find_checkpoint(config.resume_from_checkpoint, config.output_dir)
            config = continued(config, checkpoint.parent / runstate.CONFIG)
        resolve_options(find_method(config.method), config.options)
        config, photo_dir = with_subject(config)
        folder = read_folder(photo_dir)
        subject = subject_of(config, folder.photos)
        device, dtype = device_and_dtype(config)
        against = reason_against(device, config.gradient_checkpointing)
        capturing = choose(config.capture, against)
        name = config.name or f"{photo_dir.resolve().name}-{config.method}".replace(" ", "-")
        self.dir = (
            checkpoint.parent if checkpoint else runstate.choose_run_dir(config.output_dir, name)
        )
        print(f"Subject `{subject.name}`: {folder.summary()}. Run: {self.dir}")
        self.base = base = load_base(
            config.pretrained_model_name_or_path,
            revision=config.revision,
            variant=config.variant,
            prediction_type=config.prediction_type,
            dtype=dtype,
            device=device,
        )
        self.config = config = resolve(config, base, subject, self.dir)
        self.subject, self.photos = subject, [p.image for p in folder.photos]
        digests = [p.digest for p in folder.photos]
        if checkpoint and runstate.read_state(checkpoint)["photos"] != digests:
            raise ValueError(
                f"the photos in `{photo_dir}` are not those that {self.dir} was started with."
            )
        self.info = {"photos": digests, "base": base.id}
        self.evaluator = Evaluator(config, base, subject, self.photos)
        self.tracker = Tracker(config.report_to, self.dir)
        self.write_config()
        classes = class_images(config, base) if config.with_prior_preservation else []
        self.make_step(*build_cache(config, base, folder.photos, classes))
        self.do_step: Step | CapturedStep = self._step
        if capturing:
            self.do_step = CapturedStep(self._step)
        self.start, self.best_step, self.reason = 0, 0, ""
        if checkpoint:
            self.start = runstate.read_state(checkpoint)["step"]
            runstate.restore(checkpoint, self.dir, self.adapter, self._step.load_state_dict)
        self.history = runstate.read_metrics(self.dir)
        self.choose()
        self.began, self.prepared = time.perf_counter(), time.perf_counter() - began
        print(
            f"{config.method} {options_text(config.options)}: {self.adapter.num_parameters:,} "
            f"parameters on {device.type}, {config.max_train_steps} steps; "
            f"ready after {self.prepared:.1f} s"
        )
        if device.type == "cuda" and not capturing:
            print(f"Steps are not captured: {against or '`capture` is off'}.")
        self.bar = progress_bar(self.start, config.max_train_steps or 0)

    def write_config(self) -> None:
        import yaml

        self.dir.mkdir(parents=True, exist_ok=True)
        values = {**self.config.to_dict(), "resume_from_checkpoint": None}
        (self.dir / runstate.CONFIG).write_text(yaml.safe_dump(values, sort_keys=False))

    def make_step(self, cache: Any, pools: Any) -> None:
        from dreamtune.inject import inject

        c, base = self.config, self.base
        if c.gradient_checkpointing:
            base.unet.enable_gradient_checkpointing()
        self.adapter = inject(
            base.unet, c.method, target_modules=c.target_modules, seed=c.seed, **c.options
        )
        base.unet.train()
        groups = self.adapter.parameter_groups(c.learning_rate, c.adam_weight_decay)
        optimizer = SlotAdamW([groups], (c.adam_beta1, c.adam_beta2), c.adam_epsilon)
        settings = StepSettings(
            batch=c.train_batch_size or 1,
            accumulation=c.gradient_accumulation_steps,
            prediction=c.prediction_type or "epsilon",
            snr_gamma=c.snr_gamma,
            prior_weight=c.prior_loss_weight,
            max_grad_norm=c.max_grad_norm,
            loss_scale=2.0**16 if base.dtype == torch.float16 else 1.0,
        )
        self._step = Step(
            base.unet, optimizer, cache, pools, base.alpha_bar(), [c.seed], settings, base.dtype
        )

    def step(self, k: int, factor: float) -> None:
        self.do_step(k, factor)

    def show(self, k: int) -> None:
        """Progress bar and tracker, now and then. Raises ValueError if training has come apart."""
        self.bar.update(1)
        if k % SYNC_EVERY and k != self.config.max_train_steps:
            return
        loss, bad = self._step.loss.item(), self._step.skipped_now.item()
        self.bar.set_postfix_str(f"loss {loss:.3f}{self.score_text()}")
        self.tracker.log({"loss": loss, "learning_rate": self.learning_rate()}, k)
        if bad >= BAD_STEPS_IN_A_ROW:
            raise ValueError(
                f"the last {bad:.0f} steps up to {k} gave no finite loss or gradient (last loss "
                f"{loss}); the adapter "
                "was left as it was before them. Lower `learning_rate`, or use --mixed_precision "
                "bf16 or no."
            )

    def learning_rate(self) -> float:
        return float(self.config.learning_rate or 0) * self._step.optimizer.schedule.item()

    def score_text(self) -> str:
        last = self.history[-1] if self.history else {}
        names = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T"}
        text = "".join(
            f" {shown} {last[key]:.3f}" for key, shown in names.items() if last.get(key) is not None
        )
        return f" | at {last['step']}:{text}, best {self.best_step}" if text else ""

    def scoring_due(self, k: int) -> bool:
        every, scored = self.config.validation_steps, {r["step"] for r in self.history}
        return k not in scored and (
            k in (0, self.config.max_train_steps) or bool(every and k % every == 0)
        )

    def score(self, k: int) -> None:
        """Images and scores of the adapter after k steps; best/ if it is the best so far."""
        self.bar.set_postfix_str(
            f"sampling {len(self.evaluator.prompts)} images{self.score_text()}"
        )
        began = time.perf_counter()
        # Step 0 is the base, also for a method that does not start there.
        self.adapter.scale = 1.0 if k else 0.0
        try:
            images, scores = self.evaluator(k)
        finally:
            self.adapter.scale = 1.0
        loss = self._step.take_mean()[0] if k else float("nan")
        record = {
            "step": k,
            **scores,
            "loss": loss if loss == loss else None,
            "learning_rate": self.learning_rate(),
            "skipped_steps": int(self._step.skipped.item()),
            "seconds": round(time.perf_counter() - self.began, 2),
            "scoring_seconds": round(time.perf_counter() - began, 2),
        }
        self.history.append(record)
        self.choose()
        if self.best_step == k:
            self.save_files(self.dir / runstate.BEST, record)
        runstate.append_metrics(self.dir, record)
        self.tracker.log(record, k, images)
        self.bar.set_postfix_str(self.score_text().lstrip(" |"))

    def choose(self) -> None:
        """The best scoring so far; without scorers the last."""
        from dreamtune.adapters import find_method
        from dreamtune.selection import choose_best

        if self.history and self.history[-1].get("dino") is not None:
            index, self.reason = choose_best(self.history)
            self.best_step = self.history[index]["step"]
            method = find_method(self.config.method)
            if self.best_step == 0 and len(self.history) > 1 and not method.identity_at_start:
                self.best_step = self.history[-1]["step"]
                self.reason += f" No {method.name} file holds the base, so best/ has the last step."
        elif self.history:
            self.best_step, self.reason = self.history[-1]["step"], "No scorers: the last step."

    def save_files(self, folder: Path, record: dict[str, Any]) -> None:
        """adapter.safetensors and the LoRA file, whole or not at all."""
        metadata = {
            "base": self.base.id,
            "prompt": self.config.instance_prompt,
            "identifier": self.subject.identifier,
            "step": record["step"],
            "scores": {k: v for k, v in record.items() if k in ("dino", "clip_i", "clip_t")},
        }

        def fill(place: Path) -> None:
            from dreamtune.export import export

            self.adapter.save(place / runstate.ADAPTER, metadata=metadata)
            if self.exportable():
                export(self.adapter, place, format="diffusers", overwrite=True)

        runstate.replace_folder(folder, fill)

    def exportable(self) -> bool:
        from dreamtune.adapters import find_method

        return find_method(self.config.method).low_rank

    def save(self, k: int) -> Path:
        state = self._step.state_dict()
        return runstate.save_checkpoint(
            self.dir, k, self.adapter, state, self.info, self.config.checkpoints_total_limit
        )

    def finish(self) -> TrainResult:
        """Final files at the top level, the report, and what to tell the user."""
        self.bar.close()
        final = self.dir / ".final"
        self.save_files(final, self.history[-1])
        for path in final.iterdir():
            os.replace(path, self.dir / path.name)
        shutil.rmtree(final)
        if self.evaluator.scorers is not None:
            self.report()
        best = self.dir / runstate.BEST
        lora = best / runstate.LORA if self.exportable() else None
        scores = next(r for r in self.history if r["step"] == self.best_step)
        print(f"{self.reason}\nBest: {lora or best / runstate.ADAPTER}")
        if self._step.skipped.item():
            print(
                f"{self._step.skipped.item():.0f} steps were skipped: their loss or gradient was "
                f"not finite."
            )
        return TrainResult(
            self.dir,
            best / runstate.ADAPTER,
            lora,
            self.best_step,
            scores,
            self.history,
            self.reason,
        )

    def report(self) -> None:
        from dreamtune.report import write_report

        c, steps = self.config, [r["step"] for r in self.history]
        grids = {s: g for s in steps if (g := self.evaluator.saved(s)) is not None}
        options = {"num_inference_steps": c.num_inference_steps, "guidance_scale": c.guidance_scale}
        if c.guidance_rescale:
            options["guidance_rescale"] = c.guidance_rescale
        hidden = ("output_dir", "name", "resume_from_checkpoint", "validation_prompt")
        path = write_report(
            self.dir,
            title=self.subject.name,
            photos=self.photos,
            prompts=self.evaluator.prompts,
            base_images=grids[0],
            adapted_images=grids[self.best_step],
            history=self.history,
            settings={k: v for k, v in c.to_dict().items() if k not in hidden},
            base=self.base.id,
            example_prompt=self.evaluator.prompts[0],
            sample_settings=options,
            progress=[(s, g[0]) for s, g in grids.items()],
            protocol=self.evaluator.scorers.protocol,
        )
        print(f"Report: {path}")

    def close(self) -> None:
        self.bar.close()
        self.tracker.close()


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
