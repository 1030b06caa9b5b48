"""`dreamtune serve`: flags and settings, and the server over real connections."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from contextlib import contextmanager

import httpx2
import pytest
import uvicorn
from test_app import PATIENCE, Blank, total, until

from dreamtune.cli import main
from dreamtune.serving.app import make_app
from dreamtune.serving.command import PACKAGES, bound, parser
from dreamtune.serving.settings import FIELDS, Settings


def test_the_help_states_every_default():
    text = " ".join(parser("serve").format_help().split())
    for name, field in FIELDS.items():
        assert f"--{name} " in text
        assert field.metadata["help"] in text, name
    assert text.count("[default: ") == len(FIELDS) - 1  # of `adapters` there is none
    assert "--api_key " not in text  # a value there is read by every user of the machine


@pytest.mark.parametrize("name", PACKAGES)
def test_without_its_packages_it_says_what_to_install(name, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["serve", "--adapters", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"dreamtune serve: the server needs `{name}`")
    assert error.endswith("pip install 'dreamtune[serve]'\n")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "required: --adapters"),
        (["--adapters", "a", "--api_key", "secret12"], "unknown argument --api_key."),
        (["--adapters", "a", "--port", "70000"], "`port` must be at most 65535, got 70000"),
        (["--adapters", "a", "--max_batch", "0"], "`max_batch` must be at least 1, got 0"),
        (["--adapters", "a", "--wait_ms", "-1"], "`wait_ms` must be at least 0, got -1"),
        (["--adapters", "a", "--timeout_s", "inf"], "`timeout_s` must be finite"),
        (["--adapters", "a", "--resolution", "500"], "`resolution` must be a multiple of 8"),
        (["--adapters", "a", "--max_steps", "9"], "is 25, more than `max_steps`, 9"),
        (["--adapters", "a", "--api_key_file", "nowhere"], "nowhere"),
        (["--adapters", ".", "--port", "0", "--jobs", "a-file"], "`a-file` cannot be written: "),
        (["--adapters", "nowhere", "--port", "0"], "the folder of adapters `nowhere` does not"),
        (["--adapters", "a", "--host", "no host"], "`host`: there is no address no host, port"),
    ],
)
def test_refusals(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").touch()
    assert main(["serve", *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dreamtune serve: ")
    assert message in error


def test_a_server_of_no_folder_is_refused():
    with pytest.raises(ValueError, match="`adapters` is missing"):
        Settings()


def test_the_key_is_of_the_file_else_of_the_environment(tmp_path):
    file = tmp_path / "key"
    file.write_text("of-the-file\n")
    environment = {"DREAMTUNE_API_KEY": "of-the-environment"}
    assert Settings(adapters="a", api_key_file=str(file)).api_key(environment) == "of-the-file"
    assert Settings(adapters="a").api_key(environment) == "of-the-environment"
    assert Settings(adapters="a").api_key({}) is None
    for key in ("", "short", "two words of it", "schl\u00fcssel-schl\u00fcssel"):
        with pytest.raises(ValueError, match="must be one word of at least 8 printable ASCII"):
            Settings(adapters="a").api_key({"DREAMTUNE_API_KEY": key})
    with pytest.raises(ValueError, match="the API key in `.*key` must be"):
        file.write_text("\n")
        Settings(adapters="a", api_key_file=str(file)).api_key(environment)


def test_a_port_that_is_taken():
    with bound(Settings(adapters="a", port=0)) as first:
        first.listen()
        host, port = first.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(ValueError, match=f"127.0.0.1, port {port} cannot be had: .*--port"):
            bound(Settings(adapters="a", port=port))


@contextmanager
def served(engine, **more):
    """(server, address, application) of a real one, as the command runs it."""
    settings = Settings(adapters="a", port=0, wait_ms=0.0, timeout_s=PATIENCE, **more)
    app = make_app(settings, engine)
    with bound(settings) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: server.started)
            yield server, listener.getsockname(), app
        finally:
            engine.let.set()
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()


def test_a_server_that_is_ended_answers_what_it_has_accepted():
    engine, answers = Blank(held=True), []

    def ask(url, seed):
        body = {"prompt": "a", "seed": seed, "adapter": "dog"}
        answers.append(httpx2.post(f"{url}/generate", json=body, timeout=PATIENCE))

    with served(engine) as (server, (host, port), app):
        url = f"http://{host}:{port}"
        threads = [threading.Thread(target=ask, args=(url, seed)) for seed in range(6)]
        for thread in threads:
            thread.start()
        queue = app.state.queue
        until(lambda: sum(map(len, engine.batches)) + len(queue.waiting) == 6)
        assert len(queue.waiting) >= 2
        server.should_exit = True
        until(lambda: not server.servers or not any(s.is_serving() for s in server.servers))
        time.sleep(0.05)
        assert not answers
        engine.let.set()
        for thread in threads:
            thread.join(PATIENCE)
    assert [answer.status_code for answer in answers] == [200] * 6
    assert sorted(answer.json()["seed"] for answer in answers) == list(range(6))
    assert not queue.alive


def test_a_client_that_closes_its_connection_is_dropped():
    engine = Blank(held=True)
    with served(engine) as (_, address, app):
        body = json.dumps({"prompt": "a"}).encode()
        head = (
            f"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode()
        first, second = (socket.create_connection(address) for _ in range(2))
        first.sendall(head + body)
        assert engine.begun.wait(PATIENCE)
        second.sendall(head + body)
        until(lambda: len(app.state.queue.waiting) == 1)
        second.close()
        until(lambda: not app.state.queue.waiting)
        until(lambda: total(app, "cancelled") == 1)
        engine.let.set()
        assert first.recv(15).startswith(b"HTTP/1.1 200")
        first.close()
    assert len(engine.batches) == 1
