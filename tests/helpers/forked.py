"""What needs a process of its own but not imports of its own: a fork of the one that tests run in.

A fresh process takes seconds to import torch and diffusers; a fork has them.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def start(work: Callable[[], Any], log: Path) -> int:
    """The id of a process that does the work and exits as a script would; `log` has its output."""
    sys.stdout.flush()
    sys.stderr.flush()
    if child := os.fork():
        return child
    code: Any = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)  # pytest has put others in their place
        sys.stderr = os.fdopen(2, "w", closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def ended(child: int) -> int:
    """Its exit status, or minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Missing:
    """Finds no module of a package, whatever lies on the path."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, *rest: Any) -> None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def without_dreamtune(code: str, arguments: list[Any], log: Path) -> str:
    """Runs the code where dreamtune cannot be imported and nothing be connected to; what it said.

    `test_matrix.py` asks the same libraries in a process that never had dreamtune.
    """

    def refuse(*given: Any, **options: Any) -> None:
        raise OSError("there is no network here")

    def work() -> None:
        for name in [n for n in sys.modules if n.partition(".")[0] == "dreamtune"]:
            del sys.modules[name]
        sys.meta_path.insert(0, Missing("dreamtune"))  # type: ignore[arg-type]
        socket.socket.connect = socket.create_connection = refuse  # type: ignore[assignment]
        sys.argv = ["-c", *map(str, arguments)]
        exec(compile(code, "alone", "exec"), {"__name__": "__main__"})

    status = ended(start(work, log))
    said = log.read_text(errors="replace")
    assert status == 0, said
    return said
