"""The routes of training, on jobs that never start, and the stream of one that ends."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("python_multipart")

from fastapi import FastAPI, Request  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402

from dreamtune.serving import train_routes  # noqa: E402
from dreamtune.serving.jobs.asked import Limits  # noqa: E402
from dreamtune.serving.jobs.jobs import Jobs  # noqa: E402


def picture(width: int = 40, height: int = 30) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


PHOTO = ("photos", ("a.png", picture(), "image/png"))


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    limits = Limits(photos=2, waiting=2, body_bytes=20_000)
    found = Jobs(
        tmp_path / "jobs", "embedded", lambda *done: None, settings={"device": "cpu"}, limits=limits
    )
    yield found
    found.stop()


@pytest.fixture
def client(jobs: Jobs) -> TestClient:
    app = FastAPI()
    app.include_router(train_routes.make_router(jobs))
    return TestClient(app)


def send(client: TestClient, data: dict[str, str], *files: Any, path: str = "/train") -> Any:
    return client.post(path, data=data, files=list(files) or [PHOTO])


def parsed(text: str) -> list[tuple[int, str, dict[str, Any]]]:
    """Of a stream of events: id, kind, data."""
    found = []
    for block in text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines())
        if "data" in lines:
            found.append((int(lines["id"]), lines["event"], json.loads(lines["data"])))
    return found


def test_a_job_over_http(client: TestClient, jobs: Jobs) -> None:
    words = {"prompt": "a sks dog", "name": "rex", "steps": "5", "seed": "9", "method": "lora"}
    made = send(client, words, PHOTO, PHOTO)
    assert made.status_code == 202, made.text
    job = made.json()
    assert made.headers["location"] == f"/jobs/{job['id']}"
    wanted = {"name": "rex", "photos": 2, "steps": 5, "seed": 9, "method": "lora"}
    assert {k: job[k] for k in wanted} == wanted and job["state"] == "waiting"
    assert str(jobs.store.folder) not in made.text
    assert [j["id"] for j in client.get("/jobs").json()["jobs"]] == [job["id"]]
    place = jobs.store.place(job["id"]) / "run" / "samples"
    place.mkdir(parents=True)
    (place / "000003.png").write_bytes(picture())
    jobs.store.tell(job["id"], "sample", step=3)
    one = client.get(f"/jobs/{job['id']}").json()
    assert (one["samples"], one["last_event"]) == ([3], 2)
    sheet = client.get(f"/jobs/{job['id']}/samples/3")
    assert (sheet.headers["content-type"], sheet.content) == ("image/png", picture())
    for step in ("4", "x", "..%2Fjob.json", "-3"):
        assert client.get(f"/jobs/{job['id']}/samples/{step}").status_code == 404
    assert client.delete(f"/jobs/{job['id']}").json()["state"] == "cancelled"
    assert client.delete(f"/jobs/{job['id']}").status_code == 409

    events = f"/jobs/{job['id']}/events"
    told = client.get(events)
    assert told.headers["content-type"].startswith("text/event-stream")
    assert told.text.startswith(f"retry: {train_routes.RETRY}\n\nid: 1\nevent: queued\ndata: {{")
    assert [(n, kind) for n, kind, _ in parsed(told.text)] == [
        (1, "queued"), (2, "sample"), (3, "cancelled")
    ]  # fmt: skip
    rest = client.get(events, headers={"Last-Event-ID": "2"})
    assert [n for n, _, _ in parsed(rest.text)] == [3]
    assert [n for n, _, _ in parsed(client.get(f"{events}?after=1").text)] == [2, 3]
    assert client.get(events, headers={"Last-Event-ID": "3"}).status_code == 204
    assert client.get(events, headers={"Last-Event-ID": "-1"}).status_code == 422
    for method, path in (("GET", ""), ("GET", "/events"), ("GET", "/samples/0"), ("DELETE", "")):
        for id in ("0123456789abcdef", "%2e%2e", "waves"):
            assert client.request(method, f"/jobs/{id}{path}").status_code in (404, 405)


def test_a_stream_follows_until_the_job_or_the_server_ends(jobs: Jobs) -> None:
    one, two = (jobs.submit([("a", picture())], "a sks dog") for _ in range(2))

    async def follow(id: str, then: Any) -> str:
        text = ""
        async for part in train_routes.stream(jobs, id, 0, poll=0.01):
            text += part
            if "queued" in part:
                then()
        return text

    jobs.store.tell(one.id, "progress", step=1, note="a\nb")
    text = asyncio.run(follow(one.id, lambda: jobs.cancel(one.id)))
    assert [kind for _, kind, _ in parsed(text)] == ["queued", "progress", "cancelled"]
    assert parsed(text)[1][2]["note"] == "a\nb"
    text = asyncio.run(follow(two.id, jobs.stopping.set))
    assert [kind for _, kind, _ in parsed(text)] == ["queued"]


@pytest.mark.parametrize(
    "data, files, status, words",
    [
        ({}, [PHOTO], 422, "`prompt` is missing"),
        ({"prompt": "a sks dog", "promt": "x"}, [PHOTO], 422, "Did you mean `prompt`"),
        ({"prompt": "a sks dog"}, [PHOTO] * 3, 422, "Too many files"),
        ({"prompt": "a sks dog"}, [("photo", PHOTO[1])], 422, "files are sent as `photos`"),
        ({"prompt": "a sks dog"}, [("prompt", PHOTO[1])], 422, "files are sent as `photos`"),
        ({"prompt": "a sks dog"}, [("photos", ("b", b"no", "x/y"))], 422, "photo 1 (b): it is not"),
        ({"prompt": ["a sks dog"] * 2}, [PHOTO], 422, "`prompt` stands twice"),
        ({"prompt": "x" * 8193}, [PHOTO], 422, "Part exceeded maximum size"),
        ({"prompt": "a sks dog"}, [("photos", ("b", b"x" * 20_000, "x/y"))], 413, "more than 20,0"),
        ({"prompt": "a sks dog", "name": "../x"}, [PHOTO], 422, "`name` must be 1 to 64 letters"),
        ({"prompt": "a sks dog", "steps": "-1"}, [PHOTO], 422, "`max_train_steps` must be at"),
    ],
)  # fmt: skip
def test_refused_over_http(
    client: TestClient, jobs: Jobs, data: dict[str, Any], files: Any, status: int, words: str
) -> None:
    answer = send(client, data, *files)
    assert answer.status_code == status and words in answer.json()["error"]
    assert sorted(p.name for p in jobs.store.folder.iterdir()) == [".lock"]


def test_a_body_without_a_length_is_counted(client: TestClient) -> None:
    """It is given up where the limit is, not read to its end."""
    pulled = 0

    async def receive() -> dict[str, Any]:
        nonlocal pulled
        pulled += 1
        return {"type": "http.request", "body": b"y" * 1000, "more_body": True}

    async def read() -> list[bytes]:
        request = Request({"type": "http", "method": "POST", "headers": []}, receive)
        return [chunk async for chunk in train_routes.counted(request, 3500)]

    with pytest.raises(train_routes.Refused, match="more than 3,500 bytes") as refused:
        asyncio.run(read())
    assert (refused.value.status, pulled) == (413, 4)


def test_bodies_that_are_no_forms(client: TestClient) -> None:
    assert client.post("/train", json={"prompt": "a sks dog"}).status_code == 415
    for kind in ("multipart/form-data", "multipart/form-data; boundary=x"):
        for body in (b"", b"--x", b"--y\r\n"):
            answer = client.post("/train", content=body, headers={"Content-Type": kind})
            assert answer.status_code == 422 and answer.json()["error"]


def test_full(client: TestClient) -> None:
    answers = [send(client, {"prompt": "a sks dog"}) for _ in range(3)]
    assert [a.status_code for a in answers] == [202, 202, 503]
    assert answers[2].headers["retry-after"] == str(train_routes.AGAIN)


def test_what_training_would_see(client: TestClient, jobs: Jobs) -> None:
    bad = ("photos", ("b.heic", b"no", "image/heic"))
    words = {"prompt": "an ohwx toy robot in the snow", "identifier": "ohwx"}
    seen = send(client, words, PHOTO, bad, path="/photos/check").json()
    good, wrong = seen["photos"]
    assert (good["name"], good["size"]) == ("a.png", "40 x 30")
    crop = Image.open(io.BytesIO(base64.b64decode(good["crop"])))
    assert crop.size == (192, 192)
    assert wrong == {"name": "b.heic", "error": "it is not an image of a known format"}
    assert (seen["words"]["identifier"], seen["words"]["class_noun"]) == ("ohwx", "toy robot")
    assert "ohwx toy robot" in seen["words"]["first_prompt"]
    assert "ohwx" not in seen["words"]["plain_prompt"]
    assert seen["words"]["summary"] == "`ohwx toy robot` (identifier `ohwx`, class `toy robot`)"
    lost = send(client, {"prompt": "a dog"}, path="/photos/check").json()["words"]
    assert "the identifier `sks` is not in the prompt" in lost["error"]
    assert lost["error"].endswith("with `identifier`.")  # the form's field, no option of a command
    assert send(client, {"prompt": "a dog"}).json()["error"] == lost["error"]
    assert "words" not in send(client, {}, path="/photos/check").json()
    assert jobs.list() == []
