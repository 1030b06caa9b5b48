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
from dreamtune.models.patches import PATCH, PatchedBase, packed, unpacked
from dreamtune.models.prefixes import TRANSFORMER, Prefixes
from dreamtune.models.text import CLIP_TOKENIZERS
from dreamtune.models.transformer import TransformerBase, check_told

TOKENS = 512  # of a prompt, as the pipeline's call has it
TRAINED_AT = 1.0  # guidance that the network is told in training, as diffusers' README has it


class Flux(PatchedBase):
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
    nothing = NOTHING

    def __init__(self, parts: Parts, **about: Any) -> None:
        """Raises ValueError for parts that do not belong together."""
        check_parts(about["id"], parts)
        super().__init__(parts, **about)

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
        ids = ids_of(self, x, conditioning)
        return predict(self.transformer, self.dtype, x, sigma, conditioning, *ids)


def ids_of(base: TransformerBase, x: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
    """(patches, 3) and (tokens, 3), where those of latents and of a prompt stand, on the device."""
    grid, tokens = x.shape[-2:], conditioning["prompt_embeds"].shape[1]
    of_picture = base.kept(grid, partial(places, *grid))
    return of_picture, base.kept(tokens, partial(torch.zeros, tokens, 3))


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
    config = parts["transformer"].config
    check_channels(source, parts)
    pooled, t5 = parts["text_encoder"].config.hidden_size, parts["text_encoder_2"].config.d_model
    check_told(source, config.pooled_projection_dim, pooled, "of pooled text")
    check_told(source, config.joint_attention_dim, t5, by="T5 gives")


def check_channels(source: str, parts: Parts) -> None:
    """Raises ValueError for a transformer that takes or gives other patches than the autoencoder's:
    one that is told a picture takes more.
    """
    config, latents = parts["transformer"].config, parts["vae"].config.latent_channels
    given = config.out_channels or config.in_channels
    if (config.in_channels, given) != (latents * PATCH**2,) * 2:
        raise ValueError(
            f"`{source}`: the transformer takes {config.in_channels} channels and gives {given}, "
            f"the patches of its autoencoder have {latents * PATCH**2}: they are not of the same "
            "model, or it is one that is told a picture (Fill, Control), which cannot be tuned "
            "here."
        )
