"""The kinds of outputs that cannot be written, of the table that `disk.py` prints."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from children import give_up_root

AT = 3  # the step before which a run can write no more: checkpoint-2 is there


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A disk in memory. Needs root."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


class Place:
    """Where one case happens: the output, what belongs to others, and what a whole run is."""

    def __init__(self, work: Path, whole: Path) -> None:
        self.work, self.whole = work, whole
        self.output, self.theirs = work / "out", work / "theirs"
        self.log = work.parent / "log.txt"
        self.theirs.mkdir()
        (self.theirs / "x").write_text("theirs")
        (self.theirs / "folder").mkdir()
        (self.theirs / "folder" / "000000.png").write_text("theirs")


@dataclass(frozen=True)
class Unwritable:
    """One kind. It is made, tried without root's rights unless `root`, refused by a sentence with
    `named` in it (OUT: the output's path), before a model is loaded if `at_start`; or `taken`,
    where that is right too. undo: what makes it writable again, for what happens in the middle of a
    run.
    """

    name: str
    make: Callable[[Place], object]
    named: str = "OUT"
    taken: bool = False
    root: bool = False
    at_start: bool = True
    act: Callable[[Place], object] | None = None  # in the child, once it has begun to write
    before: Callable[[], object] | None = None  # in the child, at first
    undo: Callable[[Place], object] | None = None
    mount: str = ""
    command: tuple[str, ...] = ()
    more: tuple[str, ...] = ()

    @contextmanager
    def made(self, place: Place) -> Iterator[None]:
        if self.mount:
            with mounted(place.work / "disk", self.mount):
                place.output = place.work / "disk" / "out"
                self.make(place)
                yield
            return
        self.make(place)
        try:
            yield
        finally:
            for folder in (place.work, place.output):  # or it could not be taken away
                if os.path.isdir(folder) and not folder.is_symlink():
                    folder.chmod(0o755)

    def in_child(self, place: Place) -> None:
        if not self.root:
            give_up_root()
        if self.before:
            self.before()
        if self.act:
            from dreamtune.training.wave import Wave

            act, original = self.act, Wave.advance

            def advance(wave: Wave, k: int) -> None:
                if k == AT:
                    act(place)
                original(wave, k)

            Wave.advance = advance  # type: ignore[method-assign]


def nothing(place: Place) -> None:
    pass


def own(mode: int = 0o755) -> Callable[[Place], None]:
    """An empty output folder of ours."""

    def make(place: Place) -> None:
        place.output.mkdir()
        place.output.chmod(mode)

    return make


def below(mode: int) -> Callable[[Place], None]:
    def make(place: Place) -> None:
        own(mode)(place)
        place.output = place.output / "run"

    return make


def at(path: str) -> Callable[[Place], None]:
    def make(place: Place) -> None:
        place.output = Path(path)

    return make


def file(place: Place) -> None:
    place.output.write_text("")


def below_a_file(place: Place) -> None:
    file(place)
    place.output = place.output / "run"


def link(target: str) -> Callable[[Place], None]:
    return lambda place: place.output.symlink_to(place.work / target)


def named(name: str) -> Callable[[Place], None]:
    def make(place: Place) -> None:
        place.output = place.work / name

    return make


def of_socket(place: Place) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(place.output))


def inside(name: str, what: str) -> Callable[[Place], None]:
    """In the output folder, under a name of a run: a "folder", "file", "fifo", or a link to one."""

    def make(place: Place) -> None:
        own()(place)
        plant(place, name, what)

    return make


def plant(place: Place, name: str, what: str) -> None:
    path = place.output / name
    if what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "file":
        path.write_text("")
    else:
        target = {"link": "x", "link to a folder": "folder", "dangling link": "no"}[what]
        path.symlink_to(place.theirs / target)


def to_go_on(name: str, what: str) -> Callable[[Place], None]:
    """In the folder of a run that is to go on from checkpoint-4."""

    def make(place: Place) -> None:
        shutil.copytree(place.whole, place.output)
        shutil.rmtree(place.output / "checkpoint-6")
        old = place.output / name
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
        plant(place, name, what)

    return make


def few_files() -> None:
    """Next to none beside those that are open."""
    limit = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def fill(place: Place) -> None:
    """The rest of the disk, by another."""
    with open(place.output.parent / "other", "wb", buffering=0) as other:
        block = b"x" * (1 << 16)
        while block:
            try:
                other.write(block)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                block = block[: len(block) // 2]


def empty(place: Place) -> None:
    (place.output.parent / "other").unlink()


def away(instead: str | None = None) -> Callable[[Place], None]:
    """The folder is moved while the run writes into it; another thing may take its name."""

    def move(place: Place) -> None:
        place.output.rename(place.work / "moved")
        if instead == "folder":
            place.output.mkdir()
        elif instead is not None:
            place.output.symlink_to(place.theirs / "folder")

    return move


def back(place: Place) -> None:
    if place.output.is_symlink():
        place.output.unlink()
    elif place.output.exists():
        place.output.rmdir()  # nothing was written there
    (place.work / "moved").rename(place.output)


def owned(place: Place) -> None:
    """The folder that all is in, so that the output may be moved."""


def mode(number: int, name: str = "") -> Callable[[Place], None]:
    return lambda place: (place.output / name).chmod(number)


GO_ON = ("--resume_from_checkpoint", "latest")
PLANTED = {
    ".lock": ("link", "dangling link", "folder", "fifo"),
    "config.yaml": ("link", "dangling link", "folder"),
    "samples": ("file", "link to a folder", "dangling link"),
    "metrics.jsonl": ("folder", "link", "dangling link", "fifo"),
    "best": ("file", "link to a folder"),
    "checkpoint-2": ("file", "link to a folder", "dangling link"),
    "report.html": ("folder", "link"),
    "adapter.safetensors": ("link",),
}
PLANTED_TO_GO_ON = {
    "samples": ("link to a folder", "dangling link", "file"),
    "samples/000006.png": ("link", "dangling link", "folder"),
    "best": ("link to a folder", "dangling link", "file"),
    "metrics.jsonl": ("link", "dangling link", "folder", "fifo"),
    "config.yaml": ("dangling link", "folder", "fifo"),
    "report.html": ("link", "dangling link"),
    "checkpoint-6": ("link to a folder", "dangling link", "file"),
    "adapter.safetensors": ("link", "dangling link"),
    ".final": ("link to a folder", "file"),
    ".checkpoint-6.part": ("link to a folder", "dangling link", "file"),
}
PLACES = [
    Unwritable("a read-only disk", nothing, mount="ro,size=1m", root=True),
    Unwritable("no permission above", below(0o555)),
    Unwritable("no permission to enter what is above", below(0o600)),
    Unwritable("no permission", own(0o555)),
    Unwritable("no permission to enter", own(0o600)),
    Unwritable("a file", file),
    Unwritable("below a file", below_a_file),
    Unwritable("a dangling link", link("no")),
    Unwritable("a link to a file", link("theirs/x")),
    Unwritable("links in a circle", link("out")),
    Unwritable("a name too long", named("n" * 300)),
    Unwritable("a path too long", named("/".join(["n" * 200] * 25))),
    Unwritable("/dev/null", at("/dev/null")),
    Unwritable("below /dev/null", at("/dev/null/run")),
    Unwritable("below /proc", at("/proc/run")),
    Unwritable("a FIFO", lambda place: os.mkfifo(place.output)),
    Unwritable("a socket", of_socket),
]
LATER = [
    Unwritable("filled by others", own(), mount="size=6m", root=True, act=fill, undo=empty),
    Unwritable("no permission", own(), act=mode(0o555), undo=mode(0o755)),
    Unwritable("no permission to enter", own(), act=mode(0o600), undo=mode(0o755)),
    Unwritable(
        "no permission in samples/", own(), act=mode(0o555, "samples"), undo=mode(0o755, "samples")
    ),
    Unwritable("moved away", owned, act=away(), undo=back),
    Unwritable("moved away, another folder there", owned, act=away("folder"), undo=back),
    Unwritable("moved away, a link there", owned, act=away("theirs"), undo=back),
]
COMMANDS = (
    ("export", "RUN", "OUT"),
    ("generate", "RUN", "--prompt", "a", "--num_images", "1", "--output_dir", "OUT"),
)
KINDS = [
    *PLACES,
    *(
        Unwritable(f"{name} is a {what}", inside(name, what), taken=name == "config.yaml")
        for name, whats in PLANTED.items()
        for what in whats
    ),
    *(
        Unwritable(f"to go on, {name} is a {what}", to_go_on(name, what), more=GO_ON, taken=True)
        for name, whats in PLANTED_TO_GO_ON.items()
        for what in whats
    ),
    Unwritable(
        "too many open files", own(), before=few_files, at_start=False, named="", taken=True
    ),
    *(
        replace(kind, name=f"{words[0]}: {kind.name}", command=words, at_start=False)
        for words in COMMANDS
        for kind in PLACES
    ),
    *(replace(kind, name=f"later: {kind.name}", at_start=False) for kind in LATER),
]
