"""A training step: ours, captured and eager, beside PEFT's and LyCORIS' adapters and the released
dense forms.

    python eval/speed/step.py --unet sd15 --batches 1,4,8,16        # on a GPU
    python eval/speed/step.py --unet sdxl --batches 1,4 --methods ours-lora,diffusers-lora
    python eval/speed/step.py --unet embedded --batches 1,4         # on the CPU

One process, the same UNet (seeded random weights, bf16 on a GPU) built anew for each row, adapters
on every attention projection. Ours draws its noise, clips, and keeps adapters in float32; see
`others` for how the rest runs.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from common import build_unet, count_kernels, frozen, make_step, median_ms  # noqa: E402
from others import (  # noqa: E402
    DENSE,
    LYCORIS,
    PEFT,
    add_dense,
    add_lycoris,
    add_peft,
    captured_frozen,
    diffusers_step,
    plain_step,
)

from dreamtune.adapters import METHODS  # noqa: E402
from dreamtune.adapters.base import options_of  # noqa: E402
from dreamtune.fast.graphs import CapturedStep  # noqa: E402
from dreamtune.models.load import load_base  # noqa: E402

OURS = tuple(METHODS)
# Options that give factors of rank r; DeLoRA's are twice its rank, with the residual start.
EQUAL: dict[str, Callable[[int], dict[str, int]]] = {
    "lora": lambda r: {"rank": r},
    "delora": lambda r: {"rank": r // 2},
    "ether": lambda r: {"blocks": r},
    "ether+": lambda r: {"blocks": r // 4},
    "hra": lambda r: {"rank": r},
    "deft": lambda r: {"rank": r},
    "norm_bounded": lambda r: {"rank": r},
    "dora": lambda r: {"rank": r},
    "oft": lambda r: {},  # of full rank
}
EVERY = [
    *(f"ours-{m}" for m in OURS), *(f"equal-{m}" for m in OURS), *(f"compiled-{m}" for m in OURS),
    *(f"unfused-{m}" for m in OURS), *(f"eager-{m}" for m in OURS), "frozen",
    "frozen-captured", *(f"peft-{m}" for m in PEFT), *(f"lycoris-{m}" for m in LYCORIS),
    *(f"dense-{m}" for m in DENSE), "diffusers-lora",
]  # fmt: skip
UNETS = ("sd15", "sdxl", "embedded", "small", "tiny", "sdxl-small", "sdxl-tiny")
QUICK = [
    "ours-lora", "ours-delora", "ours-ether+", "unfused-delora", "eager-delora", "peft-lora",
    "peft-delora",
]  # fmt: skip


def make_call(case: str, unet: Any, batch: int, args: argparse.Namespace) -> Callable[[], None]:
    """The step of a row as a function without arguments."""
    kind, _, method = case.partition("-")
    if kind in ("ours", "equal", "compiled", "unfused", "eager"):
        options = {"rank": args.rank} if "rank" in options_of(METHODS[method].__init__) else {}
        if kind == "equal":
            options = EQUAL[method](args.rank)
        fused = False if kind == "unfused" else None
        _, step = make_step(
            unet, method, 1, batch, fused=fused, compiled=kind == "compiled", **options
        )
        run: Any = step if kind == "eager" or args.device == "cpu" else CapturedStep(step)
        counter = iter(range(10**9))
        return lambda: run(next(counter), 1.0)
    if kind == "frozen":
        frozen(unet)
        if method:
            return captured_frozen(unet, batch)
        return plain_step(unet, [], batch)
    if kind == "diffusers":
        return diffusers_step(unet, args.rank, batch)
    if kind == "peft":
        return plain_step(unet, add_peft(unet, method, args.rank, args.block), batch)
    if kind == "lycoris":
        return plain_step(unet, add_lycoris(unet, method, args.rank, args.block), batch)
    return plain_step(unet, add_dense(unet, method, args.rank), batch)


def make_unet(args: argparse.Namespace) -> Any:
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    if args.unet == "embedded":
        return load_base("embedded", dtype=dtype, device=args.device).unet
    family = "sdxl" if args.unet.startswith("sdxl") else "sd"
    size = args.unet.removeprefix("sdxl-") if "-" in args.unet else args.unet
    size = "full" if size in ("sd15", "sdxl") else size
    return build_unet(size, device=args.device, dtype=dtype, family=family)


def measure(case: str, batch: int, args: argparse.Namespace) -> tuple[float, float, int]:
    """(median ms, peak GiB, kernels)."""
    cuda = args.device.startswith("cuda")
    if cuda:
        torch.cuda.empty_cache()
    unet = make_unet(args)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    call = make_call(case, unet, batch, args)
    ms = median_ms(call, cuda, args.repeats)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    kernels = 0 if args.no_kernels else count_kernels(call, cuda)
    return ms, peak, kernels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--unet", default="sd15", choices=UNETS)
    parser.add_argument("--batches", default="1,4,8,16")
    parser.add_argument("--methods", help=f"of {','.join(EVERY)} [default: all]")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--no-kernels", action="store_true", help="do not count kernels")
    parser.add_argument("--quick", action="store_true", help="few methods, batches 1 and 8")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    cuda = args.device.startswith("cuda")
    args.block = 8 if args.unet.endswith("tiny") else 32
    if args.quick:
        args.batches, args.repeats = "1,8", 6
    cases = args.methods.split(",") if args.methods else QUICK if args.quick else EVERY
    unknown = [c for c in cases if c not in EVERY]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(EVERY)}")
    if not cuda:
        kinds = (
            "eager",
            "frozen",
            "peft",
            "lycoris",
            "dense",
            "diffusers",
        )  # nothing is captured, or fused
        cases = [c for c in cases if c.split("-")[0] in kinds and c != "frozen-captured"]
    print(torch.cuda.get_device_name() if cuda else "CPU", "torch", torch.__version__)
    print(
        "`ours`: the trainer's default step, captured and fused; `equal`: with factors of --rank;"
    )
    print("`compiled`: the transformer blocks compiled; `unfused`; `eager`: fused, not captured.\n")
    print(f"| step | batch | ms | peak GiB | {'kernels' if cuda else 'operators'} |")
    print("|---|---|---|---|---|")
    times: dict[tuple[str, int], float] = {}
    for case in cases:
        for batch in map(int, args.batches.split(",")):
            try:
                ms, peak, kernels = measure(case, batch, args)
                times[case, batch] = ms
                row = f"{ms:.1f} | {peak:.2f} | {kernels}"
            except Exception as error:  # a table with a hole says more than none
                row = f"{type(error).__name__}: {str(error).splitlines()[0][:120]} | |"
            print(f"| {case} | {batch} | {row} |", flush=True)
            gc.collect()
    print_ratios(times)
    return 0


def print_ratios(times: dict[tuple[str, int], float]) -> None:
    """Each peer's time over that of our step of the same method and batch; and what ours adds to
    its own frozen step, over what theirs adds to theirs.
    """
    for (case, batch), ms in times.items():
        kind, _, method = case.partition("-")
        if kind not in ("peft", "lycoris", "dense", "diffusers"):
            continue
        theirs = times.get(("frozen", batch))
        for ours, floor in (("ours", "frozen-captured"), ("eager", "frozen"), ("compiled", "")):
            mine, own = times.get((f"{ours}-{method}", batch)), times.get((floor, batch))
            if mine:
                print(f"{case} / {ours}-{method}, batch {batch}: {ms / mine:.2f}")
            if mine and own and theirs:
                added = f"{mine - own:.2f} ms for {ms - theirs:.2f} ms"
                share = (mine - own) / (ms - theirs)
                print(f"  above the frozen step: {added}, {share:.3f} of it")


if __name__ == "__main__":
    sys.exit(main())
