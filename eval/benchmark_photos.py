"""The photos of a benchmark's subjects: which files of a folder are taken, whether they can be
read, and a fingerprint to know them again."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from dreamtune.data.photos import HELD_OUT, KEPT_SIDE, is_picture_name, read_files
from dreamtune.data.picture import MAX_BYTES, SUFFIXES
from dreamtune.evaluation.layout import PROMPT, named_pictures
from dreamtune.files.tensors import hash_of_json
from dreamtune.textfile import contents


def places_of(folder: Path) -> list[Path]:
    """The folder of a subject, and that of its reference photos where there is one."""
    return [place for place in (folder, folder / HELD_OUT) if place.is_dir()]


def files_of(folder: Path) -> list[Path]:
    """What is taken of a subject's folder: photos, reference photos and the texts beside them, but
    not its prompt, which the benchmark words."""
    return [
        path
        for place in places_of(folder)
        for path in sorted(place.iterdir())
        if (is_picture_name(path) or path.suffix == ".txt")
        and not path.is_dir()
        and path != folder / PROMPT
    ]


def fingerprint(folder: Path) -> str:
    """SHA-256 of what is taken of a subject's folder: relative names and bytes. Raises ValueError
    that names a file that cannot be read."""
    return hash_of_json({
        path.relative_to(folder).as_posix(): hashlib.sha256(contents(path, MAX_BYTES)).hexdigest()
        for path in files_of(folder)
    })  # fmt: skip


def first_other(was: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The first subject whose fingerprints differ."""
    return next(name for name in {**was, **now} if was.get(name) != now.get(name))


def check_photos(folder: Path) -> None:
    """Decodes the photos and the captions of a subject. Raises ValueError that names the file, or
    the folder where it holds no photo."""
    if not named_pictures(folder):
        raise ValueError(
            f"no photo in `{folder}`: looked for images ({', '.join(sorted(SUFFIXES))}). Put some "
            "there, or leave the subject out by --only."
        )
    for place in places_of(folder):
        named_pictures(place)
        read_files(place, None, 1, KEPT_SIDE)


def copy_photos(folder: Path, target: Path) -> None:
    """Raises ValueError where the target holds files of another start."""
    for path in files_of(folder):
        copy = target / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    if fingerprint(target) != fingerprint(folder):
        raise ValueError(
            f"`{target}` holds other photos or texts than `{folder}`: a start that was cut off may "
            "have left them. Take the folder away, or name another --work."
        )
