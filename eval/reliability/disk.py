"""Disks that are full and outputs that cannot be written, on the embedded base.

    python eval/reliability/disk.py [--sizes 25]

A run on a disk too small for it, at many sizes, and under a limit of the files' size; then each
kind of output that cannot be written, at the start or from the middle of a run on. Each must end
with exit 1 and a sentence that names the path, its last checkpoint whole, nothing half written left
behind; and with room again `--resume_from_checkpoint latest` leads to what an uninterrupted run
leaves. What links point at must be as it was. Small disks and read-only ones are mounts, which need
root; without it their rows are left out, and said. CPU, about 10 minutes.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "eval" / "reliability")]

from children import (  # noqa: E402
    ONE_PROMPT,
    SHORT,
    UNSCORED,
    Ended,
    differences,
    run,
    tree,
    warm_up,
)
from unwritable import KINDS, Place, Unwritable, mounted, remount  # noqa: E402

from dreamtune.training.run_folder import checkpoints, damage  # noqa: E402

FLAGS = [*SHORT, *ONE_PROMPT, *UNSCORED]
OUTCOMES = CLEAN, UNCLEAR, CRASH, DAMAGE = "clean", "unclear", "crash", "damage"
GO_ON = ["--resume_from_checkpoint", "latest"]
ROOM = "64m"


def train(folder: Path, log: Path, *more: str, before: object = None) -> Ended:
    command = ["train", *FLAGS, "--output_dir", str(folder), *more]
    return run(command, log, before)  # type: ignore[arg-type]


def judge(ended: Ended, folder: Path) -> tuple[str, str]:
    """Of a run that could not write: the exit, its words, and what lies in the folder."""
    if ended.crashed or ended.status != 1:
        return CRASH, f"exit {ended.status}: {ended.text[-300:]}"
    last = ended.text.strip().replace("\r", "\n").splitlines()[-1]
    saved = checkpoints(folder)
    if broken := [f"{p.name}: {why}" for p in saved if (why := damage(p))]:
        return DAMAGE, "; ".join(broken)
    if left := litter(folder):
        return DAMAGE, f"left behind: {left}"
    if str(folder) not in last:
        return UNCLEAR, last
    if saved and f"{saved[-1].name} is whole" not in last:
        return UNCLEAR, f"does not say that {saved[-1].name} is whole: {last}"
    return CLEAN, last


def litter(folder: Path) -> list[str]:
    return [
        n for n in tree(folder) if Path(n).name.startswith(".") or n.endswith((".part", ".old"))
    ]


def goes_on(folder: Path, log: Path, whole: Path) -> tuple[str, str]:
    """To the end, with room again."""
    ended = train(folder, log, *GO_ON)
    if ended.status:
        return CRASH if ended.crashed else UNCLEAR, f"going on: {ended.text[-300:]}"
    found = differences(folder, whole)
    return (DAMAGE, "; ".join(found[:4])) if found else (CLEAN, "")


def too_small(work: Path, whole: Path, number: int, of: int, inodes: bool) -> tuple[str, str]:
    """A disk of that share of what a run leaves: of its bytes, or of its number of files."""
    files = list(whole.rglob("*"))
    needed = len(files) if inodes else sum(p.stat().st_size for p in files if p.is_file())
    size = 3 + needed * number // of if inodes else 8192 + (needed - 8192) * number // of
    disk = work / "disk"
    with mounted(disk, f"nr_inodes={size}" if inodes else f"size={size}"):
        folder = disk / "run"
        outcome, what = judge(train(folder, work / "log.txt"), folder)
        if outcome != CLEAN:
            return outcome, f"{size}: {what}"
        remount(disk, f"size={ROOM},nr_inodes=10000")
        outcome, what = goes_on(folder, work / "log.txt", whole)
        return outcome, f"{size}: {what}"


def limited(work: Path, whole: Path, number: int, of: int) -> tuple[str, str]:
    """No file larger than that share of the largest; what is printed is small."""
    largest = max(p.stat().st_size for p in whole.rglob("*") if p.is_file())
    size = 4096 + (largest - 4096) * number // of

    def before() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    folder = work / "limited"
    shutil.rmtree(folder, ignore_errors=True)
    outcome, what = judge(train(folder, work / "log.txt", before=before), folder)
    if outcome == CLEAN:
        outcome, what = goes_on(folder, work / "log.txt", whole)
    return outcome, f"{size}: {what}"


def unwritable(kind: Unwritable, work: Path, whole: Path) -> tuple[str, str]:
    """One kind: refused, or taken where it can be, with all around it as it was."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    work.chmod(0o755)
    place = Place(work, whole)
    with kind.made(place):
        before = tree(place.theirs)
        command = kind.command or ["train", *FLAGS, "--output_dir", str(place.output), *kind.more]
        command = [str(place.output) if word == "OUT" else word for word in command]
        command = [str(whole) if word == "RUN" else word for word in command]
        ended = run(command, place.log, lambda: kind.in_child(place))
        outcome, what = said(kind, ended, place, whole)
        if tree(place.theirs) != before:
            return DAMAGE, f"what a link points at was changed: {what}"
        if outcome != CLEAN or not kind.undo:
            return outcome, what
        kind.undo(place)
        return goes_on(place.output, place.log, whole)


def said(kind: Unwritable, ended: Ended, place: Place, whole: Path) -> tuple[str, str]:
    if kind.taken and not ended.status:
        found = differences(place.output, whole)
        return (DAMAGE, "; ".join(found[:4])) if found else (CLEAN, "taken")
    last = (ended.text.strip().replace("\r", "\n").splitlines() or [""])[-1]
    if ended.crashed or ended.status != 1:
        return CRASH, f"exit {ended.status}: {ended.text[-300:]}"
    if kind.named not in last.replace(str(place.output), "OUT"):
        return UNCLEAR, last
    if kind.at_start and ("ready after" in ended.text or "First validation" in ended.text):
        return UNCLEAR, f"after a model was loaded: {last}"
    return CLEAN, last


@contextmanager
def reference(work: Path) -> Iterator[Path]:
    """What an uninterrupted run leaves."""
    ended = train(work / "whole", work / "log.txt")
    if ended.status:
        raise RuntimeError(ended.text)
    yield work / "whole"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, default=25)
    a = parser.parse_args()
    warm_up()
    faults: list[str] = []
    rows: list[tuple[str, int, Counter[str]]] = []

    def count(row: str, cases: list[tuple[str, tuple[str, str]]]) -> None:
        for name, (outcome, what) in cases:
            if outcome != CLEAN:
                faults.append(f"{row}, {name}: {outcome}: {what}")
                print(faults[-1], flush=True)
        rows.append((row, len(cases), Counter(outcome for _, (outcome, _) in cases)))

    with tempfile.TemporaryDirectory() as folder, reference(Path(folder)) as whole:
        work, n = Path(folder), a.sizes
        work.chmod(0o755)
        numbers = range(n)
        if os.geteuid() == 0:
            bytes_ = [(str(i), too_small(work, whole, i, n, False)) for i in numbers]
            count("a full disk, by its size", bytes_)
            some = range(0, n, 3)
            count(
                "a full disk, by its number of files",
                [(str(i), too_small(work, whole, i, n, True)) for i in some],
            )
        else:
            print("Not root: no small disks, no read-only ones; permissions are tried as you.")
        some = range(0, n, 3)
        count("files over a limit", [(str(i), limited(work, whole, i, n)) for i in some])
        kinds = [k for k in KINDS if not k.root or os.geteuid() == 0]
        at_start = [k for k in kinds if k.undo is None]
        for row, part in (
            ("outputs that cannot be written", at_start),
            ("outputs that cannot be written any more", [k for k in kinds if k.undo]),
        ):
            count(row, [(k.name, unwritable(k, work / "place", whole)) for k in part])
    print(f"\n| tried | cases | {' | '.join(OUTCOMES)} |\n|---|---|{'---|' * len(OUTCOMES)}")
    for row, total, found in rows:
        print(f"| {row} | {total} | {' | '.join(str(found[o]) for o in OUTCOMES)} |")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
