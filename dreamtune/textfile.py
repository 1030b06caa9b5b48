"""Files that people make: regular ones of a bounded size only, and text in the encoding that its
first bytes tell.
"""

from __future__ import annotations

import codecs
import json
import stat
from pathlib import Path
from typing import Any

from dreamtune.fields import UnreadableFile

MAX_TEXT = 1 << 18  # bytes; captions, prompts and settings are far below
# UTF-32's mark begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_bytes(path: Path, limit: int) -> bytes:
    """The contents of a regular file of at most `limit` bytes.

    Raises ValueError without opening what is none: reading a pipe or a device may never end. The
    message is the reason alone, for a sentence that names the file.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"it is {KINDS.get(stat.S_IFMT(found.st_mode), 'not a file')}")
        if found.st_size <= limit:
            with path.open("rb") as file:
                data = file.read(limit + 1)
            if len(data) <= limit:
                return data
        raise ValueError(f"it has more than {limit >> 10:,} KiB, the most that is read")
    except FileNotFoundError:
        link = path.is_symlink()
        raise ValueError("it is a link to nowhere" if link else "it is not there") from None
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None


def contents(path: Path, limit: int = 1 << 24) -> bytes:
    """`read_bytes`, and an UnreadableFile that names the file."""
    try:
        return read_bytes(path, limit)
    except ValueError as error:
        raise UnreadableFile(f"cannot read `{path}`: {error}.") from None


def read_text(path: str | Path, limit: int = MAX_TEXT) -> str:
    """The text of a file: in the encoding that its byte order mark names, else UTF-8.

    Raises UnreadableFile, which names the file if it cannot be read, or does not decode.
    """
    path = Path(path)
    try:
        data = read_bytes(path, limit)
    except ValueError as error:
        raise UnreadableFile(f"cannot read the text file `{path}`: {error}.") from None
    mark = next((m for m in MARKS if data.startswith(m)), b"")
    encoding = MARKS.get(mark, "utf-8")
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        place = error.start + len(mark)
        wrong = f"{encoding.upper()} text: byte {place} is 0x{data[place]:02x}"
        raise UnreadableFile(f"`{path}` is not {wrong}. Save it as UTF-8.") from None
    if "\0" in text:  # UTF-16 without its mark is valid UTF-8, half of it zeros
        raise UnreadableFile(f"`{path}` is not UTF-8 text: it holds zero bytes. Save it as UTF-8.")
    return text


def read_json(path: str | Path, limit: int = MAX_TEXT) -> Any:
    """What a JSON file holds. Raises UnreadableFile, which names the file."""
    text = read_text(path, limit)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableFile(f"`{path}` is not JSON: {error}.") from None
