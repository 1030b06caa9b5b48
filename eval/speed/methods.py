"""The methods beside each other: a captured step of each, on a UNet of its own, replayed in turns.

    python eval/speed/methods.py                        # on a GPU: factors of rank 16
    python eval/speed/methods.py --unet tiny --rank 8   # on the CPU, eagerly: a check

In turns, so that a clock that drifts moves all of them: prints medians and ratios to the fastest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

sys.path.append(str(Path(__file__).parent))

from common import now  # noqa: E402
from step import OURS, make_call, make_unet  # noqa: E402


def in_turns(
    calls: dict[str, Callable[[], None]], rounds: int, steps: int, cuda: bool
) -> dict[str, float]:
    """Median ms a step of each; a turn is `steps` steps, the device waited for after them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            began = now(cuda)
            for _ in range(steps):
                call()
            if number:  # the first turn warms up, and captures
                times[name].append((now(cuda) - began) / steps * 1e3)
    return {name: median(each) for name, each in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--unet", default="sd15", choices=("sd15", "embedded", "small", "tiny"))
    parser.add_argument("--methods", default=",".join(OURS))
    parser.add_argument("--rank", type=int, default=16, help="of the factors")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5, help="in a turn")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.rank % 4:
        parser.error(f"--rank must be a multiple of 4, got {args.rank}")
    cuda = args.device.startswith("cuda")
    print(torch.cuda.get_device_name() if cuda else "CPU", "torch", torch.__version__)
    calls = {
        method: make_call(f"equal-{method}", make_unet(args), args.batch, args)
        for method in args.methods.split(",")
    }
    times = in_turns(calls, args.rounds, args.steps, cuda)
    fastest = min(times.values())
    print(f"factors of rank {args.rank}, batch {args.batch}\n\n| method | ms | of the fastest |")
    print("|---|---|---|")
    for method, ms in times.items():
        print(f"| {method} | {ms:.2f} | {ms / fastest:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
