"""The robustness evaluation: what is planned and gone on with, its statistics against numbers made
by hand, runs that diverge, and the page."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "eval"))

import prodigy  # noqa: E402
import robustness  # noqa: E402
import robustness_bench  # noqa: E402
import robustness_choice  # noqa: E402
import robustness_confirm  # noqa: E402
import robustness_questions  # noqa: E402
import robustness_report  # noqa: E402
import robustness_wave  # noqa: E402
from robustness_costs import MARGIN, UNSEEN, Costs, Wave, fitted, plan_text, waves_of  # noqa: E402
from robustness_plan import (  # noqa: E402
    MULTIPLIERS,
    PARTS,
    VARIANTS,
    Chosen,
    Run,
    Settings,
    runs_of,
    subjects_of,
)
from robustness_state import (  # noqa: E402
    State,
    append,
    read_state,
    results_of,
    settled,
    write_results,
)
from robustness_stats import (  # noqa: E402
    Results,
    Sweep,
    at_chosen_rate,
    difference,
    ends,
    mean,
    read,
    score,
    seed_spread,
    sweep,
    width,
)
from robustness_times import common_best, own_best, time_to_quality  # noqa: E402

from dreamtune import embedded  # noqa: E402
from dreamtune.adapters import find_method  # noqa: E402
from dreamtune.training.chosen import EMBEDDED  # noqa: E402

SETTINGS = Settings()
MEASURED = {
    "device": "cpu", "torch": "2", "variant": "delora", "setup_seconds": 2.0,
    "seconds_a_step": {"16": 0.1, "64": 0.2, "128": 0.6}, "images_a_second": 24.0,
    "seconds_a_step_alone": {"lora": 0.5},
}  # fmt: skip


def line(run: Run, step: int | None = None, **values: Any) -> dict[str, Any]:
    scores = dict.fromkeys(("clip_i", "clip_t", "dino_held_out", "dino_nearest", "dino_drift"), 0.5)
    found = {
        "kind": "run", **run.fields, "step": run.steps if step is None else step,
        "diverged": None, "dino": 0.7, **scores, "distance": 0.1, "skipped": 0, "seconds": 1.0,
    }  # fmt: skip
    return {**found, **values}


def row(subject: str, dino: float | None, **values: Any) -> dict[str, Any]:
    run = Run("a", "lora", 1.0, 6e-4, 0, subject, (240,))
    return line(run, **{"dino": dino, **values})


def results(rows: Sequence[dict[str, Any]], base: dict[str, float] | None = None) -> Results:
    known = {s: {"dino": v, "clip_t": 0.8} for s, v in (base or {}).items()}
    titles = {name: variant.title for name, variant in VARIANTS.items()}
    return Results({"calibration": MEASURED}, rows, known, titles)


# The plan


def test_parts_are_as_promised() -> None:
    runs = runs_of(Chosen(["a", "b", "c", "d"]), SETTINGS)
    count = {p: [r for r in runs if r.part == p] for p in "abcd"}
    assert [len(own) for own in count.values()] == [600, 20, 240, 1200]
    report = {s.id for s in embedded.subjects("report")}
    assert {r.subject for r in runs} <= report and len({r.subject for r in count["a"]}) == 25
    assert {r.subject for r in count["c"]} <= {r.subject for r in count["a"]}
    assert {r.seed for r in count["d"]} == {1, 2} and len({r.key for r in runs}) == len(runs)
    assert count["b"][0].at == (15, 30, 60, 120, 240, 480, 960, 1920, 3840)
    rates = sorted({r.rate for r in count["a"] if r.variant == "delora"})
    assert rates == pytest.approx([1e-2 * m for m in MULTIPLIERS])
    tuned = runs_of(Chosen(["defaults", "time"]), SETTINGS)
    variants = [len(PARTS[p].variants) for p in ("a", "c", "defaults", "lambda")]
    assert variants == [4, 8, 12, 5]
    assert {r.subject for r in tuned} == {s.id for s in embedded.subjects("dev")}


def test_no_name_has_what_a_file_cannot() -> None:
    assert all(name.isidentifier() for name in (*VARIANTS, *PARTS))


def test_rslora_is_not_lora_by_another_name() -> None:
    made = [
        find_method(v.method)(torch.ones(32, 32), **v.options)
        for v in (VARIANTS["lora"], VARIANTS["rslora"])
    ]
    assert [adapter.strength for adapter in made] == [1.0, 4.0]  # 16 / 16, 16 / sqrt(16)


def test_costs_lie_on_lines_and_learn_from_waves() -> None:
    costs = Costs(MEASURED, SETTINGS, State())
    assert [costs.step(n) for n in (16, 40, 96, 160)] == pytest.approx([0.1, 0.15, 0.4, 0.8])
    # 2 of getting ready, 240 steps of 0.2, 64 runs x 12 images at 24 a second
    assert costs.seconds("delora", 64, (240,)) == pytest.approx(2 + 48 + 32)
    assert costs.seconds("lora", 64, (240,)) == pytest.approx(2 + 48 * UNSEEN + 32)
    seen = {"kind": "wave", "device": "cpu", "variant": "lora", "slots": 64, "steps": 100}
    state = State(
        waves=[{**seen, "step_seconds": 30.0}, {**seen, "device": "x", "step_seconds": 1}]
    )
    assert Costs(MEASURED, SETTINGS, state).factor("lora") == pytest.approx(1.5)
    assert costs.size("delora", (240,), None) == 64  # 320 run-steps a second, 213 at 128


def test_waves_are_of_one_variant_and_take_turns() -> None:
    runs = runs_of(Chosen(["a"], ["lora", "delora"]), SETTINGS)
    waves = waves_of(runs, Costs(MEASURED, SETTINGS, State()), None)
    assert sorted(r.key for w in waves for r in w.runs) == sorted(r.key for r in runs)
    assert all(len({(r.variant, r.at) for r in w.runs}) == 1 for w in waves)
    assert [w.runs[0].variant for w in waves[:4]] == ["lora", "delora", "lora", "delora"]
    assert max(len(w.runs) for w in waves) <= 64


def test_what_does_not_fit_is_listed_with_its_cost() -> None:
    runs = runs_of(Chosen(["a"], ["lora", "ether"], subjects=1), SETTINGS)
    waves = [Wave(tuple(runs[:6]), 100.0), Wave(tuple(runs[6:]), 120.0), Wave(tuple(runs[:3]), 30)]
    fit, rest = fitted(waves, 130 * MARGIN)
    assert (fit, rest) == ([waves[0], waves[2]], [waves[1]])  # a later one that fits is not held up
    told = plan_text(fit, rest, 130 * MARGIN)
    assert "Does not fit" in told and "ETHER: 6 runs of 240 steps in 1 waves, 2.0 minutes" in told
    assert "In all 2.2 minutes, and 2.0 that do not fit." in told


# Going on


def test_a_line_that_was_cut_off_costs_its_run_alone(tmp_path: Path) -> None:
    runs = runs_of(Chosen(["b"], ["lora"], subjects=2), SETTINGS)
    path = tmp_path / "scores-0.jsonl"
    append(path, [line(runs[0])])
    with path.open("a") as file:
        file.write('{"kind": "run", "part": ')
    append(path, [line(runs[1], step=15)])
    state = read_state(tmp_path)
    assert state.is_done(runs[0]) and not state.is_done(runs[1])  # its end is missing
    assert [
        r[results_of(tmp_path)["columns"].index("step")] for r in results_of(tmp_path)["rows"]
    ] == [3840]


def test_settings_hold_for_a_folder(tmp_path: Path) -> None:
    asked = Settings(steps=4)
    first = settled(tmp_path, asked, ["defaults"], {}, {})
    assert first.centre("defaults", "lora") == 6e-4
    second = settled(tmp_path, asked, ["a"], {"lora": 1e-3}, {})  # what the first has told
    assert (second.centre("defaults", "lora"), second.centre("a", "lora")) == (6e-4, 1e-3)
    assert second.centre("a", "ether") == 6e-3
    third = settled(tmp_path, asked, ["b", "a", "c"], {}, {})
    assert (third.centre("b", "lora"), third.centre("c", "dora")) == (1e-3, 6e-4)
    assert settled(tmp_path, asked, ["a"], {"lora": 1e-3}, {}) == third
    with pytest.raises(ValueError, match="part a was started with lora at 0.001, not 0.002"):
        settled(tmp_path, asked, ["a"], {"lora": 2e-3}, {})
    with pytest.raises(ValueError, match="'steps': 4.*not.*'steps': 5.*name another --work"):
        settled(tmp_path, Settings(steps=5), ["a"], {}, {})
    with pytest.raises(ValueError, match="`dora`, which none of the parts"):
        settled(tmp_path, asked, ["a"], {"dora": 2e-3}, {})


def test_the_main_parts_are_centred_on_what_the_development_subjects_found(tmp_path: Path) -> None:
    """Of the variants that have all of their runs there; what is given goes before it."""
    part = PARTS["defaults"]
    runs = runs_of(Chosen(["defaults"], ["lora", "ether", "dora"]), SETTINGS)
    assert len(runs) == 3 * len(part.multipliers) * part.subjects
    lines = [line(run, dino=0.9 if run.multiplier == 4 else 0.5) for run in runs]
    append(tmp_path / "scores-0.jsonl", lines[:-1])  # one run of DoRA is to be done
    state = read_state(tmp_path)
    found = robustness.tuned(state, ["a"])
    assert set(found) == set(part.variants) and robustness.tuned(State(), ["a"]) == {}
    assert set(robustness.tuned(State(), ["defaults", "a"]).values()) == {None}
    assert {v: rate for v, rate in found.items() if rate} == {
        "lora": pytest.approx(2.4e-3), "ether": pytest.approx(2.4e-2),
    }  # fmt: skip
    four = {"ether": 1e-3, "delora": 0.01}
    with pytest.raises(
        ValueError, match="a goes around the best rates of part defaults, where eth"
    ):
        settled(tmp_path, SETTINGS, ["a", "b"], four, found)  # ETHER+
    now = settled(tmp_path, SETTINGS, ["a", "b", "time"], four, found, ["lora", "ether"])
    assert now.centre("a", "lora") == now.centre("b", "lora") == pytest.approx(2.4e-3)
    assert now.centre("a", "ether") == now.centre("b", "ether") == 1e-3
    assert "ether_plus" not in now.centres["a"]  # until it is asked for
    with pytest.raises(ValueError, match="c goes .* dora has runs to be done: .* --centres dora="):
        settled(tmp_path, SETTINGS, ["c"], {"rslora": 1e-4}, found)
    said = robustness.centres_text(now, ["a", "c"])
    assert said.endswith("a: lora 0.0024, ether 0.001; c: none.")
    later = settled(tmp_path, SETTINGS, ["a", "d"], {}, {"lora": 1.0, "ether_plus": 0.5})
    assert later.centre("a", "lora") == later.centre("d", "lora") == pytest.approx(2.4e-3)
    assert later.centre("a", "ether_plus") == later.centre("d", "ether_plus") == 0.5


class NoBench:
    """Trains nothing."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.device_name = settings, "cpu"
        self.base = SimpleNamespace(device=torch.device("cpu"))

    def clear(self) -> None:
        pass


def test_what_is_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[Run] = []
    stop = [2]

    def wave(bench: NoBench, runs: Sequence[Run]) -> list[dict[str, Any]]:
        stop[0] -= 1
        if stop[0] < 0:
            raise KeyboardInterrupt
        trained.extend(runs)
        return [line(run) for run in runs]

    monkeypatch.setattr(robustness, "Bench", NoBench)
    monkeypatch.setattr(robustness, "train_wave", wave)
    monkeypatch.setattr(robustness, "calibrated", lambda bench, sizes: MEASURED)
    args = ["--work", str(tmp_path), "--minutes", "60", "--parts", "a", "--subjects", "2",
            "--at_once", "6", "--variants", "lora", "delora"]  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        robustness.main(args)
    assert len(trained) == 12
    stop[0] = 100
    assert robustness.main(args) == 0
    assert len(trained) == 24 and len({run.key for run in trained}) == 24
    assert robustness.main([*args[:2], "--minutes", "0", *args[4:]]) == 0
    assert "All that is asked for is done." in capsys.readouterr().out and len(trained) == 24
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 24


def test_a_wave_that_fails_holds_no_other_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wave(bench: NoBench, runs: Sequence[Run]) -> list[dict[str, Any]]:
        if runs[0].variant == "lora":
            raise RuntimeError("out of memory")
        return [line(run) for run in runs]

    monkeypatch.setattr(robustness, "Bench", NoBench)
    monkeypatch.setattr(robustness, "train_wave", wave)
    monkeypatch.setattr(robustness, "calibrated", lambda bench, sizes: MEASURED)
    args = ["--work", str(tmp_path), "--minutes", "60", "--parts", "a", "--subjects", "1"]
    assert robustness.main(args) == 1
    assert (
        "failed: a lora, 6 runs of 240 steps: RuntimeError: out of memory"
        in capsys.readouterr().out
    )
    assert len(read_state(tmp_path).rows) == 18


def test_a_device_is_measured_again_for_more_slots(tmp_path: Path) -> None:
    """A first start of small waves does not bind the later ones."""
    made: list[list[int]] = []

    def calibrated(bench: Any, sizes: list[int]) -> dict[str, Any]:
        made.append(sizes)
        return {**MEASURED, "seconds_a_step": {str(n): 1.0 for n in sizes}}

    bench: Any = NoBench(SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robustness, "calibrated", calibrated)
        for most in (1, 1, None, 1, None):
            robustness.measured(tmp_path, bench, most)
    assert made == [[1], [1, 2]]


def test_no_minutes_start_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(robustness, "Bench", lambda settings: pytest.fail("nothing to train on"))
    assert robustness.main(["--work", str(tmp_path), "--minutes", "0", "--parts", "b"]) == 0
    assert "20 runs are to be done; what they cost is not measured" in capsys.readouterr().out
    (tmp_path / "calibration.json").write_text(json.dumps(MEASURED))
    assert robustness.main(["--work", str(tmp_path), "--minutes", "0", "--parts", "b"]) == 0
    assert "5 runs of 3840 steps" in capsys.readouterr().out


def test_processes_deal_whole_subjects() -> None:
    runs = runs_of(Chosen(["a"], ["lora"]), SETTINGS)
    parts = [robustness.mine(runs, rank, 2) for rank in (0, 1)]
    assert sorted(r.key for own in parts for r in own) == sorted(r.key for r in runs)
    assert not {r.subject for r in parts[0]} & {r.subject for r in parts[1]}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--minutes", "-1"], "--minutes must be 0 or more, got -1"),
        (["--minutes", "1", "--steps", "0"], "--steps must be 1 or more, got 0"),
        (["--minutes", "1", "--multipliers", "3"], "0.0625, 0.25, 1, 4, 16, 64; got 3"),
        (["--minutes", "1", "--centres", "lora=x"], "VARIANT=RATE .* got 'lora=x'"),
        (["--minutes", "1", "--centres", "lor=1e-3"], "one of lora, delora"),
    ],
)
def test_flags_that_cannot_be(flags: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        robustness.parse(["--work", "w", *flags])


# Runs that come apart


def test_a_run_that_comes_apart_is_marked_and_the_others_are_sampled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stack = robustness_wave.Stack.__new__(robustness_wave.Stack)
    stack.runs = [Run("a", "lora", 1.0, 1.0, n, "fox-3d", (30,)) for n in range(6)]
    stack.dead, asked = {}, []
    parameters = torch.zeros(2, 6, 3)
    parameters[1, 4] = math.nan
    stack.adapter = SimpleNamespace(parameters=lambda: [parameters, torch.zeros(1, 6)])
    stack.step = SimpleNamespace(
        skipped_now=torch.tensor([0.0, 25, 0, 0, 0, 0]),
        skipped=torch.tensor([15.0, 25, 16, 0, 0, 0]),
    )
    material = SimpleNamespace(evaluator=None)
    stack.bench = SimpleNamespace(material=lambda subject: material, base=None)
    stack.judge_slots(30)
    assert stack.dead == {
        1: "25 of 30 steps gave no finite loss or gradient",
        2: "16 of 30 steps gave no finite loss or gradient",
        4: "parameters are not finite at step 30",
    }

    def sample(base: Any, adapter: Any, slots: list[int], evaluators: list[Any]) -> list[str]:
        asked.append(list(slots))
        if 3 in slots:
            raise ValueError("image 0 has pixels that are not finite")
        return [f"of {slot}" for slot in slots]

    monkeypatch.setattr(robustness_wave, "sample_slots", sample)
    assert stack.images(30, [0, 3, 5]) == {0: "of 0", 5: "of 5"}
    assert stack.dead[3] == "images are not finite at step 30"
    assert asked == [[0, 3, 5], [0], [3, 5], [3], [5]]


def test_a_diverged_run_counts_as_no_picture_and_in_nothing_else() -> None:
    found = results([row("s", 0.8), row("t", None, diverged="why", clip_t=None)], {"s": 0.3})
    assert (own := mean(found, found.rows, "dino")) and own.mean == pytest.approx(0.4)
    assert (other := mean(found, found.rows, "clip_t_margin")) and other.n == 1
    assert other.mean == pytest.approx(0.5 - 0.8)


def test_a_wave_of_the_embedded_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """One run comes apart, the other is scored."""
    real = robustness_bench.sampling_of
    monkeypatch.setattr(robustness_bench, "sampling_of", lambda c: replace(real(c), steps=2))
    bench = robustness_bench.Bench(Settings(prompts=1, unrelated=1))
    runs = [Run("a", "lora", m, rate, 0, "panda-3d", (1,)) for m, rate in ((1, 1e-3), (64, 1e30))]
    with monkeypatch.context() as m, pytest.raises(RuntimeError, match="out of memory"):
        m.setattr(robustness_wave, "scored", Mock(side_effect=RuntimeError("out of memory")))
        robustness_wave.train_wave(bench, runs)
    bench.clear()  # and the next wave makes the base's line again
    base, fine, bad, wave = robustness_wave.train_wave(bench, runs)
    assert base["kind"] == "base" and base["dino_drift"] == pytest.approx(0, abs=1e-4)
    assert fine["diverged"] is None and fine["picture"] and -1 < fine["dino"] < 1
    assert 0 < fine["distance"] < 0.1 and fine["dino_drift"] > 0
    assert bad["diverged"] == "images are not finite at step 1" and bad["dino"] is None
    assert "picture" not in bad and bad["distance"] is None
    assert (wave["slots"], wave["steps"], wave["scorings"]) == (2, 1, 1)
    json.dumps([base, fine, bad, wave], allow_nan=False)


# Statistics


def test_ends_of_a_range_by_hand() -> None:
    x = np.array([-4.0, -2, 0, 2, 4])
    y = np.array([[0.5, 0.9, 1.0, 0.8, 0.99], [1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0, 0.9]])
    low, high = ends(x, y, 0.0, 0.95)
    # from 1.0 at 0 to .9 at -2 half the way is .95; to .8 at 2 a quarter; .99 at 4 is another range
    assert low.tolist() == pytest.approx([-1.0, -4.0, -4.0])
    assert high.tolist() == pytest.approx([0.5, 4.0, -3.9])
    low, high = ends(x, y[:1], np.array([0.6]), 0.5)  # .8 of 1 is half of the gain over .6
    assert (low[0], high[0]) == pytest.approx((-2.5, 4.0))


def test_width_of_a_sweep() -> None:
    own = Sweep((0.25, 1.0, 4.0), (1, 2, 3), ("s", "t"), np.array([[0.9, 1, 0.9]] * 2), (), ())
    found = width(own)
    assert (found.low, found.high, found.factor) == pytest.approx((0.5, 2.0, 4.0))
    assert (found.factor_low, found.factor_high) == pytest.approx((4.0, 4.0))  # subjects are alike
    assert not found.open_low and not found.open_high
    flat = width(Sweep((0.25, 1.0), (1, 2), ("s",), np.array([[1.0, 1.0]]), (), ()))
    assert flat.open_low and flat.open_high and flat.factor == 4.0 and flat.factor_low is None


def test_a_sweep_is_of_subjects_that_have_all_rates() -> None:
    rows = [
        row("s", v, multiplier=m, rate=m, seed=i) for m, v in ((1, 0.5), (4, 0.7)) for i in (0, 1)
    ]
    rows += [row("t", 0.9, multiplier=1, rate=1)]
    rows[0]["dino"] = 0.7
    found = sweep(results(rows), rows)
    assert found is not None and found.subjects == ("s",) and found.best == 1
    assert found.scores.tolist() == [pytest.approx([0.6, 0.7])]
    assert (found.runs, found.diverged) == ((3, 2), (0, 0))


def test_the_rate_is_chosen_by_other_subjects_where_it_can_be() -> None:
    rows = [row("s", v, multiplier=m, rate=3e-4 * m) for m, v in ((1, 0.9), (4, 0.8))]
    assert at_chosen_rate(results(rows), "lora", "a") == ([rows[0]], "reporting")
    dev = [
        row("f", v, part="defaults", multiplier=m, rate=1.2e-3 * m) for m, v in ((1, 0.9), (4, 0.1))
    ]
    assert at_chosen_rate(results([*rows, *dev]), "lora", "a") == ([rows[1]], "development")
    assert at_chosen_rate(results(rows), "ether", "a") == ([], "")


def test_paired_differences_and_spread_over_seeds() -> None:
    ours = [row("s", 0.8), row("t", 0.6), row("u", 0.1)]
    theirs = [row("s", 0.7), row("t", 0.4)]
    found = difference(results([]), ours, theirs, "dino")
    assert found is not None and found.n == 2 and found.mean == pytest.approx(0.15)
    seeds = [row("s", 0.5, seed=0), row("s", 0.7, seed=1), row("t", 0.5)]
    spread = seed_spread(results([]), seeds)
    assert spread is not None and spread.mean == pytest.approx(0.2 / math.sqrt(2))
    assert spread.n == 1 and spread.low is None  # of one subject: nothing is known of others


def test_time_to_quality_by_hand() -> None:
    curve = {"s": (0.5, 0.8, 0.79), "t": (0.3, 0.4, 0.9)}
    rows = [
        row(s, v, part="time", step=k, steps=30) for s, own in curve.items()
        for k, v in zip((10, 20, 30), own)
    ]  # fmt: skip
    better = [row("t", 0.99, part="time", step=10, steps=30, variant="ether")]
    found = results([*rows, *better])
    own = time_to_quality(found, rows, own_best(found))
    assert (own.runs, own.reached) == (2, 2)
    assert own.steps is not None and own.steps.mean == 25  # 20 and 30
    assert own.seconds is not None and own.seconds.mean == 12.5
    common = time_to_quality(found, rows, common_best(found, found.rows))
    assert (common.runs, common.reached) == (2, 1)  # .9 is less than .95 x .99


# The page


def picture() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "WEBP")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results of two variants at two rates on two subjects, where LoRA's higher rate diverges."""
    settled(tmp_path, Settings(), ["a"], {}, {})
    (tmp_path / "calibration.json").write_text(json.dumps({**MEASURED, "device": "<b>chip</b>"}))
    runs = runs_of(Chosen(["a"], ["lora", "delora"], [1.0, 64.0], 2), SETTINGS)
    lines: list[dict[str, Any]] = []
    for run in runs:
        if run.variant == "lora" and run.multiplier == 64:
            lines.append(line(run, dino=None, clip_t=None, diverged="images are not finite"))
        else:
            lines.append(line(run, dino=0.8, picture=picture()))
    lines += [
        {"kind": "base", "subject": s, "dino": 0.3, "clip_t": 0.8}
        for s in subjects_of(PARTS["a"], 2)
    ]
    append(tmp_path / "scores-0.jsonl", lines)
    path = write_results(tmp_path)
    found = json.loads(path.read_text())
    found["variants"]["delora"] = "<script>DeLoRA"
    path.write_text(json.dumps(found))
    return path


def test_the_page_shows_what_diverged_and_what_is_missing(folder: Path) -> None:
    assert robustness_report.main([str(folder)]) == 0
    page = (folder.parent / "report.html").read_text()
    assert "2 of 2 diverged" in page and "0.800 <small>(0.800 to 0.800)</small>" in page
    assert "Not run yet: b (16 times the steps), c" in page
    assert "Not answered yet: no subject here has two seeds." in page
    assert page.count('src="data:image/webp;base64,') == 3  # none of the run that diverged
    assert "<script" not in page and "&lt;script&gt;DeLoRA" in page
    assert "<b>chip</b>" not in page and "&lt;b&gt;chip&lt;/b&gt;" in page
    names = {p.name for p in (folder.parent / "figures").iterdir()}
    assert {"rates-dino.svg", "rates-dino.png", "rates-distance.svg"} <= names
    svg = (folder.parent / "figures" / "rates-dino.svg").read_text()
    assert svg.startswith("<svg xmlns=") and "var(--" not in svg and "&lt;script&gt;DeLoRA" in svg
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"


def test_files_that_are_no_results(folder: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.json"
    for text in ("{", "[]", '{"kind": "other"}'):
        wrong.write_text(text)
        with pytest.raises(ValueError, match="wrong.json"):
            robustness_report.main([str(wrong)])
    found = json.loads(folder.read_text())
    found["pictures"][0]["picture"] = base64.b64encode(b"no picture").decode()
    wrong.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="cannot be read"):
        robustness_report.main([str(wrong), "--out", str(tmp_path / "out")])


def test_the_chosen_settings_are_those_of_the_recorded_runs() -> None:
    recorded = Path(__file__).parents[1] / "eval/results/2026-11-29-robustness/results.json"
    results, found = json.loads(recorded.read_text()), {}
    for name in robustness_choice.METHODS:
        grid = robustness_choice.grid_of(results, name)
        steps, rate = robustness_choice.chosen(grid, VARIANTS[name].rate)
        found[VARIANTS[name].method] = (steps, pytest.approx(rate))
    assert found == EMBEDDED


def test_what_is_chosen_of_a_grid() -> None:
    """The own rate while it is near the best, then the fewest steps that are near and keep the
    prompt."""
    grid = {1.0: {10: (0.5, 1.0), 20: (0.79, 0.9), 30: (0.795, 1.0), 40: (0.80, 1.0)}}
    assert robustness_choice.chosen(grid, 1.0) == (30, 1.0)
    assert robustness_choice.chosen(grid | {2.0: {10: (0.805, 1.0)}}, 1.0) == (30, 1.0)
    assert robustness_choice.chosen(grid | {2.0: {10: (0.82, 1.0)}}, 1.0) == (10, 2.0)


def test_prompt_kept_is_a_share_of_the_bases_margin() -> None:
    base = {"fox": {"clip_t": 0.9, "clip_t_shuffled": 0.4}, "cup": {"clip_t": 0.9}}
    row = {"subject": "fox", "diverged": None, "clip_t": 0.8, "clip_t_shuffled": 0.35}
    results = Results({}, [row], base, {})
    assert score(results, row, "prompt_kept") == pytest.approx(0.45 / 0.5)
    assert score(results, row | {"subject": "cup"}, "prompt_kept") is None
    assert score(results, row | {"clip_t_shuffled": None}, "prompt_kept") is None
    assert robustness_report.base_of(results, [row], "prompt_kept") == 1.0


def cells(html: str, row: str) -> list[str]:
    """Of the rows of a page's tables that begin so, without what is small."""
    (found,) = re.findall(rf'<tr><th scope="row">{re.escape(row)}</th>(.*?)</tr>', html)
    return re.findall(r"<td>([^<]*)", found)


def test_what_was_chosen_and_confirmed_stands_on_the_page() -> None:
    """The recorded runs, as the page tells of them."""
    results = read(Path(__file__).parents[1] / "eval/results/2026-11-29-robustness/results.json")
    page = robustness_confirm.chosen(results)
    for name in robustness_choice.METHODS:
        steps, rate = EMBEDDED[VARIANTS[name].method]
        assert cells(page, VARIANTS[name].title)[:2] == [f"{steps}", f"{rate:.3g}"]
    rows = [r for r in results.of("confirm", last=False) if r["step"] == 45]
    ours, theirs = (
        {r["subject"]: r["dino"] for r in rows if r["variant"] == name}
        for name in ("delora", "lora")
    )
    gain = sum(ours[s] - theirs[s] for s in ours) / len(ours)
    assert len(ours) == 25
    found = cells(robustness_confirm.against(results, rows), "minus LoRA")
    assert found[0].strip() == f"{gain:+.3f}"


def test_the_starts_are_compared_at_equal_rate_strength_and_step() -> None:
    results = read(Path(__file__).parents[1] / "eval/results/2026-11-29-robustness/results.json")
    rows = [r for r in results.of("starts", last=False) if (r["rate"], r["step"]) == (0.04, 100)]
    ours, theirs = (
        [r["dino"] for r in sorted(rows, key=lambda r: r["subject"]) if r["variant"] == name]
        for name in ("delora_15", "delora_peft_15")
    )
    gain = sum(a - b for a, b in zip(ours, theirs, strict=True)) / 25
    title = "DeLoRA, lambda 15, rate 0.04, 100 steps"
    page = robustness_questions.starts(results)
    assert cells(page, title)[0].strip() == f"{gain:+.3f}"
    assert page.count("<tr>") == 1 + 2 * 4 * 4 and "25 subjects, 1 seed, reporting" in page
    dev = replace(results, rows=[r for r in results.rows if r["part"] == "lambda"])
    page = robustness_questions.starts(dev)
    assert page.count("<tr>") == 1 + 2 * 3 and "5 subjects, 1 seed, development" in page


def test_several_rates_of_a_variant_are_told_apart() -> None:
    """The long runs are of the best rate, with those of the method's own beside them."""
    results = read(Path(__file__).parents[1] / "eval/results/2026-11-29-robustness/results.json")
    assert robustness_report.centred(results, "b") == "times the best on the development subjects"
    assert robustness_report.centred(results, "time") == "times the method's own"
    assert robustness_report.centred(results, "confirm") == "times that which each was centred on"
    html, plots = robustness_report.steps_section(results)
    for title, rate in (("DeLoRA, 0.0025 (1 x)", 0.0025), ("DeLoRA, 0.01 (4 x)", 0.01)):
        rows = [r for r in results.of("b") if (r["variant"], r["rate"]) == ("delora", rate)]
        assert len(rows) == 5
        last = f"{sum(r['dino'] for r in rows) / 5:.3f} "
        table = html[html.index("DINO</th><th") :]
        assert re.findall(r"<td>([^<]*)", table[table.index(title) :])[8] == last
    ends = [
        {r["subject"]: r["dino"] for r in results.of("b") if (r["variant"], r["rate"]) == which}
        for which in (("delora", 0.0025), ("lora", 6e-4))
    ]
    gain = sum(ends[0][s] - ends[1][s] for s in ends[0]) / 5
    row = html[html.index("minus LoRA") :]
    assert re.findall(r"<td>([^<]*)", row)[8] == f"{gain:+.3f} "
    charts = [plot for plot in plots if plot is not None]
    assert "DeLoRA: 0.692 at 15" in charts[0].said


def test_the_recorded_runs_of_prodigy_are_told_with_intervals() -> None:
    recorded = Path(__file__).parents[1] / "eval/results/2026-11-29-robustness/prodigy.jsonl"
    lines = [json.loads(text) for text in recorded.read_text().splitlines()]
    found = {
        tuple(cells[1:4]): cells[4:]
        for text in prodigy.table(lines, None).splitlines()[2:]
        if (cells := [cell.strip() for cell in text.split("|")])
    }
    assert len(found) == 8
    own = [x["dino"] for x in lines if (x["variant"], x["step"]) == ("lora", 120)]
    dino, _, rate, n, _ = found["lora", "Prodigy", "120"]
    assert dino.startswith(f"{sum(own) / 5:.3f} (0.762 to 0.940") and n == "5 of 5"
    assert rate == "9.1e-04 to 1.4e-03"
