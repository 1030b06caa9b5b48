"""What an export leaves beside the tensors: settings, headers, a card, a smaller rank."""

from __future__ import annotations

import json
import logging
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_formats import changes, changes_in, trained
from tiny import disturb, tiny_unet, unet_inputs
from torch import Tensor, nn

import dreamtune
from dreamtune.cli import main
from dreamtune.files.layers import factors_of_adapter
from dreamtune.injection.inject import InjectedAdapter


def strings(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.fixture(scope="module")
def delora() -> InjectedAdapter:
    return trained(tiny_unet(), "delora")


# Kohya's names of SDXL


def xl_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16, 24),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2, cross_attention_dim=24, attention_head_dim=8, norm_num_groups=8,
        transformer_layers_per_block=(1, 1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=40,
    ).eval()  # fmt: skip


def xl_output(unet: nn.Module) -> Tensor:
    g = torch.Generator().manual_seed(0)
    x, text, pooled, ids = (
        torch.randn(2, *shape, generator=g) for shape in ((4, 8, 8), (5, 24), (16,), (6,))
    )
    more = {"text_embeds": pooled, "time_ids": ids}
    with torch.no_grad():
        output: Tensor = unet(x, torch.tensor([3, 9]), text, added_cond_kwargs=more).sample
    return output


def test_kohya_names_of_sdxl_are_those_of_its_checkpoint(tmp_path: Path) -> None:
    """diffusers' own conversion of SDXL's kohya files finds every layer."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline

    unet = xl_unet()
    base = xl_output(unet)
    adapter = trained(unet)
    wanted, layers = xl_output(unet), len(adapter.weights())
    path = dreamtune.export(adapter, tmp_path, "kohya")
    lora = dreamtune.export(adapter, tmp_path / "lora")
    adapter.eject()
    key = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.alpha"
    tensors = load_file(path)
    assert key in tensors and not any("down_blocks" in k for k in tensors)
    assert strings(path)["modelspec.implementation"].endswith("generative-models")
    dreamtune.load(unet, path)
    torch.testing.assert_close(xl_output(unet), wanted, rtol=0, atol=1e-5)
    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderKL(block_out_channels=(16,), norm_num_groups=8), text_encoder=None,
        text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=xl_unet(),
        scheduler=DDIMScheduler(),
    )  # fmt: skip
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    assert sum(hasattr(m, "lora_A") for m in pipe.unet.modules()) == layers
    torch.testing.assert_close(xl_output(pipe.unet), wanted, rtol=0, atol=1e-5)
    assert float((wanted - base).abs().max()) > 1e-2
    with pytest.raises(
        ValueError, match="of SDXL counts the blocks .*: pass the network as `base`"
    ):
        dreamtune.export(lora, tmp_path / "k", "kohya")


# A smaller rank


def test_a_cut_change_is_the_best_of_its_rank(delora: InjectedAdapter, tmp_path: Path) -> None:
    said: list[str] = []
    wanted = changes(factors_of_adapter(delora))
    paths = {
        name: dreamtune.export(delora, tmp_path / name, name, max_rank=3, tell=said.append)
        for name in ("diffusers", "peft", "native")
    }
    kept: list[float] = []
    total = sum(float(change.square().sum()) for change in wanted.values())
    unet = tiny_unet()
    for name, path in paths.items():
        for layer, change in changes_in(path, unet).items():
            size = torch.linalg.svdvals(wanted[layer])
            error = float((change - wanted[layer]).square().sum())
            assert error == pytest.approx(float(size[3:].square().sum()), rel=1e-3)
            if name == "diffusers":
                kept.append(1 - error / float(size.square().sum()))
    about = json.loads(strings(paths["diffusers"])["dreamtune"])
    cut = about["cut"]
    left = sum(float(torch.linalg.svdvals(c)[:3].square().sum()) for c in wanted.values())
    assert cut["rank"] == 3 and cut["energy"] == pytest.approx(left / total, rel=1e-6)
    assert cut["worst"][1] == pytest.approx(min(kept), rel=1e-3)
    assert f"Cut from rank {cut['from']} to 3: {cut['energy']:.2%} of the change's" in said[0]
    assert json.loads(strings(paths["native"])["dreamtune"])["exported_from"] == "delora"
    assert json.loads((paths["peft"].parent / "adapter_config.json").read_text())["r"] == 3


def test_what_cannot_be_cut(tmp_path: Path) -> None:
    dora = trained(tiny_unet(), "dora")
    with pytest.raises(ValueError, match="`dora` is not a low-rank change .* export it as `merged"):
        dreamtune.export(dora, tmp_path, "peft", max_rank=2)
    with pytest.raises(ValueError, match="a merged model has no rank: export another format"):
        dreamtune.export(dora, tmp_path, "merged", max_rank=2)
    with pytest.raises(ValueError, match="`max_rank` must be at least 1, got 0"):
        dreamtune.export(dora, tmp_path, max_rank=0)
    assert not list(tmp_path.iterdir())


# PEFT's folder


def test_peft_takes_its_own_form_where_it_is_exact(delora: InjectedAdapter, tmp_path: Path) -> None:
    """The difference to the start, which DeLoRA's residual keeps, would be lost in fp16."""
    said: list[str] = []
    path = dreamtune.export(delora, tmp_path / "a", "peft", tell=said.append)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("DELORA", 32)
    assert config["target_modules"] == ["to_k", "to_out.0", "to_q", "to_v"]
    wanted = changes(factors_of_adapter(delora))
    for layer, change in changes_in(path, tiny_unet()).items():
        torch.testing.assert_close(change, wanted[layer], rtol=0, atol=1e-5)
    half = dreamtune.export(delora, tmp_path / "b", "peft", dtype="fp16", tell=said.append)
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["lora_alpha"]) == ("LORA", config["r"])
    assert {t.dtype for t in load_file(half).values()} == {torch.float16}
    assert said == [
        "`delora` was written as PEFT's own DeLoRA.", "`delora` was written as a plain LoRA."
    ]  # fmt: skip


def test_peft_names_layers_where_the_ends_of_names_mean_others(tmp_path: Path) -> None:
    """A LoRA of half of the layers, and one without its network."""
    from test_formats import LORAS  # noqa: F401  the same writers

    unet = tiny_unet()
    adapter = trained(unet)
    whole = dreamtune.export(adapter, tmp_path / "a")
    adapter.eject()
    tensors = {k: t for k, t in load_file(whole).items() if ".attn2." in k}
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "half.safetensors")
    dreamtune.export(tmp_path / "half.safetensors", tmp_path / "b", "peft", base=unet)
    targets = json.loads((tmp_path / "b" / "adapter_config.json").read_text())["target_modules"]
    assert len(targets) == 16 and all(".attn2." in t for t in targets)
    dreamtune.export(whole, tmp_path / "c", "peft")
    targets = json.loads((tmp_path / "c" / "adapter_config.json").read_text())["target_modules"]
    assert len(targets) == 32


def test_peft_settings_and_tensors_go_together(delora: InjectedAdapter, tmp_path: Path) -> None:
    config = tmp_path / "adapter_config.json"
    path = dreamtune.export(delora, tmp_path, "peft")
    dreamtune.export(delora, tmp_path, "peft")
    mine = config.read_text().replace('"r": 32', '"r": 31')
    config.write_text(mine)
    with pytest.raises(ValueError, match="adapter_config.json` is there with other contents"):
        dreamtune.export(delora, tmp_path, "peft")
    assert config.read_text() == mine
    with (
        pytest.warns(UserWarning, match="`adapter_config.json` beside .* is not what was written"),
        pytest.raises(ValueError, match="`adapter_model.safetensors`: .*tensors do not fit"),
    ):
        dreamtune.load(tiny_unet(), path)
    dreamtune.export(delora, tmp_path, "peft", overwrite=True)
    assert json.loads(config.read_text())["r"] == 32
    before = config.read_bytes(), path.read_bytes()
    large = dreamtune.inject(tiny_unet(), "lora", rank=3)
    disturb(large, size=1e6)
    with pytest.raises(ValueError, match="would not be finite"):
        dreamtune.export(large, tmp_path, "peft", dtype="fp16", overwrite=True)
    assert before == (config.read_bytes(), path.read_bytes())


# A merged model


def test_merged_is_whole_or_not_there(tmp_path: Path) -> None:
    unet = tiny_unet()
    adapter = trained(unet, "oft")
    with torch.no_grad():
        wanted = unet(*unet_inputs(1)).sample
    path = dreamtune.export(adapter, tmp_path, "merged", name="x", max_shard_size="200KB")
    assert path == tmp_path / "x_merged" and len(list(path.glob("*.safetensors"))) > 2
    index = json.loads((path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(unet.state_dict())
    for dtype, atol in ((torch.float16, 5e-3), (torch.bfloat16, 5e-2)):
        half = dreamtune.export(adapter, tmp_path, "merged", name=str(dtype), dtype=dtype)
        model = type(unet).from_pretrained(half, torch_dtype=torch.float32)
        assert {t.dtype for t in load_file(next(half.glob("*.safetensors"))).values()} == {dtype}
        with torch.no_grad():
            torch.testing.assert_close(model(*unet_inputs(1)).sample, wanted, rtol=0, atol=atol)
    (path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="no folder is overwritten: take it away, or give another"):
        dreamtune.export(adapter, tmp_path, "merged", name="x", overwrite=True)
    with torch.no_grad():
        adapter.groups[0].adapter.q.fill_(float("nan"))
    with pytest.raises(ValueError, match="would not be finite"):
        dreamtune.export(adapter, tmp_path / "y", "merged")
    assert not (tmp_path / "y").exists() or not list((tmp_path / "y").iterdir())


def test_merged_says_no_place_and_leaves_the_base(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    """From a pipeline that somebody loaded, whose parts know their folder."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    before = {k: t.clone() for k, t in pipe.unet.state_dict().items()}
    adapter = trained(pipe.unet, "dora")
    file = adapter.save(tmp_path / "dora.safetensors")
    adapter.eject()
    path = dreamtune.export(file, tmp_path, "merged", base=pipe, dtype="fp16")
    assert all(torch.equal(t, before[k]) for k, t in pipe.unet.state_dict().items())
    assert not [f for f in path.rglob("*.json") if str(tiny_pipeline_dir) in f.read_text()]
    text = load_file(path / "text_encoder" / "model.safetensors")
    assert all(k.startswith("text_model.") for k in text)
    assert {t.dtype for t in text.values()} == {torch.float16}
    assert {"vocab.json", "merges.txt"} <= {f.name for f in (path / "tokenizer").iterdir()}
    ours = {f"{v} {k}" for k, v in pipe.tokenizer.get_vocab().items()}
    there = json.loads((path / "tokenizer" / "vocab.json").read_text())
    assert {f"{v} {k}" for k, v in there.items()} == ours


# To the native file


def test_a_lora_of_half_of_the_layers_becomes_native(tmp_path: Path) -> None:
    unet = tiny_unet()
    adapter = trained(unet)
    whole = load_file(dreamtune.export(adapter, tmp_path / "a"))
    adapter.eject()
    from safetensors.torch import save_file

    save_file({k: t for k, t in whole.items() if ".attn1." in k}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="has the fingerprint of its base, .*: pass the network"):
        dreamtune.export(tmp_path / "half.safetensors", tmp_path / "b", "native")
    path = dreamtune.export(tmp_path / "half.safetensors", tmp_path / "b", "native", base=unet)
    wanted = changes_in(tmp_path / "half.safetensors", unet)
    for layer, change in changes_in(path, unet).items():
        torch.testing.assert_close(change, wanted[layer], rtol=0, atol=1e-6)
        assert bool(change.any()) == (".attn1." in layer)
    with pytest.raises(ValueError, match="a native file keeps float32"):
        dreamtune.export(path, tmp_path / "c", "native", dtype="fp16")


# Header and card


def wide(cross: int, **config: Any) -> nn.Module:
    """Of the widths of Stable Diffusion's first block, and nothing else of it."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=(320,), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",),
        cross_attention_dim=cross, mid_block_type=None, **config,
    )  # fmt: skip


@pytest.mark.parametrize(
    "cross,config,spec,kohya,size",
    [
        (768, {}, "stable-diffusion-v1/lora", "sd_v1", "512x512"),
        (1024, {"sample_size": 96}, "stable-diffusion-v2-768-v/lora", "sd_v2_v", "768x768"),
    ],
)
def test_header_says_what_is_known(
    cross: int, config: dict[str, Any], spec: str, kohya: str, size: str, tmp_path: Path
) -> None:
    adapter = dreamtune.inject(wide(cross, **config), "lora", rank=2)
    disturb(adapter)
    given = {"prompt": "a sks dog", "base": "me/sd", "date": "2026-01-02", "identifier": "sks"}
    path = dreamtune.export(adapter, tmp_path, "kohya", name="dog", metadata=given)
    found = strings(path)
    data = path.read_bytes()
    digest = sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    about = json.loads(found.pop("dreamtune"))
    assert about["metadata"] == given and len(about["fingerprint"]) == len(adapter.weights())
    assert found == {
        "format": "pt", "modelspec.sai_model_spec": "1.0.0", "modelspec.title": "dog",
        "modelspec.architecture": spec, "modelspec.implementation": "diffusers",
        "modelspec.resolution": size, "modelspec.date": "2026-01-02",
        "modelspec.trigger_phrase": "a sks dog", "modelspec.hash_sha256": f"0x{digest}",
        "ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "2",
        "ss_base_model_version": kohya, "ss_v2": str(kohya != "sd_v1"), "ss_output_name": "dog",
        "ss_sd_model_name": "me/sd",
    }  # fmt: skip


def test_header_of_an_unknown_network_invents_nothing(
    delora: InjectedAdapter, tmp_path: Path
) -> None:
    found = strings(dreamtune.export(delora, tmp_path))
    assert {k for k in found if k.startswith(("modelspec.", "ss_"))} == {
        "modelspec.sai_model_spec", "modelspec.title", "modelspec.implementation",
        "modelspec.hash_sha256",
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a run leaves of an adapter, its scores and its samples."""
    folder = tmp_path / "fox"
    adapter = trained(tiny_unet(), "lora")
    about = {"prompt": "a `sks`\n<b>fox</b>", "base": "me/sd", "step": 40}
    adapter.save(folder / "best", metadata={**about, "scores": {"dino": 0.71234, "n": None}})
    (folder / "config.yaml").write_text("resolution: 64\n")
    (folder / "samples").mkdir()
    for step in (0, 20, 40):
        Image.new("RGB", (8, 8), (step, 0, 0)).save(folder / "samples" / f"{step:06d}.png")
    return folder


def test_card_shows_the_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--format", "kohya", "--max_rank", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(out / "fox_kohya.safetensors")
    assert "Cut from rank 16 to 2" in printed.err and "written as a plain LoRA." in printed.err
    text = (out / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == "me/sd" and front["instance_prompt"] == "a `sks`\n<b>fox</b>"
    body = text.split("---\n", 2)[2]
    assert "# `fox`" in body and "`a 'sks' <b>fox</b>`" in body and "ComfyUI's models/loras" in body
    assert "| `dino` | 0.7123 |" in body and "at step 40" in body and "Cut from rank 16" in body
    assert {p.name for p in out.glob("*.png")} == {"fox-000000.png", "fox-000040.png"}
    assert "![Step 40](fox-000040.png)" in body
    assert strings(out / "fox_kohya.safetensors")["modelspec.resolution"] == "64x64"


def test_card_replaces_nothing_and_is_left_out(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), str(tmp_path / "a"), "--no_card"]) == 0
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["pytorch_lora_weights.safetensors"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "README.md").write_text("mine")
    assert main(["export", str(run), str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / "README.md").read_text() == "mine"
    assert not list((tmp_path / "b").glob("*.png"))


@pytest.mark.parametrize("format", dreamtune.files.formats.EXPORTS)
def test_card_of_every_format_has_python_that_parses(
    format: str, delora: InjectedAdapter, tmp_path: Path
) -> None:
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    path = dreamtune.export(delora, tmp_path, format, card=True)
    text = ((path if path.is_dir() else tmp_path) / "README.md").read_text()
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")
    assert path.name in text or format == "peft"
