"""One command, several runs: the subjects of a folder, the values of a sweep."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreamtune.config import STACKED, Config, having, plain_default
from dreamtune.configfile import from_mapping, read_yaml, signatures
from dreamtune.fields import nearest
from dreamtune.textfile import read_text

PROMPT_FILE, SETTINGS_FILE = "prompt.txt", "config.yaml"
OWN = having("own")  # what config.yaml in a subject's folder may set
SWEPT = having("swept")
# Folders that systems put beside those of the user: of a Mac's zip, Synology, Windows.
LITTER = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")


def expand(config: Config) -> dict[str, Config]:
    """Label (the run's folder in the common one) -> the config of the run alone.

    The words of a subject come from its folder: config.yaml (`OWN`), then prompt.txt (first line
    the instance prompt, second line the class prompt), then the common flags; captions beside the
    photos count as in a run alone. Raises ValueError for what cannot be read or swept.
    """
    common = {k: v for k, v in config.to_dict().items() if k not in STACKED}
    named: dict[str, dict[str, Any]] = {"": common}
    if config.subjects:
        named = {
            folder.name: {**common, **words(folder), "instance_data_dir": str(folder)}
            for folder in subject_folders(config.subjects)
        }
    methods, runs = signatures(), {}
    for label, (subject, chosen) in labels_of(config.sweep, list(named)).items():
        values, swept = named[subject], {n: value for n, (_, value) in chosen.items()}
        method = swept.get("method", values["method"])
        for n in swept:
            if n not in SWEPT and n not in methods.get(method, {}):
                known = (*SWEPT, *methods.get(method, {}))
                raise ValueError(
                    f"`{n}` cannot be swept.{nearest(n, known)} Only {', '.join(known)} can "
                    f"(with method {method})."
                )
        runs[label] = from_mapping({**values, **swept}, methods)
    return runs


Labelled = dict[str, tuple[str, dict[str, tuple[str, Any]]]]


def labelled(config: Config) -> Labelled:
    """Label -> (subject's folder name or "", name -> (value as written, value) of the sweep)."""
    found = [p.name for p in subject_folders(config.subjects)] if config.subjects else [""]
    return labels_of(config.sweep, found)


def labels_of(sweep: Sequence[str], subjects: Sequence[str]) -> Labelled:
    """The same of subjects' names. Raises ValueError for a name that is swept twice."""
    axes = [values_of(text) for text in sweep]
    names = [name for name, _ in axes]
    if repeated := [n for n in names if names.count(n) > 1]:
        raise ValueError(f"`sweep` names `{repeated[0]}` twice: put its values into one list.")
    found: Labelled = {}
    for subject in subjects:
        for combination in itertools.product(*(v for _, v in axes)):
            chosen = dict(zip(names, combination, strict=True))
            parts = [subject] if subject else []
            parts += [f"{n}={shown}" for n, (shown, _) in chosen.items()]
            found[",".join(parts)] = subject, chosen
    return found


def subject_folders(parent: str) -> list[Path]:
    root = Path(parent).expanduser()
    if not root.is_dir():
        raise ValueError(f"`subjects` {root} is not a folder.")
    inner = [p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    found = [p for p in inner if p.name not in LITTER]
    if not found:
        raise ValueError(
            f"`subjects` {root} holds no folder: the photos of each subject need one of their own."
        )
    return found


def words(folder: Path) -> dict[str, Any]:
    """The settings of one subject."""
    own: dict[str, Any] = {}
    if (folder / PROMPT_FILE).is_file():
        text = read_text(folder / PROMPT_FILE)
        lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
        if not 1 <= len(lines) <= 2:
            raise ValueError(
                f"`{folder / PROMPT_FILE}` must have one line, the prompt (for instance 'a sks "
                f"dog'), or two, the second the class prompt ('a dog'); it has {len(lines)}."
            )
        own = dict(zip(("instance_prompt", "class_prompt"), lines))
    if (folder / SETTINGS_FILE).is_file():
        settings = read_yaml(folder / SETTINGS_FILE)
        for name in settings:
            if name not in OWN:
                raise ValueError(
                    f"`{name}` in `{folder / SETTINGS_FILE}` cannot be a subject's own."
                    f"{nearest(name, OWN)} Only {', '.join(OWN)} can."
                )
        own |= settings
    return own


def values_of(text: str) -> tuple[str, list[tuple[str, Any]]]:
    """`seed=0,1` -> ("seed", [("0", 0), ("1", 1)])."""
    name, _, listed = text.partition("=")
    shown = [v.strip() for v in listed.split(",")]
    if not listed or not all(shown):
        raise ValueError(f"`sweep` must be NAME=VALUE,VALUE,..., got {text!r}.")
    if len(set(shown)) < len(shown):
        raise ValueError(f"`sweep` has a value twice: {text!r}.")
    return name.strip().lstrip("-"), [(v, number(v)) for v in shown]


def number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def in_folder(config: Config, folder: Path, resume: bool) -> Config:
    """The config with the run's own folder; it goes on from that folder's last checkpoint."""
    return dataclasses.replace(
        config,
        output_dir=str(folder),
        name=plain_default("name"),
        resume_from_checkpoint="latest" if resume else None,
    )
