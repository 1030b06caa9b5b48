"""Flux.2 klein (https://bfl.ai/blog/flux2-klein-towards-interactive-visual-intelligence)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dreamtune.injection.targets import TARGET_MODULES
from dreamtune.models.base import Latents, Parts, SamplingDefaults
from dreamtune.models.conditioning import Conditioning
from dreamtune.models.folder import ModelFolder
from dreamtune.models.patches import PatchedBase, check_patches
from dreamtune.models.prefixes import TRANSFORMER, Prefixes
from dreamtune.models.rules import Flag, rules
from dreamtune.models.text import unseen_in_chat
from dreamtune.models.transformer import TransformerBase, check_told

DISTILLED = "is_distilled"
INDEX = rules(is_distilled=Flag)
TOKENS = 512  # of a prompt, as the pipeline's call has it


class Flux2Klein(PatchedBase):
    """A transformer that is told the states of three layers of Qwen3 on a chat with the prompt, and
    where in picture and text each token stands. Latents are patches of the autoencoder's codes, by
    the statistics that it keeps of them.

    In the later blocks query, key, value and the first layer of the MLP are one weight,
    `to_qkv_mlp_proj`: a method acts on each of the four for itself (`injection.parts`). Their
    second layer, `to_out`, is told attention and MLP side by side, and stays one weight: its output
    is the sum over both, and a gain of the rows of one, as DoRA has it, would need a product of its
    own, which neither the layer nor the contract of a method has.
    """

    pipeline_name = "Flux2KleinPipeline"
    network_class = "Flux2Transformer2DModel"
    title = "Flux.2 klein"
    folders = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    classes = {
        "transformer": (("diffusers", "Flux2Transformer2DModel"),),
        "vae": (("diffusers", "AutoencoderKLFlux2"),),
        "text_encoder": (("transformers", "Qwen3ForCausalLM"),),
        "tokenizer": (("transformers", "Qwen2TokenizerFast"), ("transformers", "Qwen2Tokenizer")),
    }
    prefixes = Prefixes(
        TRANSFORMER,
        "lora_unet_",
        (
            "time_guidance_embed.", "double_stream_modulation_img.",
            "double_stream_modulation_txt.", "single_stream_modulation.", "x_embedder.",
            "context_embedder.", "transformer_blocks.", "single_transformer_blocks.", "norm_out.",
            "proj_out.",
        ),
    )  # fmt: skip
    target_modules = (
        *TARGET_MODULES, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "to_qkv_mlp_proj", "to_out",
    )  # fmt: skip
    encoding = {**TransformerBase.encoding, "max_sequence_length": TOKENS}

    def __init__(self, parts: Parts, **about: Any) -> None:
        """Raises ValueError for parts that do not belong together."""
        check_parts(about["id"], parts)
        super().__init__(parts, **about)

    @classmethod
    def load_folder(
        cls, folder: ModelFolder, dtype: torch.dtype, prediction_type: str | None
    ) -> Parts:
        parts = super().load_folder(folder, dtype, prediction_type)
        stated = folder.config("", INDEX, "model_index.json")
        return {**parts, DISTILLED: stated.get(DISTILLED, False)}

    def sampling_defaults(self, size: int) -> SamplingDefaults:
        """Guidance as the pipeline itself would take it, which has none of a distilled base."""
        scale = 1.0 if self.parts[DISTILLED] else 4.0
        return SamplingDefaults(sampler="base", guidance_scale=scale, guidance_rescale=0.0)

    def unseen(self, prompt: str) -> str:
        return unseen_in_chat(self.parts["tokenizer"], prompt, TOKENS, thinking=False)

    def as_taken(self, codes: Tensor, std: Tensor | None) -> Latents:
        """Without a spread, as diffusers' script takes them."""
        from diffusers import Flux2KleinPipeline

        statistics = self.vae.bn
        mean, var = (
            x.view(1, -1, 1, 1).to(codes) for x in (statistics.running_mean, statistics.running_var)
        )
        patches = Flux2KleinPipeline._patchify_latents(codes)
        return Latents((patches - mean) / (var + self.vae.config.batch_norm_eps).sqrt(), None)

    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        sigma = t / self.scheduler.config.num_train_timesteps
        shapes = x.shape, conditioning["prompt_embeds"].shape
        ids = [self.kept(shape[1:], partial(places, shape)) for shape in shapes]
        return predict(self.transformer, self.dtype, x, sigma, conditioning, *ids)


def places(shape: Sequence[int]) -> Tensor:
    """(tokens, 4), where each stands: of pictures (n, c, h, w), of text (n, tokens, width)."""
    from diffusers import Flux2KleinPipeline

    like = torch.empty(1, *shape[1:], device="meta")
    of = Flux2KleinPipeline
    found = of._prepare_latent_ids(like) if like.ndim == 4 else of._prepare_text_ids(like)
    return found[0]  # type: ignore[no-any-return]


def predict(
    transformer: Any,
    dtype: torch.dtype,
    x: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    img_ids: Tensor,
    txt_ids: Tensor,
) -> Tensor:
    """The transformer's prediction in `dtype`. sigma: (n,); the ids are `places`."""
    found: Tensor = transformer(
        hidden_states=x.to(dtype).flatten(2).mT,
        encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
        timestep=sigma,
        img_ids=img_ids,
        txt_ids=txt_ids,
        guidance=None,  # as the pipeline has it
        return_dict=False,
    )[0]
    return found.mT.reshape(x.shape)


def check_parts(source: str, parts: Parts) -> None:
    """Raises ValueError for parts of several models."""
    config, latents = parts["transformer"].config, parts["vae"].config.latent_channels
    check_patches(source, config.in_channels, latents)
    if config.guidance_embeds:
        raise ValueError(
            f"`{source}`: its transformer is told a guidance (`guidance_embeds`), as that of "
            "Flux.2 dev, which cannot be tuned here."
        )
    width = 3 * parts["text_encoder"].config.hidden_size
    check_told(
        source, config.joint_attention_dim, width, by="three layers of its text encoder give"
    )
