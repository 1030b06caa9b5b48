"""The sections of `robustness_report.py`'s page: tables and sentences, each number made from the
results file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from robustness_stats import (
    KEPT,
    MAIN_SCORE,
    NO_PICTURE,
    PROMPT_KEPT,
    Results,
    Row,
    Sweep,
    Width,
    at_chosen_rate,
    base_floors,
    by,
    difference,
    diverged,
    mean,
    sweep,
    width,
)
from robustness_times import Reached, common_best, own_best, time_to_quality

from dreamtune.evaluation.statistics import Estimate
from dreamtune.metrics import METRICS

NONE = "–"
SCORES = (
    MAIN_SCORE, "dino_held_out", "clip_i", PROMPT_KEPT, "clip_t_margin", "dino_nearest",
    "dino_drift",
)  # fmt: skip
NAMES = {
    "clip_t_margin": "CLIP-T over the base's",
    PROMPT_KEPT: "Prompt kept",
    "distance": "Relative weight distance",
    "share": "Share of the bound used",
    "strength": "Largest |lambda| over its start",
    "least_norm": "Least norm over a usual start's",
}


def name_of(key: str) -> str:
    return NAMES[key] if key in NAMES else METRICS[key].title


def multiplier(value: float) -> str:
    """1/16, 4; between those that were run 2.8."""
    if value < 1 and abs(1 / value - round(1 / value)) < 1e-9:
        return f"1/{round(1 / value)}"
    return f"{value:.3g}"


def factor_of(value: float) -> str:
    """18.6, 1,024."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def number(e: Estimate | None, form: str = ".3f") -> str:
    """Mean and interval, as HTML."""
    if e is None:
        return NONE
    if e.low is None or e.high is None:
        return f"{e.mean:{form}}"
    return f"{e.mean:{form}} <small>({e.low:{form}} to {e.high:{form}})</small>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """heads: text; rows: HTML, the first of each the head of its row."""
    top = "".join(f'<th scope="col">{escape(h)}</th>' for h in heads)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )  # fmt: skip
    inner = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{inner}</div>'


def text(words: str) -> str:
    return f'<p class="soft">{escape(words)}</p>'


def title(results: Results, variant: str) -> str:
    return escape(results.titles.get(variant, variant))


def counted(rows: Sequence[Row]) -> str:
    runs = len({(r["part"], r["variant"], r["rate"], r["subject"], r["seed"]) for r in rows})
    subjects = len({r["subject"] for r in rows})
    seeds = len({r["seed"] for r in rows})
    return (
        f"{runs} runs, {subjects} subject{'s' * (subjects != 1)}, {seeds} seed{'s' * (seeds != 1)}"
    )


# Scores at each rate


def at_rates(results: Results, rows: Sequence[Row], key: str = MAIN_SCORE) -> str:
    """A row a variant, a column a rate: the mean with its interval, and how many diverged."""
    multipliers = sorted({row["multiplier"] for row in rows})
    lines = []
    for variant in results.variants(rows):
        cells = [title(results, variant)]
        for m in multipliers:
            own = [r for r in rows if r["variant"] == variant and r["multiplier"] == m]
            if not own:
                cells.append(NONE)
                continue
            bad = diverged(own)
            note = f"<br><small>{bad} of {len(own)} diverged</small>" if bad else ""
            rate = f"<br><small>rate {own[0]['rate']:.3g}</small>"
            cells.append(number(mean(results, own, key)) + rate + note)
        lines.append(cells)
    return table(["", *(f"{multiplier(m)} x" for m in multipliers)], lines)


def widths(results: Results, rows: Sequence[Row]) -> str:
    """The range of rates that keeps KEPT of each variant's own best."""
    lines = []
    for variant in results.variants(rows):
        own = sweep(results, [r for r in rows if r["variant"] == variant])
        if own is None or len(own.multipliers) < 2:
            continue
        floors = base_floors(results, own)
        lines.append([
            title(results, variant), f"{len(own.subjects)}",
            f"{own.rates[own.best]:.3g}" + (" <small>(at the end of the rates)</small>"
                if own.best in (0, len(own.rates) - 1) else ""),
            number(mean(results, best_rows(rows, variant, own), MAIN_SCORE)),
            *range_cells(width(own)),
            *(range_cells(width(own, floors))[1:] if floors is not None else [NONE]),
            f"{sum(own.diverged)} of {sum(own.runs)}",
        ])  # fmt: skip
    heads = [
        "", "Subjects", "Best rate", f"{name_of(MAIN_SCORE)} there (95%)",
        f"Rates that keep {KEPT:.0%} of it", "Factor (95%)",
        f"Factor, {KEPT:.0%} of the gain over the base (95%)", "Diverged",
    ]  # fmt: skip
    return table(heads, lines) if lines else ""


def best_rows(rows: Sequence[Row], variant: str, own: Sweep) -> list[Row]:
    best = own.multipliers[own.best]
    return [r for r in rows if r["variant"] == variant and r["multiplier"] == best]


def range_cells(w: Width) -> list[str]:
    """(from to, factor): open ends are said."""
    low = f"{'≤ ' * w.open_low}{multiplier(w.low)}"
    high = f"{'≥ ' * w.open_high}{multiplier(w.high)}"
    least = "≥ " if w.open_low or w.open_high else ""
    factor = f"{least}{factor_of(w.factor)}"
    if w.factor_low is not None and w.factor_high is not None:
        factor += f" <small>({factor_of(w.factor_low)} to {factor_of(w.factor_high)})</small>"
    return [f"{low} to {high}", factor]


WIDTHS = (
    "A multiplier of 1 is the rate that the method was centred on. Ranges lie on straight lines "
    "between the rates that were run, of the rate's logarithm; ≤ and ≥ say that the range reaches "
    "the first or last rate that was run and may go on. The intervals draw subjects, the same for "
    "all rates, and cannot go beyond what was run. A run that diverged counts "
    f"{NO_PICTURE:g} in {name_of(MAIN_SCORE)}, for it gives no picture, and in nothing else. "
    "DeLoRA's rate is that of A and B: lambda has its own, the same at all multipliers."
)


def at_best(results: Results, rows: Sequence[Row], *parts: str) -> str:
    """All scores at the rate that the development subjects chose, or these subjects themselves."""
    lines, by_whom = [], set()
    for variant in results.variants(rows):
        own, whom = at_chosen_rate(results, variant, *parts)
        if not own:
            continue
        by_whom.add(whom)
        cells = [number(mean(results, own, key)) for key in (*SCORES, "distance")]
        lines.append([title(results, variant), f"{own[0]['rate']:.3g}", *cells])
    if not lines:
        return ""
    base = [
        {"subject": s, "seed": 0, "diverged": None, **scores}
        for s, scores in results.base.items()
        if s in {r["subject"] for r in rows}
    ]
    if base:
        cells = [number(mean(results, base, k)) for k in (*SCORES, "distance")]
        lines.append(["base", NONE, *cells])
    note = f"The rate of each is the best by the {' or the '.join(sorted(by_whom))} subjects."
    if "reporting" in by_whom:
        note += " Chosen by the subjects that it is reported on, it flatters each a little."
    heads = ["", "Rate", *(f"{name_of(k)} (95%)" for k in (*SCORES, "distance"))]
    return table(heads, lines) + text(note)


# Along the steps


def along(results: Results, rows: Sequence[Row], key: str) -> str:
    """A row a variant, and a rate where there are several; a column a scored step."""
    steps = sorted({row["step"] for row in rows})
    several = len({row["multiplier"] for row in rows}) > 1
    lines = []
    for variant in results.variants(rows):
        for m, here in by([r for r in rows if r["variant"] == variant], "multiplier").items():
            own = by(here, "step")
            cells = [number(mean(results, own.get(s, []), key)) for s in steps]
            if any(cell != NONE for cell in cells):
                rate = f", {here[0]['rate']:.3g} ({multiplier(m)} x)" if several else ""
                lines.append([title(results, variant) + rate, *cells])
    heads = [name_of(key), *(f"{s} steps" for s in steps)]
    return table(heads, lines) if lines else ""


def along_against(results: Results, rows: Sequence[Row], ours: str, key: str) -> str:
    """One variant minus each other, paired, a column a scored step. rows: of one rate each."""
    steps = sorted({row["step"] for row in rows})
    lines = []
    for variant in results.variants(rows):
        pairs = [[r for r in rows if r["variant"] == v] for v in (ours, variant)]
        found = [
            difference(results, *([r for r in own if r["step"] == s] for own in pairs), key)
            for s in steps
        ]
        if variant != ours and any(found):
            lines.append([f"minus {title(results, variant)}", *(number(e, "+.3f") for e in found)])
    heads = [f"{name_of(key)}, {results.titles.get(ours, ours)}", *(f"{s} steps" for s in steps)]
    return table(heads, lines) if lines else ""


def times(results: Results, rows: Sequence[Row]) -> str:
    """Steps and seconds to KEPT of the best, of the run itself and of all variants."""
    lines = []
    needs = (own_best(results), common_best(results, rows))
    for (variant, m), own in by(rows, "variant", "multiplier").items():
        cells = [f"{title(results, variant)}, rate {own[0]['rate']:.3g} ({multiplier(m)} x)"]
        for need in needs:
            cells += reached_cells(time_to_quality(results, own, need))
        lines.append((results.variants(rows).index(variant), m, cells))
    heads = [""]
    for what in ("its own best", "the best of all"):
        heads += [f"Came to {KEPT:.0%} of {what}", "Steps (95%)", "Seconds alone (95%)"]
    lines.sort(key=lambda line: line[:2])
    return table(heads, (cells for *_, cells in lines)) if lines else ""


def reached_cells(found: Reached) -> list[str]:
    return [
        f"{found.reached} of {found.runs}",
        number(found.steps, ".0f"),
        number(found.seconds, ".2f"),
    ]


TIMES = (
    "Of the steps that were scored the first at which the quality was there; runs that never came "
    "to it are in no mean. The best of all is that of the subject, over all methods, rates and "
    "steps here. Seconds are of the steps of one run alone on this device, without scoring and "
    "without getting ready."
)
