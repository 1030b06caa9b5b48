"""The page and figures of `robustness.py`'s results.

    python eval/robustness_report.py RESULTS.json            # report.html and figures/ beside it
    python eval/robustness_report.py RESULTS.json --out DIR

Every number of the page is made from the file; what was not run is said to be missing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "eval"), str(ROOT)]

from robustness_confirm import chosen, confirmed  # noqa: E402
from robustness_figures import Line, Plot, plot, write_files  # noqa: E402
from robustness_pictures import pictures  # noqa: E402
from robustness_plan import PARTS, TUNED, VARIANTS  # noqa: E402
from robustness_questions import QUESTIONS  # noqa: E402
from robustness_sections import (  # noqa: E402
    SCORES,
    TIMES,
    WIDTHS,
    along,
    along_against,
    at_best,
    at_rates,
    counted,
    multiplier,
    name_of,
    text,
    times,
    widths,
)
from robustness_stats import (  # noqa: E402
    MAIN_SCORE,
    PROMPT_KEPT,
    Results,
    Row,
    best_rate,
    by,
    mean,
    minutes,
    read,
)

from dreamtune.evaluation.inline import section, write_main  # noqa: E402

PAGE, FIGURES = "report.html", "figures"
STYLE = """
.pictures td, .pictures th { text-align: center; }
.pictures td { min-width: 76px; padding: .3rem; }
.pictures img { width: 72px; height: 72px; margin: auto; }
h3 { font-size: 1rem; margin: 1.6rem 0 .2rem; }
"""
ALONG = (
    MAIN_SCORE,
    PROMPT_KEPT,
    "clip_t_margin",
    "dino_drift",
    "dino_nearest",
    "distance",
    "share",
)
BEYOND = (PROMPT_KEPT, "clip_t_margin", "dino_held_out", "dino_drift", "dino_nearest", "distance")


def centred(results: Results, part: str) -> str:
    """What a multiplier of the part is times."""
    centres = results.about.get("settings", {}).get("centres", {}).get(part, {})
    known = {v: rate for v, rate in centres.items() if v in VARIANTS}
    if all(math.isclose(rate, VARIANTS[v].rate) for v, rate in known.items()):
        return "times the method's own"
    best = {v: best_rate(results, v, TUNED) for v in known}
    if all(math.isclose(rate, best[v] or 0.0) for v, rate in known.items()):
        return "times the best on the development subjects"
    return "times that which each was centred on"


def rate_plot(results: Results, name: str, rows: Sequence[Row], key: str) -> Plot | None:
    ticks = {m: multiplier(m) for m in sorted({row["multiplier"] for row in rows})}
    lines = lines_of(results, rows, "multiplier", key)
    across = f"learning rate, {centred(results, rows[0]['part'])}"
    return plot(
        f"{name}-{key}", name_of(key), lines, ticks, across,
        reference=base_of(results, rows, key), reference_name="the base", wide=key == MAIN_SCORE,
    )  # fmt: skip


def step_plot(results: Results, name: str, rows: Sequence[Row], key: str) -> Plot | None:
    steps = sorted({row["step"] for row in rows})
    ticks = {float(s): str(s) for i, s in enumerate(steps) if i % (1 + len(steps) // 10) == 0}
    lines = lines_of(results, rows, "step", key)
    return plot(
        f"{name}-{key}", name_of(key), lines, ticks, "steps",
        reference=base_of(results, rows, key), reference_name="the base", wide=key == MAIN_SCORE,
    )  # fmt: skip


def lines_of(results: Results, rows: Sequence[Row], across: str, key: str) -> list[Line]:
    found = []
    for look, variant in enumerate(results.variants(rows)):
        own = by([r for r in rows if r["variant"] == variant], across)
        points = [(float(x), e) for x, part in own.items() if (e := mean(results, part, key))]
        found.append(Line(results.titles[variant], points, look))
    return found


def base_of(results: Results, rows: Sequence[Row], key: str) -> float | None:
    """The base's mean over the subjects of the rows."""
    names = {row["subject"] for row in rows}
    base = [{**b, "seed": 0, "diverged": None} for s, b in results.base.items() if s in names]
    if key in ("clip_t_margin", "distance", "dino_drift", PROMPT_KEPT):
        return float(key == PROMPT_KEPT)
    found = mean(results, base, key) if base else None
    return None if found is None else found.mean


def figures(plots: Sequence[Plot | None]) -> str:
    wide = "".join(p.html() for p in plots if p and p.name.endswith(f"-{MAIN_SCORE}"))
    small = "".join(p.html() for p in plots if p and not p.name.endswith(f"-{MAIN_SCORE}"))
    if wide:  # on a phone it scrolls, for its letters would be too small
        wide = f'<div class="scroll"><div style="min-width:38rem">{wide}</div></div>'
    return wide + (f'<div class="charts" style="margin-top:1rem">{small}</div>' if small else "")


def rates_section(
    results: Results, anchor: str, head: str, rows: Sequence[Row], parts: Sequence[str]
) -> tuple[str, list[Plot | None]]:
    if not rows:
        return "", []
    plots = [rate_plot(results, anchor, rows, key) for key in (MAIN_SCORE, *BEYOND)]
    html = section(
        anchor, head, text(f"{counted(rows)}, {rows[0]['steps']} steps, scored at the last."),
        figures(plots), at_rates(results, rows), "<h3>The width of the range</h3>",
        widths(results, rows), text(WIDTHS), "<h3>At the best rate</h3>",
        at_best(results, rows, *parts),
    )  # fmt: skip
    return html, plots


def steps_section(results: Results) -> tuple[str, list[Plot | None]]:
    rows = results.of("b", last=False)
    if not rows:
        return "", []
    centre = [row for row in rows if row["multiplier"] == 1.0]
    plots = [step_plot(results, "steps", centre, key) for key in ALONG]
    tables = [along_against(results, centre, "delora", key) for key in (MAIN_SCORE, PROMPT_KEPT)]
    tables += [along(results, rows, key) for key in ALONG]
    head = text(f"{counted(rows)}; rates are {centred(results, 'b')}, the charts of 1 x.")
    return section("steps", "Many more steps", head, figures(plots), *tables), plots


def starts_section(results: Results) -> tuple[str, list[Plot | None]]:
    """As the rates, and along the steps."""
    html, plots = rates_section(
        results, "starts", "Starts and strengths of DeLoRA", results.of("starts"), ("starts",)
    )
    rows = results.of("starts", last=False)
    if not rows:
        return "", []
    tables = [along(results, rows, key) for key in (MAIN_SCORE, PROMPT_KEPT)]
    return html + section("starts-steps", "Starts, along the steps", *tables), plots


def time_section(results: Results) -> tuple[str, list[Plot | None]]:
    rows = results.of("time", last=False)
    if not rows:
        return "", []
    own = [row for row in rows if row["multiplier"] == 1.0]
    plots = [step_plot(results, "time", own, key) for key in (MAIN_SCORE, PROMPT_KEPT)]
    head = f"{counted(rows)}, development subjects; the charts are of each one's own rate."
    parts = text(head), figures(plots), times(results, rows), text(TIMES)
    return section("time", "Time to quality", *parts), plots


def questions(results: Results) -> str:
    parts = [f"<h3>{escape(question)}</h3>{answer(results)}" for question, answer in QUESTIONS]
    return section("questions", "What DeLoRA's reviewers asked", *parts)


def missing(results: Results) -> str:
    there = {row["part"] for row in results.rows}
    lacking = [f"{name} ({part.about})" for name, part in PARTS.items() if name not in there]
    return f"Not run yet: {', '.join(lacking)}." if lacking else ""


def facts(results: Results) -> str:
    """How it was made, as data."""
    names = ("settings", "calibration")
    told = {name: results.about.get(name) for name in names}
    spent = {device: round(value, 1) for device, value in minutes(results).items()}
    scored = [name_of(key) for key in SCORES]
    return section(
        "how", "How it was made",
        text("Base: the embedded one; its numbers compare with nothing outside it. Means count "
             "each subject the same; 95% intervals by bootstrap over subjects, widened for how "
             f"few they are. Scores: {', '.join(scored)}. {name_of(PROMPT_KEPT)}: CLIP-T with the "
             "own prompt minus with the others', over the same of the base."),
        f"<pre><code>{escape(json.dumps({**told, 'minutes of waves': spent}, indent=1))}</code>"
        "</pre>",
    )  # fmt: skip


def build(results: Results, out: Path) -> list[Path]:
    """The page and the figures; what was written."""
    shown = pictures(results)  # the file may be damaged here: before the charts, which take long
    parts = [
        rates_section(results, "rates", "Score at each rate", results.of("a", "d"), ("a", "d")),
        steps_section(results),
        time_section(results),
        rates_section(results, "others", "Relatives and ablations", results.of("c"), ("c",)),
        starts_section(results),
        rates_section(
            results, "defaults", "Development subjects: rates to choose from",
            results.of("defaults"), ("defaults",),
        ),
        rates_section(
            results, "lambda", "Development subjects: starts and strengths of DeLoRA",
            results.of("lambda"), ("lambda",),
        ),
    ]  # fmt: skip
    spent = ", ".join(f"{v:.1f} minutes on {d}" for d, v in minutes(results).items())
    head = (
        "<header><h1>Robustness to the learning rate and to more steps</h1>"
        f'<p class="soft">{escape(counted(list(results.rows)))} on the embedded base; waves of '
        f"{escape(spent or 'no time')}. {escape(missing(results))}</p></header>"
    )
    htmls = [html for html, _ in parts]
    main = "".join(
        [
            head,
            *htmls[:3],
            chosen(results),
            confirmed(results),
            questions(results),
            shown,
            *htmls[3:],
            facts(results),
        ]
    )
    written = [write_main(out / PAGE, "Robustness", main, STYLE)]
    for _, plots in parts:
        for one in plots:
            if one is not None:
                written += write_files(one, out / FIGURES)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("results", type=Path, help="results.json of robustness.py")
    parser.add_argument("--out", type=Path, help="folder [default: that of the results]")
    args = parser.parse_args(argv)
    results = read(args.results)
    if not results.rows:
        raise ValueError(f"`{args.results}` has no finished run.")
    written = build(results, args.out or args.results.resolve().parent)
    print(f"{written[0]} and {len(written) - 1} figures")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"robustness_report: {error}")
