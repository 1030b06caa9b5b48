"""An adapter file is what it says, and what was written: hashes, schema, shapes; equal bytes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import damage
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save_file
from tiny import disturb, tiny_unet, unet_inputs
from torch import Tensor

import dreamtune
from dreamtune.fields import UnreadableFile
from dreamtune.files.native import load_adapter_file
from dreamtune.files.tensors import hash_of, read_tensors, write_tensors

KEY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A native file, a diffusers and a kohya one of one adapter."""
    folder = tmp_path_factory.mktemp("sound")
    adapter = dreamtune.inject(tiny_unet(), "lora", rank=2)
    disturb(adapter)
    return {
        "native": adapter.save(folder),
        "diffusers": dreamtune.export(adapter, folder),
        "kohya": dreamtune.export(adapter, folder, "kohya"),
    }


def edited(path: Path, place: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose `dreamtune` header is another."""
    header, body = damage.split(path.read_bytes())
    about = json.loads(header["__metadata__"]["dreamtune"])
    edit(about)
    header["__metadata__"]["dreamtune"] = json.dumps(about)
    out = place / path.name
    out.write_bytes(damage.joined(header, body))
    return out


def older(about: dict[str, Any]) -> None:
    del about["sha256"]
    about["format_version"] = 1


def retensored(path: Path, place: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy with other tensors and our header."""
    tensors = load_file(path)
    edit(tensors)
    strings = damage.split(path.read_bytes())[0]["__metadata__"]
    save_file(tensors, place / path.name, strings)
    return place / path.name


def output(path: Path) -> Tensor:
    unet = tiny_unet()
    dreamtune.load(unet, path)
    with torch.no_grad():
        return unet(*unet_inputs(1)).sample


def test_every_bit_of_a_native_files_tensors_counts(sound: dict[str, Path], tmp_path: Path) -> None:
    data = sound["native"].read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    path = tmp_path / "flipped.safetensors"
    for place in (start, start + 1000, len(data) - 1):
        changed = bytearray(data)
        changed[place] ^= 1  # the lowest bit of a number
        path.write_bytes(changed)
        with pytest.raises(UnreadableFile, match="not what was written: 1 of 64 tensors .* first"):
            load_adapter_file(path)
    assert load_adapter_file(sound["native"]).method == "lora"


def test_what_differs_is_named(sound: dict[str, Path], tmp_path: Path) -> None:
    native = sound["native"]

    def drop(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{KEY}.A"]
        tensors[f"{KEY}.B"] += 1

    with pytest.raises(UnreadableFile, match=rf"2 of 64 tensors \(`{KEY}.A` first\) changed"):
        load_adapter_file(retensored(native, tmp_path, drop))
    path = edited(native, tmp_path, lambda about: about["options"].update(alpha=4.0))
    with pytest.raises(UnreadableFile, match="not what was written: its header changed since"):
        load_adapter_file(path)
    with pytest.raises(UnreadableFile, match="its hashes are gone"):
        load_adapter_file(edited(native, tmp_path, lambda about: about.pop("sha256")))
    path = edited(native, tmp_path, lambda about: about["sha256"].update(header="x"))
    with pytest.raises(UnreadableFile, match="`sha256`: `header`"):
        load_adapter_file(path)


def test_a_file_of_an_older_version_is_read(sound: dict[str, Path], tmp_path: Path) -> None:
    for name in ("native", "diffusers"):
        old = edited(sound[name], tmp_path, older)
        assert torch.equal(output(old), output(sound[name]))


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_an_export_that_another_tool_changed_loads_and_says_how_much(
    sound: dict[str, Path], tmp_path: Path, format: str
) -> None:
    def recast(tensors: dict[str, Tensor]) -> None:
        for key in [k for k in tensors if not k.endswith("alpha")][:6]:
            tensors[key] = tensors[key].half()

    path = retensored(sound[format], tmp_path, recast)
    total = len(load_file(path))
    with pytest.warns(UserWarning, match=rf"not what was written: 6 of {total} tensors \("):
        there = output(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        here = output(sound[format])
    torch.testing.assert_close(there, here, rtol=1e-2, atol=1e-3)
    with pytest.warns(UserWarning, match="not what was written: 6 of"):
        dreamtune.export(path, tmp_path / "out", base=tiny_unet())


def test_equal_contents_are_equal_bytes(tmp_path: Path) -> None:
    """Here eight times, and in a process of another hash seed; stock readers read them."""
    call = "write_tensors(path, {'b': torch.ones(3), 'a': torch.zeros(2).half()}, {'d': 1, 'c': 2})"
    code = (
        "import sys, torch; from pathlib import Path; path = Path(sys.argv[1])\n"
        f"from dreamtune.files.tensors import write_tensors; {call}"
    )
    paths = [tmp_path / f"{i}.safetensors" for i in range(9)]
    for path in paths[:8]:
        eval(call, {"path": path, "torch": torch, "write_tensors": write_tensors})
    env = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(paths[8])], check=True, env=env)
    data = paths[0].read_bytes()
    assert [p.read_bytes() for p in paths] == [data] * 9
    assert load(data)["b"].tolist() == load_file(paths[0])["b"].tolist() == [1, 1, 1]
    assert (8 + int.from_bytes(data[:8], "little")) % 8 == 0
    files = []
    for folder in ("x", "y"):
        adapter = dreamtune.inject(tiny_unet(), "delora", rank=2)
        disturb(adapter)
        adapter.save(tmp_path / folder, metadata={"b": 1, "a": {"d": 0.5, "c": None}})
        dreamtune.export(adapter, tmp_path / folder)
        dreamtune.export(adapter, tmp_path / folder, "kohya")
        files.append({p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()})
    assert len(files[0]) == 3 and files[0] == files[1]


def test_hash_sees_dtype_and_shape(tmp_path: Path) -> None:
    x = torch.zeros(4)
    assert len({hash_of(t) for t in (x, x.view(2, 2), x.view(torch.int32), x.half(), x[0])}) == 5
    assert hash_of(torch.arange(6.0).view(2, 3).mT) == hash_of(
        torch.arange(6.0).view(2, 3).mT.contiguous()
    )
    written = tmp_path / "x.safetensors"
    write_tensors(written, {"b": x, "a": torch.tensor(3), "e": torch.zeros(0)}, {"n": (1, 2)})
    file = read_tensors(written)
    assert file.hashed and file.changed == () and file.about == {"n": [1, 2]}


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda a: a.pop("method"), "match no layer of the network|in none of the formats"),
        (lambda a: a.update(method="lore"), "`adapter.safetensors`: unknown method `lore`"),
        (lambda a: a.pop("options"), "header of `adapter.safetensors`: `options` is missing"),
        (lambda a: a["options"].update(rank="x"), "adapter.safetensors.*`rank` must be a whole"),
        (lambda a: a["options"].update(alpha=1e999), "`adapter.safetensors`: `alpha` must be fin"),
        (lambda a: a["options"].update(rank=10**30), "adapter.safetensors.*`rank` must be at most"),
        (lambda a: a["options"].update(rank=3), "adapter.safetensors.*must be .3, 32. floats, got"),
        (lambda a: a.update(shapes=3), "header of `adapter.safetensors`: `shapes` must be of type"),
        (lambda a: a["shapes"].update({KEY: [-1, 4]}), "adapter.safetensors`: `shapes` must be"),
        (lambda a: a["shapes"].pop(KEY), "adapter.safetensors`: 2 tensors do not fit `lora`"),
        (lambda a: a.update(fingerprint={}), "covers 0 of 32 layers"),
        (lambda a: a["fingerprint"].pop(KEY), "covers 31 of 32 layers, `down_.*` is not among"),
        (lambda a: a["fingerprint"].update({KEY: [1.0]}), "adapter.safetensors`: `fingerprint`"),
        (lambda a: a["fingerprint"][KEY].__setitem__(0, 1e999), "`fingerprint` must be finite"),
        (lambda a: a.update(target_modules=[]), "adapter.safetensors`: `target_modules`"),
        (lambda a: a.update(format_version="x"), "`format_version` must be a whole number"),
        (lambda a: a.update(format_version=7), "has format version 7, this dreamtune reads up to"),
        (lambda a: a.update(metadata=[]), "`metadata` must be of type dict"),
    ],
)
def test_headers_are_checked_field_by_field(
    sound: dict[str, Path], tmp_path: Path, edit: Callable[[Any], None], message: str
) -> None:
    """Of an older file, which has no hashes."""

    def both(about: dict[str, Any]) -> None:
        older(about)
        edit(about)

    path = edited(sound["native"], tmp_path, both)
    for read in (lambda: dreamtune.load(tiny_unet(), path), lambda: dreamtune.export(path, "out")):
        with pytest.raises(UnreadableFile, match=message):
            read()


@pytest.mark.parametrize(
    "text, message",
    [
        (damage.DEEP, "nested too deeply"),
        ("{", "is not JSON"),
        ("[]", "must hold names with values"),
        ('{"a": ' + "1" * 5000 + "}", "is not JSON: Exceeds"),
    ],
)
def test_a_header_that_is_no_json(text: str, message: str, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors", {"dreamtune": text})
    with pytest.raises(UnreadableFile, match=f"header of `a.safetensors`.*{message}"):
        load_adapter_file(tmp_path / "a.safetensors")


def test_a_header_without_end_and_what_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write((1 << 30).to_bytes(8, "little"))
        file.truncate(1 << 31)
    with pytest.raises(UnreadableFile, match="`a.safetensors` has a header of 1073741824 bytes"):
        read_tensors(path)
    os.mkfifo(tmp_path / "b.safetensors")
    for name, why in (("b.safetensors", "is not a file"), ("c.safetensors", "is not there")):
        with pytest.raises(UnreadableFile, match=f"{name}` {why}"):
            read_tensors(tmp_path / name)


def ranks(t: dict[str, Tensor], up: str, down: str) -> None:
    t[up] = t[up][:, :1].clone()


def integers(t: dict[str, Tensor], up: str, down: str) -> None:
    t[down] = t[down].to(torch.int32)


def eight_bits(t: dict[str, Tensor], up: str, down: str) -> None:
    t[down] = t[down].to(torch.float8_e4m3fn)


def twice(t: dict[str, Tensor], up: str, down: str) -> None:
    t[damage.other_name(up)] = -t[up]


def cube(t: dict[str, Tensor], up: str, down: str) -> None:
    t[down] = t[down][..., None].clone()


def empty(t: dict[str, Tensor], up: str, down: str) -> None:
    t[up], t[down] = t[up][:, :0].clone(), t[down][:0].clone()


def overflow(t: dict[str, Tensor], up: str, down: str) -> None:
    t[up], t[down] = torch.full_like(t[up], 1e30), torch.full_like(t[down], 1e30)


def wide(t: dict[str, Tensor], up: str, down: str) -> None:
    t[up] = torch.full_like(t[up], 1e300, dtype=torch.float64)


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    "edit, message",
    [
        (ranks, r"up \(32, 1\) and down \(2, 32\) must be of one rank"),
        (integers, "`down` of .* must be floats, got torch.int32"),
        (eight_bits, "`down` of .* must be floats, got torch.float8"),
        (twice, "has its `up` twice"),
        (cube, r"`down` of .* must be a matrix, got shape \(2, 32, 1\)"),
        (empty, r"must be a matrix, got shape \(32, 0\)"),
        (overflow, "the change of .* is not finite in float32"),
        (wide, "the change of .* is not finite in float32"),
    ],
)
def test_plain_loras_of_any_tool_are_checked_before_the_model_is_touched(
    sound: dict[str, Path], tmp_path: Path, format: str, edit: Any, message: str
) -> None:
    """Foreign ones, without our header."""
    tensors = load_file(sound[format])
    up = next(k for k in tensors if k.endswith((".lora_B.weight", ".lora_up.weight")))
    down = up.replace("lora_B", "lora_A").replace("lora_up", "lora_down")
    edit(tensors, up, down)
    save_file(tensors, tmp_path / "theirs.safetensors")
    unet = tiny_unet()
    before = {k: t.clone() for k, t in unet.state_dict().items()}
    kinds = [type(m) for m in unet.modules()]
    with pytest.raises(UnreadableFile, match=f"`theirs.safetensors`.*{message}"):
        dreamtune.load(unet, tmp_path / "theirs.safetensors")
    assert all(torch.equal(t, before[k]) for k, t in unet.state_dict().items())
    assert kinds == [type(m) for m in unet.modules()]
    with pytest.raises(UnreadableFile, match=f"`theirs.safetensors`.*{message}"):
        dreamtune.export(tmp_path / "theirs.safetensors", tmp_path / "out", base=unet)


@pytest.mark.parametrize("alpha", [torch.zeros(2), torch.tensor(float("nan")), torch.zeros(0)])
def test_alpha_is_one_finite_number(sound: dict[str, Path], tmp_path: Path, alpha: Tensor) -> None:
    tensors = load_file(sound["kohya"])
    tensors[next(k for k in tensors if k.endswith(".alpha"))] = alpha
    save_file(tensors, tmp_path / "k.safetensors")
    with pytest.raises(UnreadableFile, match="`k.safetensors`.*(one finite number|not finite in)"):
        dreamtune.load(tiny_unet(), tmp_path / "k.safetensors")


def test_a_partial_fingerprint_of_an_export_does_not_skip_the_base(tmp_path: Path) -> None:
    adapter = dreamtune.inject(tiny_unet(), "ether")
    path = dreamtune.export(adapter, tmp_path)
    for count in (0, 31):

        def emptied(about: dict[str, Any], count: int = count) -> None:
            del about["sha256"]
            about["fingerprint"] = dict(list(about["fingerprint"].items())[:count])

        (tmp_path / str(count)).mkdir()
        other = edited(path, tmp_path / str(count), emptied)
        for read in (dreamtune.load, lambda net, file: dreamtune.export(file, "x", base=net)):
            with pytest.raises(UnreadableFile, match=f"lacks {32 - count} of its 32 layers"):
                read(tiny_unet(seed=1), other)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6), format=st.sampled_from(["native", "diffusers", "kohya"]))
def test_no_damage_crashes_or_passes_in_silence(
    sound: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, seed: int, format: str
) -> None:
    """Small form of eval/reliability/files.py."""
    rng = random.Random(seed)
    path = tmp_path_factory.getbasetemp() / f"fuzz-{format}.safetensors"
    path.write_bytes(rng.choice(damage.TENSORS)(sound[format].read_bytes(), rng))
    unet = tiny_unet()
    before = {k: t.clone() for k, t in unet.state_dict().items()}
    kinds = [type(m) for m in unet.modules()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            adapter = dreamtune.load(unet, path)
        except ValueError as error:
            assert path.name in str(error)
            assert kinds == [type(m) for m in unet.modules()]
            assert all(torch.equal(t, before[k]) for k, t in unet.state_dict().items())
            return
        with torch.no_grad():
            there = unet(*unet_inputs(1)).sample
        adapter.eject()
    said = any(path.name in str(w.message) for w in caught)
    dreamtune.load(unet, sound[format])
    with torch.no_grad():
        here = unet(*unet_inputs(1)).sample
    assert said or torch.equal(there, here)
