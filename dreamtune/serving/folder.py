"""The adapters of a folder by name, and those that cannot be served."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dreamtune.fields import one_part
from dreamtune.files.formats import PICKLES

TAKEN = "another adapter of this folder has that name: rename one"
NO_NAME = "its name has letters that are not printed: rename it"
SUFFIXES = (".safetensors", *PICKLES)


@dataclass
class Folder:
    """Attributes:
    paths: name (of a file without its suffix, or of a folder) -> what may be an adapter.
    left_out: file or folder -> why it is not.
    others: files of other kinds, which nobody takes for an adapter.
    """

    paths: dict[str, Path] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)


def look(folder: Path) -> Folder:
    """What is in it, by name, hidden files aside. No file is read. Raises ValueError where it is no
    folder.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"the folder of adapters `{folder}` {what}.")
    found = Folder()
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if not path.is_dir() and path.suffix not in SUFFIXES:
            found.others.append(path.name)
            continue
        name = path.name if path.is_dir() else path.stem
        if not one_part(name):
            found.left_out[repr(path.name)] = NO_NAME
        elif name in found.paths:
            found.left_out[path.name] = TAKEN
        else:
            found.paths[name] = path
    return found
