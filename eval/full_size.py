"""The trainer at full size: SD 1.5 or SDXL, CLIP ViT-B/32, DINO ViT-S/16, random weights, real
files.

    python eval/full_size.py --work FOLDER --photos PHOTOS            # on a GPU, about 2 minutes
    python eval/full_size.py --work FOLDER --family sdxl             # the same of SDXL
    python eval/full_size.py --work FOLDER --tiny                     # on the CPU, a check of this

Builds the models from their configs, writes them as folders, trains with scores, reloads the
exported LoRA with stock diffusers, and compares one image in float32. Needs no download.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from random_models import (  # noqa: E402
    FAMILIES,
    build_clip,
    build_dino,
    build_pipeline,
    write_photos,
)

from dreamtune.config import Config  # noqa: E402
from dreamtune.metrics.table import scores_of  # noqa: E402
from dreamtune.models.load import load_base  # noqa: E402
from dreamtune.models.sample import sample_tensor  # noqa: E402
from dreamtune.training.run import Run  # noqa: E402
from dreamtune.training.train import train  # noqa: E402
from dreamtune.training.wave import Wave  # noqa: E402

PROMPTS = ["a {} on the beach", "a {} in the snow", "a red {}", "a {} on a wooden floor"]
LORA = "pytorch_lora_weights.safetensors"


class Watch:
    """Seconds by part. Steps are timed one by one, the device waited for."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.parts, self.steps, self.peak = cuda, dict[str, float](), [], 0

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def part(self, name: str, work: Callable[[], Any]) -> Any:
        began = self.now()
        result = work()
        self.parts[name] = self.parts.get(name, 0.0) + self.now() - began
        return result

    def around(self, owner: type[Run] | type[Wave], name: str) -> None:
        """Times a method."""
        original = getattr(owner, name)

        def timed(run: Run | Wave, *args: Any) -> Any:
            if name != "advance":
                return self.part(f"run: {name.strip('_')}", lambda: original(run, *args))
            began = self.now()
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
            original(run, *args)
            self.steps.append(self.now() - began)
            if self.cuda:
                self.peak = max(self.peak, torch.cuda.max_memory_allocated())

        setattr(owner, name, timed)


def fresh(folder: Path) -> Path:
    names = (folder.with_name(f"{folder.name}-{i}") for i in range(1, 1000))
    return next(f for f in names if not f.exists())


def config_of(args: argparse.Namespace, work: Path, device: str) -> Config:
    options = {} if args.rank is None else {"rank": args.rank}
    return Config(
        pretrained_model_name_or_path=str(work / "base"),
        instance_data_dir=str(args.photos or work / "photos"),
        instance_prompt="a sks dog",
        dino=str(work / "dino"),
        clip=f"local-dir:{work / 'clip'}",
        method=args.method,
        options=options,
        max_train_steps=args.steps,
        validation_steps=max(1, args.steps // 2),
        validation_prompt=PROMPTS,
        num_inference_steps=2 if args.size == "tiny" else 10,
        train_batch_size=args.batch,
        checkpointing_steps=0,
        output_dir=str(fresh(work / f"run-{args.method}-{args.capture}")),
        device=device,
        capture=args.capture,
    )


def compare(work: Path, run_dir: Path, device: str, steps: int) -> dict[str, float]:
    """Largest difference of a pixel in [0, 1]: native file against stock LoRA, and what the adapter
    changes."""
    from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

    import dreamtune

    # as exact as float32 gets: differences of kernels are not what is asked here
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    base = load_base(str(work / "base"), device=device)
    sampler = base.sampling_defaults(base.resolution).sampler

    def image(pipe: Any) -> torch.Tensor:
        return sample_tensor(pipe, ["a sks dog on the beach"], [7], steps=steps)

    with base.sampling(sampler) as pipe:
        plain = image(pipe)
        adapter = dreamtune.load(pipe, run_dir / "adapter.safetensors")
        native = image(pipe)
        adapter.eject()
    stock: Any = DiffusionPipeline.from_pretrained(work / "base", torch_dtype=torch.float32)
    stock.to(device)
    if sampler == "dpm++":
        stock.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config)
    before = image(stock)
    stock.load_lora_weights(str(run_dir), weight_name=LORA)
    lora = image(stock)
    return {
        "base, ours and stock": (plain - before).abs().max().item(),
        "adapter: native file and LoRA in stock diffusers": (native - lora).abs().max().item(),
        "adapter and base": (native - plain).abs().max().item(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for models and the run")
    parser.add_argument("--photos", type=Path, help="folder of photos [default: drawn ones]")
    parser.add_argument("--method", default="delora")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", default="full", choices=("tiny", "small", "full"))
    parser.add_argument("--family", default="sd", choices=tuple(FAMILIES))
    parser.add_argument("--tiny", dest="size", action="store_const", const="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--capture", nargs="?", const="on", default="auto")
    parser.add_argument("--no-capture", dest="capture", action="store_const", const="off")
    args = parser.parse_args()
    work, cuda = args.work, args.device.startswith("cuda")
    watch = Watch(cuda)
    large = 1024 if args.family == "sdxl" else 512
    side = {"tiny": 16, "small": 128, "full": large}[args.size]
    dtype = torch.bfloat16 if cuda else torch.float32
    began = watch.now()
    sizes = {}
    if (work / "base" / "model_index.json").is_file() and (work / "photos").is_dir():
        print(f"models: those in {work}")
    else:
        sizes = watch.part(
            "build and write the base",
            lambda: build_pipeline(
                work / "base", args.size, device=args.device, dtype=dtype, family=args.family
            ),
        )
        sizes["CLIP"] = watch.part("write CLIP", lambda: build_clip(work / "clip", args.size))
        sizes["DINO"] = watch.part("write DINO", lambda: build_dino(work / "dino", args.size))
        write_photos(work / "photos", side=side)
    print("weights: " + ", ".join(f"{name} {n:.1f}M" for name, n in sizes.items()))
    for owner, name in (
        (Run, "__init__"), (Run, "open"), (Wave, "__init__"), (Wave, "advance"), (Wave, "score"),
        (Run, "save"), (Run, "finish"),
    ):  # fmt: skip
        watch.around(owner, name)
    if cuda:
        torch.cuda.empty_cache()
    result = watch.part("train, all of it", lambda: train(config_of(args, work, args.device)))
    steps = 2 if args.size == "tiny" else 10
    differences = watch.part(
        "reload and compare", lambda: compare(work, result.run_dir, args.device, steps)
    )
    return report(args, watch, result, differences, watch.now() - began)


def report(
    args: argparse.Namespace,
    watch: Watch,
    result: Any,
    differences: dict[str, float],
    total: float,
) -> int:
    device = torch.cuda.get_device_name() if watch.cuda else "CPU"
    print(f"\n{args.family}, {args.method}, {args.size} size, batch {args.batch}, ", end="")
    print(f"{args.steps} steps, {device},")
    print(f"torch {torch.__version__}, capture {args.capture}\n\n| part | |\n|---|---|")
    for name, seconds in watch.parts.items():
        print(f"| {name} | {seconds:.2f} s |")
    print(f"| first step, with warm-up and capture | {watch.steps[0]:.2f} s |")
    print(f"| step, median of the others | {median(watch.steps[1:]) * 1e3:.2f} ms |")
    print(f"| everything | {total:.1f} s |")
    if watch.cuda:
        print(f"| peak memory of a step | {watch.peak / 2**30:.2f} GiB |")
    for name, value in differences.items():
        print(f"| largest difference of a pixel, {name} | {value:.2e} |")
    for record in result.history:
        line = ", ".join(f"{k} {v:.4f}" for k, v in scores_of(record).items())
        print(f"| scores at {record['step']} | {line}, loss {record['loss'] or float('nan'):.4f} |")
    print(f"| chosen | {result.reason} |")
    base, reloaded, effect = differences.values()
    good = effect > 0 and max(base, reloaded) < max(2e-3, 0.02 * effect)
    print("ok" if good else "FAILED: the reloaded LoRA does not give the trained images")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
