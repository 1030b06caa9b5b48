"""Adapters on the shelf: the same pictures as loaded ones, within their budgets, from files that
stay what they were.
"""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_several_adapters import KINDS, alone, close, inputs, said, written
from tiny import disturb, images, tiny_pipeline, tiny_unet

import dreamtune
from dreamtune.injection.bank import Bank, owners
from dreamtune.injection.layer import Adapted


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return written(tmp_path_factory)


def shelf_of(unet):
    (bank,) = owners(unet, Bank)
    return bank.shelf


def test_rows_sums_and_strengths_are_those_of_loaded_ones(files):
    many, loaded = tiny_unet(), tiny_unet()
    dreamtune.load_many(many, files)
    for name, file in files.items():
        dreamtune.load(loaded, file, name=name)
    assert torch.equal(said(many), said(tiny_unet()))  # none is in use before it is named
    assert {n: a.method for n, a in dreamtune.get_adapters(many).items()} == {
        name: method for name, (method, _) in KINDS.items()
    }
    mixes = [
        {"dog": 1.0}, {"cat": 0.5, "cow": 0.7}, {"owl": 1.5, "fox": -0.5},
        dict.fromkeys(files, 0.3), {"dog": {"down": 0.2, "mid": 2.0}, "bee": 1.0},
    ]  # fmt: skip
    for strengths in mixes:
        for unet in (many, loaded):
            dreamtune.set_adapters(unet, strengths)
        close(said(many), said(loaded))
    rows = [*files, None, {"dog": 0.5, "bee": 0.25}]
    out = []
    for unet in (many, loaded):
        with dreamtune.route(unet, rows):
            out.append(said(unet, len(rows)))
    close(*out)
    close(out[0][:1], alone(files, "dog", len(rows))[:1])


def test_beside_loaded_ones_and_merged(files):
    unet, other = tiny_unet(), tiny_unet()
    dreamtune.load(unet, files["dog"], name="dog")
    dreamtune.load_many(unet, {name: files[name] for name in ("cat", "owl", "cow")})
    for name in ("dog", "cat", "owl", "cow"):
        dreamtune.load(other, files[name], name=name)
    weights = {name: w.clone() for name, w in unet.state_dict().items()}
    strengths = {"dog": 0.5, "cat": 1.0, "owl": 0.5, "cow": -1.0}
    for each in (unet, other):
        dreamtune.set_adapters(each, strengths)
    expected = said(other)
    close(said(unet), expected)
    dreamtune.merge(unet)
    close(said(unet), expected, 1e-5)
    dreamtune.unmerge(unet)
    assert all(torch.equal(w, weights[name]) for name, w in unet.state_dict().items())
    dreamtune.unload(unet, "dog")
    dreamtune.set_adapters(unet, {"cat": 1.0})
    close(said(unet), alone(files, "cat", 4))
    for name in ("cat", "owl", "cow"):
        dreamtune.unload(unet, name)
    assert not any(isinstance(m, Adapted) for m in unet.modules())
    assert not unet._forward_pre_hooks and not owners(unet, Bank)


def test_a_call_s_own_strength_and_copies(files):
    unet = tiny_unet()
    dreamtune.load_many(unet, {"dog": files["dog"]})
    dreamtune.set_adapters(unet, {"dog": 1.0})
    twin = copy.deepcopy(unet)
    assert torch.equal(said(twin), said(unet))
    dreamtune.set_adapters(twin, {"dog": 0.0})
    assert torch.equal(said(twin), said(tiny_unet()))
    with torch.no_grad():
        half = unet(**inputs(4), cross_attention_kwargs={"scale": 0.5}).sample
    close(half, alone(files, "dog", 4, 0.5))
    close(said(unet), alone(files, "dog", 4))


def test_budgets_hold_and_the_least_recently_used_go(files):
    unet = tiny_unet()
    dreamtune.load_many(unet, files)
    shelf = shelf_of(unet)
    sizes = {name: entry.nbytes for name, entry in shelf.entries.items()}
    room = sizes["dog"] + sizes["cat"] + sizes["fox"]
    dreamtune.load_many(unet, {}, device_budget=room, cpu_budget=room)
    assert sum(x.nbytes for x in shelf.far.values()) <= room
    for name in ("dog", "cat", "fox", "bee", "dog"):
        dreamtune.set_adapters(unet, {name: 1.0})
        close(said(unet), alone(files, name, 4))
        assert sum(x.nbytes for x in shelf.near.values()) <= room
        assert list(shelf.near)[-1] == name
    most = []
    near = shelf._near
    shelf._near = lambda *given: (
        near(*given), most.append(sum(x.nbytes for x in shelf.near.values()))
    )[0]  # fmt: skip
    dreamtune.set_adapters(unet, {"cat": 1.0, "fox": 1.0})
    dreamtune.set_adapters(unet, {"bee": 1.0})
    dreamtune.set_adapters(unet, {"dog": 0.5})
    assert max(most) <= room  # on the way too
    shelf._near = near
    read = shelf.read
    dreamtune.set_adapters(unet, {"dog": 0.5})  # is near: no file is read
    close(said(unet), alone(files, "dog", 4, 0.5))
    assert shelf.read == read
    with pytest.raises(ValueError, match=r"6 adapters in use need \d+ KiB.*device_budget"):
        dreamtune.set_adapters(unet, dict.fromkeys(files, 1.0))
    close(said(unet), alone(files, "dog", 4, 0.5))  # as it was
    with (
        pytest.raises(ValueError, match="adapters in use need"),
        dreamtune.route(unet, list(files)),
    ):
        pass
    close(said(unet), alone(files, "dog", 4, 0.5))


def test_a_file_that_changed_is_refused(files, tmp_path):
    file = tmp_path / "dog.safetensors"
    file.write_bytes(files["dog"].read_bytes())
    unet = tiny_unet()
    dreamtune.load_many(unet, {"dog": file, "cat": files["cat"]}, cpu_budget=1)
    dreamtune.set_adapters(unet, {"dog": 1.0})
    file.write_bytes(files["cat"].read_bytes())
    close(said(unet), alone(files, "dog", 4))  # still near
    shelf_of(unet).near.clear()
    with pytest.raises(ValueError, match="`dog.safetensors` is not what it was"):
        dreamtune.set_adapters(unet, {"dog": 0.5})


def test_a_model_that_was_cast_reads_anew(files):
    unet = tiny_unet()
    dreamtune.load_many(unet, files)
    strengths = {"dog": 1.0, "bee": 0.5, "owl": 0.5}
    dreamtune.set_adapters(unet, strengths)
    expected = said(unet)
    unet.double()
    with torch.no_grad():
        given = {k: x.double() if x.is_floating_point() else x for k, x in inputs(4).items()}
        got = unet(**given).sample
    assert got.dtype == torch.float64
    close(got.float(), expected, 1e-5)


@pytest.mark.parametrize("kind", ["nan", "other", "missing", "taken", "timestep", "address"])
def test_what_does_not_fit_leaves_all_as_it_was(files, tmp_path, kind):
    unet = tiny_unet()
    given = {"cat": files["cat"], "dog": tmp_path / "dog.safetensors"}
    tensors = load_file(files["dog"])
    match = {
        "nan": "not finite", "other": r"is \(32, 32\) here and \(5, 3\)", "missing": "no adapter",
        "taken": "there is an adapter `cat`", "timestep": "depends on the timestep",
        "address": "is no address on the hub",
    }[kind]  # fmt: skip
    if kind == "nan":
        first = next(iter(tensors))
        tensors[first].view(-1)[0] = torch.nan
        save_file(tensors, given["dog"])
    elif kind == "other":
        path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
        wide = {
            f"{path}.lora_A.weight": torch.ones(2, 3),
            f"{path}.lora_B.weight": torch.ones(5, 2),
        }
        save_file(wide, given["dog"])
    elif kind == "taken":
        given["dog"] = files["dog"]
        dreamtune.load(unet, files["cat"], name="cat")
    elif kind == "address":
        given["dog"] = "hf://dog"
    elif kind == "timestep":
        adapter = dreamtune.inject(tiny_unet(), "delora", timestep_floor=0.5)
        disturb(adapter)
        given["dog"] = adapter.save(tmp_path / "timestep")
    before = said(unet)
    with pytest.raises(ValueError, match=match):
        dreamtune.load_many(unet, given)
    assert torch.equal(said(unet), before)
    assert set(dreamtune.get_adapters(unet)) == ({"cat"} if kind == "taken" else set())
    if kind != "taken":
        assert not unet._forward_pre_hooks
        assert not any(isinstance(m, Adapted) for m in unet.modules())


@pytest.mark.parametrize("dtype, near", [(torch.float16, 0.03), (torch.bfloat16, 0.3)])
@torch.no_grad()
def test_rows_in_half_precision_are_what_they_are_alone(files, dtype, near):
    """near: a share of what the adapter does."""

    def cast(rows):
        return {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs(rows).items()}

    unet = tiny_unet().to(dtype)
    dreamtune.load(unet, files["dog"], name="dog")
    dreamtune.load_many(unet, {name: files[name] for name in files if name != "dog"})
    rows = [*files, None]
    base = tiny_unet().to(dtype)(**cast(len(rows))).sample
    with dreamtune.route(unet, rows):
        got = unet(**cast(len(rows))).sample
    assert got.dtype == dtype and torch.equal(got[-1], base[-1])
    for number, name in enumerate(files):
        own = tiny_unet().to(dtype)
        dreamtune.load(own, files[name])
        right = own(**cast(len(rows))).sample[number]
        assert (got[number] - right).norm() < near * (right - base[number]).norm()


def test_in_a_pipeline_under_guidance(files):
    pipe, other = tiny_pipeline(tiny_unet()), tiny_pipeline(tiny_unet())
    dreamtune.load_many(pipe, files)
    for name in ("dog", "owl"):
        dreamtune.load(other, files[name], name=name)
    out = []
    for each in (pipe, other):
        with dreamtune.route(each, ["dog", "owl"]):
            out.append(images(each, num_images_per_prompt=2))
    close(*map(torch.as_tensor, out), 1e-4)
