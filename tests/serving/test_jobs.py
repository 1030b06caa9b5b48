"""Training jobs: waves, restarts, deaths. Their processes are forks of this one."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from job_children import Children, until

from dreamtune.files.native import load_adapter_file
from dreamtune.models.load import load_base
from dreamtune.serving.jobs import child
from dreamtune.serving.jobs.jobs import Jobs, Over
from dreamtune.serving.jobs.memory import PROCESS, Room
from dreamtune.serving.jobs.store import CANCEL, OUTCOME, Job

STEPS = 6
Photos = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def photos(photo_dir: Path) -> Photos:
    return [(p.name, p.read_bytes()) for p in sorted(photo_dir.glob("*.png"))]


@pytest.fixture(scope="module")
def common(tiny_v_pipeline_dir: Path) -> dict[str, Any]:
    """Checkpoints and pictures after 0, 3 and 6 steps, without scores."""
    load_base(str(tiny_v_pipeline_dir))  # what it imports is in every fork
    return {
        "base": str(tiny_v_pipeline_dir),
        "gather": 0.0,
        "poll": 0.02,
        "settings": {
            "validation_prompt": ["a {}"], "validation_steps": 3, "num_inference_steps": 1,
            "options": {"rank": 2}, "dino": "none", "clip": "none", "device": "cpu",
        },
    }  # fmt: skip


def make(folder: Path, common: dict[str, Any], done: list[str] | None = None, **more: Any) -> Jobs:
    told = [] if done is None else done
    return Jobs(folder, on_done=lambda name, path: told.append(name), **{**common, **more})


def submit_two(jobs: Jobs, photos: Photos) -> tuple[str, str]:
    more = {"max_train_steps": STEPS}
    one = jobs.submit(photos, "a sks dog", "one", seed=1, **more)
    two = jobs.submit(photos[:2], "a sks cat", "two", seed=2, **more)
    return one.id, two.id


def over(jobs: Jobs, *ids: str) -> list[Job]:
    until(lambda: all(jobs.get(id).over for id in ids))
    return [jobs.get(id) for id in ids]


def kinds(jobs: Jobs, id: str) -> list[str]:
    return [event["kind"] for event in jobs.events(id)]


def tensors(jobs: Jobs) -> dict[str, torch.Tensor]:
    """Of all that are done."""
    return {
        f"{name} {key}": tensor
        for name, path in jobs.adapters().items()
        for key, tensor in load_adapter_file(path).tensors.items()
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, common: dict[str, Any], photos: Photos
) -> Iterator[tuple[Jobs, list[str], list[str]]]:
    """Two jobs of a wave, nothing in their way, and one that came while they trained."""
    done: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("trained")
        Children(lambda wave, k: until((folder / "third").is_file)).into(patch)
        jobs = make(folder, common, done)
        ids = [*submit_two(jobs, photos)]
        with jobs:
            until(lambda: "sample" in kinds(jobs, ids[0]))
            ids.append(jobs.submit(photos[:1], "a sks cow", max_train_steps=1).id)
            (folder / "third").touch()
            over(jobs, *ids)
            yield jobs, ids, done


def test_a_wave_of_two_and_one_that_comes_meanwhile(
    trained: tuple[Jobs, list[str], list[str]],
) -> None:
    jobs, ids, done = trained
    one, two, third = over(jobs, *ids)
    assert [one.state, two.state, third.state] == ["done"] * 3
    assert done == ["one", "two", third.name] and third.name == f"cow-{third.id[:6]}"
    assert third.started and third.started >= max(one.ended or 0, two.ended or 0) > 0
    began = [e["jobs"] for id in ids for e in jobs.events(id) if e["kind"] == "started"]
    assert began == [2, 2, 1]
    events = jobs.events(one.id)
    assert [e["n"] for e in events] == list(range(1, len(events) + 1))
    assert [e["step"] for e in events if e["kind"] == "sample"] == [0, 3, 6]
    assert all(jobs.sample(one.id, step) for step in (0, 3, 6)) and jobs.sample(one.id, 1) is None
    assert jobs.events(one.id, after=len(events) - 1) == events[-1:]
    assert events[-1]["kind"] == "done" and events[-1]["best_step"] == 6
    progress = [e for e in events if e["kind"] == "progress" and "seconds_left" in e]
    assert progress and progress[0]["steps"] == STEPS and progress[0]["loss"] > 0
    (needed,) = {*jobs.runner.needs.found.values()}  # both waves are of one kind
    assert 100 << 20 < needed < 8 << 30
    files = sorted(p.name for p in (jobs.store.place(one.id) / "photos").iterdir())
    assert files == ["001.png", "002.png", "003.png"]
    assert jobs.adapters().keys() == {"one", "two", third.name} and len(tensors(jobs)) > 6
    assert [e["n"] for e in jobs.follow(one.id, after=2)] == [e["n"] for e in events[2:]]


def test_a_killed_process_loses_nothing(
    tmp_path: Path, common: dict[str, Any], photos: Photos, trained: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Bit for bit what an undisturbed one makes: killed in the middle, and again when it is
    finished and has not said so."""

    def kill(wave: Any, k: int) -> None:
        if k == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    def kill_at_the_end(wave: Any, k: int) -> None:
        def write(path: Path, values: dict[str, Any]) -> None:
            if path.name == OUTCOME:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(child, "write_json", write)  # in the fork

    children = Children(kill, kill_at_the_end, None).into(monkeypatch)
    jobs = make(tmp_path, common)
    ids = submit_two(jobs, photos)
    with jobs:
        assert [(job.state, job.deaths) for job in over(jobs, *ids)] == [("done", 1)] * 2
        retried = [e for e in jobs.events(ids[0]) if e["kind"] == "retried"]
        assert len(children.started) == 3 and [e["step"] for e in retried] == [3, 6]
        assert "ended by signal 9" in retried[0]["message"]
        samples = [e["step"] for e in jobs.events(ids[1]) if e["kind"] == "sample"]
        assert samples == [0, 3, 6]
        wanted = {k: t for k, t in tensors(trained[0]).items() if k[:3] in ("one", "two")}
        assert same(tensors(jobs), wanted)


def test_servers_come_and_go(
    tmp_path: Path, common: dict[str, Any], photos: Photos, trained: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One stops and its process saves; one is gone at once, and the next finds its process."""

    def hold(wave: Any, k: int) -> None:
        if k in (2, 5):
            (tmp_path / "held").touch()
            until((tmp_path / str(k)).is_file)

    children = Children(hold).into(monkeypatch)
    first = make(tmp_path, common)
    ids = submit_two(first, photos)
    first.start()
    until((tmp_path / "held").is_file)
    with pytest.raises(ValueError, match="another server's"):
        make(tmp_path, common)
    first.stop()
    assert kinds(first, ids[1])[-1] == "interrupted" and first.get(ids[1]).state == "running"
    assert children.started[0].code == 128 + signal.SIGTERM
    (tmp_path / "2").touch()

    second = make(tmp_path, common)
    second.start()
    until(lambda: kinds(second, ids[1]).count("started") == 2)
    second.runner.ending.set()  # as if it were killed: nothing is told to its process
    second.runner.join()
    second.store.close()
    assert children.started[1].poll() is None

    with make(tmp_path, common) as third:
        until(lambda: third.runner.child is not None)
        assert third.runner.child.own is None and third.runner.child.alive()
        (tmp_path / "5").touch()
        assert [job.state for job in over(third, *ids)] == ["done", "done"]
        assert len(children.started) == 2
        started = [e["step"] for e in third.events(ids[0]) if e["kind"] == "started"]
        assert started == [0, 2]
        steps = [e["step"] for e in third.events(ids[0]) if e["kind"] in ("progress", "sample")]
        assert steps == sorted(steps) and steps[-1] == STEPS
        wanted = {k: t for k, t in tensors(trained[0]).items() if k[:3] in ("one", "two")}
        assert same(tensors(third), wanted)


def test_cancelling(
    tmp_path: Path, common: dict[str, Any], photos: Photos, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that trains leaves the wave, and the other goes on; one that waits is gone at once. One
    whose photos are gone fails alone."""

    def hold(wave: Any, k: int) -> None:
        if k == 1:
            (tmp_path / "held").touch()
            until(lambda: any((place / CANCEL).is_file() for place in wave.folders.values()))

    children = Children(hold).into(monkeypatch)
    jobs = make(tmp_path, common)
    one, two = submit_two(jobs, photos)
    lost = jobs.submit(photos, "a sks hat", "hat", max_train_steps=STEPS).id
    shutil.rmtree(jobs.store.place(lost) / "photos")
    with jobs:
        until((tmp_path / "held").is_file)
        waiting = jobs.submit(photos, "a sks cow", "cow")
        assert jobs.cancel(waiting.id).state == "cancelled"
        jobs.cancel(one)
        left, gone, failed = over(jobs, two, one, lost)
        assert failed.state == "failed" and f"`{lost}/photos` does not exist" in failed.message
        assert (left.state, gone.state) == ("done", "cancelled")
        assert left.best_step == STEPS and jobs.adapters().keys() == {"two"}
        assert kinds(jobs, one)[-1] == "cancelled" and len(children.started) == 1
        for id in (one, two, waiting.id):
            with pytest.raises(Over):
                jobs.cancel(id)


def test_a_process_that_always_dies(
    tmp_path: Path, common: dict[str, Any], photos: Photos, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The jobs are tried together, then each alone, then given up with what was said last."""

    def boom() -> None:
        print("the disk is full", flush=True)
        raise SystemExit(3)

    children = Children(work=boom).into(monkeypatch)
    jobs = make(tmp_path, common)
    ids = submit_two(jobs, photos)
    with jobs:
        for job in over(jobs, *ids):
            assert job.state == "failed" and "status 3" in job.message
            assert "the disk is full" in job.message and str(tmp_path) not in job.message
            assert kinds(jobs, job.id) == [
                "queued", "started", "retried", "started", "retried", "started", "failed"
            ]  # fmt: skip
        assert len(children.started) == 4
        with pytest.raises(Over):
            jobs.cancel(ids[0])
        assert jobs.submit(photos, "a sks dog", "one").name == "one"  # the name is free again


def test_what_cannot_be_served_is_trained_all_the_same(
    tmp_path: Path, common: dict[str, Any], photos: Photos, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, path: Path) -> None:
        raise RuntimeError(f"no room for {path}")

    Children().into(monkeypatch)
    with Jobs(tmp_path, on_done=refuse, **common) as jobs:
        (job,) = over(jobs, jobs.submit(photos[:1], "a sks dog", max_train_steps=1).id)
        file = f"{job.id}/run/best/adapter.safetensors"
        assert job.state == "done"
        assert job.message == f"trained, but not served: no room for {file}"
        assert list(jobs.adapters()) == [job.name]


@pytest.mark.gpu
def test_a_wave_on_the_gpu(tmp_path: Path, photos: Photos) -> None:
    """What it needs is measured, and held against what is free from then on."""
    options: dict[str, Any] = {
        "base": "embedded",
        "gather": 0.0,
        "settings": {"resolution": 32, "num_inference_steps": 1, "dino": "none", "clip": "none"},
    }
    jobs = make(tmp_path, options)
    ids = submit_two(jobs, photos)
    with jobs:
        assert [job.state for job in over(jobs, *ids)] == ["done", "done"]
        (needed,) = jobs.runner.needs.found.values()
        assert PROCESS["cuda"] < needed < 8 << 30
    small = make(tmp_path, options, room_of=lambda device: Room(needed, needed))
    with pytest.raises(ValueError, match="GiB on cuda:0"):
        small.submit(photos, "a sks dog", max_train_steps=STEPS)
    small.stop()
