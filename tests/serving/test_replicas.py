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
from serving import done, engine_of, near, settings_of, write_adapters

from dreamtune.cli import main
from dreamtune.serving.app import make_app
from dreamtune.serving.backend import Backend, Row, Shape
from dreamtune.serving.errors import Refused
from dreamtune.serving.replica import Facts, Replica, Reply
from dreamtune.serving.resend import Lost, drawn
from dreamtune.serving.settings import Settings
from dreamtune.serving.training import trained

SHAPE = Shape(16, 2, 4.0)
LONG = 40  # steps, so that a replica can be killed while it draws
HOME = "http://127.0.0.1"
PATIENCE = 120.0
RAY = "Ray is an extra: pip install 'dreamtune[ray]'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_adapters(tmp_path_factory.mktemp("serving") / "adapters")


@pytest.fixture
def replica(tiny_pipeline_dir, folder):
    found = Replica(settings_of(tiny_pipeline_dir, folder, jobs="none"))
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
    settings = settings_of(tiny_pipeline_dir, folder, jobs=str(folder / "unshared"))
    refused = asyncio.run(Replica(settings).facts()).refused
    assert refused.startswith("`jobs`: a replica does not find the folder of training jobs `/")
    assert "unshared`" in refused and refused.endswith(" or train nothing: --jobs none.")
    wrong.check_health()  # for a while: whoever starts it is to be told
    wrong.began -= 60
    with pytest.raises(RuntimeError, match="nowhere"):
        wrong.check_health()


class Mortal(Backend):
    """Two replicas without Ray: an engine, whose next `deaths` batches are lost once drawn."""

    device, guidance_scale, workers = "2 x cpu", 4.0, 2

    def __init__(self, engine, deaths):
        super().__init__(print)
        self.engine, self.deaths, self.sent, self.count = engine, deaths, [], threading.Lock()
        self.base, self.sizes, self.max_batch = engine.base, engine.sizes, engine.max_batch
        self.empty_is_none, self.adapters = engine.empty_is_none, engine.adapters
        self.takes_negatives = engine.takes_negatives

    def add(self, name, path):
        return self.engine.add(name, path)

    def warm_up(self, guidance_scale):
        self.engine.warm_up(guidance_scale)

    def draw(self, rows, shape):
        def send(part):
            pictures = self.engine.draw(part, shape)
            with self.count:
                self.sent.append([row.seed for row in part])
                self.deaths -= 1
                if self.deaths >= 0:
                    raise Lost("ActorDiedError")
            return pictures

        return drawn(rows, send, self.on_resend)


@pytest.mark.parametrize("deaths", [1, 3])
def test_what_a_dead_replica_had_accepted_is_sent_again_with_its_seed(
    tiny_pipeline_dir, folder, deaths
):
    """Those that were not given one too: it is drawn when a request is accepted."""
    settings = settings_of(tiny_pipeline_dir, folder, wait_ms=1e4)  # until the batch is full
    names = ["dog", "cat", "cow", "owl"]
    bodies = [{"prompt": f"a {name}", "adapter": name} for name in names]
    bodies[0]["seed"] = 7
    with engine_of(settings) as engine:
        mortal = Mortal(engine, deaths)
        with (
            TestClient(make_app(settings, mortal), base_url=HOME) as client,
            ThreadPoolExecutor(4) as pool,
        ):
            answers = list(pool.map(lambda body: client.post("/generate", json=body), bodies))
            told = client.get("/metrics").text
        found = [answer.json() for answer in answers]
        rows = [Row(b["prompt"], "", b["adapter"], f["seed"]) for b, f in zip(bodies, found)]
        alone = [engine.draw([row], SHAPE)[0] for row in rows]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert found[0]["seed"] == 7 and len({one["seed"] for one in found}) == 4
    assert f"dreamtune_resends_total {deaths}.0" in told
    assert len(mortal.sent[0]) == 4 and {*mortal.sent[0]} == {one["seed"] for one in found}
    assert mortal.sent[1] == mortal.sent[0]
    assert {seed for batch in mortal.sent[deaths:] for seed in batch} == {*mortal.sent[0]}
    for answer, row, picture in zip(answers, rows, alone):
        assert near(picture_of(answer), picture), row.adapter
    assert not any(near(alone[0], other) for other in alone[1:])


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
    assert handle.sent == [[1, 2, 3], [1, 2, 3], [1], [2], [2], [3]]
    assert len(resent) == 3  # not when a row was given up
    assert replicas.memory() == {"allocated": 5, "reserved": 7, "peak": 9}
    handle.late = True
    assert "no replica drew it in 9 seconds" in str(replicas.draw(rows[:1], SHAPE)[0])
    assert len(resent) == 3  # nobody waits for it any more
    with pytest.raises(ValueError, match="`dog` already"):
        replicas.adapters["dog"] = None
        replicas.add("dog", "dog.safetensors")


def test_a_cluster_that_cannot_be_had(monkeypatch):
    ray = pytest.importorskip("ray", reason=RAY)
    from dreamtune.serving.replicas import cluster

    def unreached(**asked):
        assert asked["address"] == "host:1"
        raise ConnectionError("InvalidAuthToken\nmore")

    monkeypatch.setattr(ray, "init", unreached)
    message = "no Ray cluster could be had at host:1: InvalidAuthToken. .* RAY_AUTH_MODE=token"
    with pytest.raises(ValueError, match=message), cluster("host:1", 2):
        pass


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


@pytest.mark.cluster
def test_a_killed_replica_loses_nothing_and_pictures_are_those_of_one_engine(
    tiny_pipeline_dir, tmp_path, monkeypatch
):
    """Two on a cluster of this machine: one is killed while both draw. What training jobs end with
    meanwhile, and had before, reaches the one that takes its place.
    """
    pytest.importorskip("ray", reason=RAY)
    from dreamtune.serving import replicas as module

    monkeypatch.setattr(module, "STORE", 80 << 20)  # the least that Ray takes
    folder = write_adapters(tmp_path / "adapters")
    late, jobs_folder = folder / "dog.safetensors", tmp_path / "adapters-jobs"
    done(jobs_folder, "rex", late, "0" * 16)
    settings = settings_of(tiny_pipeline_dir, folder, max_batch=2, timeout_s=PATIENCE)
    names = ["dog", "cat", "cow", "rex"]
    asked = [
        {"prompt": f"a {name}", "adapter": name, "seed": i, "steps": LONG}
        for i, name in enumerate(names)
    ]
    new = [{"prompt": "a", "adapter": name, "seed": 1} for name in ("late", "rex")]
    brought = []
    with (
        module.Replicas.opened(replace(settings, replicas=2), tell=print) as replicas,
        trained(settings, replicas) as jobs,
        TestClient(make_app(settings, replicas, jobs), base_url=HOME) as client,
        ThreadPoolExecutor(4) as pool,
    ):

        def asked_of(bodies):
            return list(pool.map(lambda body: client.post("/generate", json=body), bodies))

        told = client.get("/health").json()
        assert told["replicas"] == 2 and told["device"] == "2 x cpu" and told["adapters"] == 5
        assert client.get("/").status_code == 200 and client.get("/about").json()["training"]
        asked_of([{"prompt": "a"}])
        victim = next(iter(replicas.memories))[1]
        kill = threading.Timer(0.5, os.kill, (victim, signal.SIGKILL))
        kill.start()
        answers = asked_of(asked)
        kill.join()
        assert [answer.status_code for answer in answers] == [200] * 4
        assert "dreamtune_resends_total 1.0" in client.get("/metrics").text
        jobs.runner.reports.on_done("late", late)
        end = time.monotonic() + PATIENCE
        while len(replicas.memories) < 2:  # that drew since: another is started
            assert time.monotonic() < end
            brought += asked_of(new * 2)
        assert victim not in [process for _, process in replicas.memories]
    with engine_of(settings) as engine:
        engine.add("rex", late)
        engine.add("late", late)
        with TestClient(make_app(settings, engine), base_url=HOME) as client:
            single = [client.post("/generate", json=body) for body in asked]
            one = client.post("/generate", json=new[0])
    for a, b in [*zip(answers, single), *((answer, one) for answer in brought)]:
        assert near(picture_of(a), picture_of(b)), a.json()["adapter"]
    assert len({answer.json()["image"] for answer in single}) == 4


def picture_of(answer):
    return Image.open(io.BytesIO(base64.b64decode(answer.json()["image"])))
