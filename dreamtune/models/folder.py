"""The parts of a model from a diffusers folder or the hub, and errors that say what to do."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch


def looks_like_a_path(name: str) -> bool:
    return (
        name.startswith(("/", ".", "~"))
        or name.count("/") != 1
        or name.endswith((".safetensors", ".ckpt"))
    )


def load_part(
    part: Any,
    place: str,
    source: str,
    revision: str | None,
    variant: str | None,
    dtype: torch.dtype,
) -> torch.nn.Module:
    """A network alone, of the class `part`: from `place` in a model's folder or hub id, or from a
    folder that holds nothing else. Raises ValueError where there is none.
    """
    folder = Path(source)
    if folder.is_dir():
        inner = place if (folder / place / "config.json").is_file() else ""
        config = folder / inner / "config.json"
        kind = json.loads(config.read_text()).get("_class_name") if config.is_file() else None
        if kind != part.__name__:
            raise ValueError(
                f"`{source}` holds no {part.__name__}: its config.json must be in it or in its "
                f"{place}/, got {kind}."
            )
        place = inner
    with explained(source):
        network: torch.nn.Module = part.from_pretrained(
            source, subfolder=place, torch_dtype=dtype, **hub_options(revision, variant)
        )
        return network


def hub_options(revision: str | None, variant: str | None = None) -> dict[str, Any]:
    """Of `from_pretrained`: what is given, and no waiting for a hub that does not answer."""
    given = {"revision": revision, "variant": variant}
    return {k: v for k, v in given.items() if v} | {"local_files_only": not hub_answers()}


def read_index(source: str, revision: str | None = None) -> dict[str, Any]:
    """model_index.json of a folder or a hub id."""
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(
                f"`{source}` has no model_index.json: it is not a diffusers model folder."
            )
        return dict(json.loads((folder / "model_index.json").read_text()))
    from huggingface_hub import hf_hub_download

    with explained(source):
        file = hf_hub_download(
            source, "model_index.json", revision=revision, local_files_only=not hub_answers()
        )
        return dict(json.loads(Path(file).read_text()))


@lru_cache(maxsize=1)
def hub_answers() -> bool:
    """Whether the hub can be reached: asked once, as its client retries for half a minute before it
    gives up.
    """
    if any(os.environ.get(k) for k in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # only the client knows how to get out through a proxy
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def explained(source: str) -> Iterator[None]:
    """Loading errors of libraries -> a ValueError that says what to do."""
    try:
        yield
    # hub and network errors are OSErrors; before huggingface_hub 1.0 ValueErrors as well, so first
    except (OSError, RuntimeError) as error:
        if Path(source).is_dir():
            raise ValueError(f"`{source}` could not be loaded: {error}") from error
        reason = str(error).strip().split("\n")[0]
        offline = (
            " HF_HUB_OFFLINE is set."
            if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
            else ""
        )
        raise ValueError(
            f"`{source}` is not a folder or file here, and could not be had from the hub "
            f"({type(error).__name__}: {reason}).{offline} With network: check the name, and "
            f"`hf auth login` for a gated model. Without: run `hf download {source} --local-dir "
            "FOLDER` where there is one and give that FOLDER, or a single .safetensors file, or "
            "set HF_HOME to a cache that holds it; `embedded` needs no download."
        ) from error
    except ValueError as error:
        if Path(source).is_dir() or "model_index" in str(error):
            raise ValueError(f"`{source}` could not be loaded: {error}") from error
        raise
