"""What a run prints. None of it ends a run: text is escaped where the console lacks its characters,
and a stream that is closed, full or gone is given up.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any


class Output:
    """A stream of this process, "stdout" or "stderr", whatever has become of it."""

    def __init__(self, name: str) -> None:
        self.name, self.lost = name, False

    def __getattr__(self, attribute: str) -> Any:
        return getattr(getattr(sys, self.name), attribute)

    def write(self, text: str) -> None:
        stream = getattr(sys, self.name)  # looked up anew: others redirect it; None where closed
        if self.lost or stream is None:
            return
        try:
            try:
                stream.write(text)
            except UnicodeEncodeError:
                kind = stream.encoding or "ascii"
                stream.write(text.encode(kind, "backslashreplace").decode(kind))
            stream.flush()
        except (OSError, ValueError):  # ValueError: closed
            self.lost = True

    def flush(self) -> None:
        self.write("")

    def isatty(self) -> bool:
        try:
            return bool(getattr(sys, self.name).isatty())
        except (AttributeError, OSError, ValueError):
            return False


def say(text: str) -> None:
    """`print`, for a run: never an error."""
    Output("stdout").write(f"{text}\n")


def settle() -> None:
    """At the end of the process: what a lost stream still holds goes nowhere, or the interpreter's
    own last flush would fail.
    """
    for name in ("stdout", "stderr"):
        output = Output(name)
        output.flush()
        if output.lost:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), getattr(sys, name).fileno())
