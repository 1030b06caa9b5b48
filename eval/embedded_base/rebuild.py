"""Make the embedded base again, on one GPU: `python -m embedded_base.rebuild --work DIR` in eval/.

Stages: sprites, tokenizer, autoencoder, base, clip, dino, export, bars. Every stage resumes from
the state in `--work`; `--seconds` stops in time and leaves the state (files of at most 16 MiB).
`--smoke` runs every stage for two steps on the CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from . import captions, networks, sources, stages
from .stages import SMOKE, Plan

STAGES = ("sprites", "tokenizer", "autoencoder", "base", "clip", "dino", "export", "bars")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="downloads, sprites and training state"
    )
    parser.add_argument("--out", type=Path, help="where the model goes (default: WORK/embedded)")
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated, in order")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop training after this long"
    )
    parser.add_argument(
        "--fit", action="store_true", help="shorten a stage's schedule to what fits into --seconds"
    )
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument(
        "--smoke", action="store_true", help="two steps of everything, eight concepts"
    )
    parser.add_argument(
        "--plan", type=json.loads, default={}, help='JSON, for example {"base_steps": 1000}'
    )
    args = parser.parse_args(argv)
    unknown = set(args.stages.split(",")) - set(STAGES)
    if unknown:
        parser.error(f"unknown stages {sorted(unknown)}; allowed: {', '.join(STAGES)}")
    return args


def _train(stage: str, args: argparse.Namespace, plan: Plan, seconds: float) -> bool:
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    # trying kernels takes as long as 500 steps
    torch.backends.cudnn.benchmark = stage in ("autoencoder", "base")
    torch.manual_seed(STAGES.index(stage))
    begin = time.time()
    scenes = stages.scenes_for(args.work / "sprites.npz", args.work / "tokenizer", args.device)
    left = seconds - (time.time() - begin)
    state = args.work / "state"
    if stage == "autoencoder":
        return stages.train_autoencoder(scenes, plan, state, left, args.fit)
    if stage == "base":
        base = stages.Base(scenes, plan)
        base.warm_up()
        # that stage may run beside this one's compilation
        while not (state / "autoencoder.json").is_file():
            time.sleep(0.5)
        vae = stages.load_autoencoder(scenes, state)
        print(f"[base] ready after {time.time() - begin:.0f} s", flush=True)
        return base.train(vae, state, seconds - (time.time() - begin), args.fit)
    if stage == "clip":
        return stages.train_clip(scenes, plan, state, left, args.fit)
    return stages.DINO(scenes, plan).train(plan, state, left, args.fit)


def export(args: argparse.Namespace, plan: Plan) -> None:
    """Write `model/`, `clip/` and `dino/` from the averaged weights."""
    from .training import restore

    scenes = stages.scenes_for(args.work / "sprites.npz", args.work / "tokenizer", args.device)
    state, out, tokenizer = args.work / "state", args.out, args.work / "tokenizer"
    vae, base = stages.load_autoencoder(scenes, state), stages.Base(scenes, plan)
    restore("base", {"unet": base.unet, "text": base.text}, state)
    networks.write_pipeline(out / "model", tokenizer, vae.cpu(), base.text.cpu(), base.unet.cpu())
    clip, dino = networks.clip(), stages.DINO(scenes, Plan(dino_batch=1))
    restore("clip", {"clip": clip}, state)
    networks.write_clip(out / "clip", tokenizer, clip.cpu())
    restore("dino", {"vit": dino.vit, "head": dino.head, "pair": dino.pair}, state)
    networks.write_dino(out / "dino", dino.vit.cpu())


def main(argv: list[str] | None = None) -> None:
    import torch

    args = parse(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.out = args.out or args.work / "embedded"
    plan = Plan(**{**(vars(SMOKE) if args.smoke else {}), **args.plan})
    end = time.time() + args.seconds
    for stage in args.stages.split(","):
        if stage == "bars" and args.smoke:  # they speak of concepts that the smoke form leaves out
            continue
        begin = time.time()
        if stage == "sprites":
            if not (args.work / "sprites.npz").is_file():
                sources.pack(
                    args.work / "downloads",
                    args.work / "sprites.npz",
                    limit=8 if args.smoke else None,
                )
        elif stage == "tokenizer":
            from .scenes import read_sprites

            if not (args.work / "tokenizer").is_dir():
                table = read_sprites(args.work / "sprites.npz")[1]
                captions.write_tokenizer([row[0] for row in table], args.work / "tokenizer")
        elif stage == "export":
            export(args, plan)
        elif stage == "bars":
            from .bars import measure

            measure(args)
        elif not _train(stage, args, plan, end - time.time()):
            print(f"stopped in stage {stage}; the same command goes on from here")
            return
        print(f"[{stage}] {time.time() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
