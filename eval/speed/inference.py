"""A UNet call of a pipeline: the base, an adapter on it in plain layers, the same sped up
(`dreamtune.speed_up`), and merged. Eager, as stock diffusers calls it.

    python eval/speed/inference.py --unet sd15 --batches 4,8
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))

from common import build_unet, count_kernels, frozen, median_ms  # noqa: E402

from dreamtune.injection.inject import inject  # noqa: E402


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--unet", default="sd15", choices=("sd15", "small", "tiny"))
    parser.add_argument("--batches", default="4,8", help="rows of the UNet: guidance doubles them")
    parser.add_argument("--methods", default="delora,lora,ether,ether+")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    cuda = args.device.startswith("cuda")
    size = {"sd15": "full"}.get(args.unet, args.unet)
    dtype = torch.bfloat16 if cuda else torch.float32
    unet = frozen(build_unet(size, device=args.device, dtype=dtype)).eval()
    config = unet.config
    kind = {"device": args.device, "dtype": dtype}
    print(torch.cuda.get_device_name() if cuda else "CPU", "torch", torch.__version__)
    print("Base, plain, sped up and merged in turn, twice; the smaller median of each.\n")
    print(
        "| method | rows | base ms | plain | ratio | sped up | ratio | merged | ratio "
        "| kernels of base, plain, sped up |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for batch in map(int, args.batches.split(",")):
        x = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size, **kind)
        text = torch.randn(batch, 77, config.cross_attention_dim, **kind)
        t = torch.tensor(500, device=args.device)

        def call(x=x, t=t, text=text) -> None:
            unet(x, t, text, return_dict=False)

        for method in args.methods.split(","):
            weights = [p.clone() for p in unet.parameters()]
            times: dict[str, list[float]] = {k: [] for k in ("base", "plain", "fast", "merged")}
            kernels = []
            for turn in range(2):
                times["base"].append(median_ms(call, cuda, args.repeats, 4))
                kernels += [count_kernels(call, cuda)] if turn else []
                adapter = inject(unet, method)
                times["plain"].append(median_ms(call, cuda, args.repeats, 4))
                kernels += [count_kernels(call, cuda)] if turn else []
                adapter.speed_up()
                times["fast"].append(median_ms(call, cuda, args.repeats, 4))
                kernels += [count_kernels(call, cuda)] if turn else []
                adapter.merge()
                times["merged"].append(median_ms(call, cuda, args.repeats, 4))
                for p, w in zip(unet.parameters(), weights, strict=True):
                    p.copy_(w)
            base = min(times.pop("base"))
            row = " | ".join(f"{min(ms):.1f} | {min(ms) / base:.3f}" for ms in times.values())
            counts = ", ".join(map(str, kernels))
            print(f"| {method} | {batch} | {base:.1f} | {row} | {counts} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
