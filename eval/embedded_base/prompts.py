"""The fixed prompts: 48 unseen combinations with 8 near-misses each, and the benchmark's 25.

`test_prompts.json` and `dreamtune/embedded/subjects.json` were written by this module and committed
before the base was trained; the sampler of `scenes.py` leaves their combinations out.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from .captions import COLORS, GROUNDS, KINDS, PATTERNS, SCENERY, Grammar, Scene, Wording

HERE = Path(__file__).parent
TEST_PROMPTS = HERE / "test_prompts.json"

BENCHMARK = (
    "a {} on a red background", "a {} on a blue background", "a {} on a yellow background",
    "a {} on a black background", "a {} on a mint background", "a {} on a purple background",
    "a {} on a white and pink striped background", "a {} on a blue and white checkered background",
    "a {} on an orange and yellow dotted background", "a {} on a navy and teal gradient background",
    "a {} on the grass", "a {} on the beach", "a {} in the snow", "a {} under a night sky",
    "a {} at sunset", "a {} next to a pizza on a green background",
    "a {} next to a soccer ball on a beige background",
    "a {} next to a cactus at sunset", "a {} above a book on a teal background",
    "a small {} on a pink background", "a small {} on the left on an orange background",
    "a big {} on a gray background", "a big {} on the beach",
    "a black and white {} on a yellow background", "a sticker of a {} on a blue background",
)  # fmt: skip


def _scene(rng: random.Random, allowed: list[int], kind: int, ground: int) -> dict[str, int]:
    color, color2 = rng.sample(range(len(COLORS)), 2)
    first, second = rng.sample(allowed, 2)
    while second // 3 == first // 3:
        second = rng.choice(allowed)
    size = rng.choice([0, 0, 0, 1, 2]) if kind == 0 else 0
    look = rng.choice([0] * 7 + [1, 2]) if kind == 0 else 0
    return {"kind": kind, "first": first, "second": second, "look": look, "size": size, "place": 0,
            "ground": ground, "color": color, "color2": color2}  # fmt: skip


def _near_misses(
    rng: random.Random, s: dict[str, int], groups: list[str], allowed: list[int]
) -> list[dict]:
    """Three other concepts, three other grounds, two other counts or relations."""
    style = s["first"] % 3
    mine = {s["first"] // 3, s["second"] // 3}
    kin = [
        i
        for i in allowed
        if groups[i // 3] == groups[s["first"] // 3] and i // 3 not in mine and i % 3 == style
    ]
    far = [
        i
        for i in allowed
        if groups[i // 3] != groups[s["first"] // 3] and i // 3 not in mine and i % 3 == style
    ]
    out = [{**s, "first": i} for i in (*rng.sample(kin, 2), *rng.sample(far, 1))]
    colors = [c for c in range(len(COLORS)) if c not in (s["color"], s["color2"])]
    if s["ground"] < len(PATTERNS):
        out += [{**s, "color": c} for c in rng.sample(colors, 2)]
        out.append(
            {**s, "ground": rng.choice([g for g in range(len(GROUNDS)) if g != s["ground"]])}
        )
    else:
        out += [
            {**s, "ground": g}
            for g in rng.sample([g for g in range(len(GROUNDS)) if g != s["ground"]], 3)
        ]
    kinds = [k for k in range(len(KINDS)) if k != s["kind"]]
    out += [{**s, "kind": k, "size": 0, "look": 0} for k in rng.sample(kinds, 2)]
    return out


def write_test_prompts(
    grammar: Grammar, groups: list[str], allowed: list[int], seed: int = 2026
) -> None:
    """48 scenes over all kinds and grounds, each with its caption, its 8 near-misses and theirs."""
    rng = random.Random(seed)
    scenery = list(range(len(PATTERNS), len(PATTERNS) + len(SCENERY)))
    plan = (
        [(0, 0)] * 14
        + [(0, g) for g in (1, 2, 3, 4, 2, 4)]
        + [(0, g) for g in scenery]
        + [(1, 0)] * 3
    )
    plan += (
        [(1, 1), (1, 4), (1, rng.choice(scenery))]
        + [(2, 0)] * 6
        + [(2, 2), (2, 3), *((2, g) for g in scenery[:3])]
    )
    plan += [(3, 0)] * 4 + [(3, 1), (3, rng.choice(scenery)), (3, 4)]
    plan = plan[:48]
    rows = []
    for kind, ground in plan:
        scene = _scene(rng, allowed, kind, ground)
        candidates = [scene, *_near_misses(rng, scene, groups, allowed)]
        rows.append(
            {
                "scene": scene,
                "caption": captions(grammar, candidates)[0],
                "near_misses": candidates[1:],
                "near_captions": captions(grammar, candidates)[1:],
            }
        )
    TEST_PROMPTS.write_text(json.dumps(rows, indent=1) + "\n")


def captions(grammar: Grammar, rows: list[dict[str, int]]) -> list[str]:
    """The full caption of each scene: style and ground named."""
    import torch

    scenes = Scene.of(rows)
    said, unsaid = torch.ones(len(rows), dtype=torch.bool), torch.zeros(len(rows), dtype=torch.bool)
    return grammar.strings(grammar.slots(scenes, Wording(said, said, said, unsaid, unsaid.long())))


def test_prompts() -> list[dict]:
    return json.loads(TEST_PROMPTS.read_text())
