"""What a user can cause is a sentence and exit 1; what only a fault of ours can, a traceback."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from dreamtune import cli
from dreamtune.config import Config
from dreamtune.configfile import absolute, read_run
from dreamtune.training.interrupts import SIGNALS, Interrupted, Interrupts


def os_error(number: int, name: str | None = "place") -> OSError:
    return OSError(number, os.strerror(number), name)


def endless() -> None:
    endless()


def nested(work: Callable[[], object]) -> RecursionError:
    with pytest.raises(RecursionError) as caught:
        work()
    return caught.value


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("`seed` must be"), "`seed` must be"),
        (os_error(errno.ENOSPC), "`place`: the disk is full; free some space, or name another"),
        (
            os_error(errno.ENOSPC, None),
            "the disk is full; free some space, or name another folder.",
        ),
        (os_error(errno.EROFS), "`place`: the file system is read-only; name a folder that can be"),
        (os_error(errno.EACCES), "`place`: permission denied."),
        (os_error(errno.ELOOP), "`place`: it is a link, which is not followed, or links in a circ"),
        (os_error(errno.ENODEV), "`place`: No such device."),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            "the disk is full; fr",
        ),
        (
            SafetensorError("Error while deserializing header"),
            "a safetensors file cannot be used: E",
        ),
        (nested(lambda: json.loads("[" * 100_000)), "a file that was read is nested too deeply."),
        (torch.OutOfMemoryError("CUDA"), "the GPU has too little memory: lower --train_batch_size"),
        (MemoryError(), "there is too little memory."),
    ],
)
def test_what_a_user_can_cause(
    error: Exception, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: object) -> int:
        raise error

    monkeypatch.setattr(cli, "methods", fail)
    assert cli.main(["methods"]) == 1
    assert capsys.readouterr().err.startswith(f"dreamtune methods: {text}")
    monkeypatch.setenv("DREAMTUNE_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.main(["methods"])


@pytest.mark.parametrize(
    "error", [TypeError("x"), KeyError("x"), AssertionError(), RuntimeError("x"), nested(endless)]
)
def test_a_fault_of_ours_shows_where(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(argv: object) -> int:
        raise error

    monkeypatch.setattr(cli, "methods", fail)
    with pytest.raises(type(error)):
        cli.main(["methods"])


@pytest.mark.parametrize("number", SIGNALS)
def test_exit_status_of_a_signal(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(argv: object) -> int:
        with Interrupts():
            os.kill(os.getpid(), number)
        return 0

    monkeypatch.setattr(cli, "methods", wait)
    before = signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler
    outside = signal.signal(number, before)  # nohup would have us ignore SIGHUP
    try:
        assert cli.main(["methods"]) == 128 + number
        assert signal.getsignal(number) == before
    finally:
        signal.signal(number, outside)


def test_signals_wait_for_what_is_held() -> None:
    done = []
    with pytest.raises(Interrupted) as caught, Interrupts() as interrupts:
        with interrupts.held():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("held")
        done.append("after")
    assert done == ["held"] and caught.value.signal == signal.SIGTERM
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)  # of a pair: it must not fall into the saving
        with interrupts.held():
            done.append("saved")
    assert done == ["held", "saved"]


def test_nohup_goes_on_ignoring_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_pipe_that_closes_is_no_error() -> None:
    """`dreamtune methods | head -0`, with the message of the interpreter's end too."""
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from dreamtune.cli import main; sys.exit(main(['methods']))"
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "/x", "..", ".", "", "a\nb", "a\0b"])
def test_a_name_is_no_path(name: str) -> None:
    with pytest.raises(
        ValueError, match="`name` must be the name of a folder in runs/, not a path"
    ):
        Config(name=name)
    assert Config(name="a dog, 2").name == "a dog, 2"


def test_places_are_absolute_where_they_are_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sd").mkdir()
    here = str(tmp_path)
    given = Config(
        pretrained_model_name_or_path="sd", instance_data_dir="p", dino="facebook/dino-vits16",
        clip="local-dir:c", with_prior_preservation=True, class_data_dir="../class",
    )  # fmt: skip
    found = absolute(given)
    assert found.pretrained_model_name_or_path == f"{here}/sd"
    assert (found.instance_data_dir, found.clip) == (f"{here}/p", f"local-dir:{here}/c")
    assert found.class_data_dir == str(tmp_path.parent / "class")
    assert found.dino == "facebook/dino-vits16"
    words = Config(dino="none", clip="embedded", instance_data_dir="embedded:fox-3d")
    assert absolute(words) == words


def test_what_lay_in_the_folder_of_a_run_lies_where_it_is_now(tmp_path: Path) -> None:
    text = "output_dir: /old/run\nclass_data_dir: /old/run/class\nclip: local-dir:/old/run/c\n"
    (tmp_path / "config.yaml").write_text(text + "dino: /old/runner\ninstance_data_dir: /old/p\n")
    assert read_run(tmp_path / "config.yaml") == {
        "output_dir": "/old/run", "class_data_dir": f"{tmp_path}/class", "dino": "/old/runner",
        "clip": f"local-dir:{tmp_path}/c", "instance_data_dir": "/old/p",
    }  # fmt: skip
