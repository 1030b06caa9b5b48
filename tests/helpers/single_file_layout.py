"""A small Stable Diffusion 1.x or XL checkpoint in the original one-file layout, to read back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dreamtune.models.single_file import CONFIGS

SMALL = {
    "v1": {
        "unet": {"block_out_channels": [32] * 4},
        "vae": {"block_out_channels": [32] * 4},
        "text_encoder": {"num_hidden_layers": 1, "intermediate_size": 8},
    },
    "xl": {
        "unet": {
            "block_out_channels": [32, 64, 64], "attention_head_dim": [2, 4, 4],
            "transformer_layers_per_block": [1, 2, 2], "cross_attention_dim": 24 + 16,
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 16,
        },
        "vae": {"block_out_channels": [32] * 4},
        "text_encoder": {
            "num_hidden_layers": 2, "intermediate_size": 8, "hidden_size": 24,
            "num_attention_heads": 2,
        },
        "text_encoder_2": {
            "num_hidden_layers": 2, "intermediate_size": 8, "hidden_size": 16,
            "projection_dim": 16, "num_attention_heads": 2,
        },
    },
}  # fmt: skip


def write_configs(folder: Path, kind: str = "v1") -> Path:
    """configs_sd/v1 or xl with narrow models; the text width of 1.x stays 768, by which a file is
    recognised.
    """
    shutil.copytree(CONFIGS / kind, folder / kind)
    for part, changes in SMALL[kind].items():
        file = folder / kind / part / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def unet_names(levels: int = 4) -> dict[str, str]:
    """Prefixes of diffusers -> of the original, after the published conversion script."""
    names = {
        "time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2.",
        "conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0.", "conv_out.": "out.2.",
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.0.": "middle_block.0.", "mid_block.resnets.1.": "middle_block.2.",
        "add_embedding.linear_1.": "label_emb.0.0.", "add_embedding.linear_2.": "label_emb.0.2.",
    }  # fmt: skip
    for i in range(levels):
        for j in range(2):
            names[f"down_blocks.{i}.resnets.{j}."] = f"input_blocks.{3 * i + j + 1}.0."
            names[f"down_blocks.{i}.attentions.{j}."] = f"input_blocks.{3 * i + j + 1}.1."
        for j in range(3):
            names[f"up_blocks.{i}.resnets.{j}."] = f"output_blocks.{3 * i + j}.0."
            names[f"up_blocks.{i}.attentions.{j}."] = f"output_blocks.{3 * i + j}.1."
        names[f"down_blocks.{i}.downsamplers.0.conv."] = f"input_blocks.{3 * (i + 1)}.0.op."
        names[f"up_blocks.{i}.upsamplers.0."] = (
            f"output_blocks.{3 * i + 2}.{2 if i or levels == 3 else 1}."
        )
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


def open_clip_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A text encoder with its projection as open_clip has it: q, k and v in one."""
    names = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.": "ln_final.", "encoder.layers.": "transformer.resblocks.",
        ".layer_norm1.": ".ln_1.", ".layer_norm2.": ".ln_2.", ".mlp.fc1.": ".mlp.c_fc.",
        ".mlp.fc2.": ".mlp.c_proj.", ".self_attn.out_proj.": ".attn.out_proj.",
    }  # fmt: skip
    found = {}
    for key, value in state.items():
        name = key.removeprefix("text_model.")
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if ".q_proj." in name:
            others = [state[key.replace(".q_proj.", f".{x}_proj.")] for x in "kv"]
            name = name.replace(".self_attn.q_proj.", ".attn.in_proj_")
            found[name] = torch.cat([value, *others])
        elif name == "text_projection.weight":
            found["text_projection"] = value.T
        elif ".k_proj." not in name and ".v_proj." not in name:
            found[name] = value
    return found


def write_single_file(path: Path, configs: Path, kind: str = "v1") -> dict[str, Any]:
    """Writes the file; returns the modules that it must load as."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    folder = configs / kind
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
    text = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
    parts = {"unet": unet, "vae": vae, "text_encoder": text}
    tensors = {}
    for key, value in unet.state_dict().items():
        levels = unet_names(len(unet.config.block_out_channels))
        name = renamed(key, levels, UNET_RESNET, ".resnets.")
        tensors[f"model.diffusion_model.{name}"] = value
    for key, value in vae.state_dict().items():
        name = renamed(key, vae_names(), VAE_PARTS, "")
        if ".attn_1." in name and value.ndim == 2:
            value = value[..., None, None]  # 1x1 convolutions there
        tensors[f"first_stage_model.{name}"] = value
    start = "conditioner.embedders.0." if kind == "xl" else "cond_stage_model."
    for key, value in text.state_dict().items():
        name = key if key.startswith("text_model.") else f"text_model.{key}"
        tensors[f"{start}transformer.{name}"] = value
    if kind == "xl":
        second = CLIPTextModelWithProjection(
            CLIPTextConfig.from_pretrained(folder / "text_encoder_2")
        )
        parts["text_encoder_2"] = second
        for key, value in open_clip_names(second.state_dict()).items():
            tensors[f"conditioner.embedders.1.model.{key}"] = value
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path)
    return parts
