"""Folders that PEFT saved of its own methods, and files of diffusers' own savers, are read."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import damage
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import disturb, tiny_pipeline, tiny_unet, unet_inputs
from torch import Tensor, nn

import dreamtune
from dreamtune.fields import UnreadableFile
from dreamtune.files.info import describe
from dreamtune.files.peft import CONFIG

peft = pytest.importorskip("peft")
LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
NO_PRINT = pytest.mark.filterwarnings("ignore:.*has no fingerprint of its base")

CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "dora": (
        lambda: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=LAYERS),
        "dora", {"rank": 4, "alpha": 6.0},
    ),
    "dora, rslora": (
        lambda: peft.LoraConfig(
            r=4, lora_alpha=3, use_dora=True, use_rslora=True, target_modules=["to_k", "to_v"]
        ),
        "dora", {"rank": 4, "alpha": 6.0},
    ),
    "oft": (
        lambda: peft.OFTConfig(r=2, oft_block_size=0, target_modules=LAYERS),
        "oft", {"blocks": 2, "exact": False, "terms": 5},
    ),
    "oft, exact": (
        lambda: peft.OFTConfig(
            r=4, oft_block_size=0, use_cayley_neumann=False, target_modules=LAYERS
        ),
        "oft", {"blocks": 4, "exact": True},
    ),
    "hra": (lambda: peft.HRAConfig(r=4, target_modules=LAYERS), "hra", {"rank": 4}),
    "hra, other layers": (
        lambda: peft.HRAConfig(r=4, target_modules=["attn2.to_k", "ff.net.2"]), "hra", {"rank": 4}
    ),
    "delora": (
        lambda: peft.DeloraConfig(r=4, target_modules=[*LAYERS, "time_emb_proj", "linear_1"]),
        "delora", {"rank": 4, "start": "peft"},
    ),
}  # fmt: skip


def saved(folder: Path, config: Any) -> Tensor:
    """What the model gives that PEFT saves there."""
    model = peft.get_peft_model(tiny_unet(), config)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=g))
        output: Tensor = model(*unet_inputs(2)).sample
    model.save_pretrained(folder)
    return output


def output(unet: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = unet(*unet_inputs(2)).sample
    return found


@NO_PRINT
@pytest.mark.parametrize("case", CASES)
def test_a_folder_of_peft_becomes_ours(case: str, tmp_path: Path) -> None:
    """Of a DeLoRA native from there, and again PEFT's, which PEFT reads."""
    make, method, options = CASES[case]
    wanted = saved(tmp_path / "p", make())
    unet = tiny_unet()
    adapter = dreamtune.load(unet, tmp_path / "p")
    assert adapter.method == method and options.items() <= adapter.options.items()
    torch.testing.assert_close(output(unet), wanted, rtol=0, atol=1e-5)
    adapter.eject()
    assert float((output(unet) - wanted).abs().max()) > 1e-2
    if method != "delora":
        return
    native = dreamtune.export(tmp_path / "p", tmp_path / "n", "native", base=unet)
    back = dreamtune.export(native, tmp_path / "b", "peft", base=unet)
    model = peft.PeftModel.from_pretrained(tiny_unet(), back.parent)
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=1e-5)
    assert describe(tmp_path / "p", unet).method.startswith(f"{method}, ")


def test_what_is_said_of_a_base(tmp_path: Path) -> None:
    """PEFT's folder has no fingerprint, but the norms of a DeLoRA's base; ours has both."""
    saved(tmp_path / "p", CASES["delora"][0]())
    with pytest.warns(UserWarning, match="has no fingerprint of its base: this one is taken"):
        dreamtune.load(tiny_unet(), tmp_path / "p")
    with pytest.raises(UnreadableFile, match="this base is not the one .*columns of `down_blocks"):
        dreamtune.load(tiny_unet(seed=1), tmp_path / "p")
    with pytest.raises(ValueError, match="do not tell the shapes .*: pass the UNet as `base`"):
        dreamtune.export(tmp_path / "p", tmp_path / "x")
    adapter = dreamtune.inject(tiny_unet(), "oft")
    disturb(adapter)
    ours = dreamtune.export(adapter, tmp_path / "o", "peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dreamtune.load(tiny_unet(), ours)
        assert describe(ours).method.startswith("oft, blocks 4")  # its header has the shapes
    with pytest.raises(ValueError, match="32 of 32 layers differ.*`oft` contains the base weights"):
        dreamtune.load(tiny_unet(seed=1), ours)


@NO_PRINT
def test_what_is_another_function_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "p", CASES["oft"][0]())
    config = tmp_path / "p" / CONFIG
    values = json.loads(config.read_text())
    for edit, message in (
        ({"coft": True}, "beside it: `coft` is set, so that `oft` here is another function"),
        ({"bias": "all"}, "`bias` is set"),
        ({"num_cayley_neumann_terms": 1}, "must be at least 2, got 1"),
        ({"peft_type": "HRA", "r": 4}, "matches no linear layer of the network. Use PEFT"),
        ({"peft_type": "BOFT"}, "match no layer of the network"),
    ):
        config.write_text(json.dumps({**values, **edit}))
        with pytest.raises(UnreadableFile, match=f"`adapter_model.safetensors`.*{message}"):
            dreamtune.load(tiny_unet(), tmp_path / "p")
    started = peft.LoraConfig(r=2, use_dora=True, init_lora_weights="olora", target_modules=LAYERS)
    saved(tmp_path / "d", started)
    with pytest.raises(UnreadableFile, match="it started as 'olora', which takes a part out"):
        dreamtune.load(tiny_unet(), tmp_path / "d")
    uneven = peft.OFTConfig(r=0, oft_block_size=8, target_modules=LAYERS)
    saved(tmp_path / "q", uneven)
    with pytest.raises(UnreadableFile, match="its layers have 3, 4, 6 blocks: read is one number"):
        dreamtune.load(tiny_unet(), tmp_path / "q")
    saved(tmp_path / "s", peft.HRAConfig(r=4, target_modules=["attn2.to_k", "attn2.to_v"]))
    file = tmp_path / "s" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[next(key for key in tensors if "to_v" in key)]
    save_file(tensors, file)
    with pytest.raises(UnreadableFile, match="1 layers lack keys, `down_blocks.*attn2.to_v` first"):
        dreamtune.load(tiny_unet(), tmp_path / "s")


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, found = tmp_path_factory.mktemp("own"), {}
    for method in ("dora", "oft", "hra", "delora"):
        adapter = dreamtune.inject(tiny_unet(), method)
        disturb(adapter)
        found[method] = dreamtune.export(adapter, folder / method, "peft")
    return found


Base = tuple[nn.Module, dict[str, Tensor]]


@pytest.fixture(scope="module")
def base(ours: dict[str, Path]) -> Base:
    """With its output, alone and with each adapter."""
    unet = tiny_unet()
    outputs = {"base": output(unet)}
    for method, path in ours.items():
        adapter = dreamtune.load(unet, path)
        outputs[method] = output(unet)
        adapter.eject()
    return unet, outputs


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(method=st.sampled_from(["dora", "oft", "hra", "delora"]), seed=st.integers(0, 10**6))
def test_damage_is_named(
    method: str, seed: int, ours: dict[str, Path], base: Base, tmp_path: Path
) -> None:
    """Of the settings or of the tensors: an error or a warning that names the file, or nothing
    changed; and after an error the model is as it was.
    """
    rng, sound = random.Random(seed), ours[method]
    place = tmp_path / "damaged"
    place.mkdir(exist_ok=True)
    for name in (CONFIG, sound.name):
        (place / name).write_bytes(sound.with_name(name).read_bytes())
    settings_too = rng.random() < 0.5
    damaged = place / (CONFIG if settings_too else sound.name)
    how = rng.choice([damage.edit_json_file] if settings_too else damage.TENSORS)
    damaged.write_bytes(how(damaged.read_bytes(), rng))
    unet, outputs = base
    before = outputs["base"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            adapter = dreamtune.load(unet, place / sound.name)
        except ValueError as error:
            assert sound.name in str(error) or CONFIG in str(error)
            assert torch.equal(output(unet), before)
            return
    got = output(unet)
    adapter.eject()
    same = torch.allclose(got, outputs[method], rtol=0, atol=1e-6)
    assert same or any(sound.name in str(w.message) for w in caught)


def test_files_of_diffusers_own_savers(tmp_path: Path) -> None:
    """`save_lora_adapter` of a model, and `save_lora_weights` of a pipeline."""
    unet = tiny_unet()
    pipe: Any = tiny_pipeline(unet)
    unet.add_adapter(peft.LoraConfig(r=3, lora_alpha=5, target_modules=LAYERS))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if "lora_B" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    wanted = output(unet)
    unet.save_lora_adapter(tmp_path / "model")
    layers = peft.get_peft_model_state_dict(unet)
    kept = {"unet": unet.peft_config["default"].to_dict()}
    kept = {"unet_lora_adapter_metadata": kept["unet"]}
    type(pipe).save_lora_weights(tmp_path / "pipe", unet_lora_layers=layers, **kept)
    for name in ("model", "pipe"):
        (file,) = (tmp_path / name).glob("*.safetensors")
        fresh = tiny_unet()
        dreamtune.load(fresh, file)
        torch.testing.assert_close(output(fresh), wanted, rtol=0, atol=1e-5)
        again = dreamtune.export(file, tmp_path / name / "peft", "peft", base=tiny_unet())
        model = peft.PeftModel.from_pretrained(tiny_unet(), again.parent)
        torch.testing.assert_close(output(model), wanted, rtol=0, atol=1e-5)
