"""The server's routes: over a tiny base, and where no picture matters over one that draws none."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from serving import engine_of, near, settings_of, write_adapters

from dreamtune.serving import guard
from dreamtune.serving.app import make_app
from dreamtune.serving.backend import Backend, Known, Row, Shape
from dreamtune.serving.png import adapter_text, encoded
from dreamtune.serving.settings import Settings

HOME = "http://127.0.0.1"
PATIENCE = 20.0
KEY = "a-key-of-the-tests"
TEXT = st.text(max_size=20)


class Blank(Backend):
    """An engine that draws a pixel when it is let."""

    guidance_scale, device, empty_is_none, takes_negatives = 4.0, "cpu", True, True

    def __init__(self, held=False):
        super().__init__(print)
        known = [Known(name, "lora", 4, None, None, None) for name in ("dog", "cat")]
        self.adapters = {one.name: one for one in known}
        self.left_out = {"torn.safetensors": "why"}
        self.sizes, self.max_batch = (16, 32), 4
        self.base = SimpleNamespace(id="blank")
        self.batches, self.begun, self.let = [], threading.Event(), threading.Event()
        if not held:
            self.let.set()

    def add(self, name, path):
        raise ValueError("none is added")

    def warm_up(self, guidance_scale):
        assert guidance_scale == self.guidance_scale

    def draw(self, rows, shape):
        self.batches.append(rows)
        self.begun.set()
        assert self.let.wait(PATIENCE)
        return [Image.new("RGB", (1, 1)) for _ in rows]


def client_of(engine=None, **more):
    options = {"adapters": "a", "wait_ms": 0.0, "timeout_s": PATIENCE, **more}
    app = make_app(Settings(**options), engine or Blank())
    return TestClient(app, base_url=HOME, raise_server_exceptions=False)


def total(app, outcome):
    registry = app.state.metrics.registry
    return registry.get_sample_value("dreamtune_requests_total", {"outcome": outcome})


def until(true):
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture(scope="module")
def engine(tiny_pipeline_dir, tmp_path_factory):
    folder = write_adapters(tmp_path_factory.mktemp("serving") / "adapters")
    own = settings_of(tiny_pipeline_dir, folder)
    with engine_of(own) as found:
        found.settings = own
        yield found


def test_concurrent_requests_are_one_batch_and_each_gets_its_own(engine):
    asked = [
        {"prompt": "a dog", "adapter": "dog", "seed": 1},
        {"prompt": "a cat", "adapter": {"cat": 0.5, "owl": 1}, "seed": 2, "negative_prompt": "x"},
        {"prompt": "a cow", "adapter": "cow", "seed": 3},
        {"prompt": "a dog", "adapter": None, "seed": 4},
    ]
    app = make_app(replace(engine.settings, wait_ms=1e3 * PATIENCE), engine)
    with TestClient(app, base_url=HOME) as client, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda body: client.post("/generate", json=body), asked))
        told = [answer.json() for answer in answers]
        metrics = client.get("/metrics")
    assert [answer.status_code for answer in answers] == [200] * 4
    assert [one["batch"] for one in told] == [4] * 4
    assert [(one["adapter"], one["seed"]) for one in told] == [
        (one["adapter"], one["seed"]) for one in asked
    ]
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = metrics.text.splitlines()
    for line in (
        'dreamtune_requests_total{outcome="done"} 4.0',
        "dreamtune_batch_rows_count 1.0",
        "dreamtune_batch_rows_sum 4.0",
        "dreamtune_draw_seconds_count 1.0",
        "dreamtune_wait_seconds_count 4.0",
        "dreamtune_request_seconds_count 4.0",
        "dreamtune_queue_length 0.0",
        "dreamtune_adapters 4.0",
    ):
        assert line in lines, line
    for kind in ("allocated", "reserved", "peak"):
        assert f'dreamtune_gpu_memory_bytes{{kind="{kind}"}} ' in metrics.text
    with TestClient(make_app(engine.settings, engine), base_url=HOME) as client:
        for body, one in zip(asked, told):  # and what it gets alone
            headers = {"Accept": "image/png"}
            alone = client.post("/generate", json=body, headers=headers)
            assert alone.headers["content-type"] == "image/png"
            assert alone.headers["x-dreamtune-batch"] == "1"
            assert alone.headers["x-dreamtune-seed"] == str(body["seed"])
            assert json.loads(alone.headers["x-dreamtune-adapter"]) == body["adapter"]
            picture = Image.open(io.BytesIO(base64.b64decode(one["image"])))
            assert near(picture, Image.open(io.BytesIO(alone.content)))
            assert picture.text["prompt"] == body["prompt"]
            assert picture.text["seed"] == str(body["seed"])
            assert json.loads(picture.text["adapter"]) == body["adapter"]
            assert (picture.text["steps"], picture.text["guidance_scale"]) == ("2", "4")


def test_a_row_that_fails_alone_fails_alone(engine, monkeypatch):
    own = engine.draw

    def draw(rows, shape):
        huge = [row._replace(adapter={"dog": 1e38}) if row.seed == 7 else row for row in rows]
        return own(huge, shape)

    monkeypatch.setattr(engine, "draw", draw)
    app = make_app(replace(engine.settings, wait_ms=1e3 * PATIENCE), engine)
    asked = [{"prompt": "a dog", "adapter": "dog", "seed": seed} for seed in (5, 6, 7, 8)]
    with TestClient(app, base_url=HOME) as client, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda body: client.post("/generate", json=body), asked))
        assert [answer.status_code for answer in answers] == [200, 200, 500, 200]
        error = answers[2].json()
        assert "not finite" in error["error"]
        assert error["got"] == 'adapter "dog", seed 7'
        assert (total(client.app, "failed"), total(client.app, "done")) == (1, 3)


def test_a_fault_of_ours_is_not_told_to_whoever_asks(monkeypatch):
    engine = Blank()
    found = iter([RuntimeError("/home/somebody/secret"), MemoryError()])
    monkeypatch.setattr(engine, "draw", lambda rows, shape: [next(found)])
    with client_of(engine) as client:
        first, second = (client.post("/generate", json={"prompt": "a"}) for _ in range(2))
    assert (first.status_code, second.status_code) == (500, 507)
    assert first.json()["error"] == "This picture could not be drawn (RuntimeError)."
    assert "too little memory" in second.json()["error"]
    engine.adapters = None  # a fault outside of the drawing
    with client_of(Blank()) as client:
        client.app.state.engine = engine
        answer = client.post("/generate", json={"prompt": "a", "adapter": "dog"})
    assert answer.status_code == 500
    assert answer.json()["error"] == "The server failed; its log says how."


def test_what_is_not_given_is_the_server_s_own():
    engine = Blank()
    with client_of(engine, num_inference_steps=3, guidance_scale=2.5) as client:
        seeds = {client.post("/generate", json={"prompt": "a"}).json()["seed"] for _ in range(3)}
        client.post(
            "/generate",
            json={"prompt": "a", "steps": 5, "guidance_scale": 0, "size": 32, "seed": 2**63 - 1},
        )
    assert len(seeds) == 3
    assert max(seeds) < 1 << 32
    assert engine.batches[0][0].seed in seeds
    assert engine.batches[-1][0].seed == 2**63 - 1


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({}, 422, "`prompt` is missing."),
        ({"prompt": ""}, 422, "`prompt`: String should have at least 1 character"),
        ({"prompt": 3}, 422, "`prompt` must be of type str, got 3."),
        ({"prompt": "\ud800"}, 422, "`prompt`: Input should be a valid string"),
        ({"prompt": "a" * 1001}, 422, "`prompt` is too long."),
        ({"prompt": "a", "negative_prompt": "b" * 1001}, 422, "`negative_prompt` is too long."),
        ({"prompt": "a", "stps": 3}, 422, "`stps` is not known."),
        ({"prompt": "a", "steps": 0}, 422, "`steps` must be at least 1, got 0."),
        ({"prompt": "a", "steps": 101}, 422, "`steps` is too large."),
        ({"prompt": "a", "seed": True}, 422, "`seed` must be of type int, got True."),
        ({"prompt": "a", "seed": -1}, 422, "`seed` must be at least 0, got -1."),
        ({"prompt": "a", "seed": 2**63}, 422, "`seed` must be below"),
        ({"prompt": "a", "guidance_scale": float("nan")}, 422, "`guidance_scale` must be finite"),
        ({"prompt": "a", "guidance_scale": 101}, 422, "`guidance_scale` must be at most 100"),
        ({"prompt": "a", "guidance_scale": 1, "negative_prompt": "b"}, 422, "acts by guidance"),
        ({"prompt": "a", "size": 24}, 422, "`size` is not one that is drawn here."),
        ({"prompt": "a", "adapter": 7}, 422, "`adapter` must be of type str, got 7."),
        ({"prompt": "a", "adapter": {"dog": 11}}, 422, "`adapter` must be at most 10, got 11."),
        ({"prompt": "a", "adapter": {str(i): 1 for i in range(9)}}, 422, "too many adapters"),
        ({"prompt": "a", "adapter": "dgo"}, 404, "no adapter of that name. Did you mean `dog`?"),
        ({"prompt": "a", "adapter": {"dog": 1, "fox": 1}}, 404, "no adapter of that name."),
        ([], 422, "The body is not a JSON object."),
        ("x", 422, "The body is not a JSON object."),
    ],
)
def test_what_cannot_be_asked(body, status, said):
    engine = Blank()
    with client_of(engine) as client:
        text = body if body == "x" else json.dumps(body)
        answer = client.post(
            "/generate", content=text, headers={"Content-Type": "application/json"}
        )
        assert total(client.app, "invalid") == 1
    told = answer.json()
    assert answer.status_code == status
    assert said in told["error"]
    assert set(told) == {"error", "got", "allowed", "way_out"}
    assert told["way_out"]
    assert not engine.batches


def test_a_base_that_is_told_its_guidance_takes_no_negative_prompt():
    engine = Blank()
    engine.takes_negatives = False
    with client_of(engine) as client:
        answer = client.post("/generate", json={"prompt": "a", "negative_prompt": "b"})
        assert client.post("/generate", json={"prompt": "a"}).status_code == 200
    assert (answer.status_code, answer.json()["got"]) == (422, "b")
    assert "which is told its guidance as a number" in answer.json()["error"]


def test_an_unknown_adapter_lists_those_that_are_there():
    with client_of() as client:
        told = client.post("/generate", json={"prompt": "a", "adapter": "bird"}).json()
    assert (told["got"], told["allowed"]) == ("'bird'", ["dog", "cat"])


OPENED: list[str] = []
LISTENING = threading.Event()


def _listen(event, arguments):
    if LISTENING.is_set() and event in ("open", "os.listdir", "os.scandir"):
        OPENED.append(str(arguments[0]))


def test_a_name_is_never_a_path(engine):
    sys.addaudithook(_listen)
    names = [
        "../dog", "/etc/passwd", "dog/../cat", "dog.safetensors", "cow/adapter.safetensors", "",
        ".", "..\\dog", "dog\0", "%2e%2e/dog", "a" * 5000, "user/repo", "hf://user/repo",
        "embedded",
    ]  # fmt: skip
    with TestClient(make_app(engine.settings, engine), base_url=HOME) as client:
        client.post("/generate", json={"prompt": "a", "adapter": "none"})  # imports are over
        OPENED.clear()
        LISTENING.set()
        try:
            for name in names:
                for adapter in (name, {name: 1.0}):
                    body = {"prompt": "a", "adapter": adapter}
                    assert client.post("/generate", json=body).status_code == 404
        finally:
            LISTENING.clear()
    assert not OPENED


def test_who_may_ask(monkeypatch):
    compared = []
    own = guard.hmac.compare_digest
    monkeypatch.setattr(
        guard.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or own(a, b)
    )
    monkeypatch.setenv("DREAMTUNE_API_KEY", KEY)
    engine = Blank()
    with client_of(engine) as client:
        wrong = [
            {}, {"Authorization": "Bearer"}, {"Authorization": f"Basic {KEY}"},
            {"Authorization": f"Bearer {KEY}x"}, {"X-API-Key": KEY[:-1]},
            {"Authorization": "Bearer \u00e9".encode("latin-1").decode("latin-1")},
        ]  # fmt: skip
        for headers in wrong:
            raw = {k: v.encode("latin-1") for k, v in headers.items()}
            answer = client.post("/generate", json={"prompt": "a"}, headers=raw)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert KEY not in answer.text
        for path in ("/adapters", "/metrics", "/openapi.json", "/nothing"):
            assert client.get(path).status_code == 401
        assert total(client.app, "denied") == len(wrong) + 4
        assert len(compared) == len(wrong) + 4
        assert not engine.batches
        assert client.get("/health").status_code == 200
        for headers in ({"Authorization": f"Bearer {KEY}"}, {"X-API-Key": KEY}):
            answer = client.post("/generate", json={"prompt": "a"}, headers=headers)
            assert answer.status_code == 200
        rebound = client.get("/adapters", headers={"X-API-Key": KEY, "Host": "example.com"})
        assert rebound.status_code == 200  # a page of another site does not have the key


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200), ("localhost:8000", 200), ("[::1]:8000", 200), ("LocalHost", 200),
        ("example.com", 421), ("127.0.0.1.example.com", 421), ("", 421), ("[::1", 421),
    ],
)  # fmt: skip
def test_no_page_of_a_browser_reaches_it_by_another_name(host, status):
    with client_of() as client:
        assert client.get("/health", headers={"Host": host}).status_code == status
    with client_of(host="0.0.0.0") as client:  # its names are not known
        assert client.get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:8000", 200), ("http://example.com", 403), ("null", 403),
        ("http://127.0.0.1:80", 403), ("http://127.0.0.1:8000.example.com", 403),
    ],
)  # fmt: skip
def test_a_page_of_another_site_sends_nothing(origin, status, monkeypatch):
    headers = {"Host": "127.0.0.1:8000", "Origin": origin}
    with client_of() as client:
        answer = client.post("/generate", json={"prompt": "a"}, headers=headers)
        assert answer.status_code == status
    with client_of(host="0.0.0.0") as client:
        answer = client.post("/generate", json={"prompt": "a"}, headers=headers)
        assert answer.status_code == status
    monkeypatch.setenv("DREAMTUNE_API_KEY", KEY)
    with client_of() as client:  # the key is what decides
        keyed = {**headers, "X-API-Key": KEY}
        assert client.post("/generate", json={"prompt": "a"}, headers=keyed).status_code == 200


@pytest.mark.parametrize(
    "text", ["[" * 60_000, '{"prompt": "a", "seed": ' + "9" * 5000 + "}", '{"prompt": "a"', "\xff"]
)
def test_json_that_no_parser_takes(text):
    with client_of() as client:
        content = text.encode("latin-1")
        kind = {"Content-Type": "application/json"}
        answer = client.post("/generate", content=content, headers=kind)
    assert answer.status_code in (400, 422)
    assert set(answer.json()) == {"error", "got", "allowed", "way_out"}


def test_a_prompt_that_is_cut_is_drawn_and_said(engine):
    words = {"prompt": "a dog in the snow " * 10, "seed": 1}
    with TestClient(make_app(engine.settings, engine), base_url=HOME) as client:
        told = client.post("/generate", json=words).json()
        png = client.post("/generate", json=words, headers={"Accept": "image/png"})
        negative = client.post(
            "/generate", json={"prompt": "a", "negative_prompt": words["prompt"], "seed": 1}
        )
        short = client.post("/generate", json={"prompt": "a dog", "seed": 1})
        short_png = client.post("/generate", json={"prompt": "a"}, headers={"Accept": "image/png"})
    assert told["warning"].endswith("the text encoder takes 16; its end is not seen")
    assert png.headers["x-dreamtune-warning"] == told["warning"]
    assert negative.json()["warning"] == told["warning"]
    assert short.json()["warning"] is None
    assert "x-dreamtune-warning" not in short_png.headers


@settings(max_examples=30)
@given(TEXT, TEXT, st.dictionaries(TEXT, st.floats(0, 1), max_size=2))
def test_the_png_says_what_was_asked_in_any_letters(prompt, negative, adapter):
    row = Row(prompt, negative, adapter, 2**63 - 1)
    picture = Image.open(io.BytesIO(encoded(Image.new("RGB", (1, 1)), row, Shape(8, 3, 7.5), "b")))
    assert (picture.text["prompt"], picture.text["negative_prompt"]) == (prompt, negative)
    assert json.loads(picture.text["adapter"]) == adapter
    assert adapter_text(adapter).isascii()  # for a header
    assert picture.text["seed"] == "9223372036854775807"


def chunks(size):
    for _ in range(size // 1000):
        yield b"a" * 1000


def test_a_body_is_bounded_with_a_stated_length_and_without():
    engine = Blank()
    with client_of(engine, max_body_kb=2) as client:
        for content in (b"a" * 2049, chunks(5000), chunks(50_000)):
            kind = {"Content-Type": "application/json"}
            answer = client.post("/generate", content=content, headers=kind)
            assert answer.status_code == 413
            assert answer.json()["allowed"] == "2048 bytes"
        fits = json.dumps({"prompt": "a" * 900, "negative_prompt": "b" * 900}).encode()
        assert client.post("/generate", content=fits, headers=kind).status_code == 200
        for length in ("-1", "x", "9" * 5000, "\u0663"):
            headers = {**kind, "Content-Length": length.encode()}
            assert client.post("/generate", content=b"{}", headers=headers).status_code == 413
        assert client.post("/generate", content=fits).status_code == 422  # of no stated kind
    assert len(engine.batches) == 1


def asked(app, messages):
    """One request straight to the application: what it was sent. messages: what it receives."""
    sent = []
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "path": "/generate", "raw_path": b"/generate", "query_string": b"", "root_path": "",
        "scheme": "http", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")],
    }  # fmt: skip

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, messages, send))
    return sent


def test_who_has_gone_is_dropped_from_the_queue():
    engine = Blank(held=True)
    with client_of(engine) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/generate", json={"prompt": "a", "seed": 1})
        assert engine.begun.wait(PATIENCE)
        queue = client.app.state.queue

        given = iter([{"type": "http.request", "body": b'{"prompt": "a", "seed": 2}'}])

        async def receive():
            for message in given:
                return message
            while not queue.waiting:  # goes once it is accepted
                await asyncio.sleep(0.001)
            return {"type": "http.disconnect"}

        asked(client.app, receive)
        assert not queue.waiting
        engine.let.set()
        assert first.result(PATIENCE).status_code == 200
        assert (total(client.app, "cancelled"), total(client.app, "done")) == (1, 1)
    assert [[row.seed for row in batch] for batch in engine.batches] == [[1]]


def test_a_body_that_does_not_come_is_given_up():
    with client_of(timeout_s=0.05) as client:
        begun = iter([{"type": "http.request", "body": b"{", "more_body": True}])

        async def receive():
            for message in begun:
                return message
            await asyncio.sleep(PATIENCE)

        sent = asked(client.app, receive)
    assert sent[0]["status"] == 408
    assert b"takes too long to come" in sent[1]["body"]


def test_time_outs_and_a_full_queue():
    engine = Blank(held=True)
    with client_of(engine, timeout_s=0.2, max_queue=1) as client, ThreadPoolExecutor(2) as pool:
        drawn = pool.submit(client.post, "/generate", json={"prompt": "a", "seed": 1})
        assert engine.begun.wait(PATIENCE)
        waiting = pool.submit(client.post, "/generate", json={"prompt": "a", "seed": 2})
        until(lambda: len(client.app.state.queue.waiting) == 1)
        full = client.post("/generate", json={"prompt": "a", "seed": 3})
        assert full.status_code == 503
        assert int(full.headers["retry-after"]) >= 1
        assert "The queue is full: requests that wait: 1" in full.json()["error"]
        for late in (drawn, waiting):
            assert late.result(PATIENCE).status_code == 504
        assert (total(client.app, "full"), total(client.app, "late")) == (1, 2)
        engine.let.set()
    assert [[row.seed for row in batch] for batch in engine.batches] == [[1]]


def test_health_and_the_list_of_adapters():
    engine = Blank()
    with client_of(engine) as client:
        found = client.get("/health")
        assert found.status_code == 200
        told = found.json()
        assert told.pop("version")
        assert told == {
            "live": True, "ready": True, "queue": 0, "device": "cpu", "adapters": 2, "left_out": 1,
            "replicas": 1,
        }  # fmt: skip
        listed = client.get("/adapters").json()
        assert [one["name"] for one in listed["adapters"]] == ["dog", "cat"]
        assert listed["left_out"] == ["torn.safetensors"]
        engine.broken = "CUDA error"
        assert client.get("/health").status_code == 503
        assert client.get("/health").json()["live"] is False
        engine.broken = None
        client.app.state.queue.close(PATIENCE)
        assert client.get("/health").json()["ready"] is False
        answer = client.post("/generate", json={"prompt": "a"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")


def test_adapters_that_have_come_are_served_after_a_reload(engine, tmp_path):
    folder = engine.settings.adapters
    with TestClient(make_app(engine.settings, engine), base_url=HOME) as client:
        assert client.post("/adapters/reload").json() == {"added": [], "left_out": []}
        source = f"{folder}/dog.safetensors"
        with open(source, "rb") as file, open(f"{folder}/late.safetensors", "wb") as copy:
            copy.write(file.read())
        assert client.post("/adapters/reload").json()["added"] == ["late"]
        answer = client.post("/generate", json={"prompt": "a", "adapter": "late", "seed": 1})
        same = client.post("/generate", json={"prompt": "a", "adapter": "dog", "seed": 1})
    pictures = [base64.b64decode(one.json()["image"]) for one in (answer, same)]
    assert near(*(Image.open(io.BytesIO(data)) for data in pictures))
    gone = replace(engine.settings, adapters=str(tmp_path / "gone"))
    with TestClient(make_app(gone, engine), base_url=HOME) as client:
        answer = client.post("/adapters/reload")
    assert answer.status_code == 409
    assert str(tmp_path) not in answer.text


def test_other_paths_are_told_in_the_same_form():
    with client_of() as client:
        for method, path, status in (("GET", "/x", 404), ("PUT", "/generate", 405)):
            answer = client.request(method, path)
            assert answer.status_code == status
            told = answer.json()
            assert told["got"] == f"{method} '{path}'"
            assert "POST /generate" in told["allowed"]
        for path in ("/docs", "/redoc"):
            assert client.get(path).status_code == 404
        answer = client.options(
            "/generate", headers={"Origin": "http://a", "Access-Control-Request-Method": "POST"}
        )
        assert "access-control-allow-origin" not in answer.headers
