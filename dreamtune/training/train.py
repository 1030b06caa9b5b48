"""Photos in, scored adapters and LoRA files out: one subject's run, or several at once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from dreamtune.config import CPU_SLOTS, Config
from dreamtune.evaluation.summary import Entry, refuse_taken, write_summary
from dreamtune.evaluation.validation import BasePictures
from dreamtune.models.base import Base
from dreamtune.models.load import load_base
from dreamtune.training import run_folder
from dreamtune.training.console import table
from dreamtune.training.defaults import device_and_dtype
from dreamtune.training.interrupts import Interrupted, Interrupts
from dreamtune.training.output import say
from dreamtune.training.resume import together
from dreamtune.training.run import Run
from dreamtune.training.run_folder import TrainResult
from dreamtune.training.sweep import PROMPT_FILE, SETTINGS_FILE, expand, in_folder, labelled
from dreamtune.training.wave import Wave


def train_wave(wave: Wave, interrupts: Interrupts) -> None:
    """The loop: scores and saves first, then a step, until no run is left.

    Raises KeyboardInterrupt on Ctrl-C, after saving. What else ends it says what is safe.
    """
    try:
        while True:
            wave.score(wave.k, interrupts.held)
            with interrupts.held():
                wave.save(wave.k)
                wave.retire(wave.k)
            if not wave.runs:
                return
            with interrupts.held():
                wave.advance(wave.k)
            wave.show(wave.k)
    except KeyboardInterrupt:
        with interrupts.held():
            wave.save_all()
        raise
    except Exception as error:
        note(error, [run_folder.safe(run.dir) for run in wave.runs.values()])
        raise
    finally:
        wave.close()


def train(config: Config) -> TrainResult:
    """Runs a training run, or goes on with one. Raises ValueError before any work for what cannot
    be done.

    Raises Interrupted on Ctrl-C, after saving.
    """
    if config.subjects or config.sweep:
        raise ValueError("`subjects` and `sweep` are several runs: use `train_stacked`.")
    began = time.perf_counter()
    with Interrupts() as interrupts, closing(Run(config)) as run:
        run.open(base_of(run.given))
        wave = Wave(run.base, {run.subject.name: run}, began)
        try:
            train_wave(wave, interrupts)
        except KeyboardInterrupt:
            saved = (
                f"saved in {run.dir / f'checkpoint-{wave.k}'}. Go on with --output_dir {run.dir} "
                "--resume_from_checkpoint latest"
            )
            raise Interrupted(
                f"Stopped after step {wave.k} of {run.config.max_train_steps}; "
                f"{'; '.join(wave.failed.values()) or saved}",
                interrupts.signal,
            ) from None
    for reason in wave.failed.values():
        raise ValueError(reason)
    return next(iter(wave.results.values()))


@dataclass(frozen=True)
class StackedResult:
    """By label: a subject's folder name, `learning_rate=1e-3,seed=0`, or both."""

    run_dir: Path
    results: dict[str, TrainResult]
    failed: dict[str, str]  # label -> what went wrong


def train_stacked(config: Config) -> StackedResult:
    """Runs what `subjects` and `sweep` ask for, in waves of `slots`, or goes on with it.

    Each run is what it would be alone: its folder, scores, best checkpoint, early stop and files.

    Raises ValueError before any work for what cannot be done; Interrupted on Ctrl-C, after saving.
    """
    with Interrupts() as interrupts, ExitStack() as stack:
        root, runs, base = get_ready(config, stack)
        results: dict[str, TrainResult] = {}
        failed: dict[str, str] = {}
        pictures = BasePictures((r.evaluator.prompts, r.evaluator.seeds) for r in runs.values())
        for part in waves(config, base, runs):
            wave = Wave(base, part, pictures=pictures)
            try:
                train_wave(wave, interrupts)
            except KeyboardInterrupt:
                raise Interrupted(
                    f"Stopped after step {wave.k}; saved in {root}. Go on with the same flags, "
                    f"--output_dir {root} --resume_from_checkpoint latest; or with one run alone: "
                    f"--output_dir {root}/NAME --resume_from_checkpoint latest",
                    interrupts.signal,
                ) from None
            results |= wave.results
            failed |= wave.failed
        in_order = {n: results[n] for n in runs if n in results}
        say(table(in_order, failed))
        say(f"Summary: {write_summary(root, root.name, entries(config, runs, in_order, failed))}")
        return StackedResult(root, in_order, failed)


def entries(
    config: Config,
    runs: Mapping[str, Run],
    results: Mapping[str, TrainResult],
    failed: Mapping[str, str],
) -> list[Entry]:
    """What the summary says of each run, in their order."""
    found, named = [], labelled(config)
    for label, run in runs.items():
        subject, values = named.get(label, ("", {}))  # a folder may have gone meanwhile
        done = results.get(label)
        history = done.history if done else run.history
        step, identity = done.best_step if done else 0, run.method.identity_at_start
        failure = failed.get(label, "")
        found.append(Entry(label, subject, values, history, step, failure, identity))
    return found


def get_ready(config: Config, stack: ExitStack) -> tuple[Path, dict[str, Run], Base]:
    """The runs, refused before a model is loaded where they cannot be trained; then the base.

    stack: holds the common folder and the runs' own until it is closed.
    """
    resume = config.resume_from_checkpoint
    if resume not in (None, "latest") or (resume and config.output_dir is None):
        raise ValueError(
            "stacked runs go on with --resume_from_checkpoint latest and the --output_dir of all; "
            "a single one with its own folder, without --subjects and --sweep."
        )
    configs = expand(config)
    source = Path(config.subjects or config.instance_data_dir or "default").name.split(":")[-1]
    name = config.name or f"{source}-{'sweep' if config.sweep else config.method}"
    # the common folder has nothing of a run in it, whether new or gone on with
    lock = run_folder.take(config.output_dir, name)
    stack.callback(lock.release)
    if not resume:
        refuse_taken(lock.folder, list(configs))
    runs: dict[str, Run] = {}
    for label, own in configs.items():
        try:
            own = in_folder(own, lock.folder / label, bool(resume))
            runs[label] = stack.enter_context(closing(Run(own, (PROMPT_FILE, SETTINGS_FILE))))
        except ValueError as error:
            raise ValueError(f"`{label}`: {error}") from error
    together(runs.values())
    base = base_of(config)
    scorers = None
    for run in runs.values():
        run.open(base, scorers)
        scorers = run.evaluator.scorers
    return lock.folder, runs, base


def note(error: Exception, texts: Sequence[str]) -> None:
    """Texts for whoever shows the error; Python 3.11 and later does by itself."""
    error.__notes__ = [*getattr(error, "__notes__", []), *dict.fromkeys(texts)]  # type: ignore


def base_of(config: Config) -> Base:
    """The base; says what was assumed of it."""
    device, dtype = device_and_dtype(config)
    base = load_base(
        config.pretrained_model_name_or_path,
        revision=config.revision,
        variant=config.variant,
        prediction_type=config.prediction_type,
        dtype=dtype,
        device=device,
    )
    for note in base.notes:
        say(note)
    return base


def waves(config: Config, base: Base, runs: dict[str, Run]) -> Iterator[dict[str, Run]]:
    """Runs of one method, one step to start from and, but for its `per_slot` options, one set of
    options; at most `slots` each.
    """
    alike: dict[str, list[str]] = {}
    for label, run in runs.items():
        c, free = run.config, run.method.per_slot
        fixed = sorted((k, v) for k, v in c.options.items() if k not in free)
        key = repr((run.start, c.method, fixed))
        alike.setdefault(key, []).append(label)
    for labels in alike.values():
        group = {n: runs[n] for n in labels}
        size = int(config.slots) if config.slots != "auto" else fitting(base, group)
        for first in range(0, len(labels), size):
            part = labels[first : first + size]
            say(f"Training {len(part)} of {len(runs)} runs at once: {'; '.join(part)}")
            yield {n: runs[n] for n in part}


def fitting(base: Base, runs: dict[str, Run]) -> int:
    """How many of the runs fit on the device at once."""
    if base.device.type != "cuda":
        return min(CPU_SLOTS, len(runs))
    from dreamtune.training.fit import largest_wave

    return largest_wave(base, list(runs.values()))
