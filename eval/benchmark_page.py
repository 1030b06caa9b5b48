"""The page of a benchmark: all methods on one self-contained report.html, beside the base."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from urllib.parse import quote

from benchmark_parts import BASE, Plan

from dreamtune.evaluation.compare import Comparison, title_of
from dreamtune.evaluation.compare import counted as clusters
from dreamtune.evaluation.inline import section, write_main
from dreamtune.evaluation.results import Results
from dreamtune.evaluation.scatter import Cloud, cloud, scatter
from dreamtune.evaluation.scores_page import PAGE, interval, level_of, number
from dreamtune.evaluation.statistics import Estimate
from dreamtune.metrics import METRICS

# What the plot shows where a protocol has it; else its first score of that kind.
FIRST = {"subject": "dino", "prompt": "clip_t"}
NOTE = (
    "Behind each mean its 95% interval, a bootstrap over {} that is widened for how few they are, "
    "and how many images it is of. Photos: among themselves."
)
PAIRED = (
    " The intervals of two methods may overlap and the methods still differ: the comparisons below "
    "are paired."
)
STYLE = """
a { color: var(--accent); }
h3 { font-size: 1rem; margin: 1.4rem 0 .2rem; overflow-wrap: anywhere; }
li { overflow-wrap: anywhere; margin: .15rem 0; }
.scores th[scope=row] { font-weight: 600; white-space: normal; min-width: 11ch; }
.scores thead th { overflow-wrap: anywhere; }
.scores td small { display: block; }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
"""


@dataclass(frozen=True)
class Pair:
    """Two methods, and how B compares with A."""

    a: str
    b: str
    comparison: Comparison


def write_benchmark(
    folder: Path,
    plan: Plan,
    results: Mapping[str, Results],
    pairs: Sequence[Pair],
    failed: Sequence[tuple[str, str, str]],
) -> Path:
    """report.html in the folder that holds those of the methods. results: by method, of those that
    have images; failed: (method, subject, why)."""
    title = escape(f"{plan.benchmark}: {', '.join(plan.methods)}")
    parts = [header(title, plan, results)]
    if results:
        together = of_all(results)
        levels = together.level_scores()
        parts += [
            table(results, together, levels),
            plots(results, together, levels),
            comparisons(pairs),
            reports(results),
        ]
    parts += [failures(failed), facts(plan, results)]
    return write_main(folder / PAGE, title, "".join(parts), STYLE)


def of_all(results: Mapping[str, Results]) -> Results:
    """The first method's, with the base and the photos of all: a subject that failed for one method
    has no base in its results."""
    each = [*results.values()]
    levels: dict[str, dict[str, float]] = {}
    photos: dict[str, object] = {}
    for one in each:
        photos |= one.coverage.get("photos", {})
        for key, values in one.levels.items():
            levels.setdefault(key, {}).update(values)
    base = {row.key: row for one in each for row in one.base}
    coverage = {**each[0].coverage, "photos": photos}
    return replace(each[0], base=[*base.values()], levels=levels, coverage=coverage)


def header(title: str, plan: Plan, results: Mapping[str, Results]) -> str:
    images = sum(len(one.images) for one in results.values())
    parts = [
        counted(len(plan.methods), "method"),
        counted(len(plan.subjects), "subject"),
        counted(len(plan.seeds), "training seed"),
        f"{counted(images, 'image')} scored",
    ]
    return f'<header><h1>{title}</h1><p class="soft">{escape(" · ".join(parts))}</p></header>'


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def table(results: Mapping[str, Results], together: Results, levels: Mapping[str, Estimate]) -> str:
    """Scores down; the base, the methods and the photos across."""
    scores = {BASE: together.scores(together.base)} if together.base else {}
    scores |= {method: one.scores() for method, one in results.items()}
    heads = "".join(
        f'<th scope="col">{text}</th>'
        for text in ("Score", *(linked(m) if m in results else "Base" for m in scores), "Photos")
    )
    rows = ""
    for key in dict.fromkeys(key for method in results for key in scores[method]):
        cells = [cell(key, own.get(key)) for own in scores.values()]
        cells.append(cell(key, level_of(key, levels)))
        head = f'<th scope="row">{escape(title_of(key))}</th>'
        rows += f"<tr>{head}{''.join(f'<td>{text}</td>' for text in cells)}</tr>"
    most = max((e for m in results for e in scores[m].values()), key=lambda e: e.clusters)
    note = NOTE.format(clusters(most.clusters, most.unit)) + PAIRED * (len(results) > 1)
    return section(
        "scores",
        "Scores",
        f'<div class="scroll"><table class="scores"><thead><tr>{heads}</tr></thead>'
        f'<tbody>{rows}</tbody></table></div><p class="soft">{escape(note)}</p>',
    )


def linked(method: str) -> str:
    """Its name, with a link to its own page; it may break at a comma."""
    name = ",<wbr>".join(escape(part) for part in method.split(","))
    return f'<a href="{escape(quote(f"{method}/{PAGE}"))}">{name}</a>'


def cell(key: str, e: Estimate | None) -> str:
    if e is None:
        return "–"
    return f"{number(key, e.mean)}<small>{escape(interval(key, e))}</small><small>n = {e.n}</small>"


def plots(results: Mapping[str, Results], together: Results, levels: Mapping[str, Estimate]) -> str:
    """Likeness against obedience: of all with their anchors; of the methods alone where there are
    several, for the base may be far from them."""
    keys = [shown_key(results, kind) for kind in ("prompt", "subject")]
    x_key, y_key = keys
    if x_key is None or y_key is None:
        return ""
    named = [(m, one.images) for m, one in results.items()]
    found = [cloud(m, rows, x_key, y_key, together.averaging) for m, rows in named]
    methods = [replace(one, subjects=()) for one in found if one is not None]
    base = cloud(BASE, together.base, x_key, y_key, together.averaging)
    if not methods:
        return ""
    titles = METRICS[x_key].title, METRICS[y_key].title
    anchors = [] if base is None else [replace(base, subjects=())]
    level = level_of(y_key, levels)
    line = None if level is None else level.mean
    charts, closer = scatter([*methods, *anchors], *titles, line, "photos among themselves"), ""
    if len(methods) > 1 and (anchors or line is not None):
        charts += scatter(methods, *titles)
        closer = " The second: the methods alone."
    inner = (
        f'<div class="charts">{charts}</div><p class="soft">Up and to the right is better. '
        f"Ellipses: 95% of the mean.{closer} {escape(front(methods))}</p>"
    )
    return section("plot", "Likeness and obedience", inner)


def shown_key(results: Mapping[str, Results], kind: str) -> str | None:
    there = dict.fromkeys(key for one in results.values() for key in one.keys)
    own = [key for key in there if key in METRICS and METRICS[key].kind == kind]
    return FIRST[kind] if FIRST[kind] in own else next(iter(own), None)


def front(methods: Sequence[Cloud]) -> str:
    """Whom no other method beats in both means."""
    best = [
        one.name
        for one in methods
        if not any(
            other.mean != one.mean and other.mean[0] >= one.mean[0] and other.mean[1] >= one.mean[1]
            for other in methods
        )
    ]
    return f"By the means alone, no other method is better in both than: {', '.join(best)}."


def comparisons(pairs: Sequence[Pair]) -> str:
    if not pairs:
        return ""
    inner = ""
    for pair in pairs:
        first, *lines, verdict = pair.comparison.text(pair.a, pair.b).split("\n")
        items = "".join(f"<li>{escape(line)}</li>" for line in lines)
        inner += (
            f"<h3>{escape(first)}</h3><p>{escape(verdict)}</p>"
            f"<details><summary>Score by score</summary><ul>{items}</ul></details>"
        )
    return section("comparisons", "Which differ", inner)


def reports(results: Mapping[str, Results]) -> str:
    items = ""
    for method, one in results.items():
        said = (
            f"{counted(len(one.images), 'image')} of {counted(len(one.subjects), 'subject')}, "
            f"{counted(len(one.warnings), 'warning')}"
        )
        items += f"<li>{linked(method)}: {escape(said)}</li>"
    return section(
        "reports", "Each method's own page, with its pictures and warnings", f"<ul>{items}</ul>"
    )


def failures(failed: Sequence[tuple[str, str, str]]) -> str:
    if not failed:
        return ""
    items = "".join(f"<li>{escape(': '.join(one))}</li>" for one in failed)
    inner = (
        f"<p>A mean is of the subjects that could be trained; a comparison is of those that both "
        f"methods have.</p><ul>{items}</ul>"
    )
    return section("failures", f"{counted(len(failed), 'failure')} of training", inner)


def facts(plan: Plan, results: Mapping[str, Results]) -> str:
    """What was asked for."""
    protocol = next((one.protocol for one in results.values()), {"name": plan.protocol})
    known = {
        "Protocol": f"{protocol['name']}: {protocol.get('about', '')}".removesuffix(": "),
        "Subjects": ", ".join(plan.subjects),
        "Training seeds": ", ".join(map(str, plan.seeds)),
        "Flags of the trainer": shlex.join(plan.training) or "none",
    }
    items = "".join(f"<p>{name}: {escape(value)}.</p>" for name, value in known.items())
    return section("protocol", "Protocol", items)
