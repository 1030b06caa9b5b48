"""The page of a benchmark: every number and name of small results in it, texts escaped."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from dreamtune.evaluation.compare import compare
from dreamtune.evaluation.results import Results, Row, mean_of, write_results

sys.path.append(str(Path(__file__).parents[1] / "eval"))

import benchmark_scores  # noqa: E402
from benchmark_page import Pair, write_benchmark  # noqa: E402
from benchmark_parts import Plan  # noqa: E402

EVIL = "oft,<b>=1"
SUBJECTS = {"dog": "dog", "<i>cat": "cat", "fox": "fox"}
PROTOCOL = {
    "name": "small", "about": "a <u>", "averaging": "images", "metrics": ["dino", "clip_t"],
    "scorers": {"dino": {"weights": "aaaa"}, "clip": {"weights": "bbbb"}},
}  # fmt: skip


def rows(dino: float, clip_t: float, seed: int) -> list[Row]:
    random = np.random.default_rng(seed)
    return [
        Row(s, p, k, False, "", "", {"dino": float(dino + random.normal(0, 0.05)),
                                     "clip_t": float(clip_t + random.normal(0, 0.02))})
        for s in SUBJECTS for p in ("in the snow", "on a rock") for k in range(2)
    ]  # fmt: skip


def results(dino: float, clip_t: float, seed: int) -> Results:
    levels = {"dino_photos": {"dog": 0.70, "<i>cat": 0.76, "fox": 0.757}}
    return Results({}, PROTOCOL, {}, rows(dino, clip_t, seed), rows(0.2, 0.35, 9), levels,
                   warnings=["one", "two"])  # fmt: skip


@pytest.fixture
def methods() -> dict[str, Results]:
    return {"lora": results(0.6, 0.3, 1), EVIL: results(0.5, 0.25, 2)}


def plan_of(*names: str) -> Plan:
    return Plan("dreambooth", SUBJECTS, [list(SUBJECTS)], list(names), [0], "paper", ["--a", "<s>"])


def test_every_number_and_name_is_on_the_page(methods: dict[str, Results], tmp_path: Path) -> None:
    pair = Pair("lora", EVIL, compare(methods["lora"], methods[EVIL]))
    failed = [("dora", "<i>cat", "no <photo>")]
    path = write_benchmark(tmp_path, plan_of("lora", EVIL, "dora"), methods, [pair], failed)
    assert path == tmp_path / "report.html"
    page = path.read_text()
    for key in ("dino", "clip_t"):
        for of in (methods["lora"].base, *(one.images for one in methods.values())):
            e = mean_of(of, key, "images")
            assert e is not None and e.low is not None and e.high is not None
            cell = f"{e.mean:.3f}<small>{e.low:.3f} to {e.high:.3f}</small><small>n = 12</small>"
            assert page.count(f"<td>{cell}</td>") == 1, (key, cell)
    assert "a bootstrap over 3 subjects that is" in page
    assert page.count("<td>0.739<small>") == 1  # the photos: the mean of three subjects
    for line in pair.comparison.text("lora", EVIL).split("\n"):
        assert line in unescape(page)
    assert 'href="lora/report.html"' in page
    assert 'href="oft%2C%3Cb%3E%3D1/report.html">oft,<wbr>&lt;b&gt;=1</a>' in page
    assert "dora: &lt;i&gt;cat: no &lt;photo&gt;" in page and "1 failure of training" in page
    assert "12 images of 3 subjects, 2 warnings" in page and "small: a &lt;u&gt;." in page
    assert "--a '<s>'" in unescape(page)
    assert not any(tag in page for tag in ("<b>", "<i>", "<u>", "<s>", "<photo>"))
    assert "<script" not in page and "http://" not in page and "https://" not in page


def test_the_plot_has_a_point_and_an_ellipse_of_each_and_the_photos(
    methods: dict[str, Results], tmp_path: Path
) -> None:
    page = write_benchmark(tmp_path, plan_of("lora", EVIL), methods, [], []).read_text()
    anchored, alone = page.split('<figure class="chart">')[1:]
    for name, of in {**{m: r.images for m, r in methods.items()},
                     "base": methods["lora"].base}.items():  # fmt: skip
        x, y = (mean_of(of, key, "images").mean for key in ("clip_t", "dino"))
        at = f"{name} at {x:.3f}, {y:.3f}"
        assert at in unescape(anchored) and (at in unescape(alone)) == (name != "base")
    for chart, count, level in ((anchored, 3, 1), (alone, 2, 0)):
        assert chart.count('class="mean ') == chart.count('class="ellipse ') == count
        assert chart.count('class="reference"') == level
    assert "photos among themselves" in anchored and "The second: the methods alone." in page
    assert "no other method is better in both than: lora." in page


def test_whom_a_failure_leaves_without_a_base(methods: dict[str, Results], tmp_path: Path) -> None:
    """The base and the photos are of all subjects that some method has."""
    lora = methods["lora"]
    part = replace(
        lora,
        images=[r for r in lora.images if r.subject == "dog"],
        base=[r for r in lora.base if r.subject == "dog"],
        levels={"dino_photos": {"dog": 0.70}},
    )
    alone = write_benchmark(tmp_path, plan_of("lora"), {"lora": part}, [], []).read_text()
    assert "a bootstrap over 2 prompts of one subject that is" in alone
    assert "comparisons" not in alone and "The second" not in alone
    known = {"lora": part, EVIL: methods[EVIL]}
    page = write_benchmark(tmp_path, plan_of(*known), known, [], []).read_text()
    e = mean_of(lora.base, "dino", "images")
    assert e is not None and f"<td>{e.mean:.3f}<small>" in page and "<td>0.739<small>" in page
    assert "4 images of 1 subject, 2 warnings" in page


def test_finish_writes_it(methods: dict[str, Results], tmp_path: Path) -> None:
    plan = plan_of("lora", EVIL, "dora")
    (tmp_path / "done").mkdir()
    for kind in ("base", *plan.methods):
        said = {"failed": {"dog": "why"}, "sampling": {}} if kind == "dora" else {
            "failed": {}, "sampling": {"steps": 2}}  # fmt: skip
        (tmp_path / "done" / f"{kind}-seed-0-part-00.json").write_text(json.dumps(said))
    for method, one in methods.items():
        (tmp_path / "results" / method).mkdir(parents=True)
        write_results(one, tmp_path / "results" / method)
    told: list[str] = []
    found = benchmark_scores.finish(tmp_path, plan, told.append)
    assert list(found) == ["lora", EVIL] and told[-1] == str(tmp_path / "results" / "report.html")
    page = unescape((tmp_path / "results" / "report.html").read_text())
    texts = (tmp_path / "results" / "comparisons.txt").read_text().strip()
    assert texts == told[0] and all(line in page for line in texts.split("\n"))
    assert "dora: dog: why" in page


def test_a_benchmark_none_of_whose_methods_could_be_trained(tmp_path: Path) -> None:
    failed = [("dora", "dog", "why")]
    page = write_benchmark(tmp_path, plan_of("dora"), {}, [], failed).read_text()
    assert "dora: dog: why" in page and "0 images scored" in page and "<table" not in page


def test_without_a_base_and_photos(methods: dict[str, Results], tmp_path: Path) -> None:
    bare = {"lora": replace(methods["lora"], base=[], levels={})}
    page = write_benchmark(tmp_path, plan_of("lora"), bare, [], []).read_text()
    assert page.count('<figure class="chart">') == page.count('class="mean ') == 1
    assert "Base" not in page and page.count("<td>–</td>") == 2
