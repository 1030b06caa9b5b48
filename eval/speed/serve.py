"""Requests of a service: each with an adapter of its own, as one routed batch through a sped-up
pipeline, and as stock diffusers takes them, one after another.

    python eval/speed/serve.py --compiled                 # on a GPU, SD 1.5 with random weights
    python eval/speed/serve.py --size embedded --requests 8 --many 0  # on a CPU, the embedded base

Also: what 8 adapters in one batch cost beside the bare base; how long an adapter's file takes to be
usable; what a change of routes takes; and what hundreds of registered adapters cost a call.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))

from common import build_unet, frozen, now  # noqa: E402
from random_models import CONFIGS, VAES, random_weights  # noqa: E402

import dreamtune  # noqa: E402
from dreamtune import embedded  # noqa: E402
from dreamtune.config import EMBEDDED  # noqa: E402
from dreamtune.fast.served import served  # noqa: E402
from dreamtune.models.quiet import quiet_diffusers  # noqa: E402

RANK = 16
MANY = 500


def build(size: str, device: str, dtype: torch.dtype) -> Any:
    """A pipeline that takes prompts as embeddings."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

    if size == EMBEDDED:
        pipe = StableDiffusionPipeline.from_pretrained(
            embedded.MODEL, text_encoder=None, tokenizer=None, torch_dtype=dtype
        ).to(device)
        pipe.set_progress_bar_config(disable=True)
        return pipe
    config = {**AutoencoderKL.load_config(CONFIGS / "v1" / "vae"), **VAES[size]}
    blocks = len(config["block_out_channels"])
    config |= {
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
    }
    with random_weights(1, device, dtype):
        vae = AutoencoderKL.from_config(config).eval()
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=None, tokenizer=None, scheduler=DDIMScheduler(),
        unet=frozen(build_unet(size, device=device, dtype=dtype)),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_loras(folder: Path, unet: Any, count: int) -> list[Path]:
    """Files of kohya's format in fp16, as trainers leave them."""
    from safetensors.torch import save_file

    found = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for name, layer in unet.named_modules():
            if not name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
                continue
            key = "lora_unet_" + name.replace(".", "_")
            out, width = layer.weight.shape
            down = torch.randn(RANK, width, generator=generator) / width**0.5
            up = torch.randn(out, RANK, generator=generator) * 0.02
            tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = down, up
            tensors[f"{key}.alpha"] = torch.tensor(float(RANK))
        found.append(folder / f"lora_{number}.safetensors")
        save_file({k: x.half() for k, x in tensors.items()}, found[-1])
    return found


class Bench:
    """Attributes: pipe; count of requests; steps of each."""

    def __init__(self, pipe: Any, count: int, steps: int, cuda: bool) -> None:
        self.pipe, self.count, self.steps, self.cuda = pipe, count, steps, cuda
        width = pipe.unet.config.cross_attention_dim
        g = torch.Generator().manual_seed(0)
        shape = (count, 77, width)
        kind = {"device": pipe.unet.device, "dtype": pipe.unet.dtype}
        self.prompts, self.negatives = torch.randn(2, *shape, generator=g).to(**kind)

    def call(self, first: int = 0, count: int | None = None, **more: Any) -> Any:
        end = first + (self.count if count is None else count)
        return self.pipe(
            prompt_embeds=self.prompts[first:end],
            negative_prompt_embeds=self.negatives[first:end],
            num_inference_steps=self.steps,
            generator=[torch.Generator().manual_seed(i) for i in range(first, end)],
            output_type="pt",
            **more,
        ).images

    def seconds(self, work: Callable[[], Any], repeats: int, warm_up: int = 1) -> float:
        for _ in range(warm_up):
            work()
        times = []
        for _ in range(repeats):
            began = now(self.cuda)
            work()
            times.append(now(self.cuda) - began)
        return median(times)


def ours(bench: Bench, files: list[Path], repeats: int) -> dict[str, float]:
    """Seconds of a routed batch: plain, and sped up where there is a GPU; and of the bare base."""
    pipe, names = bench.pipe, [f.stem for f in files]
    found = {"base, eager, one batch": bench.seconds(bench.call, repeats)}
    few = min(8, bench.count)
    found[f"base, eager, {few} rows"] = bench.seconds(lambda: bench.call(0, few), repeats)
    if bench.cuda:
        dreamtune.speed_up(pipe)
        found["base, sped up, one batch"] = bench.seconds(bench.call, repeats, 2)
        found[f"base, sped up, {few} rows"] = bench.seconds(lambda: bench.call(0, few), repeats, 2)
        dreamtune.slow_down(pipe)
    dreamtune.load_many(pipe, dict(zip(names, files)))

    def routed(count: int) -> None:
        with dreamtune.route(pipe, names[:count]):
            bench.call(0, count)

    found["routed, eager, one batch"] = bench.seconds(lambda: routed(bench.count), repeats)
    found[f"routed, eager, {few} rows"] = bench.seconds(lambda: routed(few), repeats)
    if bench.cuda:
        dreamtune.speed_up(pipe)
        found["routed, sped up, one batch"] = bench.seconds(lambda: routed(bench.count), repeats, 2)
        found[f"routed, sped up, {few} rows"] = bench.seconds(lambda: routed(few), repeats, 2)
        recorder = served(pipe.unet)
        assert recorder is not None
        count = recorder.recorded
        found["another route, sped up, first call"] = bench.seconds(
            lambda: _turned(bench, names), 1, 0
        )
        assert recorder.recorded == count, "a change of routes was recorded anew"
        found["the route's factors alone"] = _route_alone(bench, names, repeats)
    return found


def _turned(bench: Bench, names: list[str]) -> None:
    with dreamtune.route(bench.pipe, names[::-1]):
        bench.call()


@torch.no_grad()
def _route_alone(bench: Bench, names: list[str], repeats: int) -> float:
    """What a forward with another route takes more than the next with the same."""
    unet, rows = bench.pipe.unet, 2 * bench.count
    side = unet.config.sample_size
    kind = {"device": unet.device, "dtype": unet.dtype}
    x = torch.randn(rows, unet.config.in_channels, side, side, **kind)
    text = torch.cat([bench.negatives, bench.prompts])
    t = torch.tensor(500, device=unet.device)
    differences = []
    for turn in range(repeats + 2):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        with dreamtune.route(unet, order * 2):
            times = []
            for _ in range(4):
                began = now(True)
                unet(x, t, text, return_dict=False)
                times.append(now(True) - began)
        differences.append(times[0] - min(times[1:]))
    return median(differences[2:])


def loading(bench: Bench, files: list[Path], repeats: int) -> dict[str, float]:
    """Seconds from a file in the page cache to factors on the device."""
    pipe = bench.pipe
    times, near = [], []
    for turn in range(repeats + 2):
        began = now(bench.cuda)
        dreamtune.load_many(pipe, {"one more": files[turn % len(files)]})
        loaded = now(bench.cuda)
        dreamtune.set_adapters(pipe, {"one more": 1.0})
        near.append(now(bench.cuda) - loaded)
        times.append(now(bench.cuda) - began)
        dreamtune.unload(pipe, "one more")
    return {"a file, to usable": median(times[2:]), "of that, to the device": median(near[2:])}


def hundreds(bench: Bench, files: list[Path], count: int, repeats: int) -> dict[str, float]:
    """With so many on the shelf, in budgets that hold a tenth on the device and a half on the CPU.

    The files are those of the others, under names of their own.
    """
    pipe = bench.pipe
    size = dreamtune.get_adapters(pipe)[files[0].stem].nbytes
    began = now(bench.cuda)
    dreamtune.load_many(
        pipe,
        {f"more {number}": files[number % len(files)] for number in range(count)},
        device_budget=max(size * count // 10, size * bench.count),
        cpu_budget=size * count // 2,
    )
    found = {f"{count} files": now(bench.cuda) - began}
    names = [f"more {number}" for number in range(count)]

    def turn(number: int) -> None:
        rows = [names[(number * 37 + i * 11) % count] for i in range(bench.count)]
        with dreamtune.route(pipe, rows):
            bench.call()

    turn(0)
    turn(1)
    times = []
    for number in range(2, 2 + repeats):
        began = now(bench.cuda)
        turn(number)
        times.append(now(bench.cuda) - began)
    return found | {f"routed, of {count}": median(times)}


def stock(bench: Bench, files: list[Path]) -> dict[str, float]:
    """Stock diffusers, eager: every adapter loaded before, each request alone after its swap."""
    pipe = bench.pipe
    for file in files:
        pipe.load_lora_weights(file, adapter_name=file.stem)

    def requests(count: int) -> None:
        for number, file in enumerate(files[:count]):
            pipe.set_adapters(file.stem)
            bench.call(number, 1)

    found = {"stock, eager swap": bench.seconds(lambda: requests(bench.count), 1, 0)}
    pipe.unload_lora_weights()
    return found


def compiled(bench: Bench, files: list[Path]) -> dict[str, float]:
    """Stock diffusers compiled, its hot swap before each request."""
    pipe = bench.pipe
    pipe.enable_lora_hotswap(target_rank=RANK)
    pipe.load_lora_weights(files[0], adapter_name="one")
    pipe.unet.compile()

    def requests() -> None:
        for number, file in enumerate(files):
            pipe.load_lora_weights(file, hotswap=True, adapter_name="one")
            bench.call(number, 1)

    began = now(bench.cuda)
    bench.call(0, 1)
    found = {"compiling": now(bench.cuda) - began}
    return found | {"stock, compiled, hot swap": bench.seconds(requests, 1, 0)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="full", choices=("full", "small", "tiny", EMBEDDED))
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--many", type=int, default=MANY, help="adapters on the shelf; 0: none")
    parser.add_argument("--compiled", action="store_true", help="also stock diffusers compiled")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    cuda = args.device.startswith("cuda")
    dtype = torch.bfloat16 if cuda else torch.float32
    found: dict[str, float] = {}

    def keep(part: dict[str, float]) -> None:
        found.update(part)
        for name, seconds in part.items():
            print(f"| {name} | {seconds:.4f} s |", flush=True)
        if args.out:
            args.out.write_text(json.dumps(found, indent=1))

    with tempfile.TemporaryDirectory() as folder, quiet_diffusers():
        warnings.simplefilter("ignore", FutureWarning)
        began = time.perf_counter()
        bench = Bench(build(args.size, args.device, dtype), args.requests, args.steps, cuda)
        files = write_loras(Path(folder), bench.pipe.unet, args.requests)
        print(torch.cuda.get_device_name() if cuda else "CPU", "torch", torch.__version__)
        print(f"{args.requests} requests, {args.steps} steps, rank {RANK}, guidance; built in")
        print(f"{time.perf_counter() - began:.0f} s\n\n| | |\n|---|---|")
        keep(ours(bench, files, args.repeats))
        keep(loading(bench, files, 10))
        if args.many:
            keep(hundreds(bench, files, args.many, args.repeats))
        for name in list(dreamtune.get_adapters(bench.pipe)):
            dreamtune.unload(bench.pipe, name)
        if cuda:
            dreamtune.slow_down(bench.pipe)
        keep(stock(bench, files))
        if args.compiled:
            keep(compiled(bench, files))
    print(f"\n{in_words(found, min(8, args.requests), cuda)}")
    return 0


def in_words(found: dict[str, float], few: int, cuda: bool) -> str:
    way = "sped up" if cuda else "eager"
    batch = found[f"routed, {way}, one batch"]
    lines = [
        f"stock one after another / routed batch, {way}: {found['stock, eager swap'] / batch:.2f}"
    ]
    if "stock, compiled, hot swap" in found:
        ratio = found["stock, compiled, hot swap"] / batch
        lines.append(f"stock compiled with hot swap / routed batch, {way}: {ratio:.2f}")
    for kind in dict.fromkeys((way, "eager")):
        ratio = found[f"routed, {kind}, {few} rows"] / found[f"base, {kind}, {few} rows"]
        lines.append(f"{few} adapters / bare base, {kind}: {ratio:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
