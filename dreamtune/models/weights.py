"""Which files of a folder hold a part's weights, and that each weight came from them."""

from __future__ import annotations

import contextlib
import pickle
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dreamtune.fields import UnreadableFile, checker, from_file
from dreamtune.textfile import read_json

# diffusers' name, transformers' two
STEMS = r"(?:diffusion_pytorch_model|pytorch_model|model)"
SHARD = re.compile(r"-\d{5}-of-\d{5}")
SINGLE = re.compile(rf"{STEMS}(?:\.(?P<variant>[^.]+))?\.(?P<suffix>safetensors|bin)")
INDEX = re.compile(rf"{STEMS}\.(?P<suffix>safetensors|bin)\.index(?:\.(?P<variant>[^.]+))?\.json")
SHARDS = checker({"weight_map": dict[str, str]}, needed=["weight_map"], others=True)
MAX_INDEX = 1 << 24  # bytes; a line a tensor
LISTED = 3  # names in a message


class Weights(NamedTuple):
    """One of the sets of weights that a folder may hold for the same part."""

    variant: str | None
    safetensors: bool


def kinds_of(names: Iterable[str]) -> set[Weights]:
    """The sets of weights among the names of a folder's files."""
    found = set()
    for name in names:
        match = INDEX.fullmatch(name) or (
            SINGLE.fullmatch(name) if not SHARD.search(name) else None
        )
        if match:
            found.add(Weights(match["variant"], match["suffix"] == "safetensors"))
    return found


def choose(names: Iterable[str], variant: str | None, place: str) -> Weights:
    """The set that is read: of the variant asked for, else the plain one, else the only variant
    there is; tensors alone before a pickle. Raises ValueError where that leaves none, or several.
    """
    kinds = kinds_of(names)
    variants = sorted({k.variant for k in kinds if k.variant})
    if variant is None and variants and not any(k.variant is None for k in kinds):
        if len(variants) > 1:
            flags = ", ".join(f"--variant {v}" for v in variants)
            raise ValueError(f"`{place}` has variants of its weights only: choose one by {flags}.")
        variant = variants[0]
    fitting = [k for k in kinds if k.variant == variant]
    if not fitting:
        if variant is not None and kinds:
            there = f"it has {', '.join(variants)}" if variants else "there are plain weights only"
            raise ValueError(f"`{place}` has no variant `{variant}` of its weights: {there}.")
        raise ValueError(
            f"`{place}` has no weights: no .safetensors or .bin file by the names that diffusers "
            "and transformers give them."
        )
    return max(fitting, key=lambda k: k.safetensors)


def check_shards(folder: Path, place: str) -> None:
    """An index of shards names files beside it: the libraries follow it wherever it points.

    Raises UnreadableFile.
    """
    for path in sorted(folder.iterdir()):
        match = INDEX.fullmatch(path.name)
        if not match:
            continue
        where = f"`{place}/{path.name}`"
        index = from_file(SHARDS, read_json(path, MAX_INDEX), where)
        for name in sorted(set(index["weight_map"].values())):
            if Path(name).name != name or not name.endswith(f".{match['suffix']}"):
                raise UnreadableFile(
                    f"{where} must name .{match['suffix']} files beside it, got `{name[:100]}`."
                )
            if not (folder / name).is_file():
                raise UnreadableFile(f"{where} names `{name}`, which is not there.")


@contextlib.contextmanager
def read_by_library(place: str) -> Iterator[None]:
    """What a library raises over a file's contents, as an UnreadableFile that names the place: of
    whatever type, its checks are not made for reading.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, UnreadableFile):
        raise
    except Exception as error:
        raise UnreadableFile(f"`{place}` could not be loaded: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """In a line: the message, and of what says little without it the type."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, pickle.UnpicklingError):
            return (
                "its .bin file is damaged or holds more than tensors, which could run code when it "
                "is read. Convert it to .safetensors where you trust it."
            )
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(error).split())
    text = text if len(text) <= 400 else f"{text[:400]}..."
    return (
        text
        if text and isinstance(error, (OSError, ValueError))
        else (f"{type(error).__name__}: {text}")
    )


def unfilled(module: torch.nn.Module) -> list[str]:
    """Parameters and buffers that never got a value."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [name for name, t in tensors if t.device.type == "meta"]


def check_complete(place: str, module: torch.nn.Module, info: Mapping[str, Any] = {}) -> str | None:
    """That no weight is missing; a note where the file has layers that the config has not.

    info: what the library found, its `output_loading_info`. Raises UnreadableFile that names part
    and weights.
    """
    names = [str(n) for n in info.get("missing_keys", ())] + unfilled(module)
    names += [str(n[0] if isinstance(n, tuple) else n) for n in info.get("mismatched_keys", ())]
    extra = sorted(map(str, info.get("unexpected_keys", ())))
    if missing := list(dict.fromkeys(sorted(names))):
        raise lacking(place, type(module).__name__, missing, extra)
    own = {shape_of_name(n) for n in module.state_dict()}
    if unused := [n for n in extra if shape_of_name(n) in own]:
        return (
            f"`{place}`: its file has layers that its config.json has not, which are left out: "
            f"{listed(unused)}."
        )
    return None


def lacking(
    place: str, kind: str, missing: Collection[str], extra: Collection[str] = ()
) -> UnreadableFile:
    instead = f"; it has names that belong to no layer, {listed(extra)}" if extra else ""
    return UnreadableFile(
        f"`{place}` lacks weights of the {kind}: {listed(missing)}{instead}. The file is "
        "incomplete or of another layout; get it anew, or convert it."
    )


def shape_of_name(name: str) -> str:
    """A tensor's name without the numbers of layers, as all versions of transformers have it."""
    return re.sub(r"\d+", "#", name.removeprefix("text_model."))


def listed(names: Collection[str]) -> str:
    shown = ", ".join(f"`{name[:150]}`" for name in list(names)[:LISTED])
    return shown if len(names) <= LISTED else f"{shown} and {len(names) - LISTED} more"
