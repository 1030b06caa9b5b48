"""The summary of several runs: numbers of their best checkpoints, links, curves, refusals."""

from __future__ import annotations

import csv
import json
import re
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from dreamtune.config import Config
from dreamtune.evaluation.summary import Entry, write_summary
from dreamtune.evaluation.sweep_curves import Point, over_seeds, places_of, swept_curve
from dreamtune.training.train import train_stacked


def test_a_sweep_leaves_a_summary_of_its_runs(
    settings: dict[str, Any], scorer_names: dict[str, str], tmp_path: Path
) -> None:
    sweep = ["learning_rate=1e-3,1e-1", "seed=0,1"]
    config = Config(**{**settings, **scorer_names, "max_train_steps": 2, "sweep": sweep})
    result = train_stacked(config)
    stated = json.loads((result.run_dir / "summary.json").read_text())["runs"]
    assert [run["run"] for run in stated] == list(result.results)
    for run, own in zip(stated, result.results.values(), strict=True):
        assert (run["best_step"], run["steps"]) == (own.best_step, 2)
        assert {k: run["scores"][k] for k in ("dino", "clip_i", "clip_t", "dino_nearest")} == {
            k: own.scores[k] for k in ("dino", "clip_i", "clip_t", "dino_nearest")
        }
    assert [run["swept"]["learning_rate"] for run in stated] == [1e-3, 1e-3, 1e-1, 1e-1]
    with (result.run_dir / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["dino"]) for row in rows] == [run["scores"]["dino"] for run in stated]
    assert [row["seed"] for row in rows] == ["0", "1", "0", "1"]
    page = (result.run_dir / "summary.html").read_text()
    links = [unquote(unescape(link)) for link in re.findall('href="([^#"][^"]*)"', page)]
    assert links == [f"{label}/report.html" for label in result.results]
    assert all((result.run_dir / link).is_file() for link in links)
    assert "CLIP-T against learning_rate" in page and "DINO against seed" in page
    again = Config(**{**config.to_dict(), "output_dir": str(tmp_path / "other")})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "summary.csv").write_text("mine")
    with pytest.raises(ValueError, match=r"summary.csv` is there already"):
        train_stacked(again)
    assert (tmp_path / "other" / "summary.csv").read_text() == "mine"


def test_what_failed_and_what_a_name_holds(tmp_path: Path) -> None:
    label = "a <b>,method=lora"
    (tmp_path / label).mkdir()
    (tmp_path / label / "report.html").write_text("")
    history = [{"step": 0, "loss": None}, {"step": 4, "loss": 0.5, "seconds": 1.0}]
    swept = {"method": ("lora", "lora")}
    runs = [Entry(label, "a <b>", swept, history, 4), Entry("=dog", "=dog", failed="no <photo>")]
    page = write_summary(tmp_path, "both & more", runs).read_text()
    assert (
        "<b>" not in page
        and "<span>a &lt;b&gt;</span>,<wbr><span>method=lora</span>" in page
        and "both &amp; more" in page
    )
    assert 'href="a%20%3Cb%3E%2Cmethod%3Dlora/report.html"' in page
    assert "failed: no &lt;photo&gt;" in page and "2 runs, 1 failed" in page
    stated = json.loads((tmp_path / "summary.json").read_text())["runs"]
    assert [(r["steps"], r["best_step"], r["failed"]) for r in stated] == [
        (4, 4, ""), (None, None, "no <photo>"),
    ]  # fmt: skip
    assert "'=dog" in (tmp_path / "summary.csv").read_text()  # no formula for a spreadsheet


def test_numbers_have_their_standard_error(tmp_path: Path) -> None:
    history = [{"step": 2, "seconds": 1.0, "dino": 0.5, "dino_se": 0.0214, "clip_i": 0.25}]
    page = write_summary(tmp_path, "one", [Entry("a", "a", {}, history, 2)]).read_text()
    assert "<td>0.500 <small>± 0.021</small></td><td>0.250</td>" in page


def test_where_swept_values_stand() -> None:
    assert places_of("learning_rate", [1e-4, 1e-2, 1e-3]) == ({v: v for v in (1e-4, 1e-2, 1e-3)}, 1)
    assert places_of("rank", [2, 4, 8]) == ({2: 2, 4: 4, 8: 8}, False)
    assert places_of("method", ["lora", 3, "oft"]) == ({"lora": 0, 3: 1, "oft": 2}, False)
    assert places_of("decompose", [True, False]) == ({True: 0, False: 1}, False)
    assert places_of("seed", [9, 1, 500]) == ({9: 0, 1: 1, 500: 2}, False)
    points = [Point(v, str(v), s) for v, s in ((1, 0.2), (1, 0.4), (2, 0.5), (3, float("nan")))]
    drawn = swept_curve("DINO", "rank", points)
    assert 'aria-label="DINO against rank: 1: 0.300; 2: 0.500"' in drawn
    dots = re.search('<g class="dots">.*?</g>', drawn)
    assert dots is not None and dots[0].count("<use") == 3
    assert swept_curve("DINO", "rank", points[3:]) == ""


def test_nothing_joins_seeds_or_words_but_an_interval_stands_at_their_means() -> None:
    scores = {"0": (0.2, 0.4), "1": (0.3, 0.5), "2": (0.5, 0.7)}
    rates = [Point(r, str(r), s[i], k) for k, s in scores.items() for i, r in enumerate((1, 2))]
    seeds = [Point(int(p.seed), p.seed, p.score, p.seed) for p in rates]
    words = [Point("ab"[p.value == 2], "ab"[p.value == 2], p.score, p.seed) for p in rates]
    found = over_seeds(rates)
    assert (found.mean, found.clusters, found.n) == (pytest.approx(2.6 / 6), 3, 6)
    again = over_seeds([*rates, *rates[:2]])  # a seed with more runs weighs as the others
    assert again.mean == pytest.approx(2.6 / 6)
    kinds = ("line", "dash", "interval", "band")
    drawn = [
        swept_curve("DINO", name, points)
        for name, points in (("rate", rates), ("method", words), ("seed", seeds))
    ]
    assert [[d.count(f'<g class="{kind}">') for kind in kinds] for d in drawn] == [
        [1, 0, 2, 0], [0, 2, 2, 0], [0, 3, 0, 1],
    ]  # fmt: skip
    low, high = found.low, found.high
    assert f"mean of 3 seeds: 0.433, 95% interval {low:.3f} to {high:.3f}" in drawn[2]
    one = [Point(p.value, p.text, p.score) for p in rates]
    assert "interval" not in swept_curve("DINO", "rate", one)
