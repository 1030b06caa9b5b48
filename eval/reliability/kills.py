"""Kills: `kill -9` at random moments, before writes and in the middle of them, and the signals that
ask a process to end, of new, resumed and stacked runs on the embedded base.

    python eval/reliability/kills.py [--kills 100] [--signals 48] [--seed 0] [--every]

Each is gone on with by `--resume_from_checkpoint latest`, killed again at times, and at its end
compared with a run that nothing stopped: adapters, optimizer, best/, images to the byte, the scores
to the last digit. The runs are forked from one process. CPU, about 20 minutes.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "eval" / "reliability")]

from children import (  # noqa: E402
    ONE_PROMPT,
    SHORT,
    UNSCORED,
    Ended,
    differences,
    listing,
    run,
    signal_at,
    torn_at,
    warm_up,
)

from dreamtune.training.run_folder import checkpoints, damage, step_of  # noqa: E402

GO_ON = ["--resume_from_checkpoint", "latest"]
OUTCOMES = EQUAL, OTHER, REFUSED, CRASH = "equal", "not equal", "refused", "crash"
SIGNALS = {
    name: getattr(signal, name)
    for name in ("SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
}
AGAIN = 0.3  # share of the runs that are killed once more when they go on


@dataclass
class Kind:
    """Runs of one command. `folder` is where each is made, `whole` what one leaves that nothing
    stops, `writes` the changes that it makes, `start` what a resumed one has at first.
    """

    name: str
    flags: list[str]
    work: Path
    resumed: bool = False
    writes: list[tuple[int, str, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def folder(self) -> Path:
        return self.work / "run"

    @property
    def whole(self) -> Path:
        return self.work / "whole"

    @property
    def start(self) -> Path:
        return self.work / "start"

    def command(self, resume: bool) -> list[str]:
        more = GO_ON if resume else []
        return ["train", *self.flags, "--output_dir", str(self.folder), *more]

    def launch(
        self,
        resume: bool,
        before: Callable[[], None] | None = None,
        kill_after: float | None = None,
    ) -> Ended:
        return run(self.command(resume), self.work / "log.txt", before, kill_after)

    def fresh(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.resumed:
            shutil.copytree(self.start, self.folder)

    def prepare(self) -> None:
        """`whole`, and for resumed runs `start`: killed when the last but one checkpoint was there,
        so that of two stacked ones each has another step.

        Raises RuntimeError where two runs that nothing stops are not equal.
        """
        self.work.mkdir(parents=True)
        whole = self.launch(False)
        self.expect(whole)
        shutil.copytree(self.folder, self.whole)
        shutil.rmtree(self.folder)
        if self.resumed:
            every = self.list_writes(False)
            saved = [n for n, event, path in every if event == "os.rename" and is_saved(path)]
            shutil.rmtree(self.folder)
            self.launch(False, signal_at(self.folder, saved[-2] + 1, signal.SIGKILL))
            shutil.move(self.folder, self.start)
        self.fresh()
        self.writes = self.list_writes(self.resumed)
        if found := differences(self.folder, self.whole):
            raise RuntimeError(f"{self.name}: two runs that nothing stops differ: {found}")

    def list_writes(self, resume: bool) -> list[tuple[int, str, str]]:
        file = self.work / "writes.jsonl"
        file.unlink(missing_ok=True)
        ended = self.launch(resume, listing(self.folder, file))
        self.expect(ended)
        self.seconds = ended.seconds
        return [tuple(json.loads(line)) for line in file.read_text().splitlines()]

    def expect(self, ended: Ended) -> None:
        if ended.status:
            raise RuntimeError(f"{self.name}: {ended.text[-2000:]}")


def is_saved(path: str) -> bool:
    """Whether it is the folder that a checkpoint is written into."""
    return re.search(r"/\.checkpoint-\d+\.part$", path) is not None


def killed(kind: Kind, rng: random.Random, way: str, resume: bool) -> Ended:
    """way: "moment", "write" (before one) or "torn" (in the middle of one)."""
    if way == "moment":
        return kind.launch(resume, kill_after=rng.uniform(0.0, kind.seconds * 0.95))
    if way == "write":
        number = rng.choice(kind.writes)[0]
        return kind.launch(resume, signal_at(kind.folder, number, signal.SIGKILL))
    number = rng.choice([n for n, event, _ in kind.writes if event == "open"])
    return kind.launch(resume, torn_at(kind.folder, number, rng.choice((0, 1, 20, 300))))


def case(kind: Kind, rng: random.Random, ways: Sequence[str]) -> tuple[int, str, str]:
    """(kills, outcome, what was seen) of one run that is killed in each of these ways in turn."""
    kind.fresh()
    resume, kills = kind.resumed, 0
    for way in ways:
        ended = killed(kind, rng, way, resume)
        resume = True
        kills += ended.status in (-signal.SIGKILL, -signal.SIGXFSZ)
        if ended.crashed or ended.status > 0:
            return kills, CRASH if ended.crashed else REFUSED, ended.text[-400:]
    return kills, *to_the_end(kind)


def to_the_end(kind: Kind, stopped_at: int | None = None) -> tuple[str, str]:
    ended = kind.launch(True)
    if ended.crashed or ended.status:
        return CRASH if ended.crashed else REFUSED, ended.text[-400:]
    found = differences(kind.folder, kind.whole, stopped_at)
    return (OTHER, "; ".join(found[:5])) if found else (EQUAL, "")


def asked_to_stop(kind: Kind, rng: random.Random, number: int) -> tuple[str, str]:
    """A signal at a write: the run says what it saved, and that is so; then to the end."""
    kind.fresh()
    write = rng.choice(kind.writes)
    ended = kind.launch(kind.resumed, signal_at(kind.folder, write[0], number))
    what = f"at {write}, exit {ended.status}: {ended.text[-300:]}"
    if ended.crashed or ended.status != 128 + number:
        return CRASH if ended.crashed else REFUSED, what
    if problem := not_saved(kind.folder, ended.text):
        return OTHER, f"{problem} {what}"
    stopped = re.search(r"Stopped after step (\d+)", ended.text)
    outcome, seen = to_the_end(kind, int(stopped[1]) if stopped else 0)
    return outcome, f"{seen} {what}" if seen else ""


def not_saved(folder: Path, text: str) -> str:
    """What of the run's last words is not so."""
    stopped = re.search(r"Stopped after step (\d+)", text)
    if stopped is None:
        return "" if "Stopped before the first step" in text else "It does not say that it stopped."
    runs = [folder] if (folder / "config.yaml").is_file() else sorted(folder.iterdir())
    for run_dir in runs:
        steps = [step_of(p) for p in checkpoints(run_dir) if damage(p) is None]
        if int(stopped[1]) not in steps:
            return f"Step {stopped[1]} is not saved in {run_dir.name}: {steps}."
    return ""


def kinds(work: Path) -> list[Kind]:
    plain = [*SHORT, *ONE_PROMPT, *UNSCORED]
    scored = [*SHORT, "--validation_prompt", "a {} on grass", "a {}"]
    two = ["--sweep", "seed=0,1"]
    return [
        Kind("new", plain, work / "new"),
        Kind("new, scored", scored, work / "scored"),
        Kind("resumed", plain, work / "resumed", resumed=True),
        Kind("stacked", [*plain, *two], work / "stacked"),
        Kind("stacked, resumed", [*plain, *two], work / "stacked-resumed", resumed=True),
    ]


def at_every_write(kind: Kind, faults: list[str]) -> tuple[str, int, Counter[str]]:
    """A row of the table."""
    found = Counter[str]()
    for write in kind.writes:
        kind.fresh()
        kind.launch(kind.resumed, signal_at(kind.folder, write[0], signal.SIGKILL))
        outcome, what = to_the_end(kind)
        found[outcome] += 1
        if outcome != EQUAL:
            faults.append(f"{kind.name}, before {write}: {outcome}: {what}")
            print(faults[-1], flush=True)
    return f"`kill -9` before each write, {kind.name}", len(kind.writes), found


def ways_of(number: int, rng: random.Random) -> list[str]:
    every = ("moment", "write", "torn")
    more = [rng.choice(every)] if rng.random() < AGAIN else []
    return [every[number % 3], *more]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="in all")
    parser.add_argument("--signals", type=int, default=48, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", action="store_true", help="kills at every write, an hour more")
    a = parser.parse_args()
    warm_up()
    rows: list[tuple[str, int, Counter[str]]] = []
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as work:
        every = kinds(Path(work))
        for kind in every:
            kind.prepare()
            print(f"{kind.name}: {len(kind.writes)} writes, {kind.seconds:.1f} s", flush=True)
        for place, kind in enumerate(every):
            goal, total, number, found = share(a.kills, len(every), place), 0, 0, Counter[str]()
            while total < goal:
                rng = random.Random(f"{a.seed} {kind.name} {number}")
                ways = ways_of(number, rng)[: goal - total]
                kills, outcome, what = case(kind, rng, ways)
                found[outcome] += kills
                total, number = total + kills, number + 1
                if outcome != EQUAL:
                    faults.append(f"{kind.name} {number - 1} {ways}: {outcome}: {what}")
                    print(faults[-1], flush=True)
            rows.append((f"`kill -9`, {kind.name} ({number} runs)", total, found))
            if a.every:
                rows.append(at_every_write(kind, faults))
        for place, (name, code) in enumerate(SIGNALS.items()):
            found, goal = Counter[str](), share(a.signals, len(SIGNALS), place)
            for number in range(goal):
                kind, rng = every[number % len(every)], random.Random(f"{a.seed} {name} {number}")
                outcome, what = asked_to_stop(kind, rng, code)
                found[outcome] += 1
                if outcome != EQUAL:
                    faults.append(f"{name} {kind.name} {number}: {outcome}: {what}")
                    print(faults[-1], flush=True)
            rows.append((f"{name} at a write, saved", goal, found))
    print(f"\n| tried | times | {' | '.join(OUTCOMES)} |\n|---|---|{'---|' * len(OUTCOMES)}")
    for row, count, found in rows:
        print(f"| {row} | {count} | {' | '.join(str(found[o]) for o in OUTCOMES)} |")
    return 1 if faults else 0


def share(total: int, parts: int, place: int) -> int:
    return total // parts + (place < total % parts)


if __name__ == "__main__":
    sys.exit(main())
