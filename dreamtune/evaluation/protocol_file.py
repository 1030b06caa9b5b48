"""A protocol by name, or from a YAML or JSON file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dreamtune.configfile import parse_yaml
from dreamtune.evaluation.prompts import CAPTIONS
from dreamtune.evaluation.protocols import PROTOCOLS, Encoder, Protocol, TextScore
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
from dreamtune.metrics import find_metrics
from dreamtune.metrics.preprocess import Resizing
from dreamtune.textfile import read_text

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
PROMPT_LISTS = ("ours", "dreambooth", "live", "object", "embedded", CAPTIONS)


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
    values.setdefault("about", f"of `{path.name}`, which starts from {start.name}")
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
