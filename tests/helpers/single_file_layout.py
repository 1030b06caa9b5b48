"""A small Stable Diffusion 1.x checkpoint in the original one-file layout, to read back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dreamtune.models.single_file import CONFIGS

SMALL = {
    "unet": {"block_out_channels": [32] * 4},
    "vae": {"block_out_channels": [32] * 4},
    "text_encoder": {"num_hidden_layers": 1, "intermediate_size": 8},
}


def write_configs(folder: Path) -> Path:
    """configs_sd/v1 with narrow models; the text width stays 768, by which a file is recognised."""
    shutil.copytree(CONFIGS / "v1", folder / "v1")
    for part, changes in SMALL.items():
        file = folder / "v1" / part / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def unet_names() -> dict[str, str]:
    """Prefixes of diffusers -> of the original, after the published conversion script."""
    names = {
        "time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2.",
        "conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0.", "conv_out.": "out.2.",
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.0.": "middle_block.0.", "mid_block.resnets.1.": "middle_block.2.",
    }  # fmt: skip
    for i in range(4):
        for j in range(2):
            names[f"down_blocks.{i}.resnets.{j}."] = f"input_blocks.{3 * i + j + 1}.0."
            names[f"down_blocks.{i}.attentions.{j}."] = f"input_blocks.{3 * i + j + 1}.1."
        for j in range(3):
            names[f"up_blocks.{i}.resnets.{j}."] = f"output_blocks.{3 * i + j}.0."
            names[f"up_blocks.{i}.attentions.{j}."] = f"output_blocks.{3 * i + j}.1."
        names[f"down_blocks.{i}.downsamplers.0.conv."] = f"input_blocks.{3 * (i + 1)}.0.op."
        names[f"up_blocks.{i}.upsamplers.0."] = f"output_blocks.{3 * i + 2}.{2 if i else 1}."
    return names


def vae_names() -> dict[str, str]:
    names = {}
    for side in ("encoder", "decoder"):
        names[f"{side}.mid_block.attentions.0."] = f"{side}.mid.attn_1."
        for i in range(2):
            names[f"{side}.mid_block.resnets.{i}."] = f"{side}.mid.block_{i + 1}."
    for i in range(4):
        for j in range(3):
            names[f"encoder.down_blocks.{i}.resnets.{j}."] = f"encoder.down.{i}.block.{j}."
            names[f"decoder.up_blocks.{i}.resnets.{j}."] = f"decoder.up.{3 - i}.block.{j}."
        names[f"encoder.down_blocks.{i}.downsamplers.0."] = f"encoder.down.{i}.downsample."
        names[f"decoder.up_blocks.{i}.upsamplers.0."] = f"decoder.up.{3 - i}.upsample."
    return names


UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
VAE_PARTS = {
    "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out", "group_norm": "norm",
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip


def renamed(key: str, prefixes: dict[str, str], parts: dict[str, str], only: str) -> str:
    original = key
    for ours, theirs in prefixes.items():
        if key.startswith(ours):
            key = theirs + key[len(ours) :]
            break
    if only in original:
        for ours, theirs in parts.items():
            key = key.replace(f"{ours}.", f"{theirs}.")
    return key


def write_single_file(path: Path, configs: Path) -> dict[str, Any]:
    """Writes the file; returns the modules that it must load as."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    folder = configs / "v1"
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
    text = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
    tensors = {}
    for key, value in unet.state_dict().items():
        name = renamed(key, unet_names(), UNET_RESNET, ".resnets.")
        tensors[f"model.diffusion_model.{name}"] = value
    for key, value in vae.state_dict().items():
        name = renamed(key, vae_names(), VAE_PARTS, "")
        if ".attn_1." in name and value.ndim == 2:
            value = value[..., None, None]  # 1x1 convolutions there
        tensors[f"first_stage_model.{name}"] = value
    for key, value in text.state_dict().items():
        name = key if key.startswith("text_model.") else f"text_model.{key}"
        tensors[f"cond_stage_model.transformer.{name}"] = value
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path)
    return {"unet": unet, "vae": vae, "text_encoder": text}
