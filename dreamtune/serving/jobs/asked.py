"""What a client asks to be trained, checked before anything is written or started."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from PIL import Image

from dreamtune.config import STACKED, Config, plain_default
from dreamtune.configfile import absolute, from_mapping, signatures
from dreamtune.data.photos import KEPT_SIDE
from dreamtune.data.picture import check_size, decode, opened
from dreamtune.data.words import SubjectWords, read_words
from dreamtune.fields import shown

# By the format that a picture is in, whatever its file was called.
SUFFIX = {
    "JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp",
    "TIFF": ".tif", "AVIF": ".avif", "JPEG2000": ".jp2", "PPM": ".ppm", "TGA": ".tga",
}  # fmt: skip
NAME = re.compile("[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
ASKED = ("class_prompt", "identifier", "method", "max_train_steps", "seed", "learning_rate")
OF_METHOD = ("options", "learning_rate")  # what the server set of them is for its own method
PLACES = ("instance_data_dir", "output_dir", "class_data_dir", "resume_from_checkpoint", "name")
SHOWN_NAME = 60  # characters of a client's file name in a message


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many may wait.

    photo_bytes: of one file; pixels: of one picture; body_bytes: of the whole request; prompt:
    characters; steps: of training; waiting: jobs that are not running yet; wave: jobs of one wave.
    """

    photos: int = 32
    photo_bytes: int = 32 << 20
    pixels: int = 100_000_000
    body_bytes: int = 128 << 20
    prompt: int = 300
    steps: int = 4000
    waiting: int = 64
    wave: int = 16

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"the limit `{name}` must be at least 1, got {value!r}.")


Files = Sequence[tuple[str, bytes]]  # file name of the client, contents


def photo(data: bytes, limits: Limits, side: int = KEPT_SIDE) -> tuple[Image.Image, str, str]:
    """A picture as training sees it, its size as it came ("800 x 600"), and a suffix for its file.

    Raises ValueError with the reason alone.
    """
    if len(data) > limits.photo_bytes:
        raise ValueError(
            f"it has {len(data):,} bytes, at most {limits.photo_bytes:,} are taken; save it smaller"
        )
    if not data:
        raise ValueError("the file is empty")
    image = opened(data)
    check_size(image)
    width, height = image.size
    if width * height > limits.pixels:
        raise ValueError(
            f"it has {width * height / 1e6:.0f} megapixels, at most {limits.pixels / 1e6:.0f} are "
            "taken; make it smaller"
        )
    suffix = SUFFIX[image.format or ""]
    return decode(data, side), f"{width} x {height}", suffix


def photo_files(files: Files, limits: Limits) -> dict[str, bytes]:
    """Name on our disk, a number and a suffix, -> contents. Raises ValueError that names every
    picture that cannot be trained on.
    """
    check_count(len(files), limits)
    found: dict[str, bytes] = {}
    problems: list[str] = []
    for number, (name, data) in enumerate(files, 1):
        try:
            _, _, suffix = photo(data, limits)
            found[f"{number:03d}{suffix}"] = data
        except ValueError as error:
            problems.append(f"photo {number} ({client_name(name)}): {error}.")
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(files)} photos cannot be trained on: {' '.join(problems)}"
        )
    return found


def check_count(count: int, limits: Limits) -> None:
    if not 1 <= count <= limits.photos:
        raise ValueError(
            f"`photos` must be 1 to {limits.photos} pictures, got {count}: "
            + ("send at least one." if not count else "leave some out.")
        )


def client_name(name: str) -> str:
    """A file name for a message, of bounded length and without what steers a terminal."""
    last = PurePath(name.replace("\\", "/")).name
    return "".join(c if c.isprintable() else "?" for c in last)[:SHOWN_NAME] or "no name"


def one_line(field: str, text: str, limits: Limits) -> str:
    """A prompt with its spaces made plain."""
    text = " ".join(text.split())
    if not text or len(text) > limits.prompt or not text.isprintable():
        raise ValueError(
            f"`{field}` must be 1 to {limits.prompt} printable characters, for instance 'a sks "
            f"dog', got {len(text)}: {shown(text)}."
        )
    return text


def subject_words(prompt: str, more: Mapping[str, Any], limits: Limits) -> SubjectWords:
    """Identifier and class noun of what is asked; more: `class_prompt`, `identifier` where given.

    Raises ValueError where they cannot be told.
    """
    given = {
        name: one_line(name, str(value), limits)
        for name in ("class_prompt", "identifier")
        if (value := more.get(name)) is not None
    }
    return read_words(one_line("prompt", prompt, limits), **given)


def settings(
    base: str, common: Mapping[str, Any], asked: Mapping[str, Any], limits: Limits
) -> dict[str, Any]:
    """The settings of a run, those that are not at their default; without its folders.

    common: what the server set for all; asked: `instance_prompt`, and of `ASKED` what a client did.

    Raises ValueError for what cannot be trained.
    """
    from dreamtune.adapters import find_method, resolve_options

    if unknown := sorted({*asked} - {*ASKED, "instance_prompt"}):
        raise ValueError(f"`{unknown[0]}` cannot be asked for. Only {', '.join(ASKED)} can.")
    default = plain_default("method")
    asked = {k: v for k, v in asked.items() if v is not None}
    values = {k: v for k, v in common.items() if k not in (*STACKED, *PLACES)}
    if asked.get("method", values.get("method", default)) != values.get("method", default):
        values = {k: v for k, v in values.items() if k not in OF_METHOD}
    values |= {**asked, "pretrained_model_name_or_path": base}
    config = from_mapping({**values, "instance_data_dir": "."}, signatures())
    resolve_options(find_method(config.method), config.options)
    if config.max_train_steps is not None and config.max_train_steps > limits.steps:
        raise ValueError(
            f"`max_train_steps` must be at most {limits.steps}, got {config.max_train_steps}."
        )
    kept = {**absolute(config).to_dict(), "instance_data_dir": None}
    stated = ("pretrained_model_name_or_path", "method", "seed")
    return {k: v for k, v in kept.items() if k in stated or v != plain_default(k)}


def config_of(settings: Mapping[str, Any], photos: str, run: str) -> Config:
    """The run of a job: begun, or gone on with from its last whole checkpoint."""
    places = {"instance_data_dir": photos, "output_dir": run, "resume_from_checkpoint": "latest"}
    return from_mapping({**settings, **places}, signatures())


def adapter_name(name: str | None, words: SubjectWords, id: str, taken: Collection[str]) -> str:
    """The name that the adapter is served by. It is never a path.

    Raises ValueError for one that is malformed or taken.
    """
    used = {other.casefold() for other in taken}
    if name is None:
        noun = re.sub("[^A-Za-z0-9]+", "-", words.class_noun).strip("-")[:40] or "subject"
        short = f"{noun}-{id[:6]}"
        return short if short.casefold() not in used else f"{noun}-{id}"
    if not NAME.fullmatch(name):
        raise ValueError(
            "`name` must be 1 to 64 letters, digits, - and _, the first a letter or a digit, got "
            f"{shown(name)}."
        )
    if name.casefold() in used:
        raise ValueError(f"`name` {name} is taken: name another, or leave it out.")
    return name
