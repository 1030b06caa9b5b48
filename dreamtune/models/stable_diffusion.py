"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dreamtune.models.base import Parts, SamplingDefaults
from dreamtune.models.conditioning import Conditioning
from dreamtune.models.unet import UNetBase, check_unet

SMALL_IMAGE = 256  # pixels; up to here less guidance is enough


class StableDiffusion(UNetBase):
    """Stable Diffusion 1.x and 2.x: a UNet that is told a CLIP text encoder's states."""

    pipeline_name = "StableDiffusionPipeline"
    folders = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

    def __init__(self, parts: Parts, **about: Any) -> None:
        """Raises ValueError for parts that do not belong together."""
        check_parts(about["id"], parts)
        nobody = {"safety_checker": None, "feature_extractor": None}
        super().__init__({**parts, **nobody, "requires_safety_checker": False}, **about)

    def sampling_defaults(self, size: int) -> SamplingDefaults:
        return SamplingDefaults(
            sampler="base" if self.zero_snr else "dpm++",
            guidance_scale=4.0 if size <= SMALL_IMAGE else 7.5,
            guidance_rescale=0.3 if self.zero_snr else 0.0,
        )

    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return predict(self.unet, self.dtype, x, t, conditioning)


def predict(
    unet: Any, dtype: torch.dtype, x: Tensor, t: Tensor, conditioning: Conditioning
) -> Tensor:
    """The UNet's prediction in `dtype`."""
    text = conditioning["prompt_embeds"]
    y: Tensor = unet(x.to(dtype), t, text.to(dtype), return_dict=False)[0]
    return y


def check_parts(source: str, parts: Parts) -> None:
    unet = parts["unet"].config
    if unet.addition_embed_type is not None or isinstance(unet.cross_attention_dim, (list, tuple)):
        raise ValueError(
            f"`{source}`: its UNet is told more than a prompt (`addition_embed_type` "
            f"{unet.addition_embed_type}), and is none of Stable Diffusion 1.x or 2.x."
        )
    check_unet(source, parts, parts["text_encoder"].config.hidden_size)
