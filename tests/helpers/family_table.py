"""Family x what it goes through: the table of README.md. A cell says what a test of
`tests/training/test_families.py` has done with the family on tiny random weights, or what
`eval/speed/step.py --keep` measured of its network at full size.

python tests/helpers/family_table.py    # the table, as README.md has it
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "training"))

import test_families as tests
from families import FAMILIES

from dreamtune.models import load

MEASURED = Path(__file__).parents[2] / "eval" / "results" / "2026-11-29-families"
TITLES = {  # and the family's file in dreamtune/models
    "sd": ("Stable Diffusion 1.x, 2.x", "stable_diffusion"),
    "xl": ("SDXL", "stable_diffusion_xl"),
    "sd3": ("Stable Diffusion 3, 3.5", "stable_diffusion_3"),
    "klein": ("Flux.2 klein", "flux2_klein"),
    "flux": ("Flux.1 dev", "flux"),
    "schnell": ("Flux.1 schnell", "flux"),
    "chroma": ("Chroma", "chroma"),
    "qwen_image": ("Qwen-Image", "qwen_image"),
    "krea2": ("Krea 2", "krea2"),
    "z_image": ("Z-Image", "z_image"),
}
NETWORKS = {
    "sd": "sd15", "xl": "sdxl", "sd3": "sd35-medium", "klein": "flux2-klein-4b",
    "z_image": "z-image",
}  # fmt: skip
CAPTURED = "captured = eager"
# Column -> the tests that must all have had the family for a "yes".
COLUMNS = {
    "trains": (tests.test_the_loss_is_the_plain_formulas, tests.test_every_method_trains),
    "scores, resumes, stacks": (tests.test_from_photos_to_pictures,),
    "same picture in stock": (
        tests.test_prompts_are_encoded_as_by_the_pipeline,
        tests.test_the_stock_pipeline_draws_what_the_trainer_drew,
    ),
    "plugin": (tests.test_in_the_plugin,),
    CAPTURED: (tests.test_captured_losses_are_the_eager_ones,),
}
MERGED = tests.test_a_merged_folder
NONE = "—"


def families_of(test: Any) -> set[str]:
    """Those that it is called with."""
    found = (mark.args for mark in test.pytestmark if mark.name == "parametrize")
    values = next(v for names, v in found if "family" in names)
    return {value if isinstance(value, str) else value[0] for value in values}


def files(family: str) -> str:
    """Formats whose files its stock pipeline loads in a test, and whole folders."""
    names = ["diffusers", *FAMILIES[family].formats]
    return ", ".join([*names, *(["merged"] if family in families_of(MERGED) else [])])


def measured(family: str) -> list[str]:
    """Step and peak memory with LoRA, and how many times as long diffusers' script takes."""
    path = MEASURED / f"{NETWORKS.get(family)}.json"
    if not path.is_file():
        return [NONE] * 3
    rows = {row["row"]: row for row in json.loads(path.read_text())["rows"]}
    ours, theirs = rows["ours-lora"], rows["diffusers-lora"]
    batch = f" (batch {ours['batch']})" if ours["batch"] > 1 else ""
    return [
        f"{ours['ms']:.0f} ms{batch}", f"{ours['peak_gib']:.1f} for {theirs['peak_gib']:.1f} GiB",
        f"{theirs['ms'] / ours['ms']:.2f}",
    ]  # fmt: skip


def cells(family: str) -> Iterator[str]:
    for title, done in COLUMNS.items():
        passed = all(family in families_of(test) for test in done)
        yield "no" if title == CAPTURED and uncaptured(family) else "yes" if passed else NONE
    yield files(family)
    yield from measured(family)


def uncaptured(family: str) -> str:
    """Why no forward of it is recorded, which the test demands to be said; "" where it is."""
    own = next(f for f in load.FAMILIES if f.module == TITLES[family][1])
    return str(load.family_class(own).uncaptured)


def lines() -> Iterator[str]:
    head = ["family", *COLUMNS, "files for stock", "a step", "peak, diffusers' script", "times"]
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for family in FAMILIES:
        yield f"| {' | '.join([TITLES[family][0], *cells(family)])} |"


def table() -> str:
    return "\n".join(lines())


if __name__ == "__main__":
    print(table())
