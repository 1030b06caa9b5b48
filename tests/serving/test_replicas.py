"""Replicas on a cluster of this machine, one of which is killed; and what needs no cluster."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from serving import engine_of, near, settings_of, write_adapters

from dreamtune.cli import main
from dreamtune.serving.app import make_app
from dreamtune.serving.backend import Row, Shape
from dreamtune.serving.errors import Refused
from dreamtune.serving.replica import Facts, Replica, Reply
from dreamtune.serving.settings import Settings

SHAPE = Shape(16, 2, 4.0)
LONG = Shape(16, 100, 4.0)  # so that a replica can be killed while it draws
PATIENCE = 120.0
RAY = "Ray is an extra: pip install 'dreamtune[ray]'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_adapters(tmp_path_factory.mktemp("serving") / "adapters")


@pytest.fixture
def replica(tiny_pipeline_dir, folder):
    found = Replica(settings_of(tiny_pipeline_dir, folder))
    with found.open:
        yield found


def test_a_replica_brings_what_it_lacks_and_only_rows_without_fail(replica, folder, tmp_path):
    late = shutil.copy(folder / "dog.safetensors", tmp_path / "late.safetensors")
    rows = [Row("a", "", "late", 1), Row("a", "", "gone", 1), Row("a", "", "dog", 1)]
    paths = {"late": str(late), "gone": str(tmp_path / "gone"), "dog": replica.paths["dog"]}
    first, second, third = asyncio.run(replica.draw(rows, SHAPE, paths)).drawn
    assert near(first, third)
    assert type(second) is ValueError and "gone" in str(second)
    other = {"late": str(folder / "cat.safetensors")}  # the name is of another file now
    assert asyncio.run(replica.add("late", other["late"])).method == "delora"
    cat = Row("a", "", "cat", 1)
    a, b = asyncio.run(replica.draw([rows[0], cat], SHAPE, other)).drawn
    assert near(a, b) and not near(a, first)


def test_a_replica_that_cannot_draw_is_replaced(replica, tiny_pipeline_dir, folder, monkeypatch):
    replica.check_health()
    replica.drawing = time.monotonic() - 2.5 * replica.timeout
    with pytest.raises(RuntimeError, match="a batch has taken 150 seconds"):
        replica.check_health()
    replica.drawing = 0.0
    replica.engine.broken = "the GPU is gone"
    with pytest.raises(RuntimeError, match="the GPU is gone"):
        replica.check_health()
    with pytest.raises(RuntimeError, match="the GPU is gone"):
        asyncio.run(replica.draw([Row("a", "", None, 1)], SHAPE, {}))
    wrong = Replica(settings_of(tiny_pipeline_dir, folder / "nowhere"))
    assert "nowhere` does not exist" in asyncio.run(wrong.facts()).refused
    wrong.check_health()  # for a while: whoever starts it is to be told
    wrong.began -= 60
    with pytest.raises(RuntimeError, match="nowhere"):
        wrong.check_health()


class Answer:
    def __init__(self, reply):
        self.reply = reply

    def result(self, timeout_s=None):
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply

    def cancel(self):
        self.reply = None


class Handle:
    """Of replicas that are lost by any batch that has `poison` in it."""

    def __init__(self, lost, late=False):
        self.lost, self.late, self.sent = lost, late, []
        self.draw = self.facts = self

    def remote(self, rows=None, shape=None, paths=None):
        if rows is None:
            return Answer(Facts(None, "base", (16,), True, 4, 4.0, "cpu"))
        self.sent.append([row.seed for row in rows])
        if self.late:
            return Answer(TimeoutError())
        if any(row.prompt == "poison" for row in rows):
            return Answer(self.lost)
        memory = {"allocated": 5, "reserved": 7, "peak": 9}
        return Answer(Reply([row.seed for row in rows], ("host", 1), memory))


def test_a_row_that_ends_every_replica_is_the_only_one_lost():
    pytest.importorskip("ray", reason=RAY)
    from ray.exceptions import ActorDiedError

    from dreamtune.serving.replicas import Replicas

    handle, resent = Handle(ActorDiedError()), []
    replicas = Replicas(handle, "app", 2, 9.0, tell=print)
    replicas.on_resend = lambda: resent.append(1)
    rows = [Row("poison" if seed == 2 else "a", "", None, seed) for seed in range(1, 4)]
    first, second, third = replicas.draw(rows, SHAPE)
    assert (first, third) == (1, 3)
    assert isinstance(second, Refused) and second.status == 502 and "ActorDied" in str(second)
    assert handle.sent == [[1, 2, 3], [1, 2, 3], [1], [2], [2], [3]] and len(resent) == 4
    assert replicas.memory() == {"allocated": 5, "reserved": 7, "peak": 9}
    handle.late = True
    assert "no replica drew it in 9 seconds" in str(replicas.draw(rows[:1], SHAPE)[0])
    assert len(resent) == 4  # nobody waits for it any more
    with pytest.raises(ValueError, match="`dog` already"):
        replicas.adapters["dog"] = None
        replicas.add("dog", "dog.safetensors")


def test_settings_and_what_to_install(monkeypatch, capsys, tmp_path):
    with pytest.raises(ValueError, match="`ray_address` is of replicas, and there are none"):
        Settings(adapters="a", ray_address="auto")
    with pytest.raises(ValueError, match="`replicas` must be at least 1, got 0"):
        Settings(adapters="a", replicas=0)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["serve", "--adapters", str(tmp_path), "--replicas", "2"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dreamtune serve: the server needs `ray`")
    assert error.endswith("pip install 'dreamtune[serve,ray]'\n") and error.count("\n") == 1


def test_a_killed_replica_loses_nothing_and_pictures_are_those_of_one_engine(
    tiny_pipeline_dir, tmp_path
):
    """Two on a cluster of this machine: one is killed while both draw."""
    pytest.importorskip("ray", reason=RAY)
    from dreamtune.serving.replicas import Replicas

    folder = write_adapters(tmp_path / "adapters")
    settings = settings_of(tiny_pipeline_dir, folder, max_batch=2, timeout_s=PATIENCE)
    names = ["dog", "cat", "cow", "owl"]
    asked = [
        {"prompt": f"a {names[i % 4]}", "adapter": names[i % 4], "seed": i, "steps": LONG.steps}
        for i in range(16)
    ]
    late = {"prompt": "a", "adapter": "late", "seed": 1}
    with Replicas.opened(replace(settings, replicas=2), tell=print) as replicas:
        app = make_app(settings, replicas)
        with TestClient(app, base_url="http://127.0.0.1") as client, ThreadPoolExecutor(16) as pool:
            told = client.get("/health").json()
            assert told["replicas"] == 2 and told["device"] == "2 x cpu" and told["adapters"] == 4
            pool.submit(client.post, "/generate", json={"prompt": "a"}).result()
            victim = next(iter(replicas.memories))[1]
            kill = threading.Timer(0.4, os.kill, (victim, signal.SIGKILL))
            kill.start()
            answers = list(pool.map(lambda body: client.post("/generate", json=body), asked))
            kill.join()
            assert [answer.status_code for answer in answers] == [200] * 16
            assert "dreamtune_resends_total 1.0" in client.get("/metrics").text
            shutil.copy(folder / "dog.safetensors", folder / "late.safetensors")
            assert client.post("/adapters/reload").json()["added"] == ["late"]
            end = time.monotonic() + PATIENCE
            while client.get("/health").json()["replicas"] < 2:  # it is started again
                assert time.monotonic() < end
                time.sleep(0.2)
            brought = [client.post("/generate", json={**late, "seed": 1}) for _ in range(6)]
            assert victim not in [process for _, process in replicas.memories]
    with engine_of(settings) as engine:
        alone = make_app(settings, engine)
        with TestClient(alone, base_url="http://127.0.0.1") as client:
            single = [client.post("/generate", json=body) for body in asked]
            one = client.post("/generate", json=late)
    for a, b in [*zip(answers, single), *((answer, one) for answer in brought)]:
        assert near(picture(a), picture(b)), a.json()["adapter"]
    assert len({answer.json()["image"] for answer in single}) == 16


def picture(answer):
    return Image.open(io.BytesIO(base64.b64decode(answer.json()["image"])))
