"""Folders of photos as people have them -> pictures, and the captions beside them.

Every photo is decoded once, before any model is loaded, so that a broken file stops the run in the
first second.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from dreamtune.data.picture import MAX_BYTES, SUFFIXES, decode
from dreamtune.textfile import read_bytes, read_text

KOHYA = re.compile(r"(\d+)_(.+)")
MAX_REPEATS = 1000
CAPTIONS = (".txt", ".caption")  # the first is taken where both stand
HELD_OUT = "reference"  # folder beside the photos, of those that nothing is trained on
# Photos for `auto` to hold out one, or two: of fewer each is worth more in training.
ENOUGH = (6, 10)
# The short side that is kept of a photo: no scorer, and no base that we train, looks closer.
KEPT_SIDE = 1024


@dataclass(frozen=True)
class Photo:
    """One picture of a folder."""

    path: Path
    caption: str | None  # of its own .txt file
    folder_caption: str | None  # the words of a kohya folder
    repeats: int
    image: Image.Image = field(repr=False, compare=False)  # at most `side` of `read_folder`
    digest: str = field(repr=False)  # SHA-256 of the file

    @property
    def told(self) -> str:
        """A digest of what training takes from its surroundings: caption, folder, repeats."""
        values = [self.caption, self.folder_caption, self.repeats]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    @property
    def words(self) -> str | None:
        """What is said of it alone, without the prompt of all."""
        return self.caption or self.folder_caption


@dataclass(frozen=True)
class Folder:
    """The pictures of a folder and the names of what was left out. held_out: not to train on."""

    photos: list[Photo]
    skipped: list[str]
    held_out: list[Photo] = field(default_factory=list)

    def summary(self) -> str:
        text = f"{len(self.photos)} photo{'s' * (len(self.photos) != 1)}"
        if self.held_out:
            places = [p.path.parts[-2:] for p in self.held_out]
            names = listed(["/".join(p) if p[0] == HELD_OUT else p[1] for p in places])
            text += f", {len(self.held_out)} held out of training ({names})"
        if self.skipped:
            count = len(self.skipped)
            text += f", {count} other file{'s' * (count != 1)} skipped ({listed(self.skipped)})"
        return text


def listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def read_folder(folder: str | Path, need: int = 1, side: int = KEPT_SIDE) -> Folder:
    """The photos of a folder, by name: its own files and those of kohya folders (`10_sks dog/`).

    A `.txt` (or `.caption`) file beside a photo is its caption; `views` falls back on the prompt,
    then on the words of a kohya folder. Pictures in `reference/` are held out.

    Args:
        need: photos that there must be.
        side: a larger photo is kept with its short side at this many pixels.

    Raises ValueError for a folder that is missing or holds fewer than `need` photos, and, with its
    name, for an image or a caption that cannot be read.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise ValueError(f"the photo folder `{root}` {what}.")
    photos: list[Photo] = []
    skipped: list[str] = []
    places = photo_folders(root)
    for place, caption, repeats in places:
        found, others = read_files(place, caption, repeats, side)
        photos += found
        own = [root / HELD_OUT, *(opened for opened, _, _ in places)]
        others = [p for p in others if p not in own or not p.is_dir()]
        skipped += [p.relative_to(root).as_posix() + "/" * p.is_dir() for p in others]
    photos.sort(key=lambda p: p.path)
    held_out: list[Photo] = []
    if (root / HELD_OUT).is_dir():
        held_out, others = read_files(root / HELD_OUT, None, 1, side)
        skipped += [p.relative_to(root).as_posix() + "/" * p.is_dir() for p in others]
    if len(photos) < need:
        found_text = (
            f"it holds {len(skipped)} other files ({listed(skipped)})" if skipped else "it is empty"
        )
        raise ValueError(
            f"no photo in `{root}`: {found_text}. Looked for images ({', '.join(sorted(SUFFIXES))})"
            " in it and in folders named like `10_sks dog`."
        )
    return Folder(photos, sorted(skipped), held_out)


def hold_out(folder: Folder, asked: str) -> Folder:
    """The folder with `asked` more photos held out, as `chosen` says."""
    digests = chosen([p.digest for p in folder.photos], asked, bool(folder.held_out))
    kept = [p for p in folder.photos if p.digest not in digests]
    more = [p for p in folder.photos if p.digest in digests]
    return replace(folder, photos=kept, held_out=[*folder.held_out, *more])


def chosen(digests: Sequence[str], asked: str, others: bool = False) -> set[str]:
    """Which of a subject's photos are held out: the same whatever their files are called, and none
    that is there twice.

    Args:
        digests: of the photos.
        asked: how many; "auto": one of at least 6, two of at least 10, none if there are `others`.
        others: photos that are held out already.

    Raises ValueError where none would be left to train on.
    """
    if asked == "auto":
        count = 0 if others else sum(len(digests) >= enough for enough in ENOUGH)
    elif (count := int(asked)) and count >= len(digests):
        raise ValueError(
            f"`holdout` is {count}, and there are {len(digests)} photos: at least one must be left "
            "to train on."
        )
    single = sorted(digest for digest in digests if digests.count(digest) == 1)
    return set(single[:count])


def statement(photos: Sequence[Photo], held_out: Sequence[Photo] = ()) -> dict[str, list[str]]:
    """What a run keeps of its photos, to know them again: JSON values for its state."""
    found = {"photos": [p.digest for p in photos], "captions": [p.told for p in photos]}
    return {**found, "held_out": [p.digest for p in held_out]} if held_out else found


def changed(
    saved: Mapping[str, Any], photos: Sequence[Photo], held_out: Sequence[Photo] = ()
) -> str | None:
    """What is not as that `statement` has it, None if all is. Older runs keep no captions, and had
    no photo held out."""
    here = statement(photos, held_out)
    if saved["photos"] != here["photos"]:
        return "the photos"
    if "held_out" in saved and saved["held_out"] != here.get("held_out"):
        return "the photos held out"
    if "captions" not in saved or saved["captions"] == here["captions"]:
        return None
    told = zip(photos, saved["captions"], here["captions"])
    names = [photo.path.name for photo, was, now in told if was != now]
    return f"the captions (or repeats) of {listed(names)}"


def photo_folders(root: Path) -> list[tuple[Path, str | None, int]]:
    """The folder, and those in it that are named as kohya's scripts want it: each with the caption
    and the repeats of its photos. `0_...` is left out.

    Raises ValueError for more than MAX_REPEATS.
    """
    found: list[tuple[Path, str | None, int]] = [(root, None, 1)]
    for path in sorted(root.iterdir()):
        named = KOHYA.fullmatch(path.name)
        if not named or not path.is_dir() or not int(named[1]):
            continue
        if int(named[1]) > MAX_REPEATS:
            raise ValueError(
                f"the folder `{path}` asks for {named[1]} repeats of its photos, at most "
                f"{MAX_REPEATS} are made: rename it, for instance `10_{named[2]}`."
            )
        found.append((path, named[2].strip(), int(named[1])))
    return found


def is_picture_name(path: Path) -> bool:
    """Whether a file is meant as a picture: then it is one, or an error."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def read_files(
    folder: Path, caption: str | None, repeats: int, side: int
) -> tuple[list[Photo], list[Path]]:
    """The photos of one folder alone, and what is neither a photo nor the caption of one."""
    photos: list[Photo] = []
    others: list[Path] = []
    texts: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in CAPTIONS and not path.name.startswith(".") and not path.is_dir():
            texts.setdefault(path.stem, []).append(path)
            continue
        tried = not path.is_dir() and (is_picture_name(path) or bare(path))
        if tried and (found := read_picture(path, side)) is not None:
            photos.append(Photo(path, None, caption, repeats, *found))
        else:
            others.append(path)
    stems = {photo.path.stem for photo in photos}
    others += [p for stem, paths in texts.items() if stem not in stems for p in paths]
    own = {stem: read_caption(paths) for stem, paths in texts.items() if stem in stems}
    return [replace(photo, caption=own.get(photo.path.stem)) for photo in photos], others


def bare(path: Path) -> bool:
    return not path.suffix and not path.name.startswith(".")


def read_picture(path: Path, side: int) -> tuple[Image.Image, str] | None:
    """The picture and its file's digest; None for a file without a suffix that is no picture:
    somebody's notes.

    Raises ValueError that names the file.
    """
    try:
        data = read_bytes(path, MAX_BYTES)
        return decode(data, side), hashlib.sha256(data).hexdigest()
    except ValueError as error:
        if bare(path):
            return None
        hint = " Convert it to JPEG or PNG." if path.suffix.lower() in (".heic", ".heif") else ""
        raise ValueError(f"cannot read the image `{path}`: {error}.{hint}") from None


def read_caption(paths: list[Path]) -> str | None:
    first = min(paths, key=lambda p: (CAPTIONS.index(p.suffix.lower()), p.suffix not in CAPTIONS))
    return " ".join(read_text(first).split()) or None
