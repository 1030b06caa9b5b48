"""What training would see of photos and a prompt, before anything is asked for."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Mapping
from typing import Any

from dreamtune.config import EMBEDDED, Config
from dreamtune.data.views import square
from dreamtune.data.words import validation_prompts
from dreamtune.serving.jobs.asked import (
    Files,
    Limits,
    check_count,
    client_name,
    photo,
    subject_words,
)
from dreamtune.training.defaults import templates_of

SIDE = 192  # pixels of a crop that is shown


def crops(files: Files, limits: Limits, checking: threading.Lock) -> list[dict[str, Any]]:
    """Of each photo {"name", "size", "crop"}, the square that is trained on as a PNG in base64; or
    {"name", "error"}. checking: held meanwhile, for one request's pictures are decoded at a time.

    Raises ValueError for too many photos, or none.
    """
    check_count(len(files), limits)
    with checking:
        return [crop(name, data, limits) for name, data in files]


def crop(name: str, data: bytes, limits: Limits) -> dict[str, Any]:
    shown: dict[str, Any] = {"name": client_name(name)}
    try:
        image, size, _ = photo(data, limits)
    except ValueError as error:
        return {**shown, "error": str(error)}
    buffer = io.BytesIO()
    square(image, SIDE)[0].save(buffer, "PNG")
    return {**shown, "size": size, "crop": base64.b64encode(buffer.getvalue()).decode()}


def words(
    prompt: str, more: Mapping[str, Any], common: Mapping[str, Any], limits: Limits
) -> dict[str, Any]:
    """{"identifier", "class_noun", "summary", "first_prompt", "plain_prompt"} as `dreamtune train`
    prints them, or {"error"}. common: the server's settings of runs.
    """
    try:
        subject = subject_words(prompt, more, limits)
    except ValueError as error:
        return {"error": str(error)}
    config = Config(validation_prompt=list(common.get("validation_prompt", [])))
    ours = common["pretrained_model_name_or_path"] == EMBEDDED
    prompts, plain = validation_prompts(subject, templates_of(config, ours)[:1], 1)
    return {
        "identifier": subject.identifier,
        "class_noun": subject.class_noun,
        "summary": subject.summary(),
        "first_prompt": prompts[0],
        "plain_prompt": plain[0],
    }
