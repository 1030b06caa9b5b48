"""Names of scorers: what they load, how result files call them, and errors that say what to do."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dreamtune.embedded import CLIP, DINO
from dreamtune.fields import UnreadableFile, nearest
from dreamtune.models.folder import hub_answers
from dreamtune.models.weights import reason_of

EMBEDDED = "embedded"
PACKAGED = {"dino": DINO, "clip": CLIP}


def place_of(kind: str, name: str) -> str:
    """What the libraries load: the package's own folder for "embedded", else the name itself.

    kind: name of the extractor.
    """
    return str(PACKAGED[kind]) if name == EMBEDDED and kind in PACKAGED else name


def clip_arguments(name: str) -> dict[str, Any]:
    """Arguments of `open_clip.create_model_from_pretrained` for a name as in `Clip`.

    Weights that were trained with QuickGELU get it: open_clip 3 only warns when architecture and
    tag disagree (`ViT-B-32` with `openai` does), and the features are then wrong.
    """
    import open_clip

    name = place_of("clip", name)
    if (Path(name) / "open_clip_config.json").is_file():
        return {"model_name": f"local-dir:{name}"}
    if name.startswith(("local-dir:", "hf-hub:")):
        return {"model_name": name}
    architecture, _, tag = name.partition(":")
    tag = tag or "openai"
    if architecture not in open_clip.list_models():
        near = nearest(architecture, open_clip.list_models())
        raise ValueError(
            f"unknown CLIP `{name}`: not a folder with open_clip_config.json, not `local-dir:` or "
            f"`hf-hub:`, and no open_clip architecture.{near}"
        )
    arguments: dict[str, Any] = {"model_name": architecture, "pretrained": tag}
    known = open_clip.pretrained.get_pretrained_cfg(architecture, tag)
    if not known and not Path(tag).is_file():
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        raise ValueError(f"CLIP `{architecture}` has no weights `{tag}`; it has {', '.join(tags)}")
    if known.get("quick_gelu") or architecture.endswith("-quickgelu"):
        arguments["force_quick_gelu"] = True
    return arguments


def public_name(name: str) -> str:
    """The name as a result file may carry it: a folder by its last part, never a path; the
    package's own scorers as "embedded", whichever way they were named."""
    prefix, separator, rest = name.rpartition(":")
    if Path(rest).resolve() in PACKAGED.values():
        return EMBEDDED
    if Path(rest).exists() or prefix == "local-dir":
        rest = Path(rest).resolve().name
    return prefix + separator + rest


@contextmanager
def cache_if_unreachable(name: str) -> Iterator[None]:
    """Hub libraries read their cache alone where the hub cannot be reached.

    Left to themselves they retry each file for half a minute, with warnings. `name` that is local
    asks nobody.
    """
    import huggingface_hub.constants

    local = name.startswith("local-dir:") or Path(name).exists()
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    level = logging.root.level
    try:
        huggingface_hub.constants.HF_HUB_OFFLINE = before or (not local and not hub_answers())
        # open_clip logs the failure that the caller turns into an error of its own.
        logging.root.setLevel(logging.CRITICAL)
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before
        logging.root.setLevel(level)


@contextmanager
def offline(extractors: Collection[str]) -> Iterator[None]:
    """Nothing is fetched for these extractors, whose weights nobody named; an error says how to."""
    import huggingface_hub.constants

    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = before or bool(extractors)
    try:
        yield
    except ValueError as error:
        if extractors and not before:
            names = " and ".join(f"--{name}" for name in sorted(extractors))
            said = f"{error} Nothing is downloaded that was not named: give {names}."
            raise type(error)(said) from None
        raise
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def check_local(kind: str, name: str, flag: str, example: str) -> None:
    """Raises ValueError for a name that is no folder: what is not there is not downloaded."""
    if not Path(name).is_dir():
        raise ValueError(
            f"{kind} loads from a folder on this machine, and `{name}` is none: download the model "
            f"once (`hf download {example} --local-dir FOLDER`) and name it with --{flag} FOLDER."
        )


def cannot_load(kind: str, name: str, flag: str, example: str, error: Exception) -> ValueError:
    """What to do where nothing loads by a name; an error over what a file holds says it already."""
    if isinstance(error, UnreadableFile):
        return UnreadableFile(f"cannot load {kind} `{name}`: {error}")
    reason = reason_of(error)
    return ValueError(
        f"cannot load {kind} `{name}`: it is neither a usable folder nor in the local cache, and "
        f"it could not be fetched. Run once with network (a hub id such as `{example}` is then "
        "cached; HF_HOME says where), copy that cache to this machine, or name a folder with "
        f"`{flag} <folder>`. `{flag} embedded` uses the small scorer in the package, whose numbers "
        f"compare with nothing published. Cause: {reason}"
    )
