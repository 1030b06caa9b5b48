"""Features on disk, by what a picture's file holds and all that its features depend on: a second
scoring of the same pictures decodes and encodes nothing.

Files of up to 64 rows, in a folder an extractor: a file a picture would cost a disk more than most
encoders cost a GPU. What cannot be read is a miss, what cannot be written is not kept.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dreamtune.files.tensors import hash_of_json
from dreamtune.files.whole import whole
from dreamtune.metrics.extractor import Extractor

PLACE, LIMIT = "DREAMTUNE_CACHE", "DREAMTUNE_CACHE_MB"
OFF = "off"
DEFAULT_MB = 512  # MiB; 200,000 pictures of both usual encoders
WIDEST = 1 << 13  # rows of more numbers (LPIPS) cost more to read than to make again
SUFFIX = ".safetensors"

Key = tuple[str, str]  # of `Picture.key`


class Kept(NamedTuple):
    """A row (D,), and what was seen of its picture: "black", "plain" or ""."""

    row: Tensor
    look: str


def place() -> Path | None:
    """The folder: what DREAMTUNE_CACHE says, else in the user's cache; None for "off"."""
    named = os.environ.get(PLACE)
    if named == OFF:
        return None
    if named:
        return Path(named).expanduser()
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "dreamtune" / "features"


def limit() -> int:
    """Bytes. Raises ValueError for a limit that is none."""
    text = os.environ.get(LIMIT, str(DEFAULT_MB))
    if not text.isdecimal():
        raise ValueError(f"{LIMIT} must be a whole number of MiB, got {text!r}.")
    return int(text) << 20


class FeatureCache:
    """Rows of one extractor."""

    def __init__(self, root: Path, extractor: Extractor) -> None:
        depends = {
            "name": extractor.name,
            "protocol": extractor.protocol,
            # other kernels give other last digits
            "device": str(getattr(extractor, "device", "cpu")).partition(":")[0],
            # rows of before may be of stretched masks, or say nothing of what those show
            "masks": "of their picture's size, looked at",
            "versions": {n: version(n) for n in ("torch", "pillow", *extractor.libraries)},
        }
        self.folder = root / hash_of_json(depends)[:32]

    def find(self, keys: Iterable[Key]) -> dict[Key, Kept]:
        """Those of the keys that are there; their files count as used."""
        wanted, found = {name_of(key): key for key in keys}, {}
        for path in files(self.folder):
            with contextlib.suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
                looks = file.metadata() or {}
                for name in wanted.keys() & set(file.keys()):
                    row = file.get_tensor(name)
                    if row.dim() == 1 and row.dtype == torch.float32 and row.isfinite().all():
                        found[wanted[name]] = Kept(row, looks.get(name, ""))
                        os.utime(path)
        return found

    def keep(self, rows: Mapping[Key, Tensor], looks: Mapping[str, str]) -> None:
        """looks: by what a file holds, of those that are black or plain. The row of a part has that
        of the mask."""
        kept = {name_of(k): row.contiguous() for k, row in rows.items() if len(row) <= WIDEST}
        if not kept:
            return
        seen = {name_of(k): looks[file] for k in rows if (file := looked_at(k)) in looks}
        with (
            contextlib.suppress(OSError, SafetensorError),
            whole(self.folder / f"{hash_of_json(sorted(kept))[:32]}{SUFFIX}") as partial,
        ):
            save_file(kept, partial, seen or None)


def looked_at(key: Key) -> str:
    """The digest of what a row's look is of: its mask, where it is of a part."""
    return key[1].split()[-1] if key[1] else key[0]


def name_of(key: Key) -> str:
    return " ".join(part for part in key if part)


def files(folder: Path) -> Iterator[Path]:
    """Ours in a folder, which may not be there."""
    with contextlib.suppress(OSError):
        yield from sorted(p for p in folder.iterdir() if ours(p))


def ours(path: Path) -> bool:
    stem = path.name.removesuffix(SUFFIX)
    return path.suffix == SUFFIX and len(stem) == 32 and path.is_file() and not path.is_symlink()


def all_files(root: Path) -> list[tuple[float, int, Path]]:
    """(last used, bytes, path) of every file of ours, the oldest first."""
    found = []
    with contextlib.suppress(OSError):
        for folder in sorted(p for p in root.iterdir() if p.is_dir() and len(p.name) == 32):
            for path in files(folder):
                with contextlib.suppress(OSError):
                    facts = path.stat()
                    found.append((facts.st_mtime, facts.st_size, path))
    return sorted(found)


def trim(root: Path, most: int) -> int:
    """Removes what was not used for longest, until at most so many bytes are left; returns how many
    were removed."""
    known = all_files(root)
    left, removed = sum(size for _, size, _ in known), 0
    for _, size, path in known:
        if left - removed <= most:
            break
        with contextlib.suppress(OSError):
            path.unlink()
            removed += size
    for folder in {path.parent for _, _, path in known}:
        with contextlib.suppress(OSError):  # one that still holds something
            folder.rmdir()
    return removed
