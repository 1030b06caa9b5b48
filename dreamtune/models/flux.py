"""Flux.1 (https://bfl.ai/blog/24-08-01-bfl)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from dreamtune.injection.targets import TARGET_MODULES
from dreamtune.models.base import Parts, SamplingDefaults
from dreamtune.models.clip_text import unseen
from dreamtune.models.conditioning import NOTHING, Conditioning
from dreamtune.models.latent import AUTOENCODERS
from dreamtune.models.patches import PATCH, packed, unpacked
from dreamtune.models.prefixes import TRANSFORMER, Prefixes
from dreamtune.models.text import CLIP_TOKENIZERS
from dreamtune.models.transformer import TransformerBase

TOKENS = 512  # of a prompt, as the pipeline's call has it
TRAINED_AT = 1.0  # guidance that the network is told in training, as diffusers' README has it


class Flux(TransformerBase):
    """A transformer that is told the states of T5, the pooled state of CLIP, and where in picture
    and text each token stands; a distilled one (dev) how strongly its pictures are guided, too.
    """

    pipeline_name = "FluxPipeline"
    network_class = "FluxTransformer2DModel"
    title = "Flux.1"
    encoder_names = ("text_encoder", "text_encoder_2")
    folders = (
        "transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2",
        "scheduler",
    )  # fmt: skip
    classes = {
        "transformer": (("diffusers", "FluxTransformer2DModel"),),
        "vae": AUTOENCODERS[:1],
        "text_encoder": (("transformers", "CLIPTextModel"),),
        "text_encoder_2": (("transformers", "T5EncoderModel"),),
        "tokenizer": CLIP_TOKENIZERS,
        "tokenizer_2": (("transformers", "T5TokenizerFast"), ("transformers", "T5Tokenizer")),
    }
    prefixes = Prefixes(
        TRANSFORMER,
        "lora_unet_",
        (
            "pos_embed.", "time_text_embed.", "context_embedder.", "x_embedder.",
            "transformer_blocks.", "single_transformer_blocks.", "norm_out.", "proj_out.",
        ),
    )  # fmt: skip
    multiple = 16
    target_modules = (
        *TARGET_MODULES, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    )  # fmt: skip
    told = (
        "prompt_embeds", "pooled_prompt_embeds",
        "negative_prompt_embeds", "negative_pooled_prompt_embeds",
    )  # fmt: skip
    encoding = {
        **TransformerBase.encoding, "prompt_2": None, "max_sequence_length": TOKENS,
    }  # fmt: skip
    apart = True
    nothing = NOTHING

    def __init__(self, parts: Parts, **about: Any) -> None:
        """Raises ValueError for parts that do not belong together."""
        check_parts(about["id"], parts)
        super().__init__(parts, **about)

    @property
    def resolution(self) -> int:
        """That of the pipeline: no file says it."""
        return 128 * self.latent_scale

    @property
    def takes_negatives(self) -> bool:
        return not self.transformer.config.guidance_embeds

    def sampling_defaults(self, size: int) -> SamplingDefaults:
        """As the pipeline itself has it: the number that dev is told, and no other guidance."""
        scale = 3.5 if self.transformer.config.guidance_embeds else 1.0
        return SamplingDefaults(sampler="base", guidance_scale=scale, guidance_rescale=0.0)

    def unseen(self, prompt: str) -> str:
        """Of what no encoder sees: CLIP's 77 tokens are fewer than those of T5."""
        return unseen([self.parts["tokenizer_2"]], prompt, TOKENS)

    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        sigma = t / self.scheduler.config.num_train_timesteps
        grid, tokens = x.shape[-2:], conditioning["prompt_embeds"].shape[1]
        img_ids = self.kept(grid, partial(places, *grid))
        txt_ids = self.kept(tokens, partial(torch.zeros, tokens, 3))
        return predict(self.transformer, self.dtype, x, sigma, conditioning, img_ids, txt_ids)


def places(height: int, width: int) -> Tensor:
    """(patches, 3), where those of height times width latents stand."""
    from diffusers import FluxPipeline

    device = torch.device("cpu")
    found: Tensor = FluxPipeline._prepare_latent_image_ids(
        1, height // PATCH, width // PATCH, device, torch.float32
    )
    return found


def predict(
    transformer: Any,
    dtype: torch.dtype,
    x: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    img_ids: Tensor,
    txt_ids: Tensor,
) -> Tensor:
    """The transformer's prediction in `dtype`. sigma: (n,); img_ids: `places`; txt_ids: zeros."""
    guided = transformer.config.guidance_embeds
    found = transformer(
        hidden_states=packed(x.to(dtype)),
        encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
        pooled_projections=conditioning["pooled_prompt_embeds"].to(dtype),
        timestep=sigma,
        img_ids=img_ids,
        txt_ids=txt_ids,
        guidance=torch.full_like(sigma, TRAINED_AT) if guided else None,
        return_dict=False,
    )[0]
    return unpacked(found, *x.shape[-2:])


def check_parts(source: str, parts: Parts) -> None:
    """Raises ValueError for parts of several models."""
    config, latents = parts["transformer"].config, parts["vae"].config.latent_channels
    given = config.out_channels or config.in_channels
    if (config.in_channels, given) != (latents * PATCH**2,) * 2:
        raise ValueError(
            f"`{source}`: the transformer takes {config.in_channels} channels and gives {given}, "
            f"the patches of its autoencoder have {latents * PATCH**2}: they are not of the same "
            "model, or it is one that is told a picture (Fill, Control), which cannot be tuned "
            "here."
        )
    pooled = parts["text_encoder"].config.hidden_size
    if config.pooled_projection_dim != pooled:
        raise ValueError(
            f"`{source}`: the transformer is told {config.pooled_projection_dim} numbers of pooled "
            f"text, its text encoder gives {pooled}: they are not of the same model."
        )
    width = parts["text_encoder_2"].config.d_model
    if config.joint_attention_dim != width:
        raise ValueError(
            f"`{source}`: the transformer is told {config.joint_attention_dim} numbers a token, "
            f"T5 gives {width}: they are not of the same model."
        )
