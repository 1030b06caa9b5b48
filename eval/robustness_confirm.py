"""What the development subjects chose, and what that gives on the reporting ones: two sections of
`robustness_report.py`."""

from __future__ import annotations

from collections.abc import Sequence

import robustness_choice
from robustness_plan import VARIANTS
from robustness_sections import along, counted, name_of, number, table, text, title
from robustness_stats import MAIN_SCORE, PROMPT_KEPT, Results, Row, at_rate, difference, mean

from dreamtune.evaluation.inline import section
from dreamtune.training.chosen import EMBEDDED

BESIDE = ("dino_held_out", PROMPT_KEPT, "clip_t_margin")


def at_step(rows: Sequence[Row], step: int) -> list[Row]:
    return [row for row in rows if row["step"] == step]


def chosen(results: Results) -> str:
    """A row a variant of the part `choice`: what is chosen, beside the best of all rates and
    steps."""
    rows, lines = results.of("choice", last=False), []
    for variant in results.variants(rows):
        grid = robustness_choice.grid_of(results.about, variant)
        if not grid:
            continue
        steps, rate = robustness_choice.chosen(grid, VARIANTS[variant].rate)
        cells = [(dino, k, r) for r, own in grid.items() for k, (dino, _) in own.items()]
        _, best_steps, best_rate = max(cells)
        here = at_step(at_rate(rows, variant, rate), steps)
        there = at_step(at_rate(rows, variant, best_rate), best_steps)
        lines.append([
            title(results, variant), f"{steps}", f"{rate:.3g}",
            *(number(mean(results, here, key)) for key in (MAIN_SCORE, PROMPT_KEPT)),
            f"{best_steps}, {best_rate:.3g}", number(mean(results, there, MAIN_SCORE)),
            number(difference(results, here, there, MAIN_SCORE), "+.3f"),
        ])  # fmt: skip
    if not lines:
        return ""
    heads = ["", "Steps", "Rate", name_of(MAIN_SCORE), name_of(PROMPT_KEPT)]
    heads += ["Best of all steps and rates", name_of(MAIN_SCORE), "Chosen minus best"]
    about = (
        f"{counted(rows)}, development subjects. A method's own rate where its best is within "
        f"{robustness_choice.NEAR} of the best of all, else the best rate; then the fewest steps "
        f"within {robustness_choice.NEAR} of that rate's best that keep "
        f"{robustness_choice.KEPT:.0%} of the prompt. Chosen by these subjects, they flatter."
    )
    return section(
        "choice", "Steps and rates, chosen on the development subjects", text(about),
        table(heads, lines),
    )  # fmt: skip


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
            for key in (MAIN_SCORE, PROMPT_KEPT)
        ]
        lines.append(line)
    heads = ["", "Steps", "Rate", *map(name_of, (MAIN_SCORE, *BESIDE))]
    heads += [f"{name_of(key)}, minus at {longest}" for key in (MAIN_SCORE, PROMPT_KEPT)]
    about = (
        f"{counted(rows)}; steps and rates were chosen on the development subjects. One rate a "
        "method: that others are no better is seen in the parts above."
    )
    return section(
        "confirm", "The chosen settings, on subjects that chose nothing", text(about),
        table(heads, lines), against(results, rows), along(results, rows, MAIN_SCORE),
    )  # fmt: skip


def against(results: Results, rows: Sequence[Row]) -> str:
    """DeLoRA as it is set, minus the others at the same steps: strengths of its own, and who is
    not bounded."""
    steps, lines = chosen_steps("delora"), []
    own = at_step([r for r in rows if r["variant"] == "delora"], steps)
    for variant in results.variants(rows):
        theirs = at_step([r for r in rows if r["variant"] == variant], steps)
        found = [difference(results, own, theirs, key) for key in (MAIN_SCORE, *BESIDE)]
        if variant != "delora" and any(found):
            lines.append([f"minus {title(results, variant)}", *(number(e, "+.3f") for e in found)])
    heads = [f"DeLoRA at {steps} steps", *(f"{name_of(k)} (95%)" for k in (MAIN_SCORE, *BESIDE))]
    return table(heads, lines) if lines else ""


def chosen_steps(variant: str) -> int:
    """Of the variant's method, whatever its options."""
    return EMBEDDED[VARIANTS[variant].method].steps
