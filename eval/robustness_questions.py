"""What DeLoRA's reviewers asked, answered by `robustness.py`'s results."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from robustness_plan import VARIANTS
from robustness_sections import (
    SCORES,
    counted,
    multiplier,
    name_of,
    number,
    table,
    text,
    title,
)
from robustness_stats import (
    MAIN_SCORE,
    PROMPT_KEPT,
    Results,
    Row,
    at_chosen_rate,
    at_rate,
    by,
    difference,
    diverged,
    mean,
    mean_of,
    seed_spread,
)


def seeds(results: Results) -> str:
    rows = results.of("a", "d")
    lines = []
    for variant in results.variants(rows):
        named = VARIANTS.get(variant)
        usual = at_rate(rows, variant, named and named.rate)
        best, _ = at_chosen_rate(results, variant, "a", "d")
        for name, own in (("its own rate", usual), ("best rate", best)):
            if (spread := seed_spread(results, own)) is not None:
                count = len({r["seed"] for r in own})
                label = f"{title(results, variant)}, {name}"
                lines.append([label, f"{count}", f"{spread.n}", number(spread, ".4f")])
    if not lines:
        return text("Not answered yet: no subject here has two seeds.")
    heads = ["", "Seeds", "Subjects", f"Standard deviation of {name_of(MAIN_SCORE)} (95%)"]
    return table(heads, lines)


def bounds(results: Results) -> str:
    """Lambda and the share of the bound, of DeLoRA's variants, by rate and in the longest runs."""
    rows = [r for r in results.of("a", "b", "c", "d") if r.get("strength") is not None]
    lines = []
    for (variant, m, steps), own in by(rows, "variant", "multiplier", "steps").items():
        most = max(r["strength"] for r in own)
        beyond = sum(r["strength"] > 1 for r in own)
        lines.append([
            f"{title(results, variant)}, {multiplier(m)} x, {steps} steps",
            number(mean(results, own, "strength")), f"{most:.3f}", f"{beyond} of {len(own)}",
            number(mean(results, own, "share")),
            number(mean_of(own, of_the_start)),
        ])  # fmt: skip
    if not lines:
        return text("Not answered yet: no run of DeLoRA is here.")
    heads = [
        "", "Largest |lambda| of a layer over its start (95%)", "Of all runs", "Runs above 1",
        "Share of the bound at the present lambda (95%)", "At most of the bound at the start (95%)",
    ]  # fmt: skip
    return table(heads, lines) + text(
        "The change is bounded by the present lambda, which is trained: above 1 a layer's bound is "
        "larger than at the start. The last column is the mean share times the largest growth, so "
        "it is no less than the share of the bound that was set."
    )


def of_the_start(row: Row) -> float | None:
    return None if row["share"] is None else float(row["share"] * row["strength"])


def versus(results: Results, ours: str, others: Sequence[str]) -> str:
    """Paired differences of the variants' best rates on the subjects that both have."""
    parts, lines = ("a", "c", "d"), []
    a, _ = at_chosen_rate(results, ours, *parts)
    for other in others:
        b, _ = at_chosen_rate(results, other, *parts)
        found = [difference(results, a, b, key) for key in SCORES]
        if any(found):
            count = max(e.clusters for e in found if e is not None)
            label = f"{title(results, ours)} minus {title(results, other)}"
            lines.append([label, f"{count}", *(number(e, "+.3f") for e in found)])
    if not lines:
        return text("Not answered yet: the two have no subject in common here.")
    return table(["", "Subjects", *(f"{name_of(k)} (95%)" for k in SCORES)], lines)


def norms(results: Results) -> str:
    rows = [r for r in results.of("a", "b", "c", "d") if r.get("least_norm") is not None]
    lines = []
    for (variant, m, steps), own in by(rows, "variant", "multiplier", "steps").items():
        least = min(r["least_norm"] for r in own)
        lines.append([
            f"{title(results, variant)}, {multiplier(m)} x, {steps} steps",
            number(mean(results, own, "least_norm")), f"{least:.3g}",
            f"{diverged(own)} of {len(own)}", f"{sum(r['skipped'] for r in own)}",
        ])  # fmt: skip
    if not lines:
        return text("Not answered yet: no run of DeLoRA is here.")
    heads = ["", "Least norm of a row of A or column of B (95%)", "Of all runs", "Diverged",
             "Steps without a finite gradient"]  # fmt: skip
    return table(heads, lines) + text(
        "In units of the norm that a row or column usually has at the residual start. A direction "
        "is divided by its norm: only a norm near 0 makes it jump."
    )


STARTS = (("delora", "delora_peft"), ("delora_15", "delora_peft_15"))
OF_STARTS = (MAIN_SCORE, "dino_held_out", PROMPT_KEPT, "dino_drift")


def starts(results: Results) -> str:
    """The residual start minus PEFT's at equal lambda and rate: on the reporting subjects at each
    scored step, where they were run, else on the development subjects at the last."""
    lines, rows = [], results.of("starts", last=False) or results.of("lambda")
    for ours, theirs in STARTS:
        pair = [r for r in rows if r["variant"] in (ours, theirs)]
        for (_, step), here in by(pair, "multiplier", "step").items():
            own, other = ([r for r in here if r["variant"] == v] for v in (ours, theirs))
            found = [difference(results, own, other, key) for key in OF_STARTS]
            if any(found):
                label = f"{title(results, ours)}, rate {here[0]['rate']:.3g}, {step} steps"
                lines.append([label, *(number(e, "+.3f") for e in found)])
    if not lines:
        return text("Not answered yet: no start of PEFT's is here.")
    whose = "reporting" if results.of("starts") else "development"
    about = f"The residual start minus PEFT's: {counted(rows)}, {whose} subjects."
    return text(about) + table(["", *(f"{name_of(k)} (95%)" for k in OF_STARTS)], lines)


Section = Callable[[Results], str]
QUESTIONS: tuple[tuple[str, Section], ...] = (
    ("How much do seeds spread?", seeds),
    ("Does a trained lambda break the bound?", bounds),
    (
        "What does DeLoRA gain over DoRA, and over LoRA?",
        lambda results: versus(results, "delora", ("dora", "lora", "delora_peft", "delora_fixed")),
    ),
    ("What happens as norms go to 0?", norms),
    ("Is the start why PEFT's image benchmark has DeLoRA last?", starts),
)
