"""Protocols: all that must be said for two numbers of one name to mean the same.

DreamBooth's paper names the encoder DINO ViT-S/16 and little else, and those that follow it filled
the gaps in differently: CLIP L/14 gives far lower text scores than B/32, and one code reports
2.5 max(cosine, 0), another 100 cosine, where a third reports the cosine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dreamtune.configfile import parse_yaml
from dreamtune.evaluation.statistics import Averaging
from dreamtune.fields import (
    AtLeast0,
    Count,
    Pixels,
    Share,
    UnreadableFile,
    checker,
    from_file,
    nearest,
)
from dreamtune.metrics.preprocess import Resizing
from dreamtune.textfile import read_text

TextScore = Literal["cosine", "2.5 max(cosine, 0)", "100 cosine"]


@dataclass(frozen=True)
class Encoder:
    """An extractor's weights. architecture: what those that are loaded must have, by the names of
    the extractor's own protocol; empty for any. resizing: None for the encoder's own."""

    weights: str
    architecture: Mapping[str, Any] = field(default_factory=dict)
    resizing: Resizing | None = None


@dataclass(frozen=True)
class Protocol:
    """One way to score.

    Args:
        name, about: for people.
        metrics: keys of the table of metrics.
        encoders: by extractor.
        averaging: how images become one number, see `statistics.weights`.
        text_score: what a prompt metric reports of a cosine.
        identifier: whether the text encoder is asked with the rare word in the prompt.
        prompts: templates, or a list by name: "live", "object", "dreambooth" (which of the two, by
            the class), "embedded", or "ours" (of the embedded base its own, else DreamBooth's).
        images_per_prompt: seeds first_seed, first_seed + 1, ... of each prompt.
        unrelated: prompts that do not name the subject, for drift: "ours", or a list; () for none.
        sampling: settings of `Sampling` that images are made with, instead of the run's or base's.
    """

    name: str
    about: str
    metrics: tuple[str, ...]
    encoders: Mapping[str, Encoder]
    averaging: Averaging = "pairs"
    text_score: TextScore = "cosine"
    identifier: Literal["removed", "kept"] = "removed"
    prompts: str | tuple[str, ...] = "dreambooth"
    images_per_prompt: int = 4
    first_seed: int = 0
    unrelated: str | tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def statement(self) -> dict[str, Any]:
        """As plain data, what a result says of it."""
        found = dataclasses.asdict(self)
        for encoder in found["encoders"].values():
            if encoder["resizing"] is not None:
                encoder["resizing"] = encoder["resizing"]._asdict()
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}


VITS16 = {"model_type": "vit", "width": 384, "layers": 12, "patch": 16}
B32 = {"width": 768, "layers": 12, "patch": 32}
DINO_S16 = Encoder("facebook/dino-vits16", VITS16)
CLIP_B32 = Encoder("ViT-B-32:openai", B32)
THREE = ("dino", "clip_i", "clip_t")
SQUASHED, CROPPED = Resizing("squash", 224, 224), Resizing("shortest", 256, 224)

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "dreamtune",
            "ours: held-out photos, memorisation, retrieval, diversity and drift beside the usual "
            "three; each subject counts the same; any encoders, which the result names",
            (
                *THREE, "dino_held_out", "dino_nearest", "dino_retrieval", "dino_diversity",
                "dino_drift", "masked_dino", "masked_clip_t",
            ),
            {"dino": Encoder("facebook/dino-vits16"), "clip": Encoder("ViT-B-32:openai")},
            averaging="subjects",
            prompts="ours",
            unrelated="ours",
        ),
        Protocol(
            "paper",
            "DreamBooth, arXiv 2208.12242; it does not say which CLIP: B/32 fits its numbers",
            THREE,
            {"dino": DINO_S16, "clip": CLIP_B32},
        ),
        Protocol(
            "oft",
            "the code of OFT, arXiv 2306.07280, which ETHER and DeLoRA follow: CLIP L/14, pictures "
            "squashed to 224",
            THREE,
            {
                "dino": dataclasses.replace(DINO_S16, resizing=SQUASHED),
                "clip": Encoder(
                    "ViT-L-14:openai", {"width": 1024, "layers": 24, "patch": 14}, SQUASHED
                ),
            },
        ),
        Protocol(
            "customconcept101",
            "CustomConcept101, arXiv 2212.04488: a mean over subjects, 2.5 max(cosine, 0) for text",
            THREE,
            {
                "dino": dataclasses.replace(DINO_S16, resizing=CROPPED),
                "clip": dataclasses.replace(CLIP_B32, resizing=CROPPED),
            },
            averaging="subjects",
            text_score="2.5 max(cosine, 0)",
        ),
        Protocol(
            "dreambench_plus",
            "the offline scores of DreamBench++, arXiv 2406.16855: DINO S/8, 100 cosine for text",
            THREE,
            {
                "dino": Encoder("facebook/dino-vits8", {**VITS16, "patch": 8}),
                "clip": CLIP_B32,
            },
            averaging="images",
            text_score="100 cosine",
        ),
        Protocol(
            "peft_image",
            "PEFT's image benchmark: DINOv2-base, each image with the held-out photo whose caption "
            "is its prompt, and drift of unrelated prompts",
            ("dinov2_own_photo", "dinov2_drift"),
            {
                "dinov2": Encoder(
                    "facebook/dinov2-base",
                    {"model_type": "dinov2", "width": 768, "layers": 12, "patch": 14},
                )
            },
            averaging="images",
            images_per_prompt=3,
            unrelated="ours",
        ),
    )
}  # fmt: skip

Words = list[str]
_FILE = checker(
    {
        "name": str,
        "about": str,
        "like": Literal[tuple(PROTOCOLS)],
        "metrics": Words,
        "encoders": dict[str, Any],
        "averaging": Averaging,
        "text_score": TextScore,
        "identifier": Literal["removed", "kept"],
        "prompts": str | Words,
        "images_per_prompt": Annotated[int, Field(ge=1, le=1000)],
        "first_seed": Annotated[int, Field(ge=0, lt=1 << 62)],
        "unrelated": str | Words,
        "sampling": dict[str, Any],
    },
    others=True,
)
_SAMPLING = checker(
    {
        "sampler": Literal["base", "dpm++"],
        "steps": Count,
        "guidance_scale": AtLeast0,
        "guidance_rescale": Share,
        "size": Pixels,
    }
)
_ENCODER = checker(
    {"weights": str, "architecture": dict[str, Any], "resizing": dict[str, Any]}, others=True
)
_RESIZING = checker(
    {
        "mode": Literal["shortest", "squash"],
        "resize": Annotated[int, Field(ge=1, le=4096)],
        "crop": Annotated[int, Field(ge=1, le=4096)],
    },
    needed=("mode", "resize", "crop"),
)
KEYS = {
    "file": ("like", *Protocol.__dataclass_fields__),
    "encoder": tuple(Encoder.__dataclass_fields__),
}
PROMPT_LISTS = ("ours", "dreambooth", "live", "object", "embedded")


def find_protocol(name: str | Path) -> Protocol:
    """A preset by name, or one from a YAML or JSON file.

    A file starts from the preset that its `like` names (dreamtune), and has a name of its own.

    Raises:
        ValueError: no such preset or file, an unknown key, or a value that does not fit.
    """
    if str(name) in PROTOCOLS:
        return PROTOCOLS[str(name)]
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(
            f"unknown protocol `{name}`.{nearest(str(name), PROTOCOLS)} There are "
            f"{', '.join(PROTOCOLS)}; or give a YAML or JSON file."
        )
    place = f"`{path}`"
    values = from_file(_FILE, parse_yaml(read_text(path), place) or {}, place)
    check_keys(values, KEYS["file"], place)
    own = values.get("name") or path.stem
    if own in PROTOCOLS:
        raise UnreadableFile(
            f"{place}: `name` is `{own}`, a preset: a changed protocol needs its own."
        )
    if "sampling" in values:
        values["sampling"] = from_file(_SAMPLING, values["sampling"], f"{place}, `sampling`")
    start = PROTOCOLS[values.pop("like", "dreamtune")]
    encoders = dict(start.encoders)
    for kind, said in values.pop("encoders", {}).items():
        encoders[kind] = encoder_of(said, encoders.get(kind), f"{place}, `encoders`, `{kind}`")
    changes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    changes |= {"name": own, "encoders": encoders}
    found = dataclasses.replace(start, **changes)
    return checked(found, place)


def encoder_of(said: Any, start: Encoder | None, place: str) -> Encoder:
    values = from_file(_ENCODER, said, place)
    check_keys(values, KEYS["encoder"], place)
    if start is None and "weights" not in values:
        raise UnreadableFile(f"{place}: `weights` is missing.")
    if "resizing" in values:
        sizes = from_file(_RESIZING, values["resizing"], f"{place}, `resizing`")
        values["resizing"] = Resizing(**sizes)
    if start is not None and values.get("weights", start.weights) != start.weights:
        values.setdefault("architecture", {})  # that of the preset is of other weights
    return dataclasses.replace(start, **values) if start else Encoder(**values)


def checked(protocol: Protocol, place: str) -> Protocol:
    """Without encoders that no metric of it uses. Raises UnreadableFile for a metric or a list of
    prompts that is not there, or a metric without its encoder."""
    from dreamtune.metrics import find_metrics

    try:
        metrics = find_metrics(protocol.metrics)
    except ValueError as error:
        raise UnreadableFile(f"{place}: {error}") from None
    needed = dict.fromkeys(metric.extractor.name for metric in metrics)
    for name in needed:
        if name not in protocol.encoders:
            raise UnreadableFile(f"{place}: its metrics need the encoder `{name}` in `encoders`.")
    if isinstance(protocol.prompts, str) and protocol.prompts not in PROMPT_LISTS:
        raise UnreadableFile(
            f"{place}: `prompts` must be one of {', '.join(PROMPT_LISTS)}, or a list of prompts, "
            f"got `{protocol.prompts}`."
        )
    if isinstance(protocol.unrelated, str) and protocol.unrelated != "ours":
        raise UnreadableFile(
            f"{place}: `unrelated` must be ours, or a list of prompts, got `{protocol.unrelated}`."
        )
    encoders = {n: e for n, e in protocol.encoders.items() if n in needed}
    return dataclasses.replace(protocol, encoders=encoders)


def check_keys(values: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    if unknown := [key for key in values if key not in known]:
        raise UnreadableFile(
            f"{place}: `{unknown[0]}` is not known.{nearest(unknown[0], known)} There are "
            f"{', '.join(known)}."
        )


def check_encoders(protocol: Protocol, loaded: Mapping[str, Mapping[str, Any]]) -> None:
    """loaded: by extractor, the protocol of what was loaded. Raises ValueError where it is not what
    the protocol asks for."""
    for name, encoder in protocol.encoders.items():
        has = loaded[name].get("architecture", {})
        if wrong := {k: v for k, v in encoder.architecture.items() if has.get(k) != v}:
            there = ", ".join(f"{k} {has.get(k)}" for k in wrong)
            asked = ", ".join(f"{k} {v}" for k, v in wrong.items())
            raise ValueError(
                f"protocol `{protocol.name}` scores with `{encoder.weights}` ({asked}); the {name} "
                f"`{loaded[name].get('model')}` has {there}. Name a folder of those weights with "
                f"--{name}, or take --protocol dreamtune, which takes any and says which."
            )
