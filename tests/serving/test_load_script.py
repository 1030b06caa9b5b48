"""The load test itself: what it asks, and that it sees what is lost, wrong or mixed up."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_app import Blank
from test_command import served

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "eval" / "speed"))

import server as script  # noqa: E402


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
    with served(engine) as (_, place, _):
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
        data = script.base64.b64encode(out.getvalue()).decode()
        return script.Answer(200, 0.0, {"image": data})

    first, *others = script.SUBJECTS
    bodies = [{"adapter": f"{name}_lora-0"} for name in (first, first, *others)]
    pictures = [answer(name) for name in (first, others[0], *others)]
    assert script.strangers(pictures, bodies) == (1, 5)
