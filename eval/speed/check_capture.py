"""Captured steps against eager ones on a GPU, and kill and resume in both modes.

    python eval/speed/check_capture.py --work FOLDER          # about a minute on an H100

The eager run is done twice: kernels whose order of sums is not fixed differ from run to run, and
AdamW makes much of small differences. The captured run must be as near as that, or within the
stated tolerance of the change that training made.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("TQDM_DISABLE", "1")

from common import build_unet, make_step, now  # noqa: E402
from random_models import FAMILIES, build_pipeline, write_photos  # noqa: E402

from dreamtune.config import Config  # noqa: E402
from dreamtune.fast.graphs import CapturedStep  # noqa: E402
from dreamtune.training.train import Interrupted, train  # noqa: E402
from dreamtune.training.wave import Wave  # noqa: E402

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2}
Parameters = dict[str, torch.Tensor]


def distance(a: Parameters, b: Parameters, start: Parameters) -> float:
    """Norm of the difference over the norm of b's way from the start."""
    apart = sum((a[n] - b[n]).double().square().sum().item() for n in a)
    way = sum((b[n] - start[n]).double().square().sum().item() for n in a)
    return float((apart / way) ** 0.5) if way else float("nan")


def steps_of(
    method: str, slots: int, dtype: torch.dtype, args: argparse.Namespace, captured: bool
) -> tuple[Parameters, Parameters, torch.Tensor, float]:
    """(start, end, losses (k, S), ms a step)."""
    unet = build_unet(args.size, device=args.device, dtype=dtype, family=args.family)
    cache_dtype = torch.promote_types(dtype, torch.float32)
    adapter, step = make_step(unet, method, slots, batch=2, cache_dtype=cache_dtype)
    cuda = args.device.startswith("cuda")
    run: Callable[[int, float], None] = CapturedStep(step) if captured else step

    def parameters() -> Parameters:
        return {n: p.detach().clone() for n, p in adapter.named_parameters()}

    start, losses = parameters(), []
    run(0, 1.0)
    losses.append(step.loss.clone())
    began = now(cuda)
    for k in range(1, args.steps):
        run(k, 1.0)
        losses.append(step.loss.clone())
    ms = (now(cuda) - began) / (args.steps - 1) * 1e3
    return start, parameters(), torch.stack(losses), ms


def compare_steps(args: argparse.Namespace) -> bool:
    print("| method | slots | dtype | eager, again | captured | loss | tolerance | ", end="")
    print("eager ms | captured ms | |\n|---|---|---|---|---|---|---|---|---|---|")
    cases = [(m, s, torch.float32) for m in args.methods.split(",") for s in (1, 4)]
    cases += [("delora", 4, torch.float64), ("delora", 1, torch.bfloat16)]
    good = True
    for method, slots, dtype in cases:
        start, first, losses, eager_ms = steps_of(method, slots, dtype, args, False)
        _, second, _, _ = steps_of(method, slots, dtype, args, False)
        captured = args.device.startswith("cuda")
        _, ours, our_losses, ms = steps_of(method, slots, dtype, args, captured)
        noise, apart = distance(second, first, start), distance(ours, first, start)
        loss = ((our_losses - losses).abs() / losses.abs()).max().item()
        ok = apart <= max(TOLERANCES[dtype], 5 * noise)
        good &= ok
        name = str(dtype).removeprefix("torch.")
        print(
            f"| {method} | {slots} | {name} | {noise:.1e} | {apart:.1e} | {loss:.1e} | "
            f"{TOLERANCES[dtype]:.0e} | {eager_ms:.2f} | {ms:.2f} | {'ok' if ok else 'FAILED'} |",
            flush=True,
        )
    return good


def killed(config: Config, at: int) -> Any:
    """A run that is stopped before step `at`, and continued."""
    original = Wave.advance

    def advance(wave: Wave, k: int) -> None:
        if k == at:
            raise KeyboardInterrupt
        original(wave, k)

    Wave.advance = advance  # type: ignore[method-assign]
    try:
        train(config)
    except Interrupted:
        pass
    finally:
        Wave.advance = original  # type: ignore[method-assign]
    return train(Config(**{**config.to_dict(), "resume_from_checkpoint": "latest"}))


def compare_runs(args: argparse.Namespace) -> bool:
    """Whole, killed and resumed, in both modes: all four adapters agree."""
    from safetensors.torch import load_file

    work = args.work / time.strftime("%Y%m%d-%H%M%S")
    build_pipeline(work / "base", args.size, device=args.device, family=args.family)
    write_photos(work / "photos", side=128 if args.size == "small" else 16)
    ends: dict[str, Parameters] = {}
    modes = ["auto", "off"] if args.device.startswith("cuda") else ["off"]
    for mode in modes:
        for kind in ("whole", "killed"):
            config = Config(
                pretrained_model_name_or_path=str(work / "base"),
                instance_data_dir=str(work / "photos"), instance_prompt="a sks dog",
                validation_prompt=["a {} on the beach"], num_inference_steps=2, dino="none",
                clip="none", max_train_steps=args.steps, validation_steps=args.steps // 2 - 3,
                output_dir=str(work / f"{mode}-{kind}"), device=args.device, capture=mode,
                mixed_precision="no",
            )  # fmt: skip
            result = train(config) if kind == "whole" else killed(config, args.steps // 2)
            ends[f"{mode} {kind}"] = load_file(result.run_dir / "adapter.safetensors")
    reference = ends[f"{modes[-1]} whole"]
    start = {n: reference.get(f"{n}0", tensor) for n, tensor in reference.items()}  # A0 of A
    good = True
    for name, end in ends.items():
        apart = distance(end, reference, start)
        ok = apart < 5 * TOLERANCES[torch.float32]
        good &= ok
        verdict = "ok" if ok else "FAILED"
        print(f"| run: {name}, from {modes[-1]} whole | {apart:.1e} | {verdict} |", flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--methods", default="lora,delora,ether,ether+")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--size", default="small", choices=("tiny", "small", "full"))
    parser.add_argument("--family", default="sd", choices=tuple(FAMILIES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    good = compare_steps(args)
    good &= compare_runs(args)
    print("ok" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
