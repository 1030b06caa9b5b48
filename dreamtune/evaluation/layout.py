"""Folders of generated images and of photos, as `dreamtune score` reads them.

IMAGES/<subject>/<prompt>/<seed>.png            <prompt>: the words, also a_red_fox; or prompt.txt
IMAGES/<subject>/unrelated/<prompt>/<seed>.png  prompts that do not name the subject
IMAGES/<subject>/<prompt>/masks/<seed>.png      white where the subject is
PHOTOS/<subject>/*.jpg                          what was trained on
PHOTOS/<subject>/reference/*.jpg                held out of training; <name>.txt: a caption
PHOTOS/<subject>/masks/<name>.png, reference/masks/<name>.png
PHOTOS/<subject>/prompt.txt                     "a sks dog", and the class prompt below it
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dreamtune.data.photos import HELD_OUT, chosen, is_picture_name, listed
from dreamtune.data.picture import MAX_BYTES, SUFFIXES
from dreamtune.data.words import SubjectWords, in_all, read_words
from dreamtune.metrics.store import Picture
from dreamtune.textfile import read_bytes, read_text

UNRELATED, MASKS, PROMPT = "unrelated", "masks", "prompt.txt"
LAYOUT = __doc__.split("\n\n", 1)[1].rstrip()  # for --help


@dataclass(frozen=True)
class Generated:
    """One generated image. seed: a whole number where the file is named by one, else its name."""

    subject: str
    prompt: str
    seed: int | str
    picture: Picture
    unrelated: bool = False

    @property
    def key(self) -> tuple[str, str, int | str, bool]:
        """What pairs it with one of another method."""
        return self.subject, self.prompt, self.seed, self.unrelated


@dataclass(frozen=True)
class Photos:
    """A subject's photos; captions of the held-out ones; its words where prompt.txt tells them."""

    name: str
    photos: list[Picture]
    held_out: list[Picture] = field(default_factory=list)
    captions: list[str | None] = field(default_factory=list)
    words: SubjectWords | None = None


@dataclass(frozen=True)
class Found:
    """What folders hold. skipped: what else is in them, by name."""

    images: list[Generated]
    skipped: list[str]


def read_images(folder: str | Path) -> Found:
    """The generated images of a folder, by subject, prompt and seed.

    Raises ValueError that names the place: no such folder, a subject or a prompt without an image,
    a prompt that is not said, two of one wording, or two images of one name.
    """
    root = existing(Path(folder).expanduser(), "image folder")
    images: list[Generated] = []
    skipped: list[str] = []
    for subject in folders(root):
        found = prompts_of(root, subject, subject.name, False, skipped)
        if (subject / UNRELATED).is_dir():
            found += prompts_of(root, subject / UNRELATED, subject.name, True, skipped)
        if not any(not image.unrelated for image in found):
            raise ValueError(
                f"the subject folder `{subject}` holds no image: they belong into a folder a "
                f"prompt, `{subject.name}/<prompt>/<seed>.png`. Fill it, or take it away."
            )
        images += found
    skipped += rest_of(root, root, folders(root))
    if not images:
        raise ValueError(f"`{root}` holds no subject folder. It must look like this:\n{LAYOUT}")
    return Found(images, skipped)


def prompts_of(
    root: Path, place: Path, subject: str, unrelated: bool, skipped: list[str]
) -> list[Generated]:
    """The images of the prompt folders in a place."""
    images: list[Generated] = []
    known: dict[str, Path] = {}
    if pictures := [p for p in files(place) if is_picture_name(p)]:
        raise ValueError(
            f"`{pictures[0]}` ({len(pictures)} in all) lies in no prompt folder, so its prompt is "
            f"not said: move it to `{place.name}/<prompt>/`."
        )
    skipped += rest_of(root, place, [*folders(place), place / PROMPT])
    for folder in folders(place):
        if folder.name == UNRELATED and not unrelated:
            continue
        prompt = prompt_of(folder)
        if prompt in known:
            raise ValueError(f"`{known[prompt]}` and `{folder}` are of one prompt, `{prompt}`.")
        known[prompt] = folder
        found, others = pictures_of(root, folder)
        skipped += [name for name in others if Path(name).name != PROMPT]
        if not found:
            raise ValueError(f"the prompt folder `{folder}` holds no image.")
        for picture in found:
            stem = picture.path.stem
            seed = int(stem) if stem.isascii() and stem.isdigit() else stem
            if seed in (i.seed for i in images if i.prompt == prompt):
                raise ValueError(
                    f"two images of seed {seed} in `{folder}`, `{picture.path.name}` is one: "
                    "which is meant? Rename one."
                )
            images.append(Generated(subject, prompt, seed, picture, unrelated))
    return sorted(images, key=lambda i: (i.prompt, str(i.seed).rjust(20)))


def prompt_of(folder: Path) -> str:
    """Raises ValueError where nothing says the prompt: a number, and a number with a word, such as
    prompt_01, are names."""
    file = folder / PROMPT
    said = file.is_file()
    text = " ".join((read_text(file) if said else spaced(folder.name)).split())
    words = [word for word in text.split() if any(c.isalpha() for c in word)]
    numbered = any(c.isdigit() for c in text) and len(words) < 2
    if not text or (not said and (not words or numbered)):
        where = f"`{file}` is empty" if said else f"`{folder.name}` is no prompt"
        raise ValueError(
            f"the prompt of `{folder}` is missing: {where}. Write it into `{PROMPT}` in that "
            "folder, or name the folder by it."
        )
    if "{}" in text:
        raise ValueError(f"the prompt of `{folder}` has {{}} in it: write the subject's words.")
    return text


def spaced(name: str) -> str:
    """a_red_fox: a red fox."""
    return name if " " in name else name.replace("_", " ")


def read_photos(
    folder: str | Path, identifier: str | None = None
) -> tuple[dict[str, Photos], list[str]]:
    """Photos by subject, and the names of files that are none. identifier: see `read_subject`.

    Raises ValueError that names the place: no such folder, a subject without a photo.
    """
    root = existing(Path(folder).expanduser(), "photo folder")
    skipped = rest_of(root, root, folders(root))
    found = {}
    for place in folders(root):
        subject = read_subject(place, root, skipped, identifier)
        found[subject.name] = subject
    if not found:
        raise ValueError(f"`{root}` holds no subject folder. It must look like this:\n{LAYOUT}")
    return found, skipped


def read_subject(
    place: Path,
    root: Path | None = None,
    skipped: list[str] | None = None,
    identifier: str | None = None,
) -> Photos:
    """One subject's folder of photos. identifier: the rare word of its prompt.txt, where it stands
    there. Raises ValueError where the folder holds no photo."""
    root = root or place.parent
    photos, others = pictures_of(root, place, (MASKS, HELD_OUT))
    if not photos:
        raise ValueError(f"the subject folder `{place}` holds no photo. Fill it, or take it away.")
    held_out: list[Picture] = []
    captions: list[str | None] = []
    if (place / HELD_OUT).is_dir():
        held_out, more = pictures_of(root, place / HELD_OUT)
        captions = [caption_of(picture.path) for picture in held_out]
        others += more
    if skipped is not None:
        skipped += [n for n in others if not n.endswith(".txt")]
    return Photos(place.name, photos, held_out, captions, words_of(place, identifier))


def check_identifier(identifier: str, found: Found, photos: Mapping[str, Photos]) -> None:
    """Raises ValueError for one that would change nothing."""
    said = {
        image.subject: photos[image.subject].words
        for image in found.images
        if image.subject in photos
    }
    asked = [i.prompt for i in found.images if said.get(i.subject) is None]
    names = {words.identifier.casefold() for words in said.values() if words is not None}
    wanted = " ".join(identifier.split())
    if wanted.casefold() in names or any(in_all(wanted, [prompt]) for prompt in asked):
        return
    where = f"the `{PROMPT}` of any subject" if names else "any prompt"
    if names and asked:
        where += ", nor in a prompt of the others"
    told = f"; those files say {', '.join(f'`{n}`' for n in sorted(names)[:5])}" if names else ""
    raise ValueError(
        f"--identifier `{identifier}` is not in {where}, so it would change nothing{told}: "
        "leave it out, or correct it."
    )


def without(photos: Photos, asked: str) -> Photos:
    """The photos as a run with that `holdout` had them: what it held out is not what it saw."""
    digests = chosen([p.digest for p in photos.photos], asked, bool(photos.held_out))
    more = [p for p in photos.photos if p.digest in digests]
    return replace(
        photos,
        photos=[p for p in photos.photos if p.digest not in digests],
        held_out=[*photos.held_out, *more],
        captions=[*photos.captions, *(caption_of(p.path) for p in more)],
    )


def words_of(place: Path, identifier: str | None = None) -> SubjectWords | None:
    """From prompt.txt, as for training: the prompt, and the class prompt in a second line.
    identifier: the rare word, if it is in that prompt; subjects may have others."""
    if not (place / PROMPT).is_file():
        return None
    lines = [line.strip() for line in read_text(place / PROMPT).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"`{place / PROMPT}` is empty: it holds the prompt, such as `a sks dog`.")
    own = identifier if identifier and in_all(identifier, lines[:1]) else None
    return read_words(lines[0], lines[1] if len(lines) > 1 else None, own)


def caption_of(photo: Path) -> str | None:
    file = photo.with_suffix(".txt")
    return " ".join(read_text(file).split()) or None if file.is_file() else None


def pictures_of(
    root: Path, folder: Path, inner: Sequence[str] = (MASKS,)
) -> tuple[list[Picture], list[str]]:
    """The pictures of one folder alone with their masks, and the names of what else is in it.
    inner: folders in it that are read on their own.

    Raises ValueError for two of one name, such as 0.png and 0.jpg, and for a mask without one.
    """
    paths, place, masks = named_pictures(folder), folder / MASKS, {}
    others = rest_of(root, folder, [*paths, *(p for p in folders(folder) if p.name in inner)])
    if place.is_dir():
        covers = named_pictures(place)
        masks = {p.stem: read_file(root, p) for p in covers}
        if alone := sorted(masks.keys() - {p.stem for p in paths}):
            raise ValueError(
                f"`{place}` has masks without a picture in `{folder.name}`: {listed(alone)}. Name "
                "each like its picture."
            )
        others += rest_of(root, place, covers)
    return [read_file(root, p, masks.get(p.stem)) for p in paths], others


def named_pictures(folder: Path) -> list[Path]:
    paths = [p for p in files(folder) if is_picture_name(p)]
    stems = [p.stem for p in paths]
    if twice := next((s for s in stems if stems.count(s) > 1), None):
        names = " and ".join(f"`{p.name}`" for p in paths if p.stem == twice)
        raise ValueError(f"{names} in `{folder}` have one name: which is meant? Rename one.")
    return paths


def rest_of(root: Path, place: Path, read: Iterable[Path]) -> list[str]:
    """Names of what is in a place beside what is read: files, of hidden ones pictures alone, and
    folders, by the pictures in them where there are any."""
    found: list[str] = []
    for path in sorted(set(place.iterdir()) - set(read)):
        name = path.relative_to(root).as_posix()
        if path.is_dir():
            below = sorted(Path(where) / n for where, _, names in os.walk(path) for n in names)
            pictures = [p.relative_to(root).as_posix() for p in below if is_picture_file(p.name)]
            found += pictures or ([f"{name}/"] if visible(path) else [])
        elif visible(path) or is_picture_file(path.name):
            found.append(name)
    return found


def is_picture_file(name: str) -> bool:
    """Also of a hidden file; but `._1.png` is what a Mac keeps beside 1.png, and no picture."""
    return Path(name).suffix.lower() in SUFFIXES and not name.startswith("._")


def read_file(root: Path, path: Path, mask: Picture | None = None) -> Picture:
    try:
        digest = hashlib.sha256(read_bytes(path, MAX_BYTES)).hexdigest()
    except ValueError as error:
        raise ValueError(f"cannot read the image `{path}`: {error}.") from None
    return Picture(path, path.relative_to(root).as_posix(), digest, mask)


def existing(root: Path, what: str) -> Path:
    if not root.is_dir():
        how = "is a file, not a folder" if root.exists() else "does not exist"
        raise ValueError(f"the {what} `{root}` {how}.")
    return root


def visible(path: Path) -> bool:
    return not path.name.startswith(".")


def folders(place: Path) -> Sequence[Path]:
    return [p for p in sorted(place.iterdir()) if p.is_dir() and visible(p)]


def files(place: Path) -> Sequence[Path]:
    return [p for p in sorted(place.iterdir()) if not p.is_dir() and visible(p)]
