"""Qwen-Image (arXiv 2508.02324)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dreamtune.injection.targets import TARGET_MODULES
from dreamtune.models.base import Parts, SamplingDefaults
from dreamtune.models.clip_text import unseen
from dreamtune.models.conditioning import NOTHING, Conditioning
from dreamtune.models.masked import (
    AUTOENCODER,
    TOKENIZERS,
    TOKENS,
    MaskedBase,
    check_common,
)
from dreamtune.models.patches import PATCH, packed, unpacked
from dreamtune.models.prefixes import TRANSFORMER, Prefixes
from dreamtune.models.transformer import check_told

OF_OTHERS = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")


class QwenImage(MaskedBase):
    """A transformer that is told the last states of Qwen2.5-VL on a template with the prompt."""

    pipeline_name = "QwenImagePipeline"
    network_class = "QwenImageTransformer2DModel"
    title = "Qwen-Image"
    folders = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    classes = {
        "transformer": (("diffusers", "QwenImageTransformer2DModel"),),
        "vae": AUTOENCODER,
        "text_encoder": (("transformers", "Qwen2_5_VLForConditionalGeneration"),),
        "tokenizer": TOKENIZERS,
    }
    prefixes = Prefixes(
        TRANSFORMER,
        "lora_unet_",
        (
            "pos_embed.", "time_text_embed.", "txt_norm.", "img_in.", "txt_in.",
            "transformer_blocks.", "norm_out.", "proj_out.",
        ),
    )  # fmt: skip
    target_modules = (
        *TARGET_MODULES, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    )  # fmt: skip
    nothing = NOTHING
    uncaptured = "the network of Qwen-Image copies a number of its mask from the host"

    def __init__(self, parts: Parts, **about: Any) -> None:
        """Raises ValueError for parts that do not belong together."""
        check_parts(about["id"], parts)
        super().__init__(parts, **about)

    def sampling_defaults(self, size: int) -> SamplingDefaults:
        """The pipeline's own `true_cfg_scale`."""
        return SamplingDefaults(sampler="base", guidance_scale=4.0, guidance_rescale=0.0)

    def unseen(self, prompt: str) -> str:
        """Of the template with the prompt."""
        pipe = self.bare
        length = TOKENS + pipe.prompt_template_encode_start_idx
        return unseen([self.parts["tokenizer"]], pipe.prompt_template_encode.format(prompt), length)

    def encoded_once(self, pipe: Any, prompts: list[str]) -> Sequence[Any]:
        """With a mask where the pipeline has none, as no token is filled up."""
        embeds, mask = super().encoded_once(pipe, prompts)
        whole = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        return embeds, whole if mask is None else mask

    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        sigma = t / self.scheduler.config.num_train_timesteps
        return predict(self.transformer, self.dtype, x, sigma, conditioning)


def predict(
    transformer: Any, dtype: torch.dtype, x: Tensor, sigma: Tensor, conditioning: Conditioning
) -> Tensor:
    """The transformer's prediction in `dtype`. sigma: (n,)."""
    n, _, height, width = x.shape
    found = transformer(
        hidden_states=packed(x.to(dtype)),
        encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
        encoder_hidden_states_mask=conditioning["prompt_embeds_mask"],
        timestep=sigma,
        img_shapes=[[(1, height // PATCH, width // PATCH)]] * n,
        return_dict=False,
    )[0]
    return unpacked(found, height, width)


def check_parts(source: str, parts: Parts) -> None:
    """Raises ValueError for parts of several models, and for a kindred model."""
    check_common(source, parts)
    config = parts["transformer"].config
    if others := [name for name in OF_OTHERS if config.get(name)]:
        raise ValueError(
            f"`{source}`: its transformer has {' and '.join(f'`{name}`' for name in others)}, as "
            "those of Qwen-Image-Edit and Qwen-Image-Layered, which cannot be tuned here."
        )
    given = (config.out_channels or config.in_channels) * config.patch_size**2
    if given != config.in_channels:
        raise ValueError(
            f"`{source}`: the transformer takes {config.in_channels} channels and gives {given}: "
            "it is not one that makes pictures of noise alone."
        )
    width = parts["text_encoder"].config.get_text_config().hidden_size
    check_told(source, config.joint_attention_dim, width)
