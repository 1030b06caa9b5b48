"""Charts: inside their frame, in the page's colours, with what people wrote as they wrote it."""

from __future__ import annotations

import ast
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dreamtune
from dreamtune.evaluation.chart import limited, limits
from dreamtune.evaluation.curves import curve
from dreamtune.evaluation.results import Row, mean_of
from dreamtune.evaluation.scatter import Cloud, apart, cloud, scatter
from dreamtune.evaluation.sweep_curves import Point, swept_curve

EVIL = '<script>alert("x")</script> $x_1$ & \\frac {'


def parsed(figure: str) -> ElementTree.Element:
    found = ElementTree.fromstring(figure).find("svg")
    assert found is not None
    return found


def texts(figure: str) -> list[str]:
    return [text.text or "" for text in parsed(figure).iter("text")]


@pytest.mark.parametrize("values", [[0.5, 0.5], [0.1, 0.9], [-0.02, 0.001], [0.3], [1e-5, 2e-5]])
def test_curves_stay_inside_their_frame(values: list[float]) -> None:
    svg = curve("DINO", range(len(values)), values, 0, reference=0.6, reference_name="r")
    line = re.search('<g class="line">.*?</g>', svg)
    assert line is not None
    points = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', line[0])
    assert len(points) == len(values)
    assert all(0 <= float(x) <= 340 and 0 <= float(y) <= 216 for x, y in points)


def test_a_curve_is_where_its_numbers_are() -> None:
    """Against the ticks, which tell the scale."""
    svg = curve("CLIP-T", [0, 5, 10], [0.83, 0.85, 0.891], 2)
    shown = parsed(svg).iter("text")
    ticks = [(float(t.text), float(t.get("y"))) for t in shown if t.text and t.text[:2] == "0."]
    ticks = [tick for tick in ticks if tick[0] != 0.891]
    assert len(ticks) >= 2 and len({round(b[0] - a[0], 6) for a, b in zip(ticks, ticks[1:])}) == 1
    (low, below), (high, above) = ticks[0], ticks[-1]
    line = re.search('<g class="line">.*?</g>', svg)
    assert line is not None
    found = [float(y) for y in re.findall(r'<use [^>]*y="([\d.]+)"', line[0])]
    gap = (below - above) / (high - low)
    assert np.diff(found) == pytest.approx([-0.02 * gap, -0.041 * gap], abs=1e-3)
    assert "0.891" in texts(svg)
    assert 'aria-label="CLIP-T against training steps, from 0.830 to 0.891; 0.891 at the' in svg


def test_no_text_is_a_formula_or_markup() -> None:
    drawn = [
        curve(EVIL, [0, 1], [0.1, 0.2], 1, reference=0.3, reference_name=EVIL),
        curve("a", [0, 1], [0.1, 0.2], 1, other=[0.1, 0.1], other_name=EVIL),
        swept_curve(EVIL, EVIL, [Point("$a$", "$a$", 0.1), Point("#010101", "#010101\x00", 0.2)]),
        scatter([replace(some_cloud(), name=EVIL)], EVIL, EVIL, 0.5, EVIL),
    ]
    for figure in drawn:
        assert "<script" not in figure and "<style" not in figure and "DejaVu" not in figure
        assert parsed(figure).get("role") == "img" and parsed(figure)[0].tag == "title"
    assert EVIL in texts(drawn[0]) and EVIL in texts(drawn[1])
    assert texts(drawn[2])[:2] == ["$a$", "#010101\ufffd"]
    assert [t.count(EVIL) for t in texts(drawn[3]) if not t[0].isdigit()] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "name", ["柴犬", "\U0001f469\u200d\U0001f3a8", "नमस्\u200dते", "a\u00a0b", "می\u200cخواهم"]
)
def test_names_of_all_scripts_are_as_they_were_written(name: str) -> None:
    """Without a warning that matplotlib's own font lacks them: the page has its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = [
            curve(name, [0, 1], [0.1, 0.2], 1, reference=0.3, reference_name=name),
            swept_curve("t", name, [Point(name, name, 0.1), Point("b", "b", 0.2)]),
            scatter([replace(some_cloud(), name=name)], name, "y"),
        ]
    for figure in drawn:
        assert any(name in text for text in texts(figure)) and "\ufffd" not in figure
        assert name in str(parsed(figure).get("aria-label"))


def test_what_no_xml_may_hold_is_replaced() -> None:
    for odd in "\x00\x1b\ud800\ufffe\uffff\n\u2028":
        assert texts(swept_curve("t", "x", [Point(f"a{odd}b", f"a{odd}b", 0.1)]))[0] == "a\ufffdb"


def test_colours_are_the_page_s_and_ids_are_a_chart_s_own() -> None:
    one, other = (curve("a", [0, 1], [0.1, y], 1, reference=0.3) for y in (0.2, 0.25))
    assert not re.search("#[0-9a-f]{6}", one)
    assert {"var(--ink)", "var(--soft)", "var(--accent)", "var(--rule)"} <= set(
        re.findall(r"var\(--\w+\)", one)
    )
    ids = [re.findall('id="([^"]*)"', svg) for svg in (one, other)]
    assert ids[0] and not set(ids[0]) & set(ids[1])
    for svg, known in zip((one, other), ids):
        assert len(set(known)) == len(known)
        assert set(re.findall('(?:href="|url[(])#([^")]*)', svg)) == set(known)


def test_the_same_chart_is_the_same_text_whatever_a_person_set() -> None:
    """In threads too: matplotlib has one set of settings for all of them."""
    import matplotlib

    first = curve("a", [0, 1, 2], [0.1, 0.3, 0.2], 1)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "lines.linewidth": 9}):
        before = dict(matplotlib.rcParams)
        with ThreadPoolExecutor(3) as pool:
            drawn = [*pool.map(lambda _: curve("a", [0, 1, 2], [0.1, 0.3, 0.2], 1), range(6))]
        assert dict(matplotlib.rcParams) == before
    assert set(drawn) == {first}


def test_matplotlib_is_imported_only_once_a_chart_is_drawn() -> None:
    """And pyplot, with its windows and its figures that stay, never."""
    found = set()
    for path in Path(dreamtune.__file__).parent.rglob("*.py"):
        if "matplotlib" not in (text := path.read_text()):
            continue
        tree = ast.parse(text)
        inner = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
        checked = {
            n
            for f in ast.walk(tree)
            if isinstance(f, ast.If) and ast.unparse(f.test) == "TYPE_CHECKING"
            for n in ast.walk(f)
        }
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)) and "matplotlib" in ast.unparse(node):
                assert node in inner | checked, path.name
                assert "pyplot" not in ast.unparse(node), path.name
                found.add(path.name)
    assert {"chart.py", "curves.py"} <= found


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-10, 10), min_size=1, max_size=5), st.lists(st.floats(-1e6, 1e6), max_size=5)
)
def test_limits_hold_all_dots(dots: list[float], outer: list[float]) -> None:
    low, high = limits(dots)
    assert low < min(dots) <= max(dots) < high
    low, high = limited(dots, outer)
    assert low <= min(dots) and max(dots) <= high
    assert high - low <= 3 * max(max(dots) - min(dots), 0.05) + 1e-9


def rows(subjects: str = "abc") -> list[Row]:
    """Of subjects with 2, 5, 9, 2, ... photos; one image has no CLIP-T."""
    random = np.random.default_rng(0)
    found = []
    for subject, photos in zip(subjects, cycle((2, 5, 9))):
        for k in range(4):
            dino, clip = (float(x) for x in random.normal((0.6, 0.3), 0.05))
            scores = {"dino": dino, "clip_t": None if (subject, k) == ("b", 3) else clip}
            found.append(Row(subject, "p", k, False, "", "", scores, {"dino": photos}))
    return found


def some_cloud():
    found = cloud("this", rows(), "clip_t", "dino", "pairs")
    assert found is not None
    return found


@pytest.mark.parametrize("averaging", ["pairs", "images", "subjects"])
def test_a_cloud_is_where_the_table_s_means_are(averaging: str) -> None:
    """By `pairs` an image's DINO counts once a photo, its CLIP-T once."""
    found = cloud("this", rows(), "clip_t", "dino", averaging)
    table = [mean_of(rows(), key, averaging).mean for key in ("clip_t", "dino")]
    assert found.mean == pytest.approx(table, abs=1e-12)
    naive = np.mean([r.scores["clip_t"] for r in rows() if r.scores["clip_t"] is not None])
    if averaging == "pairs":
        assert found.mean[0] == pytest.approx(naive, abs=1e-12)
    means = {s: np.mean([r.scores["dino"] for r in rows() if r.subject == s]) for s in "abc"}
    assert [y for _, y in found.subjects] == pytest.approx([*means.values()])


def test_names_do_not_cover_each_other() -> None:
    """Those of means that are near in x stand a line apart, the highest at its own mean."""
    means = [(0.5, 0.50), (0.5, 0.52), (0.5, 0.51), (0.9, 0.51), (0.5, 0.1)]
    clouds = [Cloud(str(i), mean, [], []) for i, mean in enumerate(means)]
    line = 16 / 310
    found = apart(clouds, (0.0, 1.0), (0.0, 1.0))
    assert found == pytest.approx([0.52 - 2 * line, 0.52, 0.52 - line, 0.51, 0.1])
    drawn = parsed(scatter(clouds, "x", "y"))
    places = sorted(float(t.get("y", "")) for t in drawn.iter("text") if t.text in ("0", "1", "2"))
    assert len(places) == 3 and min(np.diff(places)) > 10


def test_an_ellipse_is_as_wide_as_the_two_intervals() -> None:
    """95% of two together reach sqrt(5.991) / 1.96 times as far as 95% of each."""
    many = rows("abcdefghijklmnopqrst")
    found = cloud("this", many, "clip_t", "dino", "pairs")
    corners = np.array(found.outline)
    for i, key in enumerate(("clip_t", "dino")):
        e = mean_of(many, key, "pairs")
        half = (corners[:, i].max() - corners[:, i].min()) / 2
        assert half == pytest.approx((e.high - e.low) / 2 * 5.991**0.5 / 1.96, rel=0.1)
    alone = [row for row in rows() if row.subject == "a" and row.seed == 0]
    assert cloud("this", alone, "clip_t", "dino", "pairs").outline == []
    assert cloud("this", alone, "clip_t", "lpips", "pairs") is None
    # A subject without one of the scores: draws of it alone are left out.
    part = [replace(r, scores={"dino": 0.5}) if r.subject == "c" else r for r in rows()]
    assert np.isfinite(cloud("this", part, "clip_t", "dino", "images").outline).all()
