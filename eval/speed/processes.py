"""The benchmark over one process and over two, each with its own GPU, at SD 1.5's size.

    python eval/speed/processes.py --work DIR                        # on a host with two GPUs
    python eval/speed/processes.py --work DIR --size tiny            # on the CPU: a check

Random weights and pictures; `eval/dreambench.py` by accelerate's launcher, in new folders. A short
run goes before, not timed: it compiles the kernels that a new machine lacks. Then two processes,
then one. The seconds are those that the driver reports: from the plan to the comparisons, without
the start of Python; the whole wall time stands beside them, and what a part took on average, by
what is trained: where two processes are in each other's way, their parts take longer.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "eval"), str(ROOT)]

from random_models import SIZES, build_clip, build_dino, build_pipeline, write_photos  # noqa: E402

PROTOCOL = {
    "like": "dreamtune", "name": "timed", "metrics": ["dino", "clip_i", "clip_t"], "unrelated": [],
    "prompts": ["a {} in the snow", "a red {}", "a {} on the beach"], "images_per_prompt": 8,
}  # fmt: skip


def models(work: Path, size: str, subjects: int) -> list[str]:
    """Writes what is needed; returns the driver's flags."""
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    build_pipeline(work / "base", size, device="cuda" if cuda else "cpu", dtype=dtype)
    build_clip(work / "clip", size)
    build_dino(work / "dino", size)
    names = [f"subject_{i}" for i in range(subjects)]
    for i, name in enumerate(names):
        write_photos(work / "photos" / name, seed=i)
    lines = "".join(f"{name},toy\n" for name in names)
    (work / "photos" / "prompts_and_classes.txt").write_text(lines)
    (work / "timed.yaml").write_text(yaml.safe_dump(PROTOCOL))
    return [
        "--photos", str(work / "photos"), "--protocol", str(work / "timed.yaml"),
        "--pretrained_model_name_or_path", str(work / "base"),
        "--score_dino", str(work / "dino"), "--score_clip", f"local-dir:{work / 'clip'}",
        "--dino", "none", "--clip", "none", "--validation_steps", "0",
        "--validation_prompt", "a {}",
    ]  # fmt: skip


@dataclass(frozen=True)
class Timed:
    """Of one run of the benchmark. parts: seconds of each, by method (base: images alone)."""

    work: float
    wall: float
    parts: dict[str, list[float]]

    def row(self, processes: int) -> str:
        means = ", ".join(f"{m} {statistics.mean(s):.1f}" for m, s in sorted(self.parts.items()))
        return f"| {processes} | {self.work:.1f} | {self.wall:.1f} | {means} |"


def run(work: Path, processes: int, flags: list[str]) -> Timed:
    launch = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--num_processes", str(processes), "--dynamo_backend", "no"]
    if not torch.cuda.is_available():  # accelerate's launcher makes several of GPUs only
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    elif processes > 1:
        launch.append("--multi_gpu")
    threads = max(1, min(8, (os.cpu_count() or 1) // processes))
    own = {"OMP_NUM_THREADS": str(threads)}
    if processes == 1:
        own["CUDA_VISIBLE_DEVICES"] = "0"
    driver = [str(ROOT / "eval" / "dreambench.py"), "--work", str(work)]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *launch, *driver, *flags],
        env={**os.environ, **own}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    wall = time.perf_counter() - began
    found = re.search(r"([\d.]+) s of work by (\d+) process", done.stdout)
    if done.returncode or found is None:
        raise SystemExit(f"{processes} processes: {(done.stdout + done.stderr)[-3000:]}")
    assert int(found[2]) == processes
    parts = defaultdict(list)
    for method, seconds in re.findall(r"(\S+)-seed-.* images made, ([\d.]+) s", done.stdout):
        parts[method].append(float(seconds))
    return Timed(float(found[1]), wall, parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a new folder")
    parser.add_argument("--size", default="full", choices=SIZES)
    parser.add_argument("--subjects", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--methods", nargs="+", default=["lora", "delora"])
    args = parser.parse_args()
    work = args.work.resolve()
    if work.exists():
        raise SystemExit(f"processes: `{work}` is there: name a new --work.")
    work.mkdir(parents=True)
    flags = models(work, args.size, args.subjects)
    flags += ["--at_once", "1", "--methods", *args.methods]
    run(work / "before", 1, [*flags, "--only", "subject_0", "--max_train_steps", "8"])
    if torch.cuda.is_available():
        print(f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}, torch", end=" ")
    print(torch.__version__)
    print("| processes | s of work | s in all | s a part |\n|---|---|---|---|", flush=True)
    timed = {}
    for processes in (2, 1):
        own = [*flags, "--max_train_steps", str(args.steps)]
        timed[processes] = run(work / f"by-{processes}", processes, own)
        print(timed[processes].row(processes), flush=True)
    ratio, wall = timed[1].work / timed[2].work, timed[1].wall / timed[2].wall
    print(f"Two processes do {ratio:.2f} times the work of one in its time ({wall:.2f} in all).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
