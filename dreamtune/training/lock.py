"""One folder, one run: a lock held for the run, which the system lets go when the process dies."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
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
        self.file: IO[str] | None = None
        self.place: int | None = None  # the folder, open, wherever it is moved
        self.made = not folder.is_dir()
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=not new)
        try:
            if fcntl is not None:  # Windows neither opens folders nor moves what is in use
                self.place = os.open(folder, os.O_RDONLY)
            self.file = self.take()
            self.sign(self.file)
        except BaseException as error:
            self.release()
            if isinstance(error, OSError) and error.errno and error.filename is None:
                error.filename = str(folder)  # a write that fails does not say where
            raise

    def sign(self, file: IO[str]) -> None:
        if last := file.read().strip():
            say(
                f"{self.folder} was left locked by {last}, which is gone: its run goes to this "
                "process."
            )
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()

    @property
    def folder(self) -> Path:
        return self.path.parent

    def take(self) -> IO[str]:
        """The lock file, open and locked. One that was removed meanwhile locks nothing: again."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        while True:
            handle = os.open(self.path, flags, 0o644)
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                os.close(handle)
                raise ValueError(f"`{self.path}` must be a file, and is none: take it away.")
            file = os.fdopen(handle, "r+", encoding="utf-8")
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

    def check(self) -> None:
        """Raises ValueError where the folder was moved or removed: what has its name now, or would
        be made under it, is not the run's.
        """
        if self.place is None:
            return
        try:
            here = os.path.samestat(os.fstat(self.place), os.stat(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            here = False
        if not here:
            raise ValueError(
                f"`{self.folder}` was moved or removed while its run went on: nothing more is "
                "written. Go on with --resume_from_checkpoint latest and the --output_dir where "
                "it is now."
            )

    def release(self) -> None:
        """May be called twice. A folder that was made for nothing goes too."""
        if self.file is not None:
            with contextlib.suppress(OSError, ValueError):  # ValueError: a write that failed again
                # while it is held, so that nobody locks a file without a name
                os.unlink(self.path if self.place is None else LOCK, dir_fd=self.place)
                self.file.close()
            self.file = None
        if self.place is not None:
            os.close(self.place)
            self.place = None
        if self.made:
            with contextlib.suppress(OSError):
                self.folder.rmdir()
            self.made = False


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
