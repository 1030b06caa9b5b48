"""What is asked of training jobs, what is left on the disk, and the memory: nothing trains here."""

from __future__ import annotations

import io
import json
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from job_children import Children, until
from PIL import Image, features

sys.path.append(str(Path(__file__).parents[2] / "eval" / "reliability"))
from children import signal_at  # noqa: E402

from dreamtune.data.photos import read_folder  # noqa: E402
from dreamtune.data.words import read_words  # noqa: E402
from dreamtune.serving.jobs import asked, child, memory  # noqa: E402
from dreamtune.serving.jobs.asked import SUFFIX, Limits  # noqa: E402
from dreamtune.serving.jobs.jobs import Full, Jobs  # noqa: E402
from dreamtune.serving.jobs.memory import GIB, Room  # noqa: E402
from dreamtune.serving.jobs.store import Events, Job, Store, write_json  # noqa: E402


def picture(size: tuple[int, int] = (24, 20), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


PHOTO = ("a.png", picture())


def make(folder: Path, **more: Any) -> Jobs:
    options: dict[str, Any] = {"settings": {"device": "cpu"}, "gather": 0.0, "poll": 0.02, **more}
    return Jobs(folder, "embedded", lambda name, path: None, **options)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Takes little, and never starts."""
    limits = Limits(photos=2, photo_bytes=4000, pixels=50_000, prompt=40, steps=100)
    return make(tmp_path_factory.mktemp("small"), limits=limits, taken=lambda: ["Served"])


@pytest.mark.parametrize(
    "photos, prompt, more, words",
    [
        ([], "a sks dog", {}, "`photos` must be 1 to 2 pictures, got 0"),
        ([PHOTO] * 3, "a sks dog", {}, "`photos` must be 1 to 2 pictures, got 3: leave some out"),
        ([("b.png", b"x" * 4001)], "a sks dog", {}, r"photo 1 \(b.png\): it has 4,001 bytes"),
        ([PHOTO, ("../\x1b.png", b"no")], "a sks dog", {}, r"1 of 2 .* 2 \(\?.png\): it is not"),
        ([("c", b"")], "a sks dog", {}, r"photo 1 \(c\): the file is empty"),
        ([("d.jpg", picture((300, 200), "JPEG"))], "a sks dog", {}, "0 megapixels, at most"),
        ([("e.png", picture((210, 10)))], "a sks dog", {}, "more than 20 times its short one"),
        ([PHOTO], " ", {}, "`prompt` must be 1 to 40 printable characters"),
        ([PHOTO], "a sks dog " * 9, {}, "`prompt` must be 1 to 40 printable .* got 89"),
        ([PHOTO], "a dog", {}, "the identifier `sks` is not in the prompt"),
        ([PHOTO], "a sks dog", {"name": "../up"}, "`name` must be 1 to 64 letters"),
        ([PHOTO], "a sks dog", {"name": "served"}, "`name` served is taken"),
        ([PHOTO], "a sks dog", {"max_train_steps": 101}, "must be at most 100, got 101"),
        ([PHOTO], "a sks dog", {"max_train_steps": "many"}, "`max_train_steps` must be a whole"),
        ([PHOTO], "a sks dog", {"method": "lorra"}, "unknown method `lorra`. Did you mean `lora`"),
        ([PHOTO], "a sks dog", {"device": "cpu"}, "`device` cannot be asked for. Only class_pr"),
    ],
)  # fmt: skip
def test_what_is_refused(
    small: Jobs, photos: list[tuple[str, bytes]], prompt: str, more: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        small.submit(photos, prompt, **more)
    assert sorted(p.name for p in small.store.folder.iterdir()) == [".lock"]


def test_every_format_is_stored_as_what_it_is(tmp_path: Path) -> None:
    """Under numbers, whatever its name said, so that training reads it again."""
    Image.init()  # all of its writers
    kinds = [k for k in SUFFIX if k in Image.SAVE and (k != "AVIF" or features.check("avif"))]
    files = [(f"{kind}.exe", picture(kind=kind)) for kind in kinds]
    found = asked.photo_files(files, Limits())
    assert [name[3:] for name in found] == [SUFFIX[kind] for kind in kinds] and len(kinds) > 8
    for name, data in found.items():
        (tmp_path / name).write_bytes(data)
    photos = read_folder(tmp_path).photos
    assert [p.path.name for p in photos] == sorted(found)
    assert {p.image.size for p in photos} == {(24, 20)}


@settings(max_examples=40)
@given(st.text(max_size=70))
def test_a_name_is_never_a_path(name: str) -> None:
    words = read_words("a sks robot toy")
    try:
        found = asked.adapter_name(name, words, "0123456789abcdef", ())
    except ValueError:
        return
    assert Path("x", found).name == found and found.isascii() and "." not in found


def test_names_and_settings(tmp_path: Path) -> None:
    common = {"method": "lora", "rank": 2, "learning_rate": 0.5, "device": "cpu"}
    jobs = make(tmp_path, settings=common, limits=Limits(waiting=2))
    job = jobs.submit([PHOTO], "a sks robot toy", max_train_steps="7", seed="3")
    assert job.name == f"robot-toy-{job.id[:6]}" and job.public()["steps"] == 7
    assert job.settings["options"]["rank"] == 2 and job.settings["learning_rate"] == 0.5
    other = jobs.submit([PHOTO], "a sks dog", "Dog", method="oft")
    assert "options" not in other.settings and "learning_rate" not in other.settings
    assert memory.kind_of(job.settings) != memory.kind_of(other.settings)
    with pytest.raises(Full, match="2 jobs wait, at most 2 may"):
        jobs.submit([PHOTO], "a sks dog")
    with pytest.raises(ValueError, match="`name` DOG is taken"):
        jobs.submit([PHOTO], "a sks dog", "DOG")
    assert [j["name"] for j in map(Job.public, jobs.list())] == [job.name, "Dog"]
    assert not {"wave", "settings", "deaths"} & job.public().keys()
    with pytest.raises(KeyError):
        jobs.get("../" + job.id)
    jobs.stop()


def test_what_a_server_that_was_killed_leaves(tmp_path: Path) -> None:
    jobs = make(tmp_path)
    one, two, three, four = (jobs.submit([PHOTO], "a sks dog") for _ in range(4))
    jobs.store.close()
    for job, state in ((one, "done"), (two, "failed")):  # killed before the event
        values = {**json.loads((tmp_path / job.id / "job.json").read_text()), "state": state}
        write_json(tmp_path / job.id / "job.json", {**values, "message": "why", "scores": {}})
    with (tmp_path / three.id / "events.jsonl").open("a") as file:
        file.write('{"n": 2, "ti')
    (tmp_path / four.id / "job.json").write_text("{}")
    half = tmp_path / ".0123456789abcdef.part"
    half.mkdir()

    again = Store(tmp_path)
    assert [again.events(one.id)[-1]["kind"], again.events(two.id)[-1]["message"]] == [
        "done",
        "why",
    ]
    again.tell(three.id, "waiting", message="x")
    assert [e["n"] for e in again.events(three.id)] == [1, 2] and not half.exists()
    assert four.id not in again.jobs and (tmp_path / four.id / "photos" / "001.png").is_file()
    again.close()
    assert [e["kind"] for e in Events(tmp_path / three.id / "events.jsonl").all] == [
        "queued",
        "waiting",
    ]


def test_kills_at_every_write_of_a_job(tmp_path: Path) -> None:
    """Whatever is being written, the next server finds each job whole or not at all, in a state
    that it had, its last event told."""
    photos, seen = {"001.png": PHOTO[1]}, set()

    def life() -> None:
        store = Store(folder)
        signal_at(folder, number, signal.SIGKILL)()
        id = "0123456789abcdef"
        store.add(Job(id, "dog", "a sks dog", 1, {}, created=1.0), photos)
        store.change(id, state="running", wave="w")
        store.tell(id, "started")
        store.end(id, "done")

    for number in range(1, 100):
        folder = tmp_path / str(number)
        status = forked.ended(forked.start(life, tmp_path / "log.txt"))
        store = Store(folder)
        there = sorted(p.name for p in folder.iterdir() if p.is_dir())
        assert there == sorted(store.jobs)  # none left out, nothing half made
        for job in store.all():
            events = store.events(job.id)
            assert events[0]["kind"] == "queued" and (folder / job.id / "photos/001.png").is_file()
            assert not job.over or events[-1]["kind"] == job.state
            seen.add(job.state)
            if not job.over:
                store.end(job.id, "cancelled")
        store.close()
        if status == 0:
            break
        assert status == -signal.SIGKILL, (tmp_path / "log.txt").read_text()
    assert number > 10 and seen == {"waiting", "running", "done"}


def test_a_process_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ended, and its job tried again, and given up like one that dies."""
    children = Children(work=lambda: time.sleep(1000)).into(monkeypatch)
    with make(tmp_path, silent=0.2) as jobs:
        job = jobs.submit([PHOTO], "a sks dog")
        until(lambda: jobs.get(job.id).over)
        assert "ended by signal 9" in jobs.get(job.id).message and len(children.started) == 3


def test_a_wave_waits_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the numbers, until there is enough; beyond the whole device it is refused at once."""
    room = Room(free=GIB // 2, total=8 * GIB)
    children = Children(work=lambda: None).into(monkeypatch)
    monkeypatch.setattr("dreamtune.serving.jobs.runner.ROOM_EVERY", 0.01)
    with make(tmp_path, room_of=lambda device: room) as jobs:
        job = jobs.submit([PHOTO], "a sks dog")
        until(lambda: len(jobs.events(job.id)) == 2)
        time.sleep(0.1)
        told = jobs.events(job.id)[1:]
        assert [e["kind"] for e in told] == ["waiting"] and not children.started
        assert "needs 1.0 GiB on cpu, of which 0.5 GiB are free (of 8.0;" in told[0]["message"]
        room = Room(free=4 * GIB, total=8 * GIB)
        until(lambda: children.started)
        jobs.runner.needs.learn(job.settings, 20 * GIB)
        with pytest.raises(ValueError, match="needs 20.0 GiB .* train on a larger device"):
            jobs.submit([PHOTO], "a sks dog")
        until(lambda: jobs.get(job.id).over)
        assert jobs.get(job.id).state == "failed" and "20.0 GiB" in jobs.get(job.id).message


def test_a_process_that_finds_too_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it measured is compared with what is free from then on; it counts as no death."""

    def short() -> None:
        (wave,) = (tmp_path / "waves").iterdir()
        write_json(wave / "room.json", {"needed": 6 * GIB, "short": True})

    children = Children(work=short).into(monkeypatch)
    monkeypatch.setattr("dreamtune.serving.jobs.runner.ROOM_EVERY", 0.01)
    with make(tmp_path, room_of=lambda device: Room(4 * GIB, 8 * GIB)) as jobs:
        job = jobs.submit([PHOTO], "a sks dog")
        until(lambda: jobs.get(job.id).message)
        assert "needs 6.0 GiB" in jobs.get(job.id).message and len(children.started) == 1
        found = jobs.get(job.id)
        assert (found.state, found.deaths, found.wave) == ("waiting", 0, None)
    with make(tmp_path, room_of=lambda device: Room(4 * GIB, 8 * GIB)) as jobs:
        assert jobs.runner.needs.of(job.settings, torch.device("cpu")) == 6 * GIB


@pytest.mark.parametrize("free, fits", [(10, True), (9, False), (6, False)])
def test_what_a_slot_needs_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, fits: bool
) -> None:
    """The base that is held, a sampling and a step; against 90% of what was free before."""
    peaks = iter([2 * GIB, 3 * GIB])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((free - 4) * GIB, 80 * GIB))

    def peak(base: Any, work: Any) -> float:
        if free == 6:
            raise torch.OutOfMemoryError
        return float(next(peaks))

    monkeypatch.setattr(child, "peak", peak)
    base = SimpleNamespace(device=torch.device("cuda"))
    if fits:
        child.check_room(base, None, free * GIB, tmp_path / "room.json")  # type: ignore[arg-type]
        found = json.loads((tmp_path / "room.json").read_text())
        assert found == {"needed": 9 * GIB + memory.PROCESS["cuda"]}
        return
    with pytest.raises(child.NoRoom, match=f"needs .* bytes or more, {free * GIB:,} are f") as no:
        child.check_room(base, None, free * GIB, tmp_path / "room.json")  # type: ignore[arg-type]
    assert no.value.needed == (6 if free == 6 else 9) * GIB


def test_the_real_process(tmp_path: Path) -> None:
    """`python -m`: a job whose settings are none fails, in its words."""
    with make(tmp_path) as jobs:
        with jobs.store.mutex:
            job = jobs.submit([PHOTO], "a sks dog")
            jobs.store.change(job.id, settings={**job.settings, "resolution": 7})
        until(lambda: jobs.get(job.id).over, 120)
        assert jobs.get(job.id).state == "failed"
        assert "`resolution` must be a multiple of 8, got 7" in jobs.get(job.id).message
        assert [e["kind"] for e in jobs.events(job.id)] == ["queued", "started", "failed"]
