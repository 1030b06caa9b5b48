"""What an adapter adds to the frozen UNet's step on a CPU, ours beside PEFT's DeLoRA.

    python eval/speed/overhead.py --unet embedded --batches 1,4

Most of a step on a CPU is the frozen UNet's own forward and backward, and machines drift: the three
steps take turns, and the overheads are taken round by round.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.append(str(Path(__file__).parent))

from step import make_call, make_unet  # noqa: E402

CASES = ("frozen", "eager-delora", "peft-delora")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--unet", default="embedded", choices=("embedded", "small", "tiny"))
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    args.device, args.rank, args.block = "cpu", 16, 8
    print("CPU torch", torch.__version__, "threads", torch.get_num_threads())
    print(
        "Medians of ms; the share is ours of PEFT's overhead, with the quartiles of the rounds.\n"
    )
    print("| batch | frozen | ours | PEFT | overhead ours | overhead PEFT | share (quartiles) |")
    print("|---|---|---|---|---|---|---|")
    for batch in map(int, args.batches.split(",")):
        calls = {case: make_call(case, make_unet(args), batch, args) for case in CASES}
        rounds = []
        for call in calls.values():
            call()
        for _ in range(args.rounds):
            row = {}
            for case, call in calls.items():
                began = time.perf_counter()
                call()
                row[case] = (time.perf_counter() - began) * 1e3
            rounds.append([row[case] for case in CASES])
        frozen, ours, peft = (median(column) for column in zip(*rounds))
        added = [(b - a, c - a) for a, b, c in rounds]
        mine, theirs = (median(column) for column in zip(*added))
        shares = sorted(m / t for m, t in added if t > 0)
        low, high = shares[len(shares) // 4], shares[-len(shares) // 4]
        print(
            f"| {batch} | {frozen:.1f} | {ours:.1f} | {peft:.1f} | {mine:.1f} | {theirs:.1f} | "
            f"{mine / theirs:.2f} ({low:.2f} to {high:.2f}) |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
