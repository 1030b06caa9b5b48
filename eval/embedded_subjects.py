"""What training does to subjects of the embedded base, on prompts and photos it was not chosen by.

    python eval/embedded_subjects.py quickstart --work DIR   # the table of the README
    python eval/embedded_subjects.py tunability --work DIR   # a bar of the embedded base
    python eval/embedded_subjects.py quickstart --work DIR --smoke   # either, in seconds

quickstart: `dreamtune train` with its defaults on each development subject; the best checkpoint and
the base make the same 32 pictures (8 prompts that did not choose the checkpoint x 4 seeds). Image
score: mean DINO cosine to the 3 photos held out of training. Prompt score: CLIP-T with the own
prompt minus the mean of the other prompts'. Intervals: 95%, bootstrap over prompts.

tunability: LoRA of rank 8, 300 steps; of 25 new pictures a subject, how many the image scorer finds
nearest to the photos of this subject among all held-out ones.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import dreamtune
from dreamtune import embedded
from dreamtune.config import Config
from dreamtune.metrics import Scorers, without_identifier
from dreamtune.models.load import load_base
from dreamtune.models.sample import grid, sample
from dreamtune.training.train import train

GUIDANCE: dict[str, Any] = {"guidance_scale": 4.0, "guidance_rescale": 0.3}


@dataclass(frozen=True)
class Size:
    """How much is made: of pictures, and of what is trained where that is not the default."""

    prompts: Sequence[str] = tuple(embedded.prompts()[1::3][:8])
    all_prompts: Sequence[str] = tuple(embedded.prompts())
    seeds: range = range(100, 104)
    steps: int = 25
    training: Mapping[str, Any] = field(default_factory=dict)


FULL = Size()
SMOKE = Size(
    FULL.prompts[:2], FULL.all_prompts[:2], range(100, 102), 1,
    {"max_train_steps": 2, "validation_steps": 2, "num_inference_steps": 1,
     "validation_prompt": ["a {}"], "num_validation_images": 2},
)  # fmt: skip


def trained(
    subject: embedded.Subject, folder: Path, **settings: Any
) -> tuple[Path, dict[str, Any]]:
    """Folder of the run, its best step and its seconds; a finished run is used again."""
    log = folder / "finished.json"
    if not log.is_file():
        begin, source = time.time(), f"embedded:{subject.id}"
        result = train(
            Config(instance_data_dir=source, output_dir=str(folder), device="cpu", **settings)
        )
        log.write_text(json.dumps({"step": result.best_step, "seconds": time.time() - begin}))
    return folder, json.loads(log.read_text())


def pictures(
    pipe: Any,
    subject: embedded.Subject,
    adapter: Path | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
) -> list[Image.Image]:
    """One picture for each prompt and seed, prompt by prompt."""
    rows, numbers = grid([p.format(subject.name) for p in prompts], list(seeds))
    loaded = dreamtune.load(pipe, adapter) if adapter else None
    made = sample(pipe, rows, numbers, steps=steps, **GUIDANCE)
    if loaded is not None:
        loaded.eject()
    return made


def opened(paths: list[Path]) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in paths]


def bootstrap(rows: torch.Tensor, draws: int = 10_000) -> tuple[float, float, float]:
    """Mean of rows (prompts, seeds) with a 95% interval, prompts drawn with replacement."""
    means = rows.mean(1)
    generator = torch.Generator().manual_seed(0)
    picked = means[torch.randint(len(means), (draws, len(means)), generator=generator)].mean(1)
    low, high = picked.quantile(torch.tensor([0.025, 0.975], dtype=picked.dtype)).tolist()
    return means.mean().item(), low, high


def prompt_margin(
    scorers: Scorers, made: list[Image.Image], subject: embedded.Subject, size: Size
) -> float:
    """CLIP-T with the own prompt minus the mean with the others."""
    texts = [without_identifier(p.format(subject.name), subject.identifier) for p in size.prompts]
    clip = scorers.extractors["clip"]
    table = clip.images(made) @ clip.texts(texts).T
    own = torch.arange(len(texts)).repeat_interleave(len(size.seeds))
    mine = table[torch.arange(len(made)), own]
    return (mine - (table.sum(1) - mine) / (len(texts) - 1)).mean().item()


def quickstart(
    subjects: list[embedded.Subject], work: Path, scorers: Scorers, pipe: Any, size: Size = FULL
) -> None:
    columns = "subject|step|base|best checkpoint|photos|difference (95%)|gap closed|prompt kept"
    print("| " + columns.replace("|", " | ") + " | seconds |\n" + "|---" * 9 + "|")
    differences, dino = [], scorers.extractors["dino"]
    for subject in subjects:
        run, done = trained(subject, work / "quickstart" / subject.id, **size.training)
        references = dino.images(opened(subject.references))
        photos = (dino.images(opened(subject.photos)) @ references.T).mean().item()
        made = [
            pictures(pipe, subject, adapter, size.prompts, size.seeds, size.steps)
            for adapter in (None, run / "best")
        ]
        similar = [(dino.images(m) @ references.T).mean(1).double() for m in made]
        base, ours = (row.view(len(size.prompts), len(size.seeds)) for row in similar)
        mean, low, high = bootstrap(ours - base)
        differences.append(ours - base)
        margins = [prompt_margin(scorers, m, subject, size) for m in made]
        cells = [
            subject.id,
            str(done["step"]),
            *(f"{x:.3f}" for x in (base.mean().item(), ours.mean().item(), photos)),
            f"{mean:+.3f} ({low:+.3f} to {high:+.3f})",
            f"{mean / (photos - base.mean().item()):.0%}",
            f"{margins[1] / margins[0]:.0%}",
            f"{done['seconds']:.0f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
        sheet(subject, made, work / "quickstart" / f"{subject.id}.png", len(size.seeds))
    mean, low, high = bootstrap(torch.cat(differences))
    n = f"{len(subjects)} x {len(size.prompts)} x {len(size.seeds)}"
    print(f"\nall {len(subjects)}: {mean:+.3f} ({low:+.3f} to {high:+.3f}), n = {n}")


def sheet(subject: embedded.Subject, made: list[list[Image.Image]], path: Path, each: int) -> None:
    """Photos, then base and best checkpoint for every prompt, the first of `each` seeds."""
    photos, gap = opened(subject.photos), 4
    side = photos[0].width
    rows = [photos, *(m[::each] for m in made)]
    canvas = Image.new("RGB", (len(max(rows, key=len)) * (side + gap), 3 * (side + gap)), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            canvas.paste(picture, (x * (side + gap), y * (side + gap)))
    canvas.save(path)


def tunability(
    subjects: list[embedded.Subject],
    work: Path,
    scorers: Scorers,
    pipe: Any,
    base: str = "embedded",
    steps: int = 300,
    size: Size = FULL,
) -> None:
    """Prints, for each subject, how many of its new pictures the image scorer takes for it.

    pipe: of `base`, which is what is trained on: a rebuild that is not in the package yet, say.
    """
    everyone, dino = embedded.subjects(), scorers.extractors["dino"]
    known = torch.stack([dino.images(opened(s.photos + s.references)).mean(0) for s in everyone])
    known = torch.nn.functional.normalize(known, dim=1)
    totals, prompts = [0, 0], size.all_prompts
    steps = size.training.get("max_train_steps", steps)
    print(f"| subject | base | LoRA rank 8, {steps} steps | of pictures |\n|---|---|---|---|")
    for subject in subjects:
        settings = {
            "pretrained_model_name_or_path": base, "method": "lora", "options": {"rank": 8},
            "learning_rate": 2e-3, "max_train_steps": steps, "checkpointing_steps": 0,
            **size.training, "dino": "none", "clip": "none", "validation_steps": 0,
        }  # fmt: skip
        run, _ = trained(subject, work / "tunability" / subject.id, **settings)
        me, hits = [s.id for s in everyone].index(subject.id), []
        for adapter in (None, run):
            made = pictures(pipe, subject, adapter, prompts, [200], size.steps)
            hits.append(((dino.images(made) @ known.T).argmax(1) == me).sum().item())
        for i, h in enumerate(hits):
            totals[i] += h
        print(f"| {subject.id} | {hits[0]} | {hits[1]} | {len(prompts)} |", flush=True)
    n = len(subjects) * len(prompts)
    shares = ", ".join(
        f"{name} {t / n:.1%}" for name, t in zip(("base", "tuned"), totals, strict=True)
    )
    print(f"retrieved among {len(everyone)}: {shares}, n = {n} (bar 60%)")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measure", choices=("quickstart", "tunability"))
    parser.add_argument(
        "--work", type=Path, required=True, help="runs and pictures; finished ones are used again"
    )
    parser.add_argument("--split", choices=("dev", "report"), default="dev")
    parser.add_argument(
        "--smoke", action="store_true", help="one subject, two steps, two prompts: a check of this"
    )
    args = parser.parse_args(argv)
    scorers = Scorers.load({"dino": "embedded", "clip": "embedded"})
    with load_base("embedded").sampling() as pipe:
        measure = quickstart if args.measure == "quickstart" else tunability
        subjects = embedded.subjects(args.split)[: 1 if args.smoke else None]
        measure(subjects, args.work, scorers, pipe, size=SMOKE if args.smoke else FULL)


if __name__ == "__main__":
    main()
