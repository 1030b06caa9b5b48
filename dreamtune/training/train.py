"""train(config): photos of one subject in, a scored adapter and a LoRA file out."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dreamtune.config import Config
from dreamtune.training.optim import learning_rate_factor
from dreamtune.training.run import Run, TrainResult


class Interrupted(KeyboardInterrupt):
    """The run was stopped and saved; the message says how to go on."""


class Interrupts:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt, but not in the middle of a `held` block: there,
    after it.
    """

    def __init__(self) -> None:
        self.holding = self.pending = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.handle)
        except ValueError:
            pass  # not the main thread: there are no signals to catch
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: object) -> None:
        if self.holding:
            self.pending = True
        else:
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
        if self.pending:
            self.pending = False
            raise KeyboardInterrupt


def train(config: Config) -> TrainResult:
    """Runs a training run, or goes on with one. Raises ValueError before any work for what cannot
    be done.

    Raises Interrupted on Ctrl-C, after saving.
    """
    if config.subjects or config.sweep:
        raise ValueError("`subjects` and `sweep` are several runs: use `train_stacked`.")
    with Interrupts() as interrupts:
        run = Run(config)
        c, k, total = run.config, run.start, run.config.max_train_steps or 0
        try:
            while True:
                if run.scoring_due(k):
                    run.score(k)
                if run.saving_due(k):
                    with interrupts.held():
                        run.save(k)
                if run.done(k):
                    break
                with interrupts.held():
                    run.step(k, learning_rate_factor(k, c.lr_scheduler, c.lr_warmup_steps, total))
                    k += 1
                run.show(k)
            return run.finish()
        except KeyboardInterrupt:
            with interrupts.held():
                folder = run.save(k)
            raise Interrupted(
                f"Stopped after step {k} of {total}; saved in {folder}. Go on with --output_dir "
                f"{run.dir} "
                "--resume_from_checkpoint latest"
            ) from None
        finally:
            run.close()
