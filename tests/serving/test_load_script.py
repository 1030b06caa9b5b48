"""The load test itself: what it asks, and that it sees what is lost, wrong or mixed up."""

from __future__ import annotations

import base64
import io
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from job_children import Children, until
from PIL import Image
from test_app import Blank
from test_command import served

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "eval" / "speed"))

import server as script  # noqa: E402
import server_kill as kills  # noqa: E402

from dreamtune.serving.engine import Known as Adapter  # noqa: E402
from dreamtune.serving.jobs.jobs import Jobs  # noqa: E402


class Coloured(Blank):
    """Of each seed its own grey, so slowly that others come meanwhile."""

    def draw(self, rows, shape):
        time.sleep(0.05)
        self.batches.append(rows)
        return [Image.new("RGB", (2, 2), (row.seed,) * 3) for row in rows]


def test_requests_go_by_turns_over_adapters_prompts_and_seeds():
    names = ["fox-3d_lora-0", "teapot-3d_lora-0", "lora_7"]
    found = script.requests(12, names)
    assert [one["adapter"] for one in found] == names * 4
    assert [one["seed"] for one in found] == list(range(12))
    assert len({one["prompt"] for one in found}) == 12
    assert found[0]["prompt"] == "a sks fox"
    assert "sks dog" in found[2]["prompt"]


def test_a_burst_and_its_report(capsys):
    bodies = [{"prompt": "a", "adapter": ("dog", "cat")[i % 2], "seed": i} for i in range(12)]
    wrong = [*bodies[:10], {**bodies[10], "adapter": "bird"}, bodies[11]]
    engine = Coloured()
    with served(engine, wait_ms=200.0) as (_, place, _):
        answers, seconds = script.burst(place, wrong, 20)
        again, _ = script.burst(place, bodies, 20)
    with served(Blank()) as (_, gone, _):
        pass
    lost, _ = script.burst(gone, bodies[:1], 1)
    assert [a.status for a in answers] == [200] * 10 + [404, 200]
    assert lost[0].status == 0
    assert max(len(batch) for batch in engine.batches) > 1
    rate = script.report("x", bodies, [*answers[:10], lost[0], again[0]], seconds)
    assert rate == pytest.approx(11 / seconds)
    row = [cell.strip() for cell in capsys.readouterr().out.strip(" |\n").split("|")]
    assert row[:5] == ["x", "12", "0", "1", "1"]  # again[0] is not the answer to the last
    script.report("x", bodies, answers, seconds)
    assert [c.strip() for c in capsys.readouterr().out.split("|")][2:6] == ["12", "1", "0", "0"]
    same = script.differences(answers[:10], again[:10])
    assert np.array_equal(same, np.zeros(10))
    assert np.array_equal(script.differences(again[:2], again[2:4]), [2, 2])


class Known:
    """In the scorer's place: it knows every photo's subject by heart."""

    def __init__(self, name):
        assert name == "embedded"
        self.of = {
            Image.open(photo).convert("RGB").tobytes(): number
            for number, subject in enumerate(script.SUBJECTS)
            for photo in script.embedded.subject(subject).photos
        }

    def images(self, images):
        return torch.eye(len(script.SUBJECTS))[[self.of[image.tobytes()] for image in images]]


def test_pictures_of_another_subject_are_seen(monkeypatch):
    monkeypatch.setattr(script, "Dino", Known)
    photos = {name: script.embedded.subject(name).photos[0] for name in script.SUBJECTS}

    def answer(name):
        out = io.BytesIO()
        Image.open(photos[name]).convert("RGB").save(out, "PNG")
        data = base64.b64encode(out.getvalue()).decode()
        return script.Answer(200, 0.0, {"image": data})

    first, *others = script.SUBJECTS
    bodies = [{"adapter": f"{name}_lora-0"} for name in (first, first, *others)]
    pictures = [answer(name) for name in (first, others[0], *others)]
    assert script.strangers(pictures, bodies) == (1, 5)


class Busy(Coloured):
    """A quarter of twelve is drawn at once, the others once the job's process has been ended."""

    def __init__(self, dark=False):
        super().__init__()
        self.jobs, self.dark = None, dark

    def draw(self, rows, shape):
        if sum(map(len, self.batches)) >= 3:
            until(lambda: "retried" in self.told())
            assert not self.dark, "pictures that are lost"
        return super().draw(rows, shape)

    def told(self):
        return [event["kind"] for job in self.jobs.list() for event in self.jobs.events(job.id)]

    def add(self, name, path):
        self.adapters[name] = Adapter(name, "lora", 2, None, None, None)


def held(wave, k):
    """Of the first process: it stays where it is until it is killed."""
    until(lambda: k < 5)


@pytest.fixture
def killing(tmp_path, tiny_v_pipeline_dir, photo_dir, monkeypatch):
    """What `measure_kill` does, over an engine: step 3 of 6 is saved when the process is killed."""
    Children(held, None).into(monkeypatch)
    few = {
        "validation_prompt": ["a {}"], "validation_steps": 3, "num_inference_steps": 1,
        "options": {"rank": 2}, "dino": "none", "clip": "none", "device": "cpu",
    }  # fmt: skip
    photos = sorted(photo_dir.glob("*.png"))
    bodies = [{"prompt": "a", "adapter": ("dog", "cat")[i % 2], "seed": i} for i in range(12)]

    def measure(engine):
        folder = tmp_path / "jobs"
        engine.jobs = Jobs(
            folder, str(tiny_v_pipeline_dir), engine.add, settings=few, gather=0.0, poll=0.02
        )
        with engine.jobs as jobs, served(engine, jobs, timeout_s=100.0) as (_, place, _):
            kills.measure_kill(place, folder, photos, bodies, 6, 100)

    return measure


def test_a_process_that_is_killed_under_load(killing, capsys):
    engine = Busy()
    killing(engine)
    said = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")] for line in said.splitlines()]
    told = {row[1]: row[2:6] for row in rows if len(row) == 12}
    for name in ("the process that trains is killed", "the same once more, nothing trains"):
        assert told[name] == ["12", "0", "0", "0"]
    (answered,) = re.findall(r"was killed after (\d+) of 12 answers", said)
    assert 3 <= int(answered) < 12
    assert "the job had saved step 3 of 6" in said
    assert "mean difference at most 0.000 of 255" in said
    assert "the job went on from step 3 and was done after" in said
    assert engine.told().count("retried") == 1
    drawn = [row.adapter for batch in engine.batches for row in batch]
    assert drawn.count("killed") == 1 and len(drawn) == 25


def test_a_picture_that_is_lost_beside_a_kill_is_seen(killing):
    with pytest.raises(SystemExit, match="not all requests were answered by a picture"):
        killing(Busy(dark=True))


def test_what_a_killed_job_should_have_told():
    kill = kills.Kill(1, 3, 4)
    right = [
        {"kind": "started", "step": 0}, {"kind": "retried", "step": 4},
        {"kind": "started", "step": 4}, {"kind": "done"},
    ]  # fmt: skip
    assert kills.faults_of(kill, right) == []
    assert len(kills.faults_of(kill, [])) == 3
    assert kills.faults_of(kill, right[:3]) == [f"its last event is {right[2]}, not `done`"]
    lost = [*right[:2], {"kind": "started", "step": 3}, right[3]]
    (fault,) = kills.faults_of(kill, lost)
    assert "from steps [0, 3], where step 4 was saved" in fault
    twice = [*right[:2], right[1], *right[2:]]
    assert kills.faults_of(kill, twice) == ["the job was tried again 2 times, not once"]


@pytest.mark.parametrize(
    ("state", "saved", "said"),
    [
        ("running", False, "no step within 0.2 s: more --limit"),
        ("running", True, "over before a kill: more --requests"),
        ("done", True, "done before the kill: more --job_steps"),
    ],
)
def test_a_kill_that_comes_too_late_is_no_measurement(state, saved, said, tmp_path, monkeypatch):
    monkeypatch.setattr(kills, "burst", lambda *given: ([], 0.0))
    monkeypatch.setattr(kills, "checkpoints", lambda folder: [Path("checkpoint-3")] * saved)
    monkeypatch.setattr(kills, "ask", lambda *given: script.Answer(200, 0.0, {"state": state}))
    with pytest.raises(SystemExit, match=said):
        kills.kill_under_load(("", 0), tmp_path, "0" * 16, [{}], 0.2)
