"""A crash at any write leaves what was there, whole, and nothing beside it."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import disturb, tiny_unet

import dreamtune
from dreamtune.files.whole import check_writable, remove_folder, whole, whole_folder
from dreamtune.training import run_folder

CALLS = ("fsync", "chmod", "replace")  # of `os`, between the last byte and the name


class Crash(BaseException):
    """Nothing may catch it but a clean-up."""


def tree(folder: Path) -> dict[str, bytes | None]:
    """Relative path -> contents, None for a folder, of everything below, hidden or not."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


def crash_at(patch: pytest.MonkeyPatch, number: int) -> Callable[[], bool]:
    """From now on the `number`th of CALLS raises. Gives a function that says whether it did."""
    seen = [0]

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen[0] += 1
            if seen[0] == number:
                raise Crash
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        patch.setattr(os, name, counted(getattr(os, name)))
    return lambda: seen[0] >= number


def write_file(folder: Path, new: bytes, stop: int) -> None:
    with whole(folder / "x.bin") as partial:
        partial.write_bytes(new)
        if stop == 0:
            raise Crash


def write_folder(folder: Path, new: bytes, stop: int) -> None:
    with whole_folder(folder / "x") as partial:
        (partial / "a").write_bytes(new)
        (partial / "deep").mkdir()
        (partial / "deep" / "b").write_bytes(new)
        if stop == 0:
            raise Crash


@pytest.mark.parametrize("write", [write_file, write_folder])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(old=st.none() | st.binary(max_size=9), new=st.binary(max_size=9), stop=st.integers(0, 5))
def test_old_or_new_and_nothing_else(
    write: Callable[..., None],
    old: bytes | None,
    new: bytes,
    stop: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """stop: 0 in the block, N at the Nth of CALLS after it, if there are so many."""
    folder, wanted = tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("b")
    if old is not None:
        write(folder, old, -1)
    before = tree(folder)
    write(wanted, new, -1)
    with pytest.MonkeyPatch.context() as patch:
        crashed = crash_at(patch, stop) if stop else lambda: True
        try:
            write(folder, new, stop)
        except Crash:
            assert crashed()
            assert tree(folder) == before
        else:
            assert not crashed()
            assert tree(folder) == tree(wanted)


def native(folder: Path, version: int) -> None:
    adapter = dreamtune.inject(tiny_unet(), "lora", rank=1)
    disturb(adapter, seed=version)
    adapter.save(folder)


def lora(folder: Path, version: int) -> None:
    adapter = dreamtune.inject(tiny_unet(), "lora", rank=1)
    disturb(adapter, seed=version)
    dreamtune.export(adapter, folder, overwrite=True)


def checkpoint(folder: Path, version: int) -> None:
    adapter = dreamtune.inject(tiny_unet(), "lora", rank=1)
    disturb(adapter, seed=version)
    state = {"x": torch.full((2,), float(version))}
    slot = SimpleNamespace(
        index=0,
        adapter=adapter,
        save=lambda path, metadata: adapter.save(path, 0, metadata),
        step=SimpleNamespace(state_dict=lambda index: state),
    )
    run_folder.save_checkpoint(folder, 3, slot, {"version": version})


def metrics(folder: Path, version: int) -> None:
    path = folder / run_folder.METRICS
    if version == 0:
        path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(4)))
    else:
        run_folder.truncate_metrics(folder, 1)


def picture(folder: Path, version: int) -> None:
    with whole(folder / "0.png") as partial:
        Image.new("RGB", (4, 4), (version, 0, 0)).save(partial, "PNG")


@pytest.mark.parametrize("write", [native, lora, checkpoint, metrics, picture])
def test_every_writer(
    write: Callable[[Path, int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 0)
    before, number = tree(tmp_path), 0
    while True:
        number += 1
        with monkeypatch.context() as patch:
            crashed = crash_at(patch, number)
            try:
                write(tmp_path, 1)
            except Crash:
                assert tree(tmp_path) == before
            if not crashed():
                break
    assert number > 3
    after = tree(tmp_path)
    assert after != before and after.keys() == before.keys()


def test_the_mode_is_that_of_an_ordinary_file(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with whole(tmp_path / "x") as partial:
            assert stat.S_IMODE(partial.stat().st_mode) == 0o600
        with whole_folder(tmp_path / "y"):
            pass
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "y").stat().st_mode) == 0o750


def test_links_are_not_followed(tmp_path: Path) -> None:
    """Neither one with the target's name nor one where the temporary folder will be."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "x").write_text("theirs")
    for name in ("y", ".y.part", ".y.old"):
        (tmp_path / name).symlink_to(tmp_path / "theirs")
    (tmp_path / "x").symlink_to(tmp_path / "theirs" / "x")
    with whole(tmp_path / "x") as partial:
        partial.write_text("ours")
    with whole_folder(tmp_path / "y") as partial:
        (partial / "x").write_text("ours")
    assert (tmp_path / "x").read_text() == (tmp_path / "y" / "x").read_text() == "ours"
    assert (tmp_path / "theirs" / "x").read_text() == "theirs"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["theirs", "x", "y"]


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path: Path) -> None:
    for end in ("part", "old"):
        (tmp_path / f".y.{end}").mkdir()
        (tmp_path / f".y.{end}" / "x").write_text("half")
    with whole_folder(tmp_path / "y") as partial:
        assert list(partial.iterdir()) == []
    assert tree(tmp_path) == {"y": None}
    remove_folder(tmp_path / "y")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("name", ["n" * 300, "n" * 300 + "/run", "/".join(["n" * 200] * 25)])
def test_a_name_that_no_folder_can_have_is_refused_before_it_is_made(
    name: str, tmp_path: Path
) -> None:
    """It is not there, and its parent can be written: nothing else would tell before the work."""
    with pytest.raises(OSError, match="too long") as error:
        check_writable(tmp_path / name)
    assert error.value.filename == str(tmp_path / name) and not list(tmp_path.iterdir())
    check_writable(tmp_path / "new" / "run")
