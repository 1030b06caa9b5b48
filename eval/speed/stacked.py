"""Stacked runs: milliseconds a subject-step with 1 to 32 slots in one captured step.

python eval/speed/stacked.py --unet sd15 --slots 1,2,4,8,16,32
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from common import build_unet, make_step, median_ms  # noqa: E402

from dreamtune.capture import CapturedStep  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--unet", default="sd15", choices=("sd15", "small", "tiny"))
    parser.add_argument("--slots", default="1,2,4,8,16,32")
    parser.add_argument("--methods", default="delora")
    parser.add_argument("--batch", type=int, default=1, help="rows a slot")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    cuda = args.device.startswith("cuda")
    size = {"sd15": "full"}.get(args.unet, args.unet)
    print("| method | slots | ms a step | ms a subject-step | peak GiB |\n|---|---|---|---|---|")
    for method in args.methods.split(","):
        for slots in map(int, args.slots.split(",")):
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
            dtype = torch.bfloat16 if cuda else torch.float32
            unet = build_unet(size, device=args.device, dtype=dtype)
            if args.channels_last:
                unet.to(memory_format=torch.channels_last)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            step = make_step(unet, method, slots, args.batch)[1]
            run: Any = CapturedStep(step) if cuda else step
            counter = iter(range(10**9))
            try:
                ms = median_ms(lambda run=run, k=counter: run(next(k), 1.0), cuda, args.repeats)
            except RuntimeError as error:
                if "out of memory" not in str(error):
                    raise
                print(f"| {method} | {slots} | out of memory | | |")
                break
            peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
            print(f"| {method} | {slots} | {ms:.1f} | {ms / slots:.2f} | {peak:.2f} |", flush=True)
            del unet, step, run
    return 0


if __name__ == "__main__":
    sys.exit(main())
