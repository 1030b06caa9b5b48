"""Stable Diffusion XL (arXiv 2307.01952), and what has its parts: Turbo, Pony, Illustrious."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dreamtune.models.base import Frame, Parts, SamplingDefaults
from dreamtune.models.conditioning import Conditioning
from dreamtune.models.folder import ModelFolder
from dreamtune.models.rules import Flag, rules
from dreamtune.models.text import CLIP_TOKENIZERS
from dreamtune.models.unet import CLASSES, UNetBase, check_unet

FORCED = "force_zeros_for_empty_prompt"
INDEX = rules(force_zeros_for_empty_prompt=Flag)
TIME_IDS = 6  # down and across, of shape, corner and size


class StableDiffusionXL(UNetBase):
    """A UNet that is told the last states but one of two CLIP text encoders, the pooled state of
    the second, and shape, corner and size of the picture.
    """

    pipeline_name = "StableDiffusionXLPipeline"
    encoder_names = ("text_encoder", "text_encoder_2")
    classes = {
        **CLASSES,
        "text_encoder_2": (("transformers", "CLIPTextModelWithProjection"),),
        "tokenizer_2": CLIP_TOKENIZERS,
    }
    folders = (
        "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"
    )  # fmt: skip
    told = (
        "prompt_embeds", "negative_prompt_embeds",
        "pooled_prompt_embeds", "negative_pooled_prompt_embeds",
    )  # fmt: skip

    def __init__(self, parts: Parts, **about: Any) -> None:
        """Raises ValueError for parts that do not belong together."""
        check_parts(about["id"], parts)
        # a watermark, where its library is installed, is none of what was trained
        super().__init__({**parts, "add_watermarker": False}, **about)

    @classmethod
    def load_folder(
        cls, folder: ModelFolder, dtype: torch.dtype, prediction_type: str | None
    ) -> Parts:
        parts = super().load_folder(folder, dtype, prediction_type)
        stated = folder.config("", INDEX, "model_index.json")
        return {**parts, FORCED: stated.get(FORCED, True)}

    def sampling_defaults(self, size: int) -> SamplingDefaults:
        """Sampler and guidance are those that the pipeline itself would take."""
        return SamplingDefaults(
            sampler="base",
            guidance_scale=5.0,
            guidance_rescale=0.3 if self.zero_snr else 0.0,
        )

    @property
    def empty_is_none(self) -> bool:
        return not self.parts[FORCED]

    def latent_shift_and_scale(self) -> tuple[Any, Any]:
        config = self.vae.config
        mean, std = (getattr(config, f"latents_{n}", None) for n in ("mean", "std"))
        if mean is None or std is None:
            return 0.0, config.scaling_factor
        mean, std = (torch.tensor(x, device=self.device).view(1, -1, 1, 1) for x in (mean, std))
        return mean, config.scaling_factor / std

    def encode_frames(self, frames: Sequence[Frame]) -> Conditioning:
        """time_ids (n, 6): sections 2.2 of the paper, in the order of the pipeline's."""
        ids = [[*f.shape, *f.corner, *f.size] for f in frames]
        return {"time_ids": torch.tensor(ids, dtype=torch.float32, device=self.device)}

    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return predict(self.unet, self.dtype, x, t, conditioning)


def predict(
    unet: Any, dtype: torch.dtype, x: Tensor, t: Tensor, conditioning: Conditioning
) -> Tensor:
    """The UNet's prediction in `dtype`. The sizes stay float32: bf16 holds no 1365."""
    added = {
        "text_embeds": conditioning["pooled_prompt_embeds"].to(dtype),
        "time_ids": conditioning["time_ids"],
    }
    text = conditioning["prompt_embeds"].to(dtype)
    y: Tensor = unet(x.to(dtype), t, text, added_cond_kwargs=added, return_dict=False)[0]
    return y


def check_parts(source: str, parts: Parts) -> None:
    unet, second = parts["unet"].config, parts["text_encoder_2"].config
    if unet.addition_embed_type != "text_time":
        raise ValueError(
            f"`{source}`: its UNet must have the `addition_embed_type` text_time to be told sizes, "
            f"got {unet.addition_embed_type}: it is none of Stable Diffusion XL."
        )
    check_unet(source, parts, parts["text_encoder"].config.hidden_size + second.hidden_size)
    given = TIME_IDS * (unet.addition_time_embed_dim or 0) + second.projection_dim
    if given != unet.projection_class_embeddings_input_dim:
        raise ValueError(
            f"`{source}`: the UNet takes {unet.projection_class_embeddings_input_dim} numbers of "
            f"pooled text and sizes and would be given {given}: they are not of the same model (a "
            "refiner takes five sizes and cannot be tuned here)."
        )
