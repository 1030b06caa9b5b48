"""What the settings that the development subjects chose give on the reporting ones, as a section of
`robustness_report.py`."""

from __future__ import annotations

from robustness_plan import VARIANTS
from robustness_sections import along, counted, name_of, number, section, table, text, title
from robustness_stats import MAIN_SCORE, Results, Row, difference, mean

from dreamtune.training.chosen import EMBEDDED

BESIDE = ("dino_held_out", "clip_t_margin")


def at_step(rows: list[Row], step: int) -> list[Row]:
    return [row for row in rows if row["step"] == step]


def confirmed(results: Results) -> str:
    """A row a variant: at the chosen steps, and against the longest that was run."""
    rows = results.of("confirm", last=False)
    if not rows:
        return ""
    lines, longest = [], max(row["steps"] for row in rows)
    for variant in results.variants(rows):
        own, steps = [r for r in rows if r["variant"] == variant], chosen_steps(variant)
        here, there = at_step(own, steps), at_step(own, longest)
        line = [title(results, variant), f"{steps}", f"{own[0]['rate']:.3g}"]
        line += [number(mean(results, here, key)) for key in (MAIN_SCORE, *BESIDE)]
        line += [
            number(difference(results, here, there, key), "+.3f")
            for key in (MAIN_SCORE, "clip_t_margin")
        ]
        lines.append(line)
    heads = ["", "Steps", "Rate", *map(name_of, (MAIN_SCORE, *BESIDE))]
    heads += [f"{name_of(key)}, minus at {longest}" for key in (MAIN_SCORE, "clip_t_margin")]
    about = f"{counted(rows)}; steps and rates were chosen on the development subjects."
    return section(
        "confirm", "The chosen settings, on subjects that chose nothing", text(about),
        table(heads, lines), along(results, rows, MAIN_SCORE),
    )  # fmt: skip


def chosen_steps(variant: str) -> int:
    """Of the variant's method, whatever its options."""
    return EMBEDDED[VARIANTS[variant].method].steps
