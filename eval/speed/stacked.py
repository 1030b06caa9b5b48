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

sys.path.append(str(Path(__file__).parent))

from common import build_unet, make_step, median_ms  # noqa: E402
from others import add_peft, plain_step  # noqa: E402

from dreamtune.fast.graphs import CapturedStep  # noqa: E402


def peft_ms(size: str, args: argparse.Namespace, cuda: bool) -> float:
    """A step of PEFT's DeLoRA, rank 16, eager."""
    unet = build_unet(size, device=args.device, dtype=torch.bfloat16 if cuda else torch.float32)
    call = plain_step(unet, add_peft(unet, "delora", 16, 32), args.batch)
    return median_ms(call, cuda, args.repeats)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--unet", default="sd15", choices=("sd15", "small", "tiny"))
    parser.add_argument("--slots", default="1,2,4,8,16,32")
    parser.add_argument("--methods", default="delora")
    parser.add_argument("--batch", type=int, default=1, help="rows a slot")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--no-peft", action="store_true", help="without PEFT's DeLoRA beside ours")
    parser.add_argument("--compile", action="store_true", help="with compiled transformer blocks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    cuda = args.device.startswith("cuda")
    size = {"sd15": "full"}.get(args.unet, args.unet)
    print(torch.cuda.get_device_name() if cuda else "CPU", "torch", torch.__version__)
    alone = 0.0 if args.no_peft else peft_ms(size, args, cuda)
    print(f"PEFT's DeLoRA, one subject after the other: {alone:.1f} ms a subject-step\n")
    print("| method | slots | ms a step | ms a subject-step | PEFT / ours | peak GiB |")
    print("|---|---|---|---|---|---|")
    for method in args.methods.split(","):
        for slots in map(int, args.slots.split(",")):
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
            dtype = torch.bfloat16 if cuda else torch.float32
            unet = build_unet(size, device=args.device, dtype=dtype)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            step = make_step(unet, method, slots, args.batch, compiled=args.compile)[1]
            run: Any = CapturedStep(step) if cuda else step
            counter = iter(range(10**9))
            try:
                ms = median_ms(lambda run=run, k=counter: run(next(k), 1.0), cuda, args.repeats)
            except RuntimeError as error:
                if "out of memory" not in str(error):
                    raise
                print(f"| {method} | {slots} | out of memory | | | |")
                break
            peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
            ratio = alone * slots / ms
            row = f"{ms:.1f} | {ms / slots:.2f} | {ratio:.1f} | {peak:.2f}"
            print(f"| {method} | {slots} | {row} |", flush=True)
            del unet, step, run
    return 0


if __name__ == "__main__":
    sys.exit(main())
