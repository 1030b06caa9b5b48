"""How much of one subject gets into the other's place in a picture, with and without regions.

    python eval/bleeding.py --work DIR
    python eval/bleeding.py --work DIR --smoke   # one pair, two steps: a check of this

The embedded base, and the first 20 subjects to report on as 10 pairs, in the order of the file.
Each subject is trained for 60 steps by DeLoRA. Of "a sks A next to a sks B on a red background" the
base draws A on the left. Both adapters are at full strength: everywhere; each in its half by
`dreamtune.Region`; the halves exchanged, with the same prompt, and with a prompt for each half.
Score: mean DINO cosine of a half of the picture to the 3 photos of a subject that were held out of
training; of the subject that belongs there, and of the other. Intervals: 95%, bootstrap over pairs
of subjects. Run again it goes on. Writes DIR/bleeding.json, DIR/sheet.png and prints its table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "eval")]

from embedded_subjects import GUIDANCE, opened, trained  # noqa: E402

import dreamtune  # noqa: E402
from dreamtune import embedded  # noqa: E402
from dreamtune.evaluation.statistics import estimate  # noqa: E402
from dreamtune.files.whole import whole  # noqa: E402
from dreamtune.metrics.dino import Dino  # noqa: E402
from dreamtune.models.load import load_base  # noqa: E402
from dreamtune.models.sample import sample  # noqa: E402

PROMPT = "a {} next to a {} on a red background"
OWN_PROMPT = "a {0} next to a {0} on a red background"  # of the picture's composition
HALVES = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
CONDITIONS = ("everywhere", "regions", "exchanged", "exchanged, with prompts")
TRAINING: dict[str, Any] = {
    "max_train_steps": 60, "checkpointing_steps": 0, "dino": "none", "clip": "none",
    "validation_steps": 0, "validation_prompt": ["a {}"], "num_inference_steps": 1,
}  # fmt: skip
SEEDS = range(100, 104)
PAIRS = 10
Pair = tuple[embedded.Subject, embedded.Subject]


@dataclass(frozen=True)
class Seen:
    """A half of a picture, or of a subject's photos: likeness to the subject that belongs there,
    and to the other of the pair."""

    condition: str
    pair: str
    subject: str
    seed: int
    own: float
    other: float

    @property
    def right(self) -> float:
        return float(self.own > self.other)


def pairs() -> list[Pair]:
    first = embedded.subjects("report")[: 2 * PAIRS]
    return list(zip(first[::2], first[1::2], strict=True))


def name_of(pair: Pair) -> str:
    return "+".join(subject.id for subject in pair)


def boxes(condition: str) -> Sequence[tuple[float, ...]]:
    """Of the first subject and the second."""
    return HALVES[::-1] if condition in CONDITIONS[2:] else HALVES


def row(pair: Pair, condition: str) -> dict[str, Any]:
    """The entry of `route`."""
    if condition == CONDITIONS[0]:
        return {subject.id: 1.0 for subject in pair}
    prompted = condition == CONDITIONS[3]
    return {
        subject.id: dreamtune.Region(
            box=box, prompt=OWN_PROMPT.format(subject.name) if prompted else None
        )
        for subject, box in zip(pair, boxes(condition))
    }


def draw(pipe: Any, pair: Pair, work: Path, seeds: Sequence[int], steps: int, **more: Any) -> None:
    """Pictures of all conditions that are not there yet, work/pictures/condition/pair/seed.png."""
    folders = {c: work / "pictures" / c / name_of(pair) for c in CONDITIONS}
    todo = {c: [s for s in seeds if not (f / f"{s}.png").is_file()] for c, f in folders.items()}
    if not any(todo.values()):
        return
    for subject in pair:
        run, _ = trained(subject, work / "runs" / subject.id, **{**TRAINING, **more})
        dreamtune.load(pipe, run, name=subject.id)
    prompt = PROMPT.format(*(subject.name for subject in pair))
    for condition, missing in todo.items():
        if not missing:
            continue
        with dreamtune.route(pipe, [row(pair, condition)] * len(missing)):
            made = sample(pipe, [prompt] * len(missing), missing, steps=steps, **GUIDANCE)
        for seed, picture in zip(missing, made):
            with whole(folders[condition] / f"{seed}.png") as partial:
                picture.save(partial, "png")
    for subject in pair:
        dreamtune.unload(pipe, subject.id)


def half(picture: Image.Image, box: Sequence[float]) -> Image.Image:
    """That part, centred on a square of its own mean colour: scorers crop what is no square."""
    part = picture.crop(tuple(round(x * s) for x, s in zip(box, picture.size * 2)))
    side = max(part.size)
    square = Image.new(
        "RGB", (side, side), part.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    )
    square.paste(part, ((side - part.width) // 2, (side - part.height) // 2))
    return square


def seen(pair: Pair, work: Path, seeds: Sequence[int], dino: Dino) -> list[Seen]:
    references = [dino.images(opened(subject.references)) for subject in pair]
    found = []
    for place, subject in enumerate(pair):
        own, other = references[place], references[1 - place]
        looked = {"photos": dino.images(opened(subject.photos))}
        for condition in CONDITIONS:
            folder = work / "pictures" / condition / name_of(pair)
            pictures = opened([folder / f"{seed}.png" for seed in seeds])
            looked[condition] = dino.images([half(p, boxes(condition)[place]) for p in pictures])
        for condition, features in looked.items():
            found += [
                Seen(
                    condition, name_of(pair), subject.id, number,
                    (row @ own.T).mean().item(), (row @ other.T).mean().item(),
                )
                for number, row in zip(seeds if condition in CONDITIONS else range(99), features)
            ]  # fmt: skip
    return found


def shown(values: Sequence[float], of: Sequence[Seen]) -> str:
    found = estimate(values, [s.pair for s in of], [s.seed for s in of])
    if found.low is None or found.high is None:
        return f"{found.mean:.3f}"
    return f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})"


def table(everything: Sequence[Seen]) -> str:
    """Of each condition, of the photos, and of each second condition minus the first, paired."""
    lines = [
        "| adapters | in its own half | in the other's half | halves nearer to their own | n |",
        "|---|---|---|---|---|",
    ]
    by = {c: [s for s in everything if s.condition == c] for c in (*CONDITIONS, "photos")}
    names = ("own", "other", "right")
    for condition, own in by.items():
        cells = [shown([getattr(s, name) for s in own], own) for name in names]
        lines.append(f"| {condition} | {' | '.join(cells)} | {len(own)} |")
    for first, second in (CONDITIONS[:2], CONDITIONS[2:]):
        before, after = by[first], by[second]
        cells = [
            shown([getattr(a, name) - getattr(b, name) for a, b in zip(after, before)], after)
            for name in names
        ]
        lines.append(f"| {second}: difference | {' | '.join(cells)} | {len(after)} |")
    return "\n".join(lines)


def sheet(chosen: Sequence[Pair], work: Path, seed: int) -> Image.Image:
    """A column a pair: a photo of each, then the conditions."""
    side, gap = 128, 4
    canvas = Image.new(
        "RGB", (len(chosen) * (side + gap), (2 + len(CONDITIONS)) * (side + gap)), "white"
    )
    for x, pair in enumerate(chosen):
        folders = [work / "pictures" / c / name_of(pair) for c in CONDITIONS]
        paths = [*(s.references[0] for s in pair), *(f / f"{seed}.png" for f in folders)]
        for y, picture in enumerate(opened(paths)):
            canvas.paste(picture.resize((side, side)), (x * (side + gap), y * (side + gap)))
    return canvas


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of all that is made")
    parser.add_argument("--smoke", action="store_true", help="one pair, two steps, one seed")
    args = parser.parse_args(argv)
    work = args.work.resolve()
    chosen, seeds, steps, more = pairs(), list(SEEDS), 25, {}
    if args.smoke:
        chosen, seeds, steps, more = chosen[:1], seeds[:1], 2, {"max_train_steps": 2}
    dino = Dino("embedded")
    with load_base("embedded").sampling() as pipe:
        for number, pair in enumerate(chosen, 1):
            draw(pipe, pair, work, seeds, steps, **more)
            print(f"{number} of {len(chosen)}: {name_of(pair)}", file=sys.stderr, flush=True)
    everything = [s for pair in chosen for s in seen(pair, work, seeds, dino)]
    with whole(work / "bleeding.json") as partial:
        partial.write_text(json.dumps([asdict(s) for s in everything], indent=1))
    with whole(work / "sheet.png") as partial:
        sheet(chosen, work, seeds[0]).save(partial, "png")
    print(table(everything))
    return 0


if __name__ == "__main__":
    sys.exit(main())
