"""The held-out subjects as photos: 5 to train on with captions, 3 references, and `subjects.json`.

The pictures are drawn from the sprites that nothing was trained on; turned, scaled, each on another
ground. Run once, before training: `python -m embedded_base.subjects --work DIR`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from PIL import Image

from .captions import COLORS, GROUNDS, NONCES, Scene, Wording
from .prompts import BENCHMARK
from .scenes import Scenes
from .sources import read_concepts, vocabulary

EMBEDDED = Path(__file__).parents[2] / "dreamtune" / "embedded"
IDENTIFIER = NONCES[0]


def photos(scenes: Scenes, sprite: int, seed: int, n: int = 8) -> tuple[torch.Tensor, list[str]]:
    """n pictures (n, 3, 128, 128) in [-1, 1] of one sprite on n grounds, and their captions."""
    torch.manual_seed(seed)
    plain = torch.randperm(len(COLORS))[:n]
    grounds = torch.tensor([0, 0, 0, *torch.randperm(len(GROUNDS) - 1)[: n - 3].add(1).tolist()])
    grounds = grounds[torch.randperm(n)]
    zero = torch.zeros(n, dtype=torch.long)
    scene = Scene(
        kind=zero,
        first=zero + sprite,
        second=zero + sprite,
        look=zero,
        size=zero,
        place=zero,
        ground=grounds,
        color=plain,
        color2=(plain + 1 + torch.randint(len(COLORS) - 1, (n,))) % len(COLORS),
    )
    said, unsaid = torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    words = scenes.grammar.strings(
        scenes.grammar.slots(scene, Wording(unsaid, unsaid, said, unsaid, zero + 1))
    )
    return scenes.render(scene, turns=0.4), words


def image(x: torch.Tensor) -> Image.Image:
    """One (3, H, W) picture in [-1, 1] as a PIL image."""
    return Image.fromarray(
        ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    )


def write(scenes: Scenes, concepts: dict[str, tuple[str, str]], out: Path) -> None:
    rows, seed, listed = [], 1000, vocabulary()["subjects"]
    for split in ("dev", "report"):
        for name in listed[split]:
            seed += 1
            if name in listed["withdrawn"]:
                continue
            style, word = name.split(" ", 1)
            key = f"{word} {style}".replace(" ", "-")
            pictures, words = photos(scenes, scenes.subjects[name], seed=seed - 1)
            folder = out / "subjects" / key
            (folder / "reference").mkdir(parents=True, exist_ok=True)
            for i, (picture, caption) in enumerate(zip(pictures, words, strict=True)):
                path = folder / f"{i:02}.jpg" if i < 5 else folder / "reference" / f"{i - 5:02}.jpg"
                image(picture).save(path, quality=87, subsampling=0, optimize=True)
                if i < 5:
                    path.with_suffix(".txt").write_text(caption + "\n")
            category, subcategory = concepts[word]
            rows.append(
                {
                    "id": key,
                    "class_word": word,
                    "concept": word,
                    "style": style,
                    "category": category,
                    "subcategory": subcategory,
                    "split": split,
                }
            )
    table = {
        "identifier": IDENTIFIER,
        "default": rows[0]["id"],
        "prompts": list(BENCHMARK),
        "subjects": rows,
    }
    (out / "subjects.json").write_text(json.dumps(table, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder with sprites.npz")
    parser.add_argument("--out", type=Path, default=EMBEDDED)
    args = parser.parse_args()
    write(Scenes(args.work / "sprites.npz"), read_concepts(), args.out)


if __name__ == "__main__":
    main()
