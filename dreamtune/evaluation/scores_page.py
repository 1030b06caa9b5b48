"""The page of a scoring: one self-contained report.html, no scripts, nothing fetched."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from dreamtune.evaluation.compare import counted, difference_of, title_of
from dreamtune.evaluation.inline import img, write_html
from dreamtune.evaluation.layout import Photos
from dreamtune.evaluation.results import Results, Row, mean_of
from dreamtune.evaluation.scatter import cloud, scatter
from dreamtune.evaluation.statistics import Estimate
from dreamtune.metrics import METRICS
from dreamtune.metrics.store import Picture, opened

PAGE = "report.html"
SIDE = 160  # of a picture, in pixels
SHEET = 25  # images of a subject that its sheet shows, one a prompt
EXTREMES = 6
COPIES = 12
NOTE = (
    "Behind each mean its 95% interval: a bootstrap over {}, widened for how few they are. n: "
    "images; over the base, differences of two of one prompt and seed. Photos: among themselves, "
    "the mean over the subjects and n photos, the level of a perfect generator; above it are "
    "copies. One subject's have no interval."
)

Show = Callable[[Row], str]


def write_page(
    results: Results, folder: Path, pictures: Mapping[Any, Picture], photos: Mapping[str, Photos]
) -> Path:
    """report.html in the folder. pictures: by `Row.key`; photos: by subject."""
    scores, levels = results.scores(), results.level_scores()
    kinds = {kind: first_of(results, kind) for kind in ("subject", "prompt")}

    def show(row: Row) -> str:
        return figure(pictures[row.key], f"{row.subject}: {row.prompt}", captioned(row, kinds))

    unit = next(iter(scores.values()))
    return write_html(
        folder / PAGE,
        "scores",
        f"Scores of {results.source.get('name', 'images')}",
        subtitle=escape(subtitle(results)),
        facts="".join(fact(key, value, results) for key, value in scores.items() if key in METRICS),
        warnings=warnings(results.warnings),
        heads="".join(
            f'<th scope="col">{h}</th>'
            for h in (
                "Score",
                "Mean (95%)",
                "Images",
                "Base (95%)",
                "Over the base (95%)",
                "Photos (95%)",
            )
        ),
        rows="".join(row_of(key, value, results, levels) for key, value in scores.items()),
        note=escape(NOTE.format(counted(unit.clusters, unit.unit))),
        plot=plot(results, kinds, levels),
        heat="".join(heat(results, key, photos) for key in kinds.values() if key),
        extremes="".join(extremes(results, key, show) for key in kinds.values() if key),
        copies=copies(results, show),
        sheets="".join(sheet(results, s, photos[s], show) for s in results.subjects),
        about=escape(f"{results.protocol['name']}: {results.protocol.get('about', '')}."),
        pairings="".join(
            f"<p>{escape(METRICS[key].title)}: {escape(METRICS[key].pairing)}.</p>"
            for key in results.protocol["metrics"]
            if key in METRICS
        ),
        protocol=escape(json.dumps(results.protocol, indent=1)),
        coverage=escape(json.dumps(results.coverage, indent=1)),
    )


def first_of(results: Results, kind: str) -> str | None:
    """The first score of that kind, of those that images have; held-out photos before others."""
    found = [k for k in results.scores() if k in METRICS and METRICS[k].kind == kind]
    return next((k for k in found if k.endswith("_held_out")), found[0] if found else None)


def subtitle(results: Results) -> str:
    count, subjects = len(results.images), len(results.subjects)
    parts = [
        str(results.source.get("kind", "")),
        f"protocol {results.protocol['name']}",
        f"{count} image{'s' * (count != 1)} of {subjects} subject{'s' * (subjects != 1)}",
    ]
    if base := results.source.get("base"):
        parts.append("on the embedded base" if base == "embedded" else f"on {base}")
    return " · ".join(part for part in parts if part)


def number(key: str, value: float) -> str:
    metric = METRICS.get(key)
    return format(value, metric.format if metric else ".3f")


def interval(key: str, e: Estimate, sign: str = "") -> str:
    if e.low is None or e.high is None:
        return "no interval"
    return " to ".join(f"{x:{sign}.3f}" if sign else number(key, x) for x in (e.low, e.high))


def noted(key: str, e: Estimate, sign: str = "") -> str:
    return f"{interval(key, e, sign)}, n\u00a0=\u00a0{e.n}"


def fact(key: str, e: Estimate, results: Results) -> str:
    main = "main" if METRICS[key].kind != "other" else ""
    return (
        f'<div class="{main}"><dt>{escape(METRICS[key].title)}</dt>'
        f"<dd>{number(key, e.mean)}<small>{escape(noted(key, e))}</small></dd></div>"
    )


def row_of(key: str, e: Estimate, results: Results, levels: Mapping[str, Estimate]) -> str:
    base, over = "–", "–"
    theirs = {row.key: row for row in results.base if row.scores.get(key) is not None}
    if found := mean_of(results.base, key, results.averaging):
        base = f"{number(key, found.mean)} <small>{escape(noted(key, found))}</small>"
    pairs = [
        (theirs[row.key], row)
        for row in results.images
        if row.key in theirs and row.scores.get(key) is not None
    ]
    if pairs:
        d = difference_of(key, pairs, results).estimate
        over = f"{d.mean:+.3f} <small>{escape(noted(key, d, '+'))}</small>"
    cells = (
        f"{number(key, e.mean)} <small>{escape(interval(key, e))}</small>",
        str(e.n),
        base,
        over,
        level_text(key, levels),
    )
    head = f'<th scope="row">{escape(title_of(key))}</th>'
    return f"<tr>{head}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def level_of(key: str, levels: Mapping[str, Estimate]) -> Estimate | None:
    """The mean over the subjects of what the photos are among themselves."""
    metric = METRICS.get(key)
    return levels.get(metric.comparison_key) if metric else None


def level_text(key: str, levels: Mapping[str, Estimate]) -> str:
    if (e := level_of(key, levels)) is None:
        return "–"
    note = f"n\u00a0=\u00a0{e.n}" if e.low is None else noted(key, e)
    return f"{number(key, e.mean)} <small>{escape(note)}</small>"


def warnings(texts: Sequence[str]) -> str:
    if not texts:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return (
        '<section aria-labelledby="warnings"><h2 id="warnings">To know before quoting</h2>'
        f'<ul class="warnings">{items}</ul></section>'
    )


def plot(results: Results, kinds: Mapping[str, str | None], levels: Mapping[str, Estimate]) -> str:
    x_key, y_key = kinds["prompt"], kinds["subject"]
    if x_key is None or y_key is None:
        return ""
    named = [("this", results.images), ("base", results.base)]
    clouds = [cloud(name, rows, x_key, y_key, results.averaging) for name, rows in named]
    shown = [c for c in clouds if c is not None]
    if not shown:
        return ""
    level = level_of(y_key, levels)
    if level is None and y_key.endswith("_held_out"):
        level = level_of(y_key.removesuffix("_held_out"), levels)
    line = level.mean if level else None
    chart = scatter(
        shown, METRICS[x_key].title, METRICS[y_key].title, line, "photos among themselves"
    )
    return (
        '<section aria-labelledby="plot-title"><h2 id="plot-title">Likeness and obedience</h2>'
        f'<div class="wide">{chart}</div><p class="soft">Up and to the right is better. Ellipses: '
        "95% of the mean. Small dots: subjects.</p></section>"
    )


def template_of(row: Row, photos: Mapping[str, Photos]) -> str:
    """The prompt with {} for the subject, where its words are known: one line for all subjects."""
    words = photos[row.subject].words if row.subject in photos else None
    return row.prompt if words is None else words.template(row.prompt)


def heat(results: Results, key: str, photos: Mapping[str, Photos]) -> str:
    """Prompts down, subjects across; the colour runs from the lowest cell to the highest."""
    cells: dict[tuple[str, str], list[float]] = {}
    for row in results.images:
        if (value := row.scores.get(key)) is not None:
            cells.setdefault((template_of(row, photos), row.subject), []).append(value)
    means = {place: fmean(values) for place, values in cells.items()}
    low, high = min(means.values()), max(means.values())
    prompts = list(dict.fromkeys(prompt for prompt, _ in means))
    lines = []
    for prompt in prompts:
        line = ""
        for subject in results.subjects:
            value = means.get((prompt, subject))
            if value is None:
                line += "<td>–</td>"
                continue
            share = 0 if high == low else (value - low) / (high - low)
            colour = f"color-mix(in srgb, var(--accent) {6 + 54 * share:.0f}%, var(--card))"
            line += f'<td style="background:{colour}">{number(key, value)}</td>'
        lines.append(f'<tr><th scope="row">{escape(prompt)}</th>{line}</tr>')
    heads = "".join(f'<th scope="col">{escape(subject)}</th>' for subject in results.subjects)
    title = f"{METRICS[key].title} by prompt"
    return (
        f'<section aria-labelledby="heat-{key}"><h2 id="heat-{key}">{escape(title)}</h2>'
        '<div class="scroll"><table class="heat"><thead><tr><th scope="col">Prompt</th>'
        f"{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def figure(picture: Picture, alt: str, caption: str) -> str:
    image = img(opened(picture), alt, SIDE)
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{image}{text}</figure>"


def captioned(row: Row, kinds: Mapping[str, str | None]) -> str:
    values = [
        f"{METRICS[key].title} {number(key, value)}"
        for key in kinds.values()
        if key is not None and (value := row.scores.get(key)) is not None
    ]
    return ", ".join([row.prompt, *values])


def gallery(title: str, name: str, figures: Sequence[str], text: str = "") -> str:
    return (
        f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>'
        f'{text}<div class="row">{"".join(figures)}</div></section>'
    )


def extremes(results: Results, key: str, show: Show) -> str:
    """The highest and the lowest, where there are enough to tell them from all."""
    known = [row for row in results.images if row.scores.get(key) is not None]
    if len(known) < 2 * EXTREMES:
        return ""
    order = sorted(known, key=lambda row: row.scores[key] or 0.0)
    title = METRICS[key].title
    return gallery(
        f"Highest {title}", f"best-{key}", [show(row) for row in order[: -EXTREMES - 1 : -1]]
    ) + gallery(f"Lowest {title}", f"worst-{key}", [show(row) for row in order[:EXTREMES]])


def copies(results: Results, show: Show) -> str:
    """Images nearer to a training photo than the photos are to their nearest."""
    for key in results.keys:
        metric = METRICS.get(key)
        if metric is None or not key.endswith("_nearest"):
            continue
        levels = results.levels.get(metric.comparison_key, {})
        near = [
            (value - levels[row.subject], row)
            for row in results.images
            if row.subject in levels and (value := row.scores.get(key)) is not None
        ]
        found = [row for by, row in sorted(near, key=lambda n: -n[0]) if by > 0]
        text = (
            f"<p>{len(found)} of {len(near)} images are nearer to a training photo than the "
            "photos are to their nearest on average; the nearest first.</p>"
        )
        return gallery("Suspected copies", "copies", [show(row) for row in found[:COPIES]], text)
    return ""


def sheet(results: Results, subject: str, photos: Photos, show: Show) -> str:
    own = [row for row in results.images if row.subject == subject]
    firsts = list({(row.prompt, row.unrelated): row for row in reversed(own)}.values())[::-1]
    more = len(firsts) - SHEET
    parts = []
    for name, pictures in (("Photos", photos.photos), ("Held-out photos", photos.held_out)):
        if pictures:
            row = "".join(figure(p, f"{name} of {subject}", "") for p in pictures)
            parts.append(f'<p class="label">{name}</p><div class="row">{row}</div>')
    rest = f", {more} more prompts are in the folder" if more > 0 else ""
    parts.append(
        f'<p class="label">Generated, the first of each prompt{rest}</p>'
        f'<div class="row">{"".join(show(row) for row in firsts[:SHEET])}</div>'
    )
    return f'<article class="sheet"><h3>{escape(subject)}</h3>{"".join(parts)}</article>'
