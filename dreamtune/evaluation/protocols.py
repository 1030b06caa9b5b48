"""Protocols: all that must be said for two numbers of one name to mean the same.

DreamBooth's paper names the encoder DINO ViT-S/16 and little else, and those that follow it filled
the gaps in differently: CLIP L/14 gives far lower text scores than B/32, and one code reports
2.5 max(cosine, 0), another 100 cosine, where a third reports the cosine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dreamtune.evaluation.prompts import CAPTIONS
from dreamtune.evaluation.statistics import Averaging
from dreamtune.metrics.preprocess import Resizing

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
            the class), "embedded", "ours" (of the embedded base its own, else DreamBooth's), or
            "captions" (those of the subject's held-out photos, as they stand).
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
            "PEFT's image benchmark: DINOv2-base, images of the captions of the held-out photos, "
            "each with the photo of its caption, and drift of unrelated prompts",
            ("dinov2_own_photo", "dinov2_drift"),
            {
                "dinov2": Encoder(
                    "facebook/dinov2-base",
                    {"model_type": "dinov2", "width": 768, "layers": 12, "patch": 14},
                )
            },
            averaging="images",
            prompts=CAPTIONS,
            images_per_prompt=3,
            unrelated="ours",
        ),
    )
}  # fmt: skip


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
