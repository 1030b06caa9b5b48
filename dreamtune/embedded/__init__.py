"""What ships with the package: a small base model, its two scorers, and subjects to try it on.

    from dreamtune import embedded
    pipe = StableDiffusionPipeline.from_pretrained(embedded.MODEL)
    embedded.subject("fox-3d").photos       # paths

Trained on emoji pictures: it shows that the tools work, and its numbers compare with nothing else.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
MODEL = ROOT / "model"
CLIP = ROOT / "clip"
DINO = ROOT / "dino"
SUBJECTS = ROOT / "subjects"


@dataclass(frozen=True)
class Subject:
    """One entry of subjects.json. `split` is "dev" (tune on it) or "report" (report on it)."""

    id: str
    class_word: str
    concept: str
    style: str
    category: str
    split: str
    identifier: str

    @property
    def folder(self) -> Path:
        """Photos to train on, each with its caption in a .txt of the same name."""
        return SUBJECTS / self.id

    @property
    def photos(self) -> list[Path]:
        return sorted(self.folder.glob("*.jpg"))

    @property
    def captions(self) -> list[str]:
        """In the order of `photos`."""
        return [photo.with_suffix(".txt").read_text().strip() for photo in self.photos]

    @property
    def references(self) -> list[Path]:
        """Photos held out of training."""
        return sorted((self.folder / "reference").glob("*.jpg"))

    @property
    def name(self) -> str:
        """Identifier and class word, what fills the {} of a prompt: "sks fox"."""
        return f"{self.identifier} {self.class_word}"


def subjects(split: str | None = None) -> list[Subject]:
    """All subjects in the order of the file, or those of one split."""
    registry = _registry()
    fields = ("id", "class_word", "concept", "style", "category", "split")
    entries = [{field: entry[field] for field in fields} for entry in registry["subjects"]]
    found = [Subject(**entry, identifier=registry["identifier"]) for entry in entries]
    return [subject for subject in found if split is None or subject.split == split]


def subject(id: str | None = None) -> Subject:
    """The subject of that id, by default the one the package was set to.

    Raises:
        ValueError: no such subject.
    """
    known = {entry.id: entry for entry in subjects()}
    id = _registry()["default"] if id is None else id
    if id not in known:
        near = ", ".join(f"`{name}`" for name in difflib.get_close_matches(id, known, 3))
        hint = f"Did you mean {near}?" if near else f"There are {', '.join(known)}."
        raise ValueError(f"no embedded subject `{id}`. {hint}")
    return known[id]


def prompts() -> list[str]:
    """Prompt templates with {} for the subject."""
    return list(_registry()["prompts"])


@cache
def _registry() -> dict[str, Any]:
    path = ROOT / "subjects.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {key: found[key] for key in ("subjects", "default", "identifier", "prompts")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"dreamtune/embedded/subjects.json of this installation is missing or damaged "
            f"({type(error).__name__}): reinstall dreamtune."
        ) from None
