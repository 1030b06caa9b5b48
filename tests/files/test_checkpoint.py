"""The native file: bit-exact, whole after a crash, and bound to its base."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import cases, disturb, tiny_unet

import dreamtune
from dreamtune.files import native
from dreamtune.files.fingerprint import compare_fingerprints, fingerprint
from dreamtune.files.native import load_adapter_file

all_cases = pytest.mark.parametrize("method,options", cases())


@all_cases
def test_round_trip_is_bit_exact(method, options, tmp_path):
    adapter = dreamtune.inject(tiny_unet(), method, slots=2, **options)
    disturb(adapter)
    path = adapter.save(tmp_path / "a.safetensors", slot=1, metadata={"prompt": "a sks dog"})
    file = load_adapter_file(path)
    assert (file.method, file.options) == (method, adapter.options)
    assert file.metadata == {"prompt": "a sks dog"}
    again = dreamtune.inject(
        tiny_unet(), file.method, target_modules=file.target_modules, seed=9, **file.options
    )
    again.load_state_dict(file.tensors)
    for key, tensor in adapter.state_dict(1).items():
        assert torch.equal(again.state_dict()[key], tensor), key
        assert torch.equal(file.tensors[key], tensor), key
    with torch.no_grad():
        for mine, theirs in zip(again.groups, adapter.groups):
            a = mine.adapter.merged(mine.weight)[:, 0]
            assert torch.allclose(a, theirs.adapter.merged(theirs.weight)[:, 1], atol=1e-6)


def test_folder_gets_the_native_name(tmp_path):
    adapter = dreamtune.inject(tiny_unet(), "lora", rank=2)
    assert adapter.save(tmp_path / "best") == tmp_path / "best" / "adapter.safetensors"
    assert load_adapter_file(tmp_path / "best").method == "lora"


def test_header_names_nobody(tmp_path, monkeypatch):
    path = dreamtune.inject(tiny_unet(), "delora", rank=2).save(tmp_path / "a.safetensors")
    assert str(tmp_path).encode() not in path.read_bytes()
    assert os.path.expanduser("~").encode() not in path.read_bytes()


def test_crash_while_writing_leaves_the_file_before(tmp_path, monkeypatch):
    adapter = dreamtune.inject(tiny_unet(), "lora", rank=2)
    path = adapter.save(tmp_path)
    before = path.read_bytes()
    disturb(adapter)

    def crash(file, data):
        with open(file, "wb") as handle:
            handle.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", crash)
    with pytest.raises(KeyboardInterrupt):
        adapter.save(tmp_path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_damaged_and_foreign_files(tmp_path):
    with pytest.raises(ValueError, match="no adapter file at"):
        load_adapter_file(tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not a native adapter file: no `dreamtune` header"):
        load_adapter_file(tmp_path / "other.safetensors")
    adapter = dreamtune.inject(tiny_unet(), "lora", rank=2)
    path = adapter.save(tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="`cut.safetensors` is not a whole safetensors file"):
        load_adapter_file(tmp_path / "cut.safetensors")
    disturb(adapter)
    next(adapter.parameters()).data[0] = float("nan")
    for write in (adapter.save, lambda path: dreamtune.export(adapter, path.parent)):
        with pytest.raises(ValueError, match="not finite"):
            write(tmp_path / "nan.safetensors")
    assert not (tmp_path / "nan.safetensors").exists()
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    save_file(adapter.state_dict(), tmp_path / "nan.safetensors", header)
    with pytest.raises(ValueError, match="holds values that are not finite in"):
        load_adapter_file(tmp_path / "nan.safetensors")
    exported = dreamtune.export(dreamtune.inject(tiny_unet(), "lora"), tmp_path / "out")
    with pytest.raises(ValueError, match="is an exported file"):
        load_adapter_file(exported)


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    path = dreamtune.inject(tiny_unet(), "lora", rank=2).save(tmp_path)
    monkeypatch.setattr(native, "FORMAT_VERSION", 1)
    with pytest.raises(ValueError, match="format version 2, this dreamtune reads up to 1"):
        load_adapter_file(path)


@pytest.mark.parametrize("shape", [(320, 320), (640, 768), (64, 24)])
def test_fingerprint_sees_training_but_not_a_cast(shape):
    g = torch.Generator().manual_seed(0)
    weights = {str(i): torch.randn(shape, generator=g) * 0.05 for i in range(8)}
    here = fingerprint(weights)
    assert all(len(values) == 16 for values in here.values())
    for dtype in (torch.float16, torch.bfloat16):
        cast = fingerprint({k: w.to(dtype) for k, w in weights.items()})
        assert compare_fingerprints(here, cast) == []
    trained = {k: w + 0.01 * w.std() * torch.randn(shape, generator=g) for k, w in weights.items()}
    assert len(compare_fingerprints(here, fingerprint(trained))) == len(weights)
    one = {**weights, "3": weights["3"] * 1.02}
    assert compare_fingerprints(here, fingerprint(one)) == ["3"]
    assert compare_fingerprints(here, {k: v for k, v in here.items() if k != "5"}) == ["5"]


def test_fingerprint_values_stay():
    """Golden: the sign vectors must be the same on every machine and version."""
    weight = torch.arange(12.0).reshape(3, 4)
    assert fingerprint({"w": weight})["w"][:4] == GOLDEN


GOLDEN = [4.0, -36.0, -54.0, 0.0]


def test_tensors_are_stored_by_module_path(tmp_path):
    adapter = dreamtune.inject(tiny_unet(), "delora", rank=2)
    tensors = load_file(adapter.save(tmp_path))
    path = adapter.groups[0].names[0]
    names = {key.removeprefix(f"{path}.") for key in tensors if key.startswith(f"{path}.")}
    assert names == {"A", "B", "A0", "B0", "lambda_"}
    assert tensors[f"{path}.A"].shape == (2, 32) and tensors[f"{path}.lambda_"].shape == (1,)
