"""Training beside a server: where its jobs are, and that what they trained is served."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from fastapi.testclient import TestClient
from serving import done, engine_of, settings_of, write_adapters

from dreamtune.serving import command
from dreamtune.serving.app import make_app
from dreamtune.serving.engine import Engine
from dreamtune.serving.jobs.store import Job, Store
from dreamtune.serving.settings import Settings
from dreamtune.serving.training import trained

HOME = "http://127.0.0.1"
PATIENCE = 20.0


@pytest.fixture
def engine(tiny_pipeline_dir: Path, tmp_path: Path) -> Iterator[Engine]:
    settings = settings_of(tiny_pipeline_dir, write_adapters(tmp_path / "adapters"))
    with engine_of(settings) as found:
        found.settings = settings
        yield found


def test_where_the_jobs_are(tmp_path: Path) -> None:
    assert Settings(adapters="a", jobs="none").jobs_folder is None
    assert Settings(adapters="a", jobs="b/c").jobs_folder == Path("b/c")
    assert Settings(adapters=f"{tmp_path}/a/").jobs_folder == tmp_path / "a-jobs"
    assert Settings(adapters=".").jobs_folder == Path.cwd().with_name(f"{Path.cwd().name}-jobs")


def test_what_was_trained_is_served_again(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = tmp_path / "adapters-jobs", tmp_path / "adapters" / "dog.safetensors"
    done(folder, "rex", file, "0" * 16)
    done(folder, "cat", file, "1" * 16)  # a file of that name came into the folder since
    with trained(engine.settings, engine) as jobs:
        assert jobs is not None
        said = capsys.readouterr().out
        assert "Left out of what was trained: cat: " in said and "rex" not in said
        assert set(engine.adapters) == {"dog", "cat", "cow", "owl", "rex"}
        on_done = jobs.runner.reports.on_done
        on_done("rex", jobs.adapters()["rex"])  # once more: nothing happens
        on_done("new", file)
        with pytest.raises(ValueError, match="`cat`"):
            on_done("cat", file)
        assert "new" in engine.adapters
        with TestClient(make_app(engine.settings, engine, jobs), base_url=HOME) as client:
            photo = {"photos": ("a.png", b"x")}
            answer = client.post("/train", data={"prompt": "a sks dog", "name": "OWL"}, files=photo)
            assert answer.status_code == 422
            assert answer.json()["error"].startswith("`name` OWL is taken")
            assert set(answer.json()) == {"error", "got", "allowed", "way_out"}
            large = b"x" * (200 << 10)  # more than other routes take
            answer = client.post("/train", data={"prompt": "a sks dog"}, files={"photos": large})
            assert answer.status_code == 422 and "photo 1" in answer.json()["error"]
            body = {"prompt": "a sks dog", "adapter": "rex"}
            assert client.post("/generate", json=body).status_code == 200
            told = client.get("/metrics").text.splitlines()
            counts = {"done": 2, "waiting": 0, "running": 0, "failed": 0, "cancelled": 0}
            assert {f'dreamtune_jobs{{state="{s}"}} {n}.0' for s, n in counts.items()} <= {*told}
    with trained(replace(engine.settings, jobs="none"), engine) as none:
        assert none is None
    with TestClient(make_app(engine.settings, engine), base_url=HOME) as client:
        assert client.get("/jobs").status_code == 404


def test_a_signal_ends_open_streams(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server waits for them, and they for their jobs."""
    monkeypatch.setattr(Engine, "opened", lambda settings: contextlib.nullcontext(engine))
    monkeypatch.setattr("dreamtune.serving.jobs.runner.Runner.start", lambda self: None)
    folder = Path(engine.settings.adapters).with_name("adapters-jobs")
    store = Store(folder)
    id = "2" * 16
    store.add(Job(id, "rex", "a sks dog", 1, {}, time.time()), {})
    store.close()
    told: list[str] = []
    listeners: list[socket.socket] = []
    bound = command.bound
    monkeypatch.setattr(command, "bound", lambda of: listeners.append(bound(of)) or listeners[0])

    def follow() -> None:
        until = time.monotonic() + PATIENCE
        while not told and time.monotonic() < until:
            time.sleep(0.02)
            with contextlib.suppress(IndexError, OSError, httpx2.ConnectError):
                url = f"{HOME}:{listeners[0].getsockname()[1]}/jobs/{id}/events"
                with httpx2.stream("GET", url, timeout=PATIENCE) as answer:
                    for line in answer.iter_lines():
                        if line.startswith("event:"):
                            told.append(line)
                            os.kill(os.getpid(), signal.SIGTERM)
                told.append("ended")
        if not told:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=follow)
    thread.start()
    with pytest.raises(SystemExit) as ended:
        command.serve(replace(engine.settings, port=0))
    thread.join(PATIENCE)
    assert told == ["event: queued", "ended"]
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    Store(folder).close()  # nobody has it any more
