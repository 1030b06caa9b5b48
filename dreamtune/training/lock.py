"""One folder, one run: a lock held for the run, which the system lets go when the process dies."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path
from typing import IO

from dreamtune.training.output import say

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class FolderLock:
    """Makes the folder and holds it until `release`; the lock file says who does.

    new: the folder must not be there yet: FileExistsError.

    Raises ValueError that names the holder where another run has the folder, OSError where it
    cannot be written.
    """

    def __init__(self, folder: Path, new: bool = False) -> None:
        self.path = folder / LOCK
        self.made = not folder.is_dir()
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=not new)
        self.file: IO[str] | None = self.take()
        if last := self.file.read().strip():
            say(f"{folder} was left locked by {last}, which is gone: its run goes to this process.")
        self.file.seek(0)
        self.file.truncate()
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    @property
    def folder(self) -> Path:
        return self.path.parent

    def take(self) -> IO[str]:
        """The lock file, open and locked. One that was removed meanwhile locks nothing: again."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        while True:
            file = os.fdopen(os.open(self.path, flags, 0o644), "r+", encoding="utf-8")
            try:
                lock(file)
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                    return file
            except FileNotFoundError:
                pass
            except BlockingIOError:
                holder = file.read().strip() or "another process"
                file.close()
                raise ValueError(
                    f"`{self.folder}` is in use: {holder} trains in it. Wait for it, or name "
                    "another --output_dir."
                ) from None
            except BaseException:
                file.close()
                raise
            file.close()

    def release(self) -> None:
        """May be called twice. A folder that was made for nothing goes too."""
        if self.file is None:
            return
        with contextlib.suppress(OSError):
            os.unlink(self.path)  # while it is held, so that nobody locks a file without a name
        self.file.close()
        self.file = None
        if self.made:
            with contextlib.suppress(OSError):
                self.folder.rmdir()


def lock(file: IO[str]) -> None:
    """Raises BlockingIOError where another process, or another run of this one, has it."""
    if fcntl is None:
        return lock_on_windows(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        say(f"The file system of {file.name} has no locks: nothing keeps a second run out of it.")


def lock_on_windows(file: IO[str]) -> None:
    import msvcrt

    file.seek(1 << 20)  # far behind the text, which others must be able to read
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError:
        raise BlockingIOError from None
    finally:
        file.seek(0)
