"""Exported files do in stock diffusers what the adapter does here."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from single_file_layout import write_configs, write_single_file
from tiny import cases, disturb, images, tiny_pipeline, tiny_unet

import dreamtune
from dreamtune import METHODS
from dreamtune.cli import main
from dreamtune.files.lora import recompress
from dreamtune.models import folder as model_folder
from dreamtune.models import single_file
from dreamtune.models.load import load_network

all_cases = pytest.mark.parametrize("method,options", cases())


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_stock_diffusers_gives_the_same_images(format, tmp_path):
    """Of every method in `test_matrix.py`; here in a pipeline, at a scale of 1 in every layer."""
    unet = tiny_unet()
    pipe = tiny_pipeline(unet)
    base = images(pipe)
    adapter = dreamtune.inject(unet, "delora")
    disturb(adapter)
    expected = images(pipe)
    path = dreamtune.export(adapter, tmp_path, format)
    adapter.eject()
    assert torch.equal(images(pipe), base)
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    loaded = images(pipe)
    assert float((loaded - expected).abs().max()) < 1e-3
    assert float((loaded - base).abs().max()) > 1e-2
    modules = [m for m in unet.modules() if hasattr(m, "lora_A")]
    assert len(modules) == 32 and all(set(m.scaling.values()) == {1.0} for m in modules)


@all_cases
def test_exact_in_float32_and_small_error_in_fp16(method, options, tmp_path):
    """Near the start too, where a naive cast of the halves loses most of the change."""
    if not METHODS[method].low_rank:
        pytest.skip("not low rank")
    adapter = dreamtune.inject(tiny_unet(), method, **options)
    disturb(adapter, size=1e-3)
    for dtype, limit in ((torch.float32, 2e-6), ("fp16", 6e-4), ("bf16", 5e-3)):
        path = dreamtune.export(adapter, tmp_path / str(dtype), dtype=dtype)
        tensors = load_file(path)
        for group in adapter.groups:
            up, down = (x.detach() for x in group.adapter.factors(group.weight))
            for i, name in enumerate(group.names):
                change = up[i, 0].double() @ down[i, 0].double()
                a = tensors[f"unet.{name}.lora_A.weight"].double()
                b = tensors[f"unet.{name}.lora_B.weight"].double()
                assert float((b @ a - change).norm() / change.norm()) < limit


def test_recompress():
    """Two large halves that cancel: the cast of the product's own factors is at the fp16 floor."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(8, 96, generator=g), torch.randn(64, 8, generator=g)
    moved = a + 1e-3 * torch.randn(8, 96, generator=g)
    up, down = torch.cat([b, -b], 1), torch.cat([moved, a])
    exact = up.double() @ down.double()

    def error(u, d):
        return float((u.half().double() @ d.half().double() - exact).norm() / exact.norm())

    assert error(up, down) > 0.1
    u, d = recompress(up, down)
    assert error(u, d) < 5e-4
    assert u.shape == up.shape and d.shape == down.shape
    torch.testing.assert_close(u @ d, exact, rtol=0, atol=1e-12)
    u, d = recompress(torch.randn(3, 8, generator=g), torch.randn(8, 5, generator=g))
    assert u.shape == (3, 3) and d.shape == (3, 5)


@all_cases
def test_native_file_exports_the_same(method, options, tmp_path):
    if not METHODS[method].low_rank:
        pytest.skip("not low rank")
    unet = tiny_unet()
    adapter = dreamtune.inject(unet, method, **options)
    disturb(adapter)
    native = adapter.save(tmp_path, metadata={"prompt": "a sks dog"})
    there = load_file(dreamtune.export(adapter, tmp_path / "a"))
    adapter.eject()
    if METHODS[method].depends_on_weight:
        with pytest.raises(ValueError, match="contains the base weights: pass the network"):
            dreamtune.export(native, tmp_path / "b")
        with pytest.raises(ValueError, match="layers differ.*pass `force=True`"):
            dreamtune.export(native, tmp_path / "b", base=tiny_unet(seed=1))
        path = dreamtune.export(native, tmp_path / "b", base=unet)
    else:
        path = dreamtune.export(native, tmp_path / "b")
    here = load_file(path)
    assert here.keys() == there.keys()
    for key in here:
        if key.endswith("lora_A.weight"):
            other = key.replace("lora_A", "lora_B")
            torch.testing.assert_close(
                here[other] @ here[key], there[other] @ there[key], rtol=0, atol=1e-5
            )
    with safe_open(path, "pt") as file:
        strings = file.metadata()
    header = json.loads(strings["dreamtune"])
    assert header["exported_from"] == method and header["metadata"] == {"prompt": "a sks dog"}
    assert "lora_adapter_metadata" not in strings


def test_base_can_be_a_folder_or_a_pipeline(tmp_path):
    unet = tiny_unet()
    unet.save_pretrained(tmp_path / "base" / "unet")
    adapter = dreamtune.inject(unet, "ether")
    native = adapter.save(tmp_path)
    adapter.eject()
    bases = [tmp_path / "base", tmp_path / "base" / "unet", tiny_pipeline(unet), unet]
    files = [load_file(dreamtune.export(native, tmp_path / str(i), base=b))
             for i, b in enumerate(bases)]  # fmt: skip
    name = adapter.groups[0].names[0]
    changes = [f[f"unet.{name}.lora_B.weight"] @ f[f"unet.{name}.lora_A.weight"] for f in files]
    for change in changes:
        torch.testing.assert_close(change, changes[0], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="`base` must be a network, a pipeline, a folder"):
        dreamtune.export(native, tmp_path / "x", base=3)


def native_and_lora(unet, tmp_path):
    """An ETHER file, which needs its base, and what it must be exported as."""
    adapter = dreamtune.inject(unet, "ether")
    disturb(adapter)
    native = adapter.save(tmp_path)
    lora = load_file(dreamtune.export(adapter, tmp_path / "lora"))
    adapter.eject()
    return native, lora


def test_base_can_be_the_embedded_one(tmp_path):
    native, lora = native_and_lora(load_network("embedded"), tmp_path)
    here = load_file(dreamtune.export(native, tmp_path / "a", base="embedded"))
    for key, tensor in lora.items():
        torch.testing.assert_close(here[key], tensor, rtol=0, atol=1e-6)
    out = str(tmp_path / "b")
    assert main(["export", str(native), out, "--pretrained_model_name_or_path", "embedded"]) == 0
    there = load_file(tmp_path / "b" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(there[k], here[k]) for k in here)


def test_base_can_be_a_single_file(tmp_path, monkeypatch):
    monkeypatch.setattr(single_file, "CONFIGS", write_configs(tmp_path / "configs"))
    file = tmp_path / "model.safetensors"
    unet = write_single_file(file, tmp_path / "configs")["unet"]
    native, lora = native_and_lora(unet, tmp_path)
    here = load_file(dreamtune.export(native, tmp_path / "a", base=file))
    for key, tensor in lora.items():
        torch.testing.assert_close(here[key], tensor, rtol=0, atol=1e-6)


def test_bases_that_cannot_be_had_are_explained(tmp_path, monkeypatch, tiny_pipeline_dir):
    unet = tiny_unet()
    native, _ = native_and_lora(unet, tmp_path)
    monkeypatch.setattr(model_folder, "hub_answers", lambda: False)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "empty").mkdir()
    for base, message in (
        ("nobody/nothing", "hf download nobody/nothing --local-dir FOLDER"),
        ("./nowhere", "there is no base model at `./nowhere`: a folder with model_index.json, a"),
        (tmp_path / "other.safetensors", "is not a Stable Diffusion 1.x, 2.x or XL checkpoint"),
        (tmp_path / "empty", "holds no UNet2DConditionModel: its config.json must .* None"),
        (tiny_pipeline_dir / "vae", "holds no UNet2DConditionModel: .* got AutoencoderKL"),
    ):
        with pytest.raises(ValueError, match=message):
            dreamtune.export(native, tmp_path / "x", base=base)
    assert not (tmp_path / "x").exists()


def test_base_of_the_run_where_a_method_needs_one(tmp_path, tiny_pipeline_dir):
    native, lora = native_and_lora(load_network(tiny_pipeline_dir), tmp_path)
    with pytest.raises(
        ValueError, match="pass the network as `base`, in the command as --pretrained"
    ):
        dreamtune.export(native, tmp_path / "a")
    (tmp_path / "config.yaml").write_text(f"pretrained_model_name_or_path: {tiny_pipeline_dir}\n")
    here = load_file(dreamtune.export(native, tmp_path / "a"))
    for key, tensor in lora.items():
        torch.testing.assert_close(here[key], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "dtype,written",
    [("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16"), ("bfloat16", "bfloat16")],
)
def test_command_exports_a_lora_outside_a_run_in_every_dtype(dtype, written, tmp_path, capsys):
    native = dreamtune.inject(tiny_unet(), "lora", rank=2).save(tmp_path)
    assert main(["export", str(native), str(tmp_path / "out"), "--dtype", dtype]) == 0
    path = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    assert capsys.readouterr().out.strip() == str(path)
    assert {t.dtype for t in load_file(path).values()} == {getattr(torch, written)}
    assert main(["export", str(native), str(tmp_path / "out"), "--dtype", "int8"]) == 1
    assert "`dtype` must be one of fp32, fp16, bf16" in capsys.readouterr().err


def test_slot_is_exported(tmp_path):
    adapter = dreamtune.inject(tiny_unet(), "lora", slots=2, rank=2)
    disturb(adapter)
    tensors = load_file(dreamtune.export(adapter, tmp_path, slot=1))
    state = adapter.state_dict(1)
    name = adapter.groups[0].names[0]
    change = tensors[f"unet.{name}.lora_B.weight"] @ tensors[f"unet.{name}.lora_A.weight"]
    torch.testing.assert_close(change, state[f"{name}.B"] @ state[f"{name}.A"])
    with pytest.raises(ValueError, match="`slot` must be 0 to 1, got 2"):
        dreamtune.export(adapter, tmp_path, slot=2)


def test_never_overwrites_silently(tmp_path):
    adapter = dreamtune.inject(tiny_unet(), "lora", rank=2)
    path = dreamtune.export(adapter, tmp_path)
    dreamtune.export(adapter, tmp_path)
    disturb(adapter)
    with pytest.raises(ValueError, match="is there with other contents: pass `overwrite=True`"):
        dreamtune.export(adapter, tmp_path)
    assert dreamtune.export(adapter, tmp_path, overwrite=True) == path
    save_file({"x": torch.zeros(1)}, tmp_path / "mine_kohya.safetensors")
    with pytest.raises(ValueError, match="with other contents"):
        dreamtune.export(adapter, tmp_path, "kohya", name="mine")


@pytest.mark.parametrize("format", ["comfy", "onnx"])
def test_unknown_format(format, tmp_path):
    listed = r"diffusers \(.*\), kohya \(ComfyUI, A1111\), comfyui .*, got '"
    with pytest.raises(ValueError, match=f"`format` must be one of {listed}{format}'"):
        dreamtune.export(dreamtune.inject(tiny_unet(), "lora"), tmp_path, format)


def test_other_refusals(tmp_path):
    adapter = dreamtune.inject(tiny_unet(), "lora", rank=2)
    with pytest.raises(ValueError, match="`dtype` must be one of fp32, fp16, bf16"):
        dreamtune.export(adapter, tmp_path, dtype="int8")
    with pytest.raises(ValueError, match="`dtype` must be float32"):
        dreamtune.export(adapter, tmp_path, dtype=torch.float64)
    next(adapter.parameters()).data[0] = float("nan")
    with pytest.raises((ValueError, torch.linalg.LinAlgError)):
        dreamtune.export(adapter, tmp_path)
    assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()


def test_kohya_keys(tmp_path):
    adapter = dreamtune.inject(tiny_unet(), "lora", rank=2)
    tensors = load_file(dreamtune.export(adapter, tmp_path, "kohya", name="dog"))
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1"
    for child in ("to_q", "to_out_0"):
        assert tensors[f"{layer}_{child}.lora_down.weight"].shape == (2, 32)
        assert tensors[f"{layer}_{child}.lora_up.weight"].shape == (32, 2)
        assert tensors[f"{layer}_{child}.alpha"].shape == ()
        assert float(tensors[f"{layer}_{child}.alpha"]) == 2


@pytest.mark.parametrize("name", ["", "..", "a/b", "../x", "a\\b", "a\0"])
def test_a_name_is_one_part_of_a_path(name, tmp_path):
    adapter = dreamtune.inject(tiny_unet(), "lora", rank=2)
    with pytest.raises(ValueError, match="`name` must be one part of a path, got"):
        dreamtune.export(adapter, tmp_path / "out", "kohya", name=name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_a_strength_that_follows_the_timestep_is_in_no_plain_lora(format, tmp_path):
    """From the model, and from its native file; a constant one is."""
    adapter = dreamtune.inject(unet := tiny_unet(), "delora", timestep_floor=0.5)
    disturb(adapter)
    file = adapter.save(tmp_path / "a.safetensors")
    for source in (adapter, file):
        with pytest.raises(
            ValueError, match=r"`delora` changes with the timestep \(.*0.5\) and no"
        ):
            dreamtune.export(source, tmp_path / "out", format, base=tiny_unet())
    assert not (tmp_path / "out").exists()
    adapter.eject()
    constant = dreamtune.inject(unet, "delora", timestep_floor=1.0)
    assert dreamtune.export(constant, tmp_path / "out", format).is_file()
