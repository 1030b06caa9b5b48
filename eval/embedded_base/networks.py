"""The networks of the embedded base and its scorers, from their configs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import nn

from .captions import BOS, EOS, LENGTH, VOCABULARY

LATENT_CHANNELS = 6
RESOLUTION = 128
SAMPLING = {"num_inference_steps": 25, "guidance_scale": 4.0, "guidance_rescale": 0.3}


def autoencoder(width: int = 48) -> nn.Module:
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(width,) * 4,
        decoder_block_out_channels=(width,) * 4,
        latent_channels=LATENT_CHANNELS,
        scaling_factor=1.0,
    )


def unet() -> nn.Module:
    """8.1M parameters: 16 MB in fp16, a file may have 16 MiB. Heads are 16 and 32 wide."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(112, 160),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=192,
        attention_head_dim=(7, 5),  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def text_encoder() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=768,
            projection_dim=192,
            num_hidden_layers=4,
            num_attention_heads=6,
            max_position_embeddings=LENGTH,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=EOS,
        )
    )


def scheduler():
    """v-prediction with zero terminal SNR, so that saturated plain grounds come out."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def dino_vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=144,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=576,
        image_size=RESOLUTION,
        patch_size=16,
        qkv_bias=True,
    )
    return ViTModel(config, add_pooling_layer=False)


CLIP_CONFIG = {
    "model_cfg": {
        "embed_dim": 128,
        "quick_gelu": False,
        "vision_cfg": {
            "image_size": RESOLUTION,
            "layers": [2, 2, 3, 1],
            "width": 16,
            "head_width": 32,
            "patch_size": None,
        },
        "text_cfg": {
            "context_length": LENGTH,
            "vocab_size": VOCABULARY,
            "hf_tokenizer_name": "tokenizer",
            "tokenizer_kwargs": {"clean": "lower"},
            "width": 128,
            "heads": 4,
            "layers": 2,
        },
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
}


def clip() -> nn.Module:
    import open_clip

    cfg = {k: dict(v) if isinstance(v, dict) else v for k, v in CLIP_CONFIG["model_cfg"].items()}
    cfg["text_cfg"] = {
        k: v
        for k, v in cfg["text_cfg"].items()
        if k not in ("hf_tokenizer_name", "tokenizer_kwargs")
    }
    return open_clip.CLIP(**cfg)


def half(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        k: (v.half() if v.is_floating_point() else v).contiguous()
        for k, v in module.state_dict().items()
    }


def write_pipeline(
    folder: Path, tokenizer: Path, vae: nn.Module, text: nn.Module, denoiser: nn.Module
) -> None:
    """A folder that `StableDiffusionPipeline.from_pretrained` loads, fp16, no file over 16 MiB.

    The text encoder keeps the `text_model.` prefix: transformers 5 drops it at save, and
    transformers 4 would then start from random weights. Its config asks for float32: transformers 5
    goes by it, or by the weights, where diffusers loads the other parts in float32.
    """
    from safetensors.torch import save_file

    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.36.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderTiny"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    scheduler().save_pretrained(folder / "scheduler")
    shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    for name, module in (("vae", vae), ("unet", denoiser)):
        module.save_config(folder / name)
        save_file(
            half(module), folder / name / "diffusion_pytorch_model.safetensors", {"format": "pt"}
        )
    settings = json.loads((folder / "vae" / "config.json").read_text())
    settings.pop("block_out_channels")  # AutoencoderTiny derives it, and warns of it in a file
    (folder / "vae" / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    weights = half(text)
    weights = {
        k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in weights.items()
    }
    weights.pop("text_model.embeddings.position_ids", None)
    (folder / "text_encoder").mkdir(exist_ok=True)
    text.config.architectures = ["CLIPTextModel"]
    config = text.config.to_diff_dict() | {"torch_dtype": "float32"}
    config.pop("dtype", None)
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, folder / "text_encoder" / "model.safetensors", {"format": "pt"})


def write_clip(folder: Path, tokenizer: Path, model: nn.Module) -> None:
    """An open_clip `local-dir:` folder with its tokenizer beside it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(CLIP_CONFIG, indent=2) + "\n")
    save_file(half(model), folder / "open_clip_model.safetensors", {"format": "pt"})


def write_dino(folder: Path, model: nn.Module) -> None:
    """A transformers ViT folder with its preprocessor."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = ["ViTModel"]
    config = model.config.to_diff_dict() | {"torch_dtype": "float32"}
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    size = {"height": RESOLUTION, "width": RESOLUTION}
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True, "size": size, "resample": 3,
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    save_file(half(model), folder / "model.safetensors", {"format": "pt"})
