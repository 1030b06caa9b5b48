"""A command in a process of its own, forked from one that has imported everything: a short run on
the embedded base takes seconds, so that hundreds can be stopped, and gone on with, in minutes.
"""

from __future__ import annotations

import csv
import ctypes
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHORT = [
    *("--device", "cpu", "--rank", "2", "--resolution", "32"),
    *("--max_train_steps", "6", "--validation_steps", "2", "--checkpointing_steps", "2"),
    *("--num_inference_steps", "1", "--guidance_scale", "1", "--checkpoints_total_limit", "2"),
]
ONE_PROMPT = ["--validation_prompt", "a {}"]
UNSCORED = ["--dino", "none", "--clip", "none"]
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")


def warm_up() -> None:
    """Imports, and the embedded base, which is in every child as it was loaded."""
    import torch

    torch.set_num_threads(1)
    import dreamtune.evaluation.report  # noqa: F401
    import dreamtune.metrics  # noqa: F401
    from dreamtune.config import Config
    from dreamtune.training import train

    loaded = train.base_of(Config(device="cpu"))
    original = train.load_base

    def load_base(name: Any, **options: Any) -> Any:
        return loaded if name in (None, "embedded") else original(name, **options)

    train.load_base = load_base


def give_up_root() -> None:
    """Root may write anywhere; without its capabilities it is a user like others, who can still
    read its own files, as another user could not in a private checkout. Linux; else, and for
    others, nothing to do.
    """
    if os.geteuid() != 0 or sys.platform != "linux":
        return
    version_3 = 0x20080522
    header = (ctypes.c_uint32 * 2)(version_3, 0)
    none = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(header, none) != 0:
        raise OSError(ctypes.get_errno(), "capset")


@dataclass(frozen=True)
class Ended:
    """status: the exit status, or minus the number of the signal that ended the process."""

    status: int
    text: str
    seconds: float

    @property
    def crashed(self) -> bool:
        return "Traceback (most recent call last)" in self.text


def run(
    command: Sequence[str],
    log: Path,
    before: Callable[[], None] | None = None,
    kill_after: float | None = None,
) -> Ended:
    """`dreamtune COMMAND ...` to its end. before: in the child; kill_after: seconds."""
    began = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        in_child(command, log, before)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)  # nothing, where it has ended
    _, status = os.waitpid(child, 0)
    text = log.read_text(errors="replace")
    return Ended(os.waitstatus_to_exitcode(status), text, time.monotonic() - began)


def in_child(command: Sequence[str], log: Path, before: Callable[[], None] | None) -> None:
    code = 99
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)  # pytest has put others in their place
        sys.stderr = os.fdopen(2, "w", closefd=False)
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):  # nohup ignores one
            signal.signal(number, signal.SIG_DFL)
        from dreamtune.cli import main

        if before is not None:
            before()
        code = main(list(command))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def watch(folder: Path, act: Callable[[int, str, str], None]) -> None:
    """Calls act(number, event, path) before each change of what is in the folder: a file that is
    opened to be written, renames, removals. From now on, in this process.
    """
    inside, number = str(folder), 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal number
        if event == "open":
            flags = arguments[2]
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event not in CHANGES:
            return
        path = arguments[0]
        if not isinstance(path, (str, os.PathLike)):
            return
        name = os.fspath(path)
        # a bare name: below a folder that is being removed
        if isinstance(name, str) and (name.startswith(inside) or "/" not in name):
            number += 1
            act(number, event, name)

    sys.addaudithook(hook)


def listing(folder: Path, file: Path) -> Callable[[], None]:
    """For `run(before=)`: writes what `watch` sees into a file, a JSON list a line."""

    def before() -> None:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def act(number: int, event: str, path: str) -> None:
            os.write(handle, (json.dumps([number, event, path]) + "\n").encode())

        watch(folder, act)

    return before


def signal_at(folder: Path, number: int, kind: int) -> Callable[[], None]:
    """For `run(before=)`: the signal comes just before that change."""

    def before() -> None:
        def act(n: int, event: str, path: str) -> None:
            if n == number:
                os.kill(os.getpid(), kind)

        watch(folder, act)

    return before


def torn_at(folder: Path, number: int, bytes_more: int) -> Callable[[], None]:
    """For `run(before=)`: the process dies in the middle of what is written next, when the file
    that is opened then has so many bytes more. What it prints goes nowhere.
    """

    def before() -> None:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

        def act(n: int, event: str, path: str) -> None:
            if n == number:
                size = os.path.getsize(path) if os.path.isfile(path) else 0
                resource.setrlimit(resource.RLIMIT_FSIZE, (size + bytes_more,) * 2)

        watch(folder, act)

    return before


def tree(folder: Path) -> dict[str, bytes | None]:
    """Relative path -> contents, None for what is no file, of everything below, hidden or not."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() and not p.is_symlink() else None
        for p in sorted(folder.rglob("*"))
    }


def differences(run_dir: Path, wanted: Path, stopped_at: int | None = None) -> list[str]:
    """What of a run's folder is not what an uninterrupted run left; seconds are left out.

    stopped_at: the step of a checkpoint that a signal made, which may be of before its scoring;
    there may be others too, and some that took their places.
    """
    files = [
        {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}
        for folder in (run_dir, wanted)
    ]
    common = files[0] & files[1]
    other = files[0] ^ files[1]
    if stopped_at is not None:
        other = {name for name in other if "checkpoint-" not in name or "/." in f"/{name}"}
        if stopped_at != max(int(p.name.split("-")[1]) for p in wanted.rglob("checkpoint-*")):
            common = {n for n in common if f"checkpoint-{stopped_at}" not in Path(n).parts}
    found = [f"{name} is {'not there' if name in files[1] else 'too many'}" for name in other]
    for name in sorted(common):
        if contents(run_dir, name) != contents(wanted, name):
            found.append(f"{name} is another")
    return sorted(found)


def _without_seconds(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k != "seconds"}


def contents(run_dir: Path, name: str) -> Any:
    path = run_dir / name
    if path.suffix == ".html":  # has times in it
        return path.read_text().rstrip().endswith("</html>")
    if path.name == "summary.csv":
        with path.open(newline="") as file:
            return [{k: v for k, v in x.items() if k != "seconds"} for x in csv.DictReader(file)]
    if path.name == "summary.json":
        return json.loads(path.read_text(), object_hook=_without_seconds)
    if path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [{k: v for k, v in x.items() if not k.endswith("seconds")} for x in lines]
    if path.name == "run_state.json":
        state = json.loads(path.read_text())
        return {k: v for k, v in state.items() if k not in ("metrics", "sha256")}
    if path.name == "config.yaml":
        lines = path.read_text().splitlines()
        return [line for line in lines if not line.startswith("output_dir:")]
    return path.read_bytes()
