"""One subject whole, from the command to the exported file, in a process of its own.

python eval/speed/run.py --work FOLDER                     # on a GPU: 1,000 steps, 5 scorings
python eval/speed/run.py --work FOLDER --size tiny --steps 8
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))

from common import ROOT  # noqa: E402
from random_models import build_clip, build_dino, build_pipeline, write_photos  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", default="full", choices=("tiny", "small", "full"))
    parser.add_argument("--method", default="delora")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    work, out = args.work, args.work / "whole"
    if not (work / "base" / "model_index.json").is_file():
        dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
        build_pipeline(work / "base", args.size, device=args.device, dtype=dtype)
    if not (work / "dino").is_dir():
        build_clip(work / "clip", args.size)
        build_dino(work / "dino", args.size)
    if not (work / "photos").is_dir():
        write_photos(work / "photos", side={"tiny": 16, "small": 128, "full": 512}[args.size])
    shutil.rmtree(out, ignore_errors=True)
    flags = {
        "pretrained_model_name_or_path": work / "base", "instance_data_dir": work / "photos",
        "instance_prompt": "a sks dog", "dino": work / "dino", "clip": f"local-dir:{work / 'clip'}",
        "method": args.method, "max_train_steps": args.steps, "validation_steps": args.steps // 4,
        "output_dir": out, "device": args.device,
    }  # fmt: skip
    command = [sys.executable, str(Path(__file__).with_name("timed_train.py"))]
    command += [str(work / "parts.json"), "train"]
    command += [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT)
    total = time.perf_counter() - began
    if done.returncode:
        return done.returncode
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    scoring = sum(r["scoring_seconds"] for r in records)
    loop = records[-1]["seconds"]
    parts = json.loads((work / "parts.json").read_text())
    print("\n| part | s |\n|---|---|")
    print(f"| from the command to the exported file | {total:.1f} |")
    print(f"| start, load, cache, and after the last scoring | {total - loop:.1f} |")
    for name, seconds in parts.items():
        print(f"| of these: {name} | {seconds:.2f} |")
    print(f"| {len(records)} scorings of 8 images | {scoring:.1f} |")
    print(f"| {args.steps} steps, checkpoints | {loop - scoring:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
