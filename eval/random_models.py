"""Stable Diffusion, CLIP and DINO folders of seeded random weights, at three sizes.

full: the shapes of SD 1.5 or SDXL, CLIP ViT-B/32 and DINO ViT-S/16, so that time, memory and file
formats are real; small: about the size of the embedded base; tiny: for a check on the CPU in
seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dreamtune.models.quiet import quiet_diffusers
from dreamtune.models.single_file import CONFIGS, clip_tokenizer

SIZES = ("tiny", "small", "full")
FAMILIES = {"sd": "v1", "sdxl": "xl"}  # by the folders of their configs
ATTENTION = {
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
}
UNETS: dict[str, dict[str, Any]] = {
    "tiny": {
        **ATTENTION, "sample_size": 8, "block_out_channels": [16, 32], "attention_head_dim": 2,
        "cross_attention_dim": 24, "norm_num_groups": 8,
    },
    "small": {
        **ATTENTION, "sample_size": 16, "block_out_channels": [128, 160],
        "attention_head_dim": [4, 5], "cross_attention_dim": 192, "norm_num_groups": 16,
    },
    "full": {},
}  # fmt: skip
# What makes a small UNet one of SDXL's: no attention in its first block, and all that it is told.
XL: dict[str, dict[str, Any]] = {
    "tiny": {"cross_attention_dim": 24 + 32, "projection_class_embeddings_input_dim": 6 * 8 + 32},
    "small": {
        "cross_attention_dim": 192 + 256, "projection_class_embeddings_input_dim": 6 * 8 + 256,
    },
    "full": {},
}  # fmt: skip
XL_UNET: dict[str, Any] = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2], "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
}  # fmt: skip
VAES: dict[str, dict[str, Any]] = {
    "tiny": {"block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1},
    "small": {"block_out_channels": [16, 16, 16, 16], "norm_num_groups": 8, "layers_per_block": 1},
    "full": {},
}
TEXTS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "heads": 2},
    "small": {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 4, "heads": 4},
    "full": {},
}


SECOND_TEXTS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "heads": 2,
        "projection_dim": 32,
    },
    "small": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "heads": 4,
        "projection_dim": 256,
    },
    "full": {},
}  # fmt: skip


@contextmanager
def random_weights(seed: int, device: str, dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside are initialised there: on a GPU a second for a billion weights."""
    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build_unet(
    size: str,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    family: str = "sd",
) -> Any:
    """A UNet2DConditionModel; full is SD 1.5's, 859.5M, or SDXL's, 2567M."""
    from diffusers import UNet2DConditionModel

    config = dict(UNet2DConditionModel.load_config(CONFIGS / FAMILIES[family] / "unet"))
    if size != "full":
        config = {"in_channels": 4, "out_channels": 4, **UNETS[size]}
        config |= {**XL_UNET, **XL[size]} if family == "sdxl" else {}
    with random_weights(seed, device, dtype):
        return UNet2DConditionModel.from_config(config).eval()


def build_pipeline(
    folder: Path,
    size: str,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    family: str = "sd",
) -> dict[str, float]:
    """Writes a pipeline's folder; returns millions of weights by part."""
    import diffusers
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    configs = CONFIGS / FAMILIES[family]
    unet = build_unet(size, seed, device, dtype, family)
    vae_config = {**AutoencoderKL.load_config(configs / "vae"), **VAES[size]}
    blocks = len(vae_config["block_out_channels"])
    vae_config |= {
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
    }
    with random_weights(seed + 1, device, dtype):
        vae = AutoencoderKL.from_config(vae_config)
        text = CLIPTextModel(text_config(configs / "text_encoder", TEXTS[size]))
    parts: dict[str, Any] = {"unet": unet, "vae": vae, "text_encoder": text}
    tokenizers: dict[str, Any] = {"tokenizer": clip_tokenizer()}
    if family == "sdxl":
        second = text_config(configs / "text_encoder_2", SECOND_TEXTS[size])
        with random_weights(seed + 2, device, dtype):
            parts["text_encoder_2"] = CLIPTextModelWithProjection(second)
        tokenizers["tokenizer_2"] = clip_tokenizer("!")
        own: dict[str, Any] = {"add_watermarker": False}
    else:
        own = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    index = json.loads((configs / "model_index.json").read_text())
    kind, schedule = getattr(diffusers, index["_class_name"]), index["scheduler"][1]
    scheduler = getattr(diffusers, schedule).from_pretrained(configs / "scheduler")
    with quiet_diffusers():
        pipe = kind(**parts, **tokenizers, **own, scheduler=scheduler)
        pipe.save_pretrained(folder)
    words = {"unet": "UNet", "vae": "autoencoder", "text_encoder": "text encoder"}
    words["text_encoder_2"] = "second text encoder"
    return {words[k]: sum(p.numel() for p in m.parameters()) / 1e6 for k, m in parts.items()}


def text_config(folder: Path, changes: dict[str, Any]) -> Any:
    from transformers import CLIPTextConfig

    config = CLIPTextConfig.from_pretrained(folder)
    for key, value in changes.items():
        setattr(config, {"heads": "num_attention_heads"}.get(key, key), value)
    return config


def build_clip(folder: Path, size: str, seed: int = 0) -> float:
    """Writes an open_clip `local-dir:` folder; returns millions of weights."""
    import open_clip
    from safetensors.torch import save_file

    config: dict[str, Any] = open_clip.get_model_config("ViT-B-32")
    if size != "full":
        config["embed_dim"] = 32
        config["vision_cfg"] |= {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16}
        config["text_cfg"] |= {"width": 32, "heads": 2, "layers": 2}
    preprocess = {
        "mean": list(open_clip.OPENAI_DATASET_MEAN),
        "std": list(open_clip.OPENAI_DATASET_STD),
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    (folder / "open_clip_config.json").write_text(text)
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    return sum(p.numel() for p in model.parameters()) / 1e6


def build_dino(folder: Path, size: str, seed: int = 0) -> float:
    """Writes a transformers ViT folder; returns millions of weights."""
    from transformers import ViTConfig, ViTModel

    shape = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    config = ViTConfig(**shape, image_size=224, patch_size=16)
    if size != "full":
        config = ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            image_size=64, patch_size=16,
        )  # fmt: skip
    torch.manual_seed(seed)
    model = ViTModel(config, add_pooling_layer=False)
    model.save_pretrained(folder)
    side = config.image_size
    settings = {"size": {"height": side, "width": side}, "do_resize": True, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return sum(p.numel() for p in model.parameters()) / 1e6


def write_photos(folder: Path, count: int = 5, side: int = 512, seed: int = 0) -> Path:
    """Discs on gradients: pictures that differ, where no photos are given."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    for i in range(count):
        slope, disc = rng.uniform(0, 1, (2, 3)), rng.uniform(0.3, 0.7, 2)
        pixels = slope[0] * x[..., None] + slope[1] * y[..., None]
        pixels[(x - disc[0]) ** 2 + (y - disc[1]) ** 2 < 0.05] = [0.9, 0.3, 0.1]
        image = Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))
        image.save(folder / f"{i:02d}.png")
    return folder
