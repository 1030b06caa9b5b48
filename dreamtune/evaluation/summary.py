"""What several runs of one command leave beside their folders: summary.json, summary.csv, and a
page that links their reports.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dreamtune.evaluation.inline import write_html
from dreamtune.evaluation.results import write_csv
from dreamtune.evaluation.selection import choose_best
from dreamtune.evaluation.sweep_curves import Point, Value, swept_curve
from dreamtune.files.whole import whole
from dreamtune.metrics.table import METRICS, scored
from dreamtune.version import __version__

JSON, CSV, PAGE = "summary.json", "summary.csv", "summary.html"
NAMES = (JSON, CSV, PAGE)
SHARES = {"subject_gained": "Subject gained", "prompt_kept": "Prompt kept", "product": "Product"}
OVER_SEEDS = (
    "Dots: runs. Lines up and down: 95% of the mean over seeds, a bootstrap that is widened for "
    "how few they are. Dashed, with a band: the mean of all seeds and its 95%."
)


@dataclass(frozen=True)
class Entry:
    """One run.

    label: its folder below the common one. subject: of `--subjects`, "" for a sweep of one. swept:
    name -> (value as it was written, value). history: its scorings. failed: what went wrong.
    """

    label: str
    subject: str = ""
    swept: Mapping[str, tuple[str, Value]] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    best_step: int = 0
    failed: str = ""
    identity_at_start: bool = True

    @property
    def seed(self) -> str:
        """As it was written, "" where seeds were not swept."""
        return self.swept["seed"][0] if "seed" in self.swept else ""

    def record(self) -> Mapping[str, Any]:
        """The scoring of the best checkpoint."""
        return next((r for r in self.history if r["step"] == self.best_step), {})

    def numbers(self) -> dict[str, float | None]:
        """The scores of the best checkpoint, and its shares of the rule that chose it."""
        record = self.record()
        found = {key: record.get(key) for m in scored([record]) for key in m.record_keys}
        choice = choose_best(self.history, self.identity_at_start) if self.history else None
        if choice and choice.ratings:
            rating = choice.ratings[choice.index]
            found |= {key: getattr(rating, key) for key in SHARES} if rating.finite else {}
        return {key: value for key, value in found.items() if value is not None}

    def line(self) -> dict[str, Any]:
        last = self.history[-1] if self.history else {}
        return {
            "run": self.label,
            "subject": self.subject,
            "swept": {name: value for name, (_, value) in self.swept.items()},
            "failed": self.failed,
            "steps": last.get("step"),
            "best_step": None if self.failed else self.best_step,
            "seconds": last.get("seconds"),
            "scores": {} if self.failed else self.numbers(),
        }


def refuse_taken(folder: Path, labels: Sequence[str]) -> None:
    """Raises ValueError where a summary would replace something: nothing is overwritten."""
    if there := [name for name in NAMES if (folder / name).exists()]:
        raise ValueError(
            f"`{folder / there[0]}` is there already: name another --output_dir, or move it away."
        )
    if label := next((label for label in labels if label in NAMES), None):
        raise ValueError(
            f"a subject cannot be called `{label}`: a summary of that name is written beside it."
        )


def write_summary(folder: Path, title: str, entries: Sequence[Entry]) -> Path:
    """The three files, in the folder that holds those of the runs; returns the page's path."""
    lines = [entry.line() for entry in entries]
    stated = {"format_version": 1, "dreamtune": __version__, "title": title, "runs": lines}
    with whole(folder / JSON) as partial:
        partial.write_text(json.dumps(stated, indent=1) + "\n", encoding="utf-8")
    keys = list(dict.fromkeys(key for line in lines for key in line["scores"]))
    names = swept_names(entries)
    heads = ["run", "subject", *names, "failed", "steps", "best_step", "seconds", *keys]
    rows = [
        [
            line["run"],
            line["subject"],
            *(line["swept"].get(name) for name in names),
            *(line[name] for name in ("failed", "steps", "best_step", "seconds")),
            *(line["scores"].get(key) for key in keys),
        ]
        for line in lines
    ]
    write_csv(folder / CSV, heads, rows)
    failed = sum(bool(entry.failed) for entry in entries)
    return write_html(
        folder / PAGE,
        "summary",
        title,
        subtitle=escape(f"{len(entries)} runs" + (f", {failed} failed" if failed else "")),
        table=table(folder, entries),
        charts=charts(entries),
    )


def swept_names(entries: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(name for entry in entries for name in entry.swept))


def title_of(key: str) -> str:
    return SHARES.get(key) or METRICS[key].title


def shown_keys(entries: Sequence[Entry]) -> list[str]:
    """Scores that the page shows: each metric of any run, and the shares."""
    keys = [metric.key for metric in scored(entry.record() for entry in entries)]
    return [*keys, *SHARES] if keys else []


def table(folder: Path, entries: Sequence[Entry]) -> str:
    """One row a run; its name links to its report where that is there."""
    keys, rows = shown_keys(entries), []
    heads = ["Run", "Steps", "Best", *map(title_of, keys)]
    for entry in entries:
        name = ",<wbr>".join(f"<span>{escape(part)}</span>" for part in entry.label.split(","))
        if (folder / entry.label / "report.html").is_file():
            name = f'<a href="{escape(quote(f"{entry.label}/report.html"))}">{name}</a>'
        line = entry.line()
        if entry.failed:
            cells = (
                f'<td class="failed" colspan="{len(heads) - 1}">failed: {escape(entry.failed)}</td>'
            )
        else:
            cells = f"<td>{line['steps']}</td><td>{line['best_step']}</td>"
            cells += "".join(f"<td>{cell_of(key, line['scores'])}</td>" for key in keys)
        rows.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    return f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"


def cell_of(key: str, scores: Mapping[str, float]) -> str:
    """A number, with its standard error where there is one."""
    error = METRICS[key].error_text(scores) if key in METRICS else ""
    text = text_of(key, scores.get(key))
    return f"{text} <small>{error}</small>" if error else text


def text_of(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    if key in SHARES:
        return f"{value:.2f}" if key == "product" else f"{value:.0%}"
    return format(value, METRICS[key].format)


def charts(entries: Sequence[Entry]) -> str:
    """Each score against the values of each swept setting; "" without a sweep."""
    parts = []
    seeds = len({entry.seed for entry in entries}) > 1
    note = f'<p class="soft">{escape(OVER_SEEDS)}</p>' if seeds else ""
    numbers = [(entry, entry.numbers()) for entry in entries if not entry.failed]
    for name in swept_names(entries):
        drawn = ""
        for key in shown_keys(entries):
            points = [
                Point(entry.swept[name][1], entry.swept[name][0], float(value), entry.seed)
                for entry, own in numbers
                if name in entry.swept and (value := own.get(key)) is not None
            ]
            drawn += swept_curve(title_of(key), name, points)
        if drawn:
            parts.append(
                f'<section><h2>{escape(name)}</h2><div class="charts">{drawn}</div>{note}</section>'
            )
    return "".join(parts)
