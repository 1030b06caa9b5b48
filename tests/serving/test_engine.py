"""Rows of several requests in one call, and which of them a fault belongs to."""

from __future__ import annotations

import shutil

import pytest
import torch
from serving import KINDS, computing_on, engine_of, near, settings_of, write_adapters
from tiny import disturb, tiny_unet

import dreamtune
from dreamtune.fast.served import served
from dreamtune.pipeline.load import network_of
from dreamtune.serving import engine as module
from dreamtune.serving.backend import Row, Shape
from dreamtune.serving.engine import Engine
from dreamtune.serving.folder import look

SHAPE = Shape(16, 2, 4.0)
HUGE = {"dog": 1e38}  # its pictures are not finite
ROWS = [
    Row("a dog", "", "dog", 1),
    Row("a cat in the snow", "rain", "cat", 2),
    Row("a cow", "", "cow", 3),
    Row("an owl", "blue", {"owl": 0.5, "dog": -0.3}, 1),
    Row("a dog", "", None, 1),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_adapters(tmp_path_factory.mktemp("serving") / "adapters")


@pytest.fixture(scope="module")
def opened(tiny_pipeline_dir, folder):
    with engine_of(settings_of(tiny_pipeline_dir, folder, max_batch=5)) as found:
        yield found


@pytest.fixture
def engine(opened):
    opened.most, opened.broken = {}, None
    return opened


@pytest.fixture
def calls(monkeypatch):
    """Rows of each call of the pipeline."""
    found, own = [], module.sample

    def counted(pipe, prompts, seeds, **options):
        found.append(len(prompts))
        return own(pipe, prompts, seeds, **options)

    monkeypatch.setattr(module, "sample", counted)
    return found


def test_the_folder_s_adapters_as_their_files_state_them(engine):
    assert [known.to_dict() for known in engine.adapters.values()] == [
        {
            "name": name,
            "method": KINDS[name][0],
            "rank": KINDS[name][1].get("rank"),
            "prompt": f"a sks {name}",
            "identifier": "sks",
            "warning": None,
        }
        for name in sorted(KINDS)
    ]
    assert (engine.left_out, engine.sizes, engine.max_batch, engine.device) == ({}, (16,), 5, "cpu")


def test_rows_of_one_call_are_what_each_is_alone(engine, calls):
    together = engine.draw(ROWS, SHAPE)
    assert calls == [5]
    alone = [engine.draw([row], SHAPE)[0] for row in ROWS]
    assert calls == [5, 1, 1, 1, 1, 1]
    for number, (a, b) in enumerate(zip(together, alone)):
        assert near(a, b), number
    for number, other in ((0, 4), (0, 2), (1, 3)):  # and each has something of its own
        assert not near(together[number], together[other])
    plain = engine.draw([ROWS[1]._replace(negative_prompt="")], SHAPE)[0]
    assert not near(plain, together[1])


@pytest.mark.gpu
def test_on_a_gpu_too_sped_up(tiny_pipeline_dir, folder, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    settings = settings_of(tiny_pipeline_dir, folder, max_batch=6)
    with engine_of(settings, "cuda") as engine:
        engine.warm_up(4.0)
        recorder = served(network_of(engine.pipe))
        recorded = recorder.recorded
        assert recorded >= 5  # of 1, 2, 3, 4, 6 rows
        together = engine.draw(ROWS, SHAPE)
        for row, picture in zip(ROWS, together):
            assert near(picture, engine.draw([row], SHAPE)[0])
        assert recorder.replays
    assert not near(together[0], together[4])


def test_a_row_that_fails_alone_fails_alone(engine, calls):
    bad = Row("a dog", "", HUGE, 5)
    rows = [ROWS[0], ROWS[1], bad, ROWS[2], ROWS[4]]
    found = engine.draw(rows, SHAPE)
    assert isinstance(found[2], ValueError)
    assert "not finite" in str(found[2])
    for row, picture in zip(rows, found):
        if row is not bad:
            assert near(picture, engine.draw([row], SHAPE)[0])
    assert calls[:5] == [5, 3, 2, 1, 2]
    assert not engine.most


def test_too_little_memory_for_a_batch_draws_smaller_ones_from_then_on(engine, calls, monkeypatch):
    counted = module.sample

    def small(pipe, prompts, seeds, **options):
        if len(prompts) > 2:
            calls.append(-len(prompts))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return counted(pipe, prompts, seeds, **options)

    monkeypatch.setattr(module, "sample", small)
    first = engine.draw(ROWS, SHAPE)
    assert calls == [-5, -3, 2, 1, 2]
    assert engine.most[16].rows == 2
    second = engine.draw(ROWS, SHAPE)
    assert calls[5:] == [2, 2, 1]
    assert all(near(a, b) for a, b in zip(first, second))
    later = engine.most[16].until + 1
    monkeypatch.setattr(module.time, "monotonic", lambda: later)
    engine.draw(ROWS[:4], SHAPE)
    assert calls[8:] == [-4, 2, 2]  # the memory may be free again


def test_too_little_memory_for_one_is_its_error(engine, monkeypatch):
    def none(pipe, prompts, seeds, **options):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(module, "sample", none)
    found = engine.draw(ROWS[:2], SHAPE)
    assert [type(error) for error in found] == [RuntimeError, RuntimeError]
    assert module.lacks_memory(found[0])
    assert engine.broken is None


def test_a_gpu_that_has_failed_is_not_asked_again(engine, monkeypatch):
    calls = []

    def fault(pipe, prompts, seeds, **options):
        calls.append(len(prompts))
        raise torch.AcceleratorError("CUDA error: an illegal memory access\nmore")

    monkeypatch.setattr(module, "sample", fault)
    found = engine.draw(ROWS, SHAPE)
    assert calls == [5]
    assert len(found) == 5
    assert engine.broken == "CUDA error: an illegal memory access"


def test_on_a_gpu_a_batch_is_filled_up_to_a_number_that_is_recorded(engine, calls, monkeypatch):
    monkeypatch.setattr(engine, "on_gpu", True)
    monkeypatch.setattr(engine, "max_batch", 8)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    five = engine.draw(ROWS, SHAPE)
    assert (calls, len(five)) == ([6], 5)
    engine.warm_up(4.0)
    assert calls[1:] == [1, 2, 3, 4, 6, 8]
    monkeypatch.setattr(engine, "on_gpu", False)
    assert all(near(a, b) for a, b in zip(five, engine.draw(ROWS, SHAPE)))


def test_adapters_come_and_go(engine, folder):
    with pytest.raises(ValueError, match="there is an adapter `dog`"):
        engine.add("dog", folder / "cat.safetensors")
    before = engine.draw([ROWS[1]], SHAPE)[0]
    engine.remove("cat")
    assert "cat" not in engine.adapters
    assert isinstance(engine.draw([ROWS[1]], SHAPE)[0], ValueError)
    with pytest.raises(ValueError, match="no adapter `cat` is served"):
        engine.remove("cat")
    engine.add("cat", folder / "cat.safetensors")
    assert near(before, engine.draw([ROWS[1]], SHAPE)[0])


def test_without_adapters_the_base_is_served(tiny_pipeline_dir, tmp_path, engine):
    (tmp_path / "none").mkdir()
    with engine_of(settings_of(tiny_pipeline_dir, tmp_path / "none")) as bare:
        assert not bare.adapters
        assert near(bare.draw([ROWS[4]], SHAPE)[0], engine.draw([ROWS[4]], SHAPE)[0])


def test_what_cannot_be_served_is_told_and_the_others_are(tiny_pipeline_dir, folder, tmp_path):
    own = tmp_path / "adapters"
    shutil.copytree(folder, own)
    data = (own / "dog.safetensors").read_bytes()
    (own / "torn.safetensors").write_bytes(data[: len(data) // 2])
    (own / "cow.safetensors").write_bytes(data)  # beside the folder of that name
    (own / "old.pt").write_bytes(b"\x80")
    (own / "notes").mkdir()
    (own / "README.md").write_text("mine\n")
    (own / ".hidden.safetensors").write_bytes(b"")
    said = []
    with computing_on(), Engine.opened(settings_of(tiny_pipeline_dir, own), said.append) as engine:
        assert sorted(engine.adapters) == sorted(KINDS)
        assert sorted(engine.left_out) == ["cow.safetensors", "notes", "old.pt", "torn.safetensors"]
        assert "has that name" in engine.left_out["cow.safetensors"]
        assert "pickle" in engine.left_out["old.pt"]
        assert "no adapter at" in engine.left_out["notes"]
        assert sum(text.startswith("Left out of the adapters: ") for text in said) == 4
        assert "Passed over, for no adapter has such a name: README.md" in said
        (own / "torn.safetensors").write_bytes(data)
        (own / "new.safetensors").write_bytes(data)
        assert engine.add_all(look(own)) == ["new", "torn"]
        assert "torn.safetensors" not in engine.left_out
    with pytest.raises(ValueError, match="the folder of adapters .*nowhere` does not exist"):
        look(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a file, not a folder"):
        look(own / "README.md")


def test_an_adapter_of_another_base_is_served_with_the_warning(engine, folder, tmp_path):
    adapter = dreamtune.inject(tiny_unet(seed=7), "lora", rank=2)
    disturb(adapter)
    known = engine.add("far", adapter.save(tmp_path / "far"))
    assert "this base is not the one that the adapter was trained on" in (known.warning or "")
    engine.remove("far")


def test_a_size_that_the_base_cannot_draw(engine):
    with pytest.raises(ValueError, match="`resolution` must be a multiple of 8, got 20"):
        Engine(engine.base, engine.pipe, sizes=(16, 20))
