"""Files and folders that are whole or as they were before, whatever stops the writing."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """An empty file beside `path`, to fill in the block; it takes the name when the block ends, and
    is removed when the block raises. Folders on the way are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name that nobody can foresee: a link that was put in its place would be written through.
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    partial = Path(name)
    try:
        os.close(handle)
        yield partial
        _sync(partial)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(partial, 0o666 & ~umask)  # mkstemp's is 0600
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        _named(error, path, partial)
        raise


@contextlib.contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """An empty folder beside `folder`, to fill in the block; it takes the place of `folder`, with
    all that was in there, when the block ends, and is removed when the block raises.

    What a killed process left of it goes with the next one: its name is always the same.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (folder.with_name(f".{folder.name}.{end}") for end in ("part", "old"))
    _clear(partial)
    partial.mkdir()  # raises if a link is there
    try:
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                _sync(path)
        _clear(old)
        try:
            if os.path.lexists(folder):
                os.replace(folder, old)
            os.replace(partial, folder)
        except BaseException:
            if os.path.lexists(old) and not os.path.lexists(folder):
                os.replace(old, folder)
            raise
    except BaseException as error:
        _clear(partial)
        _named(error, folder, partial)
        raise
    _clear(old)


def remove_folder(folder: Path) -> None:
    """Renamed first: a half-removed folder must not look like one."""
    doomed = folder.with_name(f".{folder.name}.gone")  # `.old` is what `whole_folder` sets aside
    _clear(doomed)
    os.replace(folder, doomed)
    _clear(doomed)


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Onto the disk before the rename, else a power cut leaves a whole name with empty files."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def check_writable(folder: str | Path) -> None:
    """To be tried before the work whose result goes there. Makes nothing.

    Raises OSError that names the folder if it, or what is there of the way to it, takes no file.
    """
    folder = Path(folder).absolute()
    try:
        there = next(p for p in (folder, *folder.parents) if _is_there(p))
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        error.filename = str(folder)
        raise


def _is_there(path: Path) -> bool:
    """Raises OSError for what can never be there, as a name that is too long."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _named(error: BaseException, path: Path, partial: Path) -> None:
    """A write that fails does not say which file it was for, or names the one beside it."""
    if not isinstance(error, OSError) or error.errno is None:
        return
    name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
    if not name or name == str(partial) or name.startswith(str(partial) + os.sep):
        error.filename = str(path) + name[len(str(partial)) :]
