"""A training step: ours, captured and eager, beside PEFT's and LyCORIS' adapters and the released
dense forms.

    python eval/speed/step.py --unet sd15 --batches 1,4,8,16        # on a GPU
    python eval/speed/step.py --unet sdxl --batches 1,4 --methods ours-lora,diffusers-lora
    python eval/speed/step.py --unet embedded --batches 1,4         # on the CPU

The transformers of the flow-matching families at 1024 pixels, one command each, which are to take
at most 200 s on one large GPU:

    python eval/speed/step.py --unet sd35-medium --batches 1 --repeats 5 \\
        --methods frozen,frozen-captured,ours-lora,ours-delora,diffusers-lora
    python eval/speed/step.py --unet z-image --batches 1 --repeats 5 \\
        --methods frozen,ours-lora,ours-delora,diffusers-lora
    python eval/speed/step.py --unet flux2-klein-4b --batches 1 --repeats 5 \\
        --methods frozen,frozen-captured,ours-lora,ours-delora,diffusers-lora

One process, the same network (seeded random weights, bf16 on a GPU) built anew for each row and
round, adapters on every attention projection that the trainer adapts. Ours draws its noise, clips,
and keeps adapters in float32; see `others` for how the rest runs. Rounds go through all rows by
turns; times are medians of the rounds' medians. "of ceiling" is the frozen step's matrix products,
forward and to the input's gradient, by the row's time, as a share of what one large product
reaches in the same process: the same work for all rows.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))

from common import (  # noqa: E402
    build_unet,
    count_kernels,
    count_products,
    frozen,
    make_step,
    median_ms,
    product_ceiling,
)
from flow_models import FLOWS  # noqa: E402
from kernel_kinds import kernel_kinds, print_kinds  # noqa: E402
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
from step_report import Measured, keep, print_ratios  # noqa: E402

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
UNETS = ("sd15", "sdxl", "embedded", "small", "tiny", "sdxl-small", "sdxl-tiny", *FLOWS)
QUICK = [
    "ours-lora", "ours-delora", "ours-ether+", "unfused-delora", "eager-delora", "peft-lora",
    "peft-delora",
]  # fmt: skip
FLOW = [
    "frozen", "frozen-captured", "ours-lora", "ours-delora", "eager-lora", "eager-delora",
    "diffusers-lora",
]  # fmt: skip
UNET_ONLY = ("lycoris", "dense")


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
        plain = kind == "eager" or args.device == "cpu"
        run: Any = step if plain else CapturedStep(step)
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


def dtype_on(device: str) -> torch.dtype:
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def make_unet(args: argparse.Namespace) -> Any:
    dtype = dtype_on(args.device)
    if args.unet in FLOWS:
        return FLOWS[args.unet].build(args.device, dtype)
    if args.unet == "embedded":
        return load_base("embedded", dtype=dtype, device=args.device).unet
    family = "sdxl" if args.unet.startswith("sdxl") else "sd"
    size = args.unet.removeprefix("sdxl-") if "-" in args.unet else args.unet
    size = "full" if size in ("sd15", "sdxl") else size
    return build_unet(size, device=args.device, dtype=dtype, family=family)


def measure(
    case: str, batch: int, args: argparse.Namespace, last: bool
) -> tuple[float, float, int]:
    """(median ms, peak GiB, kernels)."""
    cuda = args.device.startswith("cuda")
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
    unet = make_unet(args)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    call = make_call(case, unet, batch, args)
    ms = median_ms(call, cuda, args.repeats)
    if last and args.profile:
        args.kinds[f"{case}, batch {batch}"] = kernel_kinds(call)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return ms, peak, count_kernels(call, cuda) if last and not args.no_kernels else 0


def at_ceiling(batches: list[int], args: argparse.Namespace) -> dict[int, float]:
    """Batch -> milliseconds of the frozen step's matrix products at the speed of a large one."""
    ceiling = product_ceiling(args.device, dtype_on(args.device))
    print(f"One large matrix product: {ceiling / 1e12:.4g} TFLOP/s.")
    found, unet = {}, frozen(make_unet(args))
    for batch in batches:
        flops = count_products(plain_step(unet, [], batch))
        print(f"The frozen step, batch {batch}: {flops / 1e12:.4g} TFLOP.")
        found[batch] = flops / ceiling * 1e3
    return found


def rows_of(args: argparse.Namespace, error: Callable[[str], Any]) -> list[str]:
    """The rows that are asked for, without those that cannot be here."""
    flow = args.unet in FLOWS
    usual = FLOW if flow else QUICK if args.quick else EVERY
    cases = args.methods.split(",") if args.methods else usual
    unknown = [c for c in cases if c not in EVERY]
    if unknown:
        error(f"unknown: {', '.join(unknown)}; there are {', '.join(EVERY)}")
    if flow and (others := [c for c in cases if c.startswith(UNET_ONLY)]):
        error(f"of UNets alone: {', '.join(others)}; --unet is {args.unet}")
    if not args.device.startswith("cuda"):  # nothing is captured, or fused
        kinds = ("eager", "frozen", "peft", "lycoris", "dense", "diffusers")
        cases = [c for c in cases if c.split("-")[0] in kinds and c != "frozen-captured"]
    return cases


def print_table(
    cases: list[str], batches: list[int], args: argparse.Namespace
) -> dict[tuple[str, int], Measured]:
    """Rows as they are done, in the last round."""
    cuda = args.device.startswith("cuda")
    ideal = at_ceiling(batches, args)
    print(f"\n| step | batch | ms | peak GiB | of ceiling | {'kernels' if cuda else 'operators'} |")
    print("|---|---|---|---|---|---|")
    found: dict[tuple[str, int], list[tuple[float, float, int]]] = defaultdict(list)
    faults: dict[tuple[str, int], str] = {}
    for turn in range(args.rounds):
        for key in [(c, b) for c in cases for b in batches]:
            last = turn == args.rounds - 1
            try:
                if key not in faults:
                    found[key].append(measure(*key, args, last))
            except Exception as error:  # a table with a hole says more than none
                faults[key] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]} | | |"
            if not last:
                continue
            row = faults.get(key)
            if row is None:
                ms, peak = median(x[0] for x in found[key]), max(x[1] for x in found[key])
                row = f"{ms:.1f} | {peak:.2f} | {ideal[key[1]] / ms:.3f} | {found[key][-1][2]}"
            print(f"| {key[0]} | {key[1]} | {row} |", flush=True)
    return {
        k: Measured(median(x[0] for x in v), max(x[1] for x in v), ideal[k[1]])
        for k, v in found.items()
        if k not in faults
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--unet", default="sd15", choices=UNETS, help="or a transformer")
    parser.add_argument("--batches", default="1,4,8,16")
    parser.add_argument("--methods", help=f"of {','.join(EVERY)} [default: all]")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=12, help="in a round")
    parser.add_argument(
        "--rounds", type=int, help="by turns [default: 3 of a transformer, 1 of a UNet]"
    )
    parser.add_argument("--no-kernels", action="store_true", help="do not count kernels")
    parser.add_argument("--profile", action="store_true", help="kernels by kind, on a GPU")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write the rows there, as JSON")
    parser.add_argument("--quick", action="store_true", help="few methods, batches 1 and 8")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.block = 8 if args.unet.endswith("tiny") else 32
    if args.rounds is None:
        args.rounds = 3 if args.unet in FLOWS else 1
    if args.rounds < 1:
        parser.error(f"--rounds must be 1 or more, got {args.rounds}")
    if args.quick:
        args.batches, args.repeats = "1,8", 6
    cuda = args.device.startswith("cuda")
    if args.profile and not cuda:
        parser.error(f"--profile is of kernels on a GPU; --device is {args.device}")
    args.kinds = {}
    print(torch.cuda.get_device_name() if cuda else "CPU", "torch", torch.__version__)
    cases, batches = rows_of(args, parser.error), list(map(int, args.batches.split(",")))
    print("`ours`: the trainer's default step, captured and fused where it can be; `equal`: with")
    print(
        "factors of --rank; `compiled`: the transformer blocks compiled; `unfused`; `eager`: fused,"
    )
    print("not captured.")
    measured = print_table(cases, batches, args)
    times = {key: found.ms for key, found in measured.items()}
    if args.profile:
        print_kinds(args.kinds)
    if args.keep:
        keep(args.keep, args.unet, args.device, measured)
    print_ratios(times, {"ours": "frozen-captured", "eager": "frozen", "compiled": ""})
    return 0


if __name__ == "__main__":
    sys.exit(main())
