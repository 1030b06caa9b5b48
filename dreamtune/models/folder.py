"""The files of a model: a diffusers folder of this machine, or of a hub id in the hub's cache."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import torch

from dreamtune.fields import UnreadableFile
from dreamtune.models.rules import INDEX, Rules, read_config
from dreamtune.models.weights import (
    STEMS,
    check_complete,
    check_shards,
    choose,
    kinds_of,
    read_by_library,
)

VARIANT = re.compile(r"[\w-][\w.-]*")  # it becomes a part of file names


def looks_like_a_path(name: str) -> bool:
    return (
        name.startswith(("/", ".", "~"))
        or name.count("/") != 1
        or name.endswith((".safetensors", ".ckpt"))
    )


@dataclass
class ModelFolder:
    """Where the parts of a model are, each in a folder of its name.

    Attributes:
        name: as the user gave it; messages say it. A part named "" is the folder itself.
        path: on this machine.
        variant: of the weights, None for the plain ones or the only ones.
        notes: what was assumed or chosen while reading, for the user.
    """

    name: str
    path: Path
    variant: str | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def open(
        cls, name: str, revision: str | None, variant: str | None, parts: Collection[str]
    ) -> ModelFolder:
        """Fetches the files of a hub id, those of `parts` alone.

        Raises ValueError for a variant that is no part of a file's name, one that no part has, and
        a hub id that cannot be had.
        """
        if variant is not None and not VARIANT.fullmatch(variant):
            raise ValueError(
                f"`variant` must be a part of a file's name such as fp16, got {variant!r}."
            )
        path = Path(name)
        found = cls(
            name, path if path.is_dir() else fetched(name, revision, variant, parts), variant
        )
        weighty = {p: found.names(p) for p in parts if kinds_of(found.names(p))}
        if variant and weighty and not any(has(n, variant) for n in weighty.values()):
            part, names = next(iter(weighty.items()))
            choose(names, variant, found.place(part))
        return found

    def place(self, part: str, file: str = "") -> str:
        """What messages call it."""
        return "/".join(p for p in (self.name.rstrip("/"), part, file) if p)

    def names(self, part: str) -> list[str]:
        folder = self.path / part
        return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []

    def index(self) -> dict[str, Any]:
        """model_index.json. Raises UnreadableFile."""
        path = self.path / "model_index.json"
        if not path.is_file():
            raise UnreadableFile(
                f"`{self.name}` has no model_index.json: it is not a diffusers model folder."
            )
        return read_config(path, INDEX, self.place("", path.name))

    def config(self, part: str, schema: Rules, file: str = "config.json") -> dict[str, Any]:
        return read_config(self.path / part / file, schema, self.place(part, file))

    def load(self, part: str, kind: Any, dtype: torch.dtype, **options: Any) -> Any:
        """A part's module by diffusers' or transformers' own loader, every weight from the file.

        options: of its `from_pretrained`. Raises UnreadableFile that names the part.
        """
        place, folder, names = self.place(part), self.path / part, self.names(part)
        if "adapter_config.json" in names:
            raise UnreadableFile(
                f"`{place}` holds an adapter (adapter_config.json), which transformers puts on "
                "another model: merge it and save the whole, or take its files out."
            )
        plain = self.variant if has(names, self.variant) else None
        weights = choose(names, plain, place)
        check_shards(folder, place)
        if weights.variant != self.variant:
            said = f"`{place}` has no other weights than its variant `{weights.variant}`"
            if self.variant:
                said = f"`{place}` has no variant `{self.variant}`; its plain weights"
            self.notes.append(f"{said}: read.")
        if not weights.safetensors:
            self.notes.append(
                f"`{place}` has no .safetensors file: its .bin is read, tensors alone."
            )
        with read_by_library(place):
            module, info = kind.from_pretrained(
                str(folder),
                torch_dtype=dtype,
                variant=weights.variant,
                use_safetensors=weights.safetensors,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
        if note := check_complete(place, module, info):
            self.notes.append(note)
        return module


def has(names: Collection[str], variant: str | None) -> bool:
    return any(k.variant == variant for k in kinds_of(names))


def fetched(name: str, revision: str | None, variant: str | None, parts: Collection[str]) -> Path:
    """The folder of a hub id in the hub's cache, with all that is needed of it.

    What is there is taken as it is where the hub cannot be reached. Raises ValueError.
    """
    with explained(name):
        from huggingface_hub import constants, hf_hub_download, list_repo_files, snapshot_download

        def cached() -> Path:
            first = "model_index.json" if any(parts) else "config.json"
            file = hf_hub_download(name, first, revision=revision, local_files_only=True)
            return Path(file).parent

        if constants.HF_HUB_OFFLINE or not hub_answers():
            return cached()
        try:
            names = list_repo_files(name, revision=revision)
        except hub_errors():
            with contextlib.suppress(*hub_errors()):
                return cached()
            raise
        wanted = needed(name, names, variant, parts)
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))


def needed(
    name: str, names: Collection[str], variant: str | None, parts: Collection[str]
) -> list[str]:
    """Of a repository's files: the settings of the parts, and one set of weights of each."""
    found = [n for n in names if n == "model_index.json"]
    for part in parts:
        inside = f"{part}/" if part else ""
        own = [n.name for n in map(PurePosixPath, names) if f"{n.parent}/" == (inside or "./")]
        found += [inside + n for n in own if n.endswith((".json", ".txt", ".jinja"))]
        if not kinds_of(own):
            continue
        chosen = choose(own, variant if has(own, variant) else None, f"{name}/{inside}")
        suffix = ".safetensors" if chosen.safetensors else ".bin"
        mark = f".{chosen.variant}" if chosen.variant else ""
        found += [
            inside + n
            for n in own
            if re.match(STEMS, n)
            and n.endswith(suffix)
            and (mark in n if mark else n.count(".") == 1)
        ]
    return found


@lru_cache(maxsize=1)
def hub_answers() -> bool:
    """Whether the hub can be reached: asked once, as its client retries for half a minute before it
    gives up.
    """
    if any(os.environ.get(k) for k in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # only the client knows how to get out through a proxy
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=5).close()
    except OSError:
        return False
    return True


def hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises. Its errors of the network are its HTTP client's own, which are
    OSErrors with `requests` alone; those before huggingface_hub 1.0 are ValueErrors as well.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    network = [kind for kind in HfHubHTTPError.__mro__[1:] if kind.__name__ == "HTTPError"]
    return (OSError, RuntimeError, HFValidationError, *network)


@contextlib.contextmanager
def explained(source: str) -> Iterator[None]:
    """What the hub's client raises over a hub id -> a ValueError that says what to do."""
    try:
        yield
    except hub_errors() as error:
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
