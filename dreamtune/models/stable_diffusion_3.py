"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dreamtune.injection.targets import TARGET_MODULES
from dreamtune.models.base import Parts, SamplingDefaults
from dreamtune.models.clip_text import unseen
from dreamtune.models.conditioning import Conditioning
from dreamtune.models.latent import AUTOENCODERS
from dreamtune.models.prefixes import TRANSFORMER, Prefixes
from dreamtune.models.text import CLIP_TOKENIZERS
from dreamtune.models.transformer import TransformerBase, check_told

CLIP = (("transformers", "CLIPTextModelWithProjection"),)
T5_TOKENS = 256  # of a prompt, as the pipeline's call has it


class StableDiffusion3(TransformerBase):
    """A transformer that is told the states of two CLIP text encoders and of T5, and the pooled
    states of the first two. Without T5 its states are zero, as the pipeline has it.
    """

    pipeline_name = "StableDiffusion3Pipeline"
    network_class = "SD3Transformer2DModel"
    title = "Stable Diffusion 3"
    encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    optional = ("text_encoder_3", "tokenizer_3")
    folders = (
        "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer",
        "tokenizer_2", "tokenizer_3", "scheduler",
    )  # fmt: skip
    classes = {
        "transformer": (("diffusers", "SD3Transformer2DModel"),),
        "vae": AUTOENCODERS[:1],
        "text_encoder": CLIP,
        "text_encoder_2": CLIP,
        "text_encoder_3": (("transformers", "T5EncoderModel"),),
        "tokenizer": CLIP_TOKENIZERS,
        "tokenizer_2": CLIP_TOKENIZERS,
        "tokenizer_3": (("transformers", "T5TokenizerFast"), ("transformers", "T5Tokenizer")),
    }
    prefixes = Prefixes(
        TRANSFORMER,
        "lora_unet_",
        (
            "pos_embed.", "time_text_embed.", "context_embedder.", "transformer_blocks.",
            "norm_out.", "proj_out.",
        ),
    )  # fmt: skip
    multiple = 16
    target_modules = (
        *TARGET_MODULES, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    )  # fmt: skip
    told = (
        "prompt_embeds", "negative_prompt_embeds",
        "pooled_prompt_embeds", "negative_pooled_prompt_embeds",
    )  # fmt: skip
    encoding = {**TransformerBase.encoding, "prompt_2": None, "prompt_3": None}  # as the first
    density = "logit_normal"
    of_picture = True

    def __init__(self, parts: Parts, **about: Any) -> None:
        """Raises ValueError for parts that do not belong together."""
        check_parts(about["id"], parts)
        super().__init__(parts, **about)

    @property
    def resolution(self) -> int:
        return int(self.transformer.config.sample_size) * self.latent_scale

    def check_side(self, size: int) -> None:
        super().check_side(size)
        config = self.transformer.config
        most = config.pos_embed_max_size * config.patch_size * self.latent_scale
        if size > most:
            raise ValueError(
                f"`resolution` must be at most {most}, as far as the positions of `{self.id}` "
                f"reach; got {size}."
            )

    def sampling_defaults(self, size: int) -> SamplingDefaults:
        """Guidance between those that the cards of 3.5 have, 3.5 (large) and 4.5 (medium), and 3's
        7.
        """
        return SamplingDefaults(sampler="base", guidance_scale=4.5, guidance_rescale=0.0)

    def unseen(self, prompt: str) -> str:
        """Of what no encoder sees: CLIP's 77 tokens are fewer than those of T5."""
        tokenizer = self.parts["tokenizer_3"]
        if tokenizer is None:
            return unseen([self.parts["tokenizer"], self.parts["tokenizer_2"]], prompt)
        return unseen([tokenizer], prompt, T5_TOKENS)

    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return predict(self.transformer, self.dtype, x, t, conditioning)


def predict(
    transformer: Any, dtype: torch.dtype, x: Tensor, t: Tensor, conditioning: Conditioning
) -> Tensor:
    """The transformer's prediction in `dtype`."""
    y: Tensor = transformer(
        hidden_states=x.to(dtype),
        timestep=t,
        encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
        pooled_projections=conditioning["pooled_prompt_embeds"].to(dtype),
        return_dict=False,
    )[0]
    return y


def check_parts(source: str, parts: Parts) -> None:
    """Raises ValueError for parts of several models."""
    config, latents = parts["transformer"].config, parts["vae"].config.latent_channels
    if config.in_channels != latents or config.out_channels != latents:
        raise ValueError(
            f"`{source}`: the transformer takes {config.in_channels} channels and gives "
            f"{config.out_channels}, its autoencoder gives {latents}: they are not of the same "
            "model."
        )
    first, second, third = (parts[name] for name in StableDiffusion3.encoder_names)
    pooled = first.config.projection_dim + second.config.projection_dim
    told = config.pooled_projection_dim
    check_told(source, told, pooled, "of pooled text", "its text encoders give")
    width, clip = config.joint_attention_dim, first.config.hidden_size + second.config.hidden_size
    t5 = third.config.d_model if third is not None else width
    if t5 != width or clip > width:
        raise ValueError(
            f"`{source}`: the transformer is told {width} numbers a token, its text encoders give "
            f"{clip} of CLIP and {t5} of T5: they are not of the same model."
        )
