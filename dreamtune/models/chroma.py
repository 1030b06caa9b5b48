"""Chroma (https://huggingface.co/lodestones/Chroma1-Base), made of Flux.1 schnell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dreamtune.models.base import Parts, SamplingDefaults
from dreamtune.models.clip_text import unseen
from dreamtune.models.conditioning import Conditioning
from dreamtune.models.flux import TOKENS, Flux, check_channels, ids_of
from dreamtune.models.latent import AUTOENCODERS, cast
from dreamtune.models.patches import PatchedBase, packed, unpacked
from dreamtune.models.prefixes import TRANSFORMER, Prefixes
from dreamtune.models.rules import Depth, DepthOr0, Whole, Wholes, rules
from dreamtune.models.transformer import TransformerBase, check_told


class Chroma(PatchedBase):
    """A transformer that is told the states of T5, and a mask: 0 where they are filled up, but for
    the first of these. As in the pipeline it is added to the attention, so that it weakens what is
    0, and leaves nothing out.
    """

    pipeline_name = "ChromaPipeline"
    network_class = "ChromaTransformer2DModel"
    title = "Chroma"
    folders = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    classes = {
        "transformer": (("diffusers", "ChromaTransformer2DModel"),),
        "vae": AUTOENCODERS[:1],
        "text_encoder": Flux.classes["text_encoder_2"],
        "tokenizer": Flux.classes["tokenizer_2"],
    }
    network_rules = rules(
        ("in_channels",),
        patch_size=Depth, in_channels=Whole, out_channels=Whole | None, num_layers=Depth,
        num_single_layers=DepthOr0, attention_head_dim=Whole, num_attention_heads=Depth,
        joint_attention_dim=Whole, axes_dims_rope=Wholes, approximator_num_channels=Whole,
        approximator_hidden_dim=Whole, approximator_layers=Depth,
    )  # fmt: skip
    prefixes = Prefixes(
        TRANSFORMER,
        "lora_unet_",
        (
            "pos_embed.", "time_text_embed.", "distilled_guidance_layer.", "context_embedder.",
            "x_embedder.", "transformer_blocks.", "single_transformer_blocks.", "norm_out.",
            "proj_out.",
        ),
    )  # fmt: skip
    target_modules = Flux.target_modules
    told = (
        "prompt_embeds", "prompt_attention_mask",
        "negative_prompt_embeds", "negative_prompt_attention_mask",
    )  # fmt: skip
    encoding = {**TransformerBase.encoding, "max_sequence_length": TOKENS}
    uncaptured = "the network of Chroma makes numbers on the host in each forward"
    uncheckpointed = (
        "diffusers recomputes the later blocks of Chroma without the mask of the prompt, which are "
        "then told other things than in pictures"
    )

    def __init__(self, parts: Parts, **about: Any) -> None:
        """Raises ValueError for parts that do not belong together."""
        check_parts(about["id"], parts)
        super().__init__(parts, **about)

    def sampling_defaults(self, size: int) -> SamplingDefaults:
        """The pipeline's own guidance."""
        return SamplingDefaults(sampler="base", guidance_scale=5.0, guidance_rescale=0.0)

    def unseen(self, prompt: str) -> str:
        return unseen([self.parts["tokenizer"]], prompt, TOKENS)

    def encoded_once(self, pipe: Any, prompts: list[str]) -> Sequence[Any]:
        """States and mask."""
        found = pipe.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False, **self.encoding
        )
        return found[0], found[2]

    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        sigma = t / self.scheduler.config.num_train_timesteps
        ids = ids_of(self, x, conditioning)
        return predict(self.transformer, self.dtype, x, sigma, conditioning, *ids)


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
    from diffusers import ChromaPipeline

    of_text = cast(conditioning["prompt_attention_mask"], dtype)
    mask = ChromaPipeline._prepare_attention_mask(None, len(x), len(img_ids), dtype, of_text)
    found = transformer(
        hidden_states=packed(x.to(dtype)),
        encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
        attention_mask=mask,
        timestep=sigma,
        img_ids=img_ids,
        txt_ids=txt_ids,
        return_dict=False,
    )[0]
    return unpacked(found, *x.shape[-2:])


def check_parts(source: str, parts: Parts) -> None:
    """Raises ValueError for parts of several models."""
    check_channels(source, parts)
    told, t5 = parts["transformer"].config.joint_attention_dim, parts["text_encoder"].config.d_model
    check_told(source, told, t5, by="T5 gives")
