"""One folder, one run: who has it, what lies in it, and what is not written into it."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import disturb, tiny_unet

import dreamtune
from dreamtune.config import Config
from dreamtune.training import run_folder
from dreamtune.training.lock import LOCK, FolderLock
from dreamtune.training.resume import together
from dreamtune.training.train import train


def in_another_process(work: Any) -> int:
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_folder_has_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a" / "b"
    lock = FolderLock(folder)
    with pytest.raises(ValueError, match=f"`{folder}` is in use: process {os.getpid()} on .* trai"):
        FolderLock(folder)
    assert in_another_process(lambda: FolderLock(folder)) == 1
    assert (folder / LOCK).is_file()
    lock.release()
    lock.release()
    assert not folder.exists()  # made for nothing
    assert in_another_process(lambda: FolderLock(folder).release()) == 0
    assert capsys.readouterr().out == ""


def test_the_folder_of_a_dead_process_is_free(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_another_process(lambda: (FolderLock(tmp_path), os._exit(9))) == 9
    assert (tmp_path / LOCK).is_file()
    lock = FolderLock(tmp_path)
    assert f"{tmp_path} was left locked by process" in capsys.readouterr().out
    (tmp_path / "x").touch()
    lock.release()
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_two_that_start_together_take_two_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the other makes the folder between a look at it and the making."""
    monkeypatch.chdir(tmp_path)
    names = [run_folder.take(None, "dog").folder.name for _ in range(3)]
    assert names == ["dog", "dog-2", "dog-3"]
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    assert run_folder.take(None, "dog").folder.name == "dog-4"


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_a_file_where_runs_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Before: looked for a free name for ever."""
    monkeypatch.chdir(tmp_path)
    if kind == "file":
        (tmp_path / "runs").touch()
    else:
        (tmp_path / "runs").symlink_to("no")
    with pytest.raises(ValueError, match="`output_dir` runs is a (file|link)"):
        run_folder.take(None, "dog")


@pytest.mark.parametrize("target", ["theirs", "no"])
def test_a_planted_lock_is_not_followed(tmp_path: Path, target: str) -> None:
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / target)
    with pytest.raises(OSError) as caught:
        FolderLock(tmp_path / "run")
    assert caught.value.filename == str(tmp_path / "run" / LOCK)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "theirs"]
    assert (tmp_path / "theirs").read_text() == "theirs"


def test_a_lock_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    """A full disk has room for names, and for no byte."""
    import resource

    folder = tmp_path / "run"

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        with pytest.raises(OSError) as caught:
            FolderLock(folder)
        assert caught.value.filename == str(folder)

    assert in_another_process(full) == 0
    assert not folder.exists()


@pytest.mark.parametrize("instead", ["nothing", "folder", "link"])
def test_a_folder_that_is_moved_is_written_no_more(
    settings: dict[str, Any], tmp_path: Path, instead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its checkpoint goes on where it is."""
    from dreamtune.training.wave import Wave

    folder, moved, original = Path(settings["output_dir"]), tmp_path / "moved", Wave.advance
    (tmp_path / "theirs").mkdir()

    def advance(self: Wave, k: int) -> None:
        original(self, k)
        if k == 3:
            folder.rename(moved)
            if instead == "folder":
                folder.mkdir()
            elif instead == "link":
                folder.symlink_to(tmp_path / "theirs")

    with monkeypatch.context() as patch:
        patch.setattr(Wave, "advance", advance)
        with pytest.raises(ValueError, match=f"`{folder}` was moved or removed while its run went"):
            train(Config(**settings))
    assert not folder.exists() or not list(folder.iterdir())
    assert not list(moved.glob(".*")) and not list((tmp_path / "theirs").iterdir())
    given = {"resume_from_checkpoint": "latest", "output_dir": str(moved)}
    assert [r["step"] for r in train(Config(**given)).history] == [0, 3, 6]


def test_links_in_the_folder_of_a_run_are_not_followed(tmp_path: Path) -> None:
    run_dir, theirs = tmp_path / "run", tmp_path / "theirs"
    (run_dir / "samples").mkdir(parents=True)
    theirs.mkdir()
    (run_dir / "notes").symlink_to(theirs)  # the user's own
    run_folder.refuse_planted(run_dir)
    names = (*run_folder.OURS, "logs", "checkpoint-3", "samples/000003.png")
    for name in (n for n in names if n != "samples"):
        (run_dir / name).symlink_to(theirs / "x")
        with pytest.raises(ValueError, match=f"`{run_dir / name}` is a link, which is not foll"):
            run_folder.refuse_planted(run_dir)
        (run_dir / name).unlink()
    for name in names:  # a folder for a file, and the other way round
        path = run_dir / name
        folder = name in run_folder.FOLDERS or name == "checkpoint-3"
        if name == "samples":
            path.rmdir()
        path.touch() if folder else path.mkdir()
        with pytest.raises(
            ValueError, match=f"`{path}` must be a (file|folder) of the run, and is"
        ):
            run_folder.refuse_planted(run_dir)
        path.unlink() if folder else path.rmdir()
        (run_dir / "samples").mkdir(exist_ok=True)
    (run_dir / "samples").rmdir()
    (run_dir / "samples").symlink_to(theirs)
    given = {"resume_from_checkpoint": "latest", "output_dir": str(run_dir)}
    with pytest.raises(ValueError, match="samples` is a link, which is not followed: take it away"):
        train(Config(**given))
    assert not list(theirs.iterdir())


@pytest.mark.parametrize("name", ["checkpoint-3", "samples", "best", "metrics.jsonl"])
@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_nothing_of_the_name_of_a_runs_files_is_overwritten(
    tmp_path: Path, name: str, kind: str
) -> None:
    if kind == "file":
        (tmp_path / name).write_text("theirs")
    else:
        (tmp_path / name).symlink_to(tmp_path / "no")
    with pytest.raises(ValueError, match=rf"holds another run \({name}\); nothing is overwritten"):
        run_folder.take(str(tmp_path), "x")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_what_is_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "no")
    for name, why in (
        ("file", "file is a file, not a folder"),
        ("file/a/b", f"file/a/b cannot be made: {tmp_path}/file is a file, not a folder"),
        ("link", "link is a link that leads to no folder"),
        ("link/a", f"link/a cannot be made: {tmp_path}/link is a link that leads to no folder"),
    ):
        for given in ({}, {"resume_from_checkpoint": "latest"}):
            with pytest.raises(ValueError, match=f"`output_dir` {tmp_path}/{why}"):
                train(Config(output_dir=str(tmp_path / name), **given))


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    for name in (
        ".checkpoint-3.part", ".checkpoint-6.gone", ".best.old", ".final", "..final.part",
        ".checkpoint-9.old", "checkpoint-9",
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    for name in (".config.yaml.ab_1.part", ".report.html.x.part", ".theirs", ".metrics.jsonl"):
        (tmp_path / name).touch()
    for place, name in (("samples", "000003.png"), ("class", "class-00001.png")):
        (tmp_path / place).mkdir()
        (tmp_path / place / name).touch()
        (tmp_path / place / f".{name}.ab_12cd3.part").touch()
    run_folder.sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "best", "checkpoint-9", ".theirs", ".metrics.jsonl", "samples", "class",
    }  # fmt: skip
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["000003.png"]
    assert [p.name for p in (tmp_path / "class").iterdir()] == ["class-00001.png"]
    # what was about to be replaced is there again, and what had been replaced is gone
    assert (tmp_path / "best" / "x").read_text() == ".best.old"
    assert (tmp_path / "checkpoint-9" / "x").read_text() == "checkpoint-9"


@pytest.mark.parametrize("which", ["adapter", "moment", "loss"])
def test_what_is_not_finite_is_no_checkpoint(tmp_path: Path, which: str) -> None:
    """And the sound ones stay. The loss of a skipped step alone may be."""
    adapter = dreamtune.inject(tiny_unet(), "lora", rank=1)
    disturb(adapter)
    state = {"optimizer.0.exp_avg": torch.zeros(2), "step.loss": torch.zeros(())}
    slot: Any = SimpleNamespace(
        index=0,
        adapter=adapter,
        save=lambda path, metadata: adapter.save(path, 0, metadata),
        step=SimpleNamespace(state_dict=lambda index: state),
    )
    run_folder.save_checkpoint(tmp_path, 3, slot, {"photos": []})
    name = {"moment": "optimizer.0.exp_avg", "loss": "step.loss"}.get(which)
    with torch.no_grad():
        broken = state[name] if name else next(iter(adapter.parameters()))
        broken.view(-1)[0] = float("nan") if which != "moment" else float("inf")
    if which == "loss":
        run_folder.save_checkpoint(tmp_path, 6, slot, {"photos": []})
        assert run_folder.damage(tmp_path / "checkpoint-6") is None
        return
    with pytest.raises(ValueError, match="checkpoint-6 is not written, .*: 1 tensors .* are not f"):
        run_folder.save_checkpoint(tmp_path, 6, slot, {"photos": []})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]
    assert "checkpoint-3 is whole" in run_folder.safe(tmp_path)


def test_one_command_begins_and_goes_on(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """For a machine that can vanish: with leftovers of its start, with nothing, with a checkpoint.
    Class images and the like stay.
    """
    command = Config(**{**settings, "max_train_steps": 3}, resume_from_checkpoint="latest")
    folder = Path(settings["output_dir"])
    with pytest.raises(ValueError, match="no settings of a run yet, and no photos are named: give"):
        train(Config(output_dir=str(folder), resume_from_checkpoint="latest"))
    assert [r["step"] for r in train(command).history] == [0, 3]
    assert f"Nothing to resume in {folder} yet" in capsys.readouterr().out
    first = (folder / "adapter.safetensors").read_bytes()
    for path in (folder / "checkpoint-3").iterdir():
        path.unlink() if path.is_file() else None
    with pytest.raises(ValueError, match="no checkpoint in .* is whole. checkpoint-3: .* Remove"):
        train(command)
    for name in ("checkpoint-3", "best"):
        run_folder.remove_folder(folder / name)
    with pytest.raises(ValueError, match="holds a finished run .* nothing to resume"):
        train(command)
    for name in run_folder.OURS[2:5]:  # killed before its first checkpoint
        (folder / name).unlink(missing_ok=True)
    (folder / "class").mkdir()
    assert [r["step"] for r in train(command).history] == [0, 3]
    assert "Nothing to resume" in capsys.readouterr().out
    assert (folder / "adapter.safetensors").read_bytes() == first and (folder / "class").is_dir()
    assert [r["step"] for r in train(command).history] == [0, 3]  # done: no step more


def test_runs_that_were_stacked_go_back_to_the_step_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where one was killed before its first checkpoint all begin anew."""
    steps = {"a": {2, 4}, "b": {2}, "new": set()}
    monkeypatch.setattr("dreamtune.training.resume.whole_steps", lambda p: steps[p.name])
    monkeypatch.setattr("dreamtune.training.resume.unfinished", lambda run: True)

    def run(name: str, every: int = 2) -> Any:
        own = {
            "dir": tmp_path / name,
            "checkpoint": Path("x"),
            "start": max(steps[name], default=0),
        }
        return SimpleNamespace(**own, given=SimpleNamespace(checkpointing_steps=every))

    a, b = run("a"), run("b")
    together([a, b])
    assert (a.start, a.checkpoint) == (2, tmp_path / "a" / "checkpoint-2") and b.start == 2
    assert f"{tmp_path / 'a'} goes back from step 4 to 2" in capsys.readouterr().out
    steps["a"] = {2}
    a, new = run("a"), run("new")
    together([a, new])
    assert (a.start, a.checkpoint, new.start) == (0, None, 0)
    steps["a"] = {4, 6}  # long ago: each goes on from its own
    a, new = run("a"), run("new")
    together([a, new])
    assert (a.start, new.start) == (6, 0)
