"""Loading a base from a folder, a single file, the hub; encoding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dreamtune.models import folder as model_folder
from dreamtune.models.load import load_base
from dreamtune.models.single_file import CONFIGS, clip_tokenizer, family_of

KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
TEXT = "cond_stage_model.transformer.text_model.final_layer_norm.bias"


def test_tokenizer_has_clips_ids() -> None:
    """Golden ids of CLIP's tokenizer."""
    text = "a sks dog in the snow"
    ids = clip_tokenizer()(text, padding="max_length", max_length=77).input_ids
    assert ids == [49406, 320, 48136, 1929, 530, 518, 2583] + [49407] * 70
    padded = clip_tokenizer("!")(text, padding="max_length", max_length=10).input_ids
    assert padded == [49406, 320, 48136, 1929, 530, 518, 2583, 49407, 0, 0]


@pytest.mark.parametrize(("width", "family"), [(768, "v1"), (1024, "v2")])
def test_family_of_a_single_file(tmp_path: Path, width: int, family: str) -> None:
    save_file({KEY: torch.zeros(2, width), TEXT: torch.zeros(1)}, tmp_path / "m.safetensors")
    assert family_of(tmp_path / "m.safetensors") == family
    assert (CONFIGS / family / "unet" / "config.json").is_file()


def test_files_that_are_no_base(tmp_path: Path) -> None:
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    save_file({KEY: torch.zeros(2, 512), TEXT: torch.zeros(1)}, tmp_path / "odd.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"12")
    (tmp_path / "m.ckpt").write_bytes(b"12")
    for name, message in (
        ("lora", "is not a Stable Diffusion 1.x/2.x checkpoint"),
        ("odd", "text width 512 is neither"),
        ("cut", "is damaged or not a safetensors file"),
    ):
        with pytest.raises(ValueError, match=message):
            load_base(str(tmp_path / f"{name}.safetensors"))
    with pytest.raises(ValueError, match="is not a .safetensors file; convert it"):
        load_base(str(tmp_path / "m.ckpt"))


@pytest.mark.parametrize(
    ("family", "parameters"), [("v1", 859_520_964), ("v2", 865_910_724), ("v2-base", 865_910_724)]
)
def test_shipped_configs_build_the_real_models(family: str, parameters: int) -> None:
    """Parameter counts of the published UNets, autoencoder and text encoders."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    folder = CONFIGS / family
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
    assert count(unet) == parameters
    assert count(vae) == 83_653_863
    assert count(text) == (123_060_480 if family == "v1" else 340_387_840)


def test_folder(tiny_pipeline_dir: Path, tiny_v_pipeline_dir: Path) -> None:
    eps, v = load_base(str(tiny_pipeline_dir)), load_base(str(tiny_v_pipeline_dir))
    assert (eps.resolution, eps.prediction_type, eps.zero_snr) == (16, "epsilon", False)
    assert (v.resolution, v.prediction_type, v.zero_snr) == (16, "v_prediction", True)
    assert v.process().alpha_bar[-1].item() == pytest.approx(0, abs=1e-6)
    assert eps.id == tiny_pipeline_dir.name
    assert not any(p.requires_grad for p in eps.unet.parameters())
    changed = load_base(str(tiny_pipeline_dir), prediction_type="v_prediction")
    assert changed.prediction_type == "v_prediction"


def test_encode_images_of_both_autoencoders(
    tiny_pipeline_dir: Path, tiny_v_pipeline_dir: Path
) -> None:
    pixels = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    kl = load_base(str(tiny_pipeline_dir))
    mean, std = kl.encode_images(pixels, batch=2)
    with torch.no_grad():
        spread = kl.vae.encode(pixels).latent_dist
    assert (mean - 0.5 * spread.mean).abs().max() < 1e-5
    assert std is not None and (std - 0.5 * spread.std).abs().max() < 1e-5
    tiny = load_base(str(tiny_v_pipeline_dir))
    mean, none = tiny.encode_images(pixels)
    assert none is None and mean.shape == (5, 4, 8, 8)


def test_prompts_are_encoded_as_the_pipeline_does(tiny_pipeline_dir: Path) -> None:
    base = load_base(str(tiny_pipeline_dir))
    ours = base.encode_prompts(["a dog", "a cat"])["prompt_embeds"]
    theirs, _ = base.pipeline().encode_prompt(["a dog", "a cat"], "cpu", 1, False)
    assert (ours - theirs).abs().max() < 1e-6


def test_a_prompt_that_is_too_long_is_said(
    tiny_pipeline_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_base(str(tiny_pipeline_dir)).encode_prompts(["a very very very very long prompt"])
    assert "its end is not seen" in caplog.text


def test_sampling_gives_the_modules_back(tiny_pipeline_dir: Path) -> None:
    base = load_base(str(tiny_pipeline_dir), dtype=torch.bfloat16)
    with base.sampling("dpm++") as pipe:
        assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
        assert pipe.vae.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert base.vae.dtype == base.text_encoder.dtype == torch.float32


def test_refusals(tmp_path: Path, tiny_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="there is no base model at `./nowhere`"):
        load_base("./nowhere")
    with pytest.raises(ValueError, match="has no model_index.json"):
        load_base(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match="is a FluxPipeline; a Stable Diffusion 1.x/2.x"):
        load_base(str(tmp_path))
    monkeypatch.setattr(model_folder, "hub_answers", lambda: False)
    with pytest.raises(ValueError, match="hf download nobody/nothing --local-dir FOLDER"):
        load_base("nobody/nothing")


def test_single_file_loads_offline_as_the_same_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor of a checkpoint in the original layout arrives where it belongs."""
    from single_file_layout import write_configs, write_single_file

    from dreamtune.models import single_file

    monkeypatch.setattr(single_file, "CONFIGS", write_configs(tmp_path / "configs"))
    file = tmp_path / "model.safetensors"
    parts = write_single_file(file, tmp_path / "configs")
    base = load_base(str(file))
    assert (base.id, base.prediction_type, base.resolution) == ("model", "epsilon", 512)
    for name, original in parts.items():
        loaded, wanted = getattr(base, name).state_dict(), original.state_dict()
        assert loaded.keys() == wanted.keys()
        assert all(torch.equal(loaded[k], wanted[k]) for k in wanted), name
    assert base.encode_prompts(["a sks dog"])["prompt_embeds"].shape == (1, 77, 768)
