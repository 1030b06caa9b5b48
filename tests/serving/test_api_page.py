"""configs/serve/API.md: its examples run against a server, and it says what the server has."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from job_children import Children
from PIL import Image
from serving import engine_of
from test_app import HOME, KEY, Blank
from test_command import served

import dreamtune.serving
from dreamtune import embedded
from dreamtune.serving import schema
from dreamtune.serving.app import FREE, make_app
from dreamtune.serving.engine import Known
from dreamtune.serving.generate import GONE
from dreamtune.serving.jobs.asked import Limits
from dreamtune.serving.jobs.jobs import Jobs
from dreamtune.serving.jobs.store import ENDED, STATES, Job
from dreamtune.serving.metrics import OUTCOMES
from dreamtune.serving.page_routes import PATHS
from dreamtune.serving.settings import API_KEY, Settings
from dreamtune.serving.train_routes import ALIVE, CHECK, PHOTOS, TRAIN

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "configs" / "serve" / "API.md").read_text()
URL = "http://127.0.0.1:8000"
ROUTE = re.compile(r"\b(GET|POST|PUT|PATCH|DELETE) (/[\w/{}.]*)")


def examples(language: str) -> str:
    text = "\n".join(re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL))
    assert text.count(URL) == 1
    return text


def section(title: str) -> str:
    """What stands under a heading, up to the next."""
    found = re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^## |^### |\Z)", TEXT, re.M | re.S)
    assert found, title
    return found[1]


def named(text: str) -> set[str]:
    """What stands in it as code."""
    return set(re.findall(r"`([^`\n]+)`", text))


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Any]:
    jobs = Jobs(tmp_path / "jobs", "embedded", lambda *done: None)
    yield make_app(Settings(adapters="a"), Blank(), jobs)
    jobs.stop()


# The examples


def test_the_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (tmp_path / "photos").mkdir()
    for photo in embedded.subject("fox-3d").photos[:2]:
        shutil.copy(photo, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(API_KEY, KEY)
    Children(None).into(monkeypatch)
    options = {"adapters": str(adapters), "num_inference_steps": 2}
    few = {
        "max_train_steps": 1, "num_inference_steps": 1, "validation_prompt": ["a {}"],
        "dino": "none", "clip": "none", "device": "cpu", "options": {"rank": 2},
    }  # fmt: skip
    with engine_of(Settings(**options)) as engine:
        jobs = Jobs(tmp_path / "jobs", "embedded", engine.add, settings=few, gather=0.0, poll=0.02)
        engine.let = jobs.stopping  # what `served` sets when it ends
        with jobs, served(engine, jobs, **options) as (_, (host, port), _):
            url = f"http://{host}:{port}"
            exec(compile(examples("python").replace(URL, url), "API.md", "exec"), {})
            shell = run_shell(examples("sh").replace(URL, url))
            told = [event for job in jobs.list() for event in jobs.events(job.id)]
    said = capsys.readouterr().out
    assert "no adapter of that name" in said
    assert "1 1\n1\n" in said  # seed and batch, and the seed in a header
    for kind in ("queued", "started", "progress", "sample", "done"):
        assert f"\n{kind} " in said
    assert "`sks fox`" in said and "[128] [] []" in said
    pictures = [Path(name).read_bytes() for name in ("fox.png", "same.png", "samples.png")]
    assert pictures[0] == pictures[1]
    with Image.open("samples.png") as sheet:
        assert sheet.width >= 128
    assert "done" in {event["kind"] for event in told}
    for event in told:
        assert event.keys() - {"n", "time", "kind"} <= event_fields()[event["kind"]], event
    if shell is None:
        pytest.skip("without curl its examples are not run")
    assert Path("again.png").read_bytes() == pictures[0]
    assert '"name":"my-fox","method":"delora"' in shell
    assert shell.count("event: cancelled") == 1 and '"state":"cancelled"' in shell
    assert "dreamtune_requests_total" in shell


def run_shell(text: str) -> str | None:
    """What the commands say; None where there is no curl."""
    if shutil.which("curl") is None:
        return None
    done = subprocess.run(
        ["bash", "-eu", "-c", text], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


# What it says


def event_fields() -> dict[str, set[str]]:
    """Kind of an event -> what it says beside `n`, `time` and `kind`."""
    rows = re.findall(r"^\| (`.+`) \| (.*) \|$", section("`GET /jobs/{id}/events`"), re.MULTILINE)
    found = {kind: named(more) for kinds, more in rows for kind in named(kinds)}
    del found["kind"]  # the head
    return found


def test_every_route_has_its_heading_and_no_other_is_named(app: Any) -> None:
    routes = {
        f"{method.upper()} {path}"
        for path, methods in app.openapi()["paths"].items()
        for method in methods
    }
    headings = re.findall(r"^### `(.*)`$", TEXT, re.MULTILINE)
    assert sorted(headings) == sorted(routes)
    assert {" ".join(found) for found in ROUTE.findall(TEXT)} == routes | {"GET /openapi.json"}
    assert TestClient(app, base_url=HOME).get("/openapi.json").status_code == 200
    assert set(FREE) == {"/health", *PATHS}  # as the first lines say


def test_every_field_is_named(app: Any) -> None:
    training = Job("1", "a", "b", 1, {}, 0.0).public()
    client = TestClient(app, base_url=HOME)
    jobs = app.state.jobs
    picture = ("photos", ("a.png", embedded.subject("fox-3d").photos[0].read_bytes()))
    id = client.post("/train", data={"prompt": "a sks fox"}, files=[picture]).json()["id"]
    checked = client.post("/photos/check", data={"prompt": "a sks fox"}, files=[picture]).json()
    about = client.get("/about").json()
    reloaded = {"added", "left_out"}
    for title, wanted in {
        "POST /generate": {*schema.Request.model_fields, *schema.Picture.model_fields},
        "GET /adapters": {*client.get("/adapters").json(), *(f.name for f in fields(Known))},
        "POST /adapters/reload": reloaded,
        "GET /about": {*about, *about["training"]},
        "POST /train": {*TRAIN, PHOTOS, *training, *STATES},
        "POST /photos/check": {PHOTOS, *CHECK, *checked, *checked["photos"][0], *checked["words"]},
        "GET /jobs": set(client.get("/jobs").json()),
        "GET /jobs/{id}": client.get(f"/jobs/{id}").json().keys() - training.keys(),
        "GET /health": set(client.get("/health").json()),
    }.items():
        said = named(section(f"`{title}`"))
        assert set(wanted) <= said, (title, set(wanted) - said)
    assert jobs.get(id).state == "waiting"


def test_fields_that_are_sent_are_no_others() -> None:
    def rows(title: str) -> set[str]:
        return set(re.findall(r"^\| `(\w+)` \|", section(f"`{title}`"), re.MULTILINE))

    assert rows("POST /generate") == set(schema.Request.model_fields)
    assert rows("POST /train") == {*TRAIN, PHOTOS}


def test_every_event_is_named(app: Any) -> None:
    folder = Path(dreamtune.serving.__file__).parent
    text = "\n".join(path.read_text() for path in folder.glob("jobs/*.py"))
    told = set(re.findall(r'\btell\([\w.]+, "(\w+)"', text))
    told |= set(re.findall(r'yield "(\w+)", ', text)) | set(ENDED)
    assert set(event_fields()) == told
    assert f"{ALIVE:g} seconds" in section("`GET /jobs/{id}/events`")


def test_every_status_is_named() -> None:
    folder = Path(dreamtune.serving.__file__).parent
    text = "\n".join(path.read_text() for path in folder.rglob("*.py"))
    found = set(re.findall(r"\bRefused\(\s*(\d{3}),", text)) | {"405"}
    assert str(GONE) not in found
    assert set(re.findall(r"^\| (\d{3}) \|", section("Errors"), re.MULTILINE)) == found
    said = set(re.findall(r"\b[45]\d\d\b", TEXT))
    assert said <= found


def test_limits_are_those_of_the_server() -> None:
    plain, jobs = Settings(adapters="a"), Limits()
    found = dict(re.findall(r"^\| ([^|]+) \| (\d+) \|", section("Limits"), re.MULTILINE))
    flags = {name.strip("`"): int(x) for name, x in found.items() if name.startswith("`")}
    assert flags == {name: getattr(plain, name) for name in flags} and len(flags) == 6
    others = {name: int(x) for name, x in found.items() if not name.startswith("`")}
    assert others == {
        "adapters in a picture": schema.MIXED,
        "photos of a job": jobs.photos,
        "bytes of a photo": jobs.photo_bytes,
        "pixels of a photo": jobs.pixels,
        "characters of a job's prompt": jobs.prompt,
        "steps of a job": jobs.steps,
        "jobs that wait": jobs.waiting,
    }
    assert f"the whole form {jobs.body_bytes}" in section("Limits")
    train = section("`POST /train`")
    assert f"1 to {jobs.photos} " in train and f"1 to {jobs.steps} " in train


def test_every_metric_is_named(app: Any) -> None:
    registry = app.state.metrics.registry
    kinds = {"counter": "_total"}
    wanted = {family.name + kinds.get(family.type, "") for family in registry.collect()}
    said = section("`GET /metrics`")
    assert {name for name in named(said) if name.startswith("dreamtune_")} == wanted
    assert set(OUTCOMES) <= named(said)
