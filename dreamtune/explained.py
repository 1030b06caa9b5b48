"""Errors that a user can cause, in a sentence."""

from __future__ import annotations

import errno
import re
import traceback

REASONS = {
    errno.ENOSPC: "the disk is full; free some space, or name another folder",
    errno.EDQUOT: "your share of the disk is full; free some space, or name another folder",
    errno.EFBIG: "files may not be so large here; raise the limit, or name another folder",
    errno.EROFS: "the file system is read-only; name a folder that can be written",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EEXIST: "something else has that name",
    errno.ENOENT: "there is no such file or folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "it is a folder, not a file",
    errno.ELOOP: "it is a link, which is not followed, or links in a circle",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EMFILE: "too many files are open",
    errno.EIO: "the disk failed",
}


def sentence(error: Exception) -> str | None:
    """What a user can cause, explained; None for what can only be a fault of ours."""
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, OSError):
        reason = REASONS.get(error.errno or 0, error.strerror or str(error))
        return f"`{error.filename}`: {reason}." if error.filename else f"{reason}."
    name = f"{type(error).__module__.split('.')[0]}.{type(error).__name__}"
    if name.endswith(".SafetensorError"):  # says of the system's errors only the number
        number = re.search(r"os error (\d+)", str(error))
        known = REASONS.get(int(number[1])) if number else None
        return f"{known}." if known else f"a safetensors file cannot be used: {error}."
    if isinstance(error, RecursionError):
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        parsers = ("json", "yaml")
        nested = frame.f_globals.get("__name__", "").split(".")[0] in parsers
        return "a file that was read is nested too deeply." if nested else None
    if name == "torch.OutOfMemoryError":
        return (
            "the GPU has too little memory: lower --train_batch_size, --sample_batch_size or "
            "--slots, or add --gradient_checkpointing."
        )
    return "there is too little memory." if isinstance(error, MemoryError) else None
