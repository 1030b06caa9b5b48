"""The schedule of a base, from the scheduler's file in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dreamtune.fields import UnreadableFile
from dreamtune.models.folder import ModelFolder
from dreamtune.models.rules import SCHEDULER, assumed
from dreamtune.models.weights import read_by_library

FILE = "scheduler_config.json"
# Those of Stable Diffusion: each is told the betas and the prediction by the same names.
KNOWN = (
    "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler",
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "TCDScheduler",
    "UniPCMultistepScheduler",
)  # fmt: skip
# How DDIM samples from Stable Diffusion; the class's own defaults are those of pixels.
SAMPLING = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
SCHEDULE = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "prediction_type", "rescale_betas_zero_snr",
)  # fmt: skip


def load_scheduler(folder: ModelFolder, named: Sequence[str], prediction_type: str | None) -> Any:
    """named: library and class, of model_index.json; prediction_type: the user's, which wins.

    Training needs the betas alone, so they are read where the class itself is not here. Raises
    UnreadableFile for a scheduler of another kind, or one whose file says what it may not.
    """
    import diffusers

    place = folder.place("scheduler", FILE)
    stated = folder.config("scheduler", SCHEDULER, FILE)
    kind, missing = class_of(named, folder.place("", "model_index.json"))
    config = {k: v for k, v in stated.items() if not k.startswith("_")}
    if missing:
        unsaid = [n for n in SCHEDULE[1:4] if n not in config]
        if unsaid and not config.get("trained_betas"):
            raise UnreadableFile(
                f"the scheduler {'.'.join(named)} {missing}, and `{place}` does not say "
                f"{', '.join(unsaid)}: nothing is known of its noise."
            )
        config = {**SAMPLING, **{n: config[n] for n in SCHEDULE if n in config}}
        folder.notes.append(
            f"The scheduler {'.'.join(named)} {missing}: the schedule in `{place}` is used, and "
            "--sampler base samples with DDIM."
        )
    said = stated.get("prediction_type")
    with read_by_library(place):
        scheduler = kind.from_config(config)
        for used in (
            scheduler,
            diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config),
        ):
            used.set_timesteps(2)  # what it cannot do shows here, not after an hour of training
    first, last = scheduler.config.beta_start, scheduler.config.beta_end
    if first > last:
        raise UnreadableFile(
            f"`{place}`: `beta_start` must be at most `beta_end`, got {first} and {last}."
        )
    unsaid = assumed("scheduler", stated, scheduler.config)
    if prediction_type is not None:
        unsaid = [n for n in unsaid if not n.startswith("prediction_type")]
        scheduler = told(scheduler, place, said, prediction_type, folder.notes)
    elif said is None:
        unsaid[-1] += " (--prediction_type v_prediction otherwise)"
    if unsaid:
        folder.notes.append(f"`{place}` does not say, and it is assumed: {', '.join(unsaid)}.")
    return scheduler


def told(
    scheduler: Any, place: str, said: str | None, prediction_type: str, notes: list[str]
) -> Any:
    """The scheduler with the user's prediction type. said: by the file."""
    if said not in (None, prediction_type):
        notes.append(
            f"--prediction_type {prediction_type} is used, although `{place}` says {said}."
        )
    return type(scheduler).from_config(scheduler.config, prediction_type=prediction_type)


def class_of(named: Sequence[str], place: str) -> tuple[type[Any], str | None]:
    """The class, or DDIM's and why it is not the one that was named.

    Raises UnreadableFile for a class of diffusers that is no scheduler of Stable Diffusion.
    """
    import diffusers

    library, name = named
    found = getattr(diffusers, name, None) if library == "diffusers" else None
    if library == "diffusers" and found is not None and name not in KNOWN:
        raise UnreadableFile(
            f"`{place}` names the scheduler {name[:100]}, which is none of Stable Diffusion: "
            f"{', '.join(KNOWN)}."
        )
    if found is None:
        return diffusers.DDIMScheduler, (
            "is not in this diffusers" if library == "diffusers" else "is no scheduler of diffusers"
        )
    if needs := getattr(found, "_backends", None):  # of the stand-in for what cannot be imported
        needs = ", ".join(n for n in needs if n != "torch")
        return diffusers.DDIMScheduler, f"cannot be imported here (pip install {needs})"
    return found, None
