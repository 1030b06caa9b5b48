"""Tiny random transformers of diffusers' classes, and what goes into each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

TEXT, GRID = 5, 4  # tokens of the prompt, latents a side


def _flux(**more: Any) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    options: dict[str, Any] = {
        "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 10,
        "guidance_embeds": True, "axes_dims_rope": (2, 2, 4),
    }  # fmt: skip
    return FluxTransformer2DModel(**(options | more))


def _chroma(**more: Any) -> nn.Module:
    from diffusers import ChromaTransformer2DModel

    options: dict[str, Any] = {
        "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": 12, "axes_dims_rope": (2, 2, 4),
        "approximator_num_channels": 8, "approximator_hidden_dim": 8, "approximator_layers": 1,
    }  # fmt: skip
    return ChromaTransformer2DModel(**(options | more))


def _flux2(**more: Any) -> nn.Module:
    from diffusers import Flux2Transformer2DModel

    options: dict[str, Any] = {
        "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": 12, "timestep_guidance_channels": 8,
        "axes_dims_rope": (2, 2, 2, 2),
    }  # fmt: skip
    return Flux2Transformer2DModel(**(options | more))


def _sd3(**more: Any) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    options: dict[str, Any] = {
        "sample_size": GRID, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16,
        "pooled_projection_dim": 10, "out_channels": 4, "pos_embed_max_size": 8,
        "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    }  # fmt: skip
    return SD3Transformer2DModel(**(options | more))


def _qwen(**more: Any) -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    options: dict[str, Any] = {
        "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": 12, "axes_dims_rope": (2, 2, 4),
    }  # fmt: skip
    return QwenImageTransformer2DModel(**(options | more))


def _krea2(**more: Any) -> nn.Module:
    from diffusers import Krea2Transformer2DModel

    options: dict[str, Any] = {
        "in_channels": 4, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 16, "timestep_embed_dim": 8,
        "text_hidden_dim": 12, "num_text_layers": 2, "text_num_attention_heads": 2,
        "text_num_key_value_heads": 1, "text_intermediate_size": 16,
        "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "axes_dims_rope": (2, 2, 4),
    }  # fmt: skip
    return Krea2Transformer2DModel(**(options | more))


def _z_image(**more: Any) -> nn.Module:
    from diffusers import ZImageTransformer2DModel

    options: dict[str, Any] = {
        "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2,
        "n_kv_heads": 2, "cap_feat_dim": 12, "axes_dims": [4, 6, 6], "axes_lens": [64, 16, 16],
    }  # fmt: skip
    return ZImageTransformer2DModel(**(options | more))


MAKE: dict[str, Callable[..., nn.Module]] = {
    "ChromaTransformer2DModel": _chroma,
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux2,
    "SD3Transformer2DModel": _sd3,
    "QwenImageTransformer2DModel": _qwen,
    "Krea2Transformer2DModel": _krea2,
    "ZImageTransformer2DModel": _z_image,
}


def tiny(kind: str, seed: int = 0, **options: Any) -> nn.Module:
    """Every weight random: some of diffusers' start at zero, and would hide a change."""
    torch.manual_seed(seed)
    model = MAKE[kind](**options).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    return model


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    """Of one picture and one prompt."""
    kind, g = type(model).__name__, torch.Generator().manual_seed(3)
    picture = torch.randn(1, 4, GRID, GRID, generator=g)
    text = torch.randn(1, TEXT, 12, generator=g)
    pooled = torch.randn(1, 10, generator=g)
    t = torch.tensor([0.3])
    if kind == "SD3Transformer2DModel":
        return model(picture, text, pooled, t * 1000).sample
    if kind == "ZImageTransformer2DModel":
        found = model([picture[0].unsqueeze(1)], t, [text[0]], return_dict=False)[0]
        return torch.stack(found)
    tokens = picture.flatten(2).mT
    if kind == "QwenImageTransformer2DModel":
        shapes = [[(1, GRID, GRID)]]
        return model(tokens, text, torch.ones(1, TEXT), t, shapes).sample
    if kind == "Krea2Transformer2DModel":
        origin, down = torch.zeros(TEXT, 3), torch.arange(GRID).repeat_interleave(GRID)
        grid = torch.stack([torch.zeros(GRID**2), down, torch.arange(GRID).repeat(GRID)], 1)
        layers = text.unsqueeze(2).repeat(1, 1, 2, 1)
        return model(tokens, layers, t, torch.cat([origin, grid])).sample
    axes = 4 if kind == "Flux2Transformer2DModel" else 3
    places, words = torch.zeros(GRID * GRID, axes), torch.zeros(TEXT, axes)
    places[:, 1] = torch.arange(GRID).repeat_interleave(GRID)
    places[:, 2] = torch.arange(GRID).repeat(GRID)
    given: dict[str, Any] = {"timestep": t, "img_ids": places, "txt_ids": words}
    if kind == "FluxTransformer2DModel":
        given["pooled_projections"] = pooled
    if kind != "ChromaTransformer2DModel":
        given["guidance"] = torch.tensor([3.5])
    return model(tokens, text, **given).sample
