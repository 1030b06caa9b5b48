"""A README.md beside an exported file: what it is, how to use it, what its run made."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dreamtune.config import EMBEDDED
from dreamtune.files.find import run_of
from dreamtune.files.formats import Change, ExportFormat
from dreamtune.files.header import trigger
from dreamtune.files.lora import cut_in_words
from dreamtune.files.tensors import hash_of_json
from dreamtune.files.whole import whole
from dreamtune.version import __version__

CARD = "README.md"


def write_card(
    place: Path, target: ExportFormat, change: Change, held: str, source: Path | None
) -> str:
    """Writes it where there is none, with copies of the run's samples, and says so.

    place: the exported file or folder. source: the adapter's file, None where there is none.
    """
    folder = place if place.is_dir() else place.parent
    path = folder / CARD
    if os.path.lexists(path):
        return f"`{path}` is there and stays as it is."
    pictures = _pictures(folder, change, source)
    with whole(path) as partial:
        partial.write_text(text_of(place, target, change, held, pictures), encoding="utf-8")
    return f"`{path}` says how to use it."


def text_of(
    place: Path, target: ExportFormat, change: Change, held: str, pictures: Mapping[str, str]
) -> str:
    """pictures: what is seen -> file beside the card."""
    metadata, method = change.about["metadata"], change.about["exported_from"]
    base, prompt = metadata.get("base"), trigger(metadata)
    front: dict[str, Any] = {
        "tags": ["text-to-image", "dreamtune", method],
        "library_name": "diffusers",
    }
    if isinstance(base, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        front["base_model"] = base
    if prompt:
        front["instance_prompt"] = prompt
    header = yaml.safe_dump(front, sort_keys=True, allow_unicode=True, width=10**6)
    of_base = f" of {_code(base)}" if isinstance(base, str) else ""
    prints = change.about["fingerprint"]
    known = f" Fingerprint of the base's {len(prints)} adapted layers: " if prints else ""
    parts = [
        f"---\n{header}---",
        f"# {_code(change.title)}",
        f"An adapter{of_base}, trained by the method {_code(method)} with dreamtune, written as"
        f" {held} by dreamtune {__version__}.{known}{_code(_digest(prints)) if prints else ''}",
        *([f"Prompt of training: {_code(prompt)}"] if prompt else []),
        cut_in_words(change.about["cut"]) if "cut" in change.about else "",
        _scores(metadata),
        *(f"![{words}]({file})\n\n*{words}*" for words, file in pictures.items()),
        f"## Use\n\n```python\n{_with_pipe(target.usage(place, change), base)}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _with_pipe(usage: str, base: Any) -> str:
    """With the base's pipeline made before it, where it is used."""
    if "pipe." not in usage and "(pipe" not in usage:
        return usage
    known = isinstance(base, str) and "/" in base
    name = repr(base if known else base or "BASE")
    more, note = "", "" if known else "  # the folder or hub id of the base"
    if base == EMBEDDED:
        more, name, note = "from dreamtune import embedded\n", "embedded.MODEL", ""
    made = f"pipe = DiffusionPipeline.from_pretrained({name}){note}"
    return f"from diffusers import DiffusionPipeline\n{more}\n{made}\n{usage}"


def _digest(prints: Mapping[str, Any]) -> str:
    return hash_of_json(prints)[:12]


def _scores(metadata: Mapping[str, Any]) -> str:
    scores = metadata.get("scores")
    numbers = {
        name: value
        for name, value in (scores.items() if isinstance(scores, dict) else ())
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    if not numbers:
        return ""
    step = metadata.get("step")
    rows = "\n".join(f"| {_code(name)} | {value:.4f} |" for name, value in numbers.items())
    return f"Scores{f' at step {step}' if step is not None else ''}:\n\n| | |\n|---|---|\n{rows}"


def _pictures(folder: Path, change: Change, source: Path | None) -> dict[str, str]:
    """Copies the samples of the base and of this step from the run's folder, over nothing."""
    run, step = run_of(source) if source else None, change.about["metadata"].get("step")
    found: dict[str, str] = {}
    if run is None or not isinstance(step, int):
        return found
    for number, words in {0: "The base", step: f"Step {step}"}.items():
        picture = run / "samples" / f"{number:06d}.png"
        copy = folder / f"{change.title}-{number:06d}.png"
        if not picture.is_file() or os.path.lexists(copy):
            continue
        with whole(copy) as partial:
            shutil.copyfile(picture, partial)
        found[words] = copy.name
    return found


def _code(value: Any) -> str:
    """Somebody's text as text: a line, and no markup."""
    text = "".join(c if c.isprintable() else " " for c in str(value)).replace("`", "'")
    return f"`{text}`"
