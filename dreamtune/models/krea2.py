"""Krea 2 (https://www.krea.ai/blog/krea-2-technical-report)."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from dreamtune.injection.targets import TARGET_MODULES
from dreamtune.models.base import Parts, SamplingDefaults
from dreamtune.models.clip_text import unseen
from dreamtune.models.conditioning import Conditioning
from dreamtune.models.folder import ModelFolder
from dreamtune.models.masked import (
    AUTOENCODER,
    TOKENIZERS,
    TOKENS,
    MaskedBase,
    check_common,
)
from dreamtune.models.patches import PATCH, packed, unpacked
from dreamtune.models.prefixes import TRANSFORMER, Prefixes
from dreamtune.models.rules import Depth, Flag, Positive, Token, Whole, Wholes, rules
from dreamtune.models.transformer import check_told

DISTILLED, LAYERS, SIDE = "is_distilled", "text_encoder_select_layers", "patch_size"
Layers = Annotated[list[Token], Field(min_length=1, max_length=200)]
INDEX = rules(is_distilled=Flag, text_encoder_select_layers=Layers | None, patch_size=Depth)


class Krea2(MaskedBase):
    """A transformer that is told the states of several layers of Qwen3-VL on a template with the
    prompt, filled up to 512 tokens. The base is trained; its adapters are for the distilled one
    (Turbo), too.
    """

    pipeline_name = "Krea2Pipeline"
    network_class = "Krea2Transformer2DModel"
    title = "Krea 2"
    folders = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    classes = {
        "transformer": (("diffusers", "Krea2Transformer2DModel"),),
        "vae": AUTOENCODER,
        "text_encoder": (("transformers", "Qwen3VLModel"),),
        "tokenizer": TOKENIZERS,
    }
    network_rules = rules(
        ("in_channels",),
        in_channels=Whole, num_layers=Depth, attention_head_dim=Whole, num_attention_heads=Depth,
        num_key_value_heads=Depth, intermediate_size=Whole, timestep_embed_dim=Whole,
        text_hidden_dim=Whole, num_text_layers=Depth, text_num_attention_heads=Depth,
        text_num_key_value_heads=Depth, text_intermediate_size=Whole,
        num_layerwise_text_blocks=Depth, num_refiner_text_blocks=Depth, axes_dims_rope=Wholes,
        rope_theta=Positive, norm_eps=Positive,
    )  # fmt: skip
    prefixes = Prefixes(
        TRANSFORMER,
        "lora_unet_",
        (
            "img_in.", "time_embed.", "time_mod_proj.", "text_fusion.", "txt_in.", "rotary_emb.",
            "transformer_blocks.", "final_layer.",
        ),
    )  # fmt: skip
    target_modules = (*TARGET_MODULES, "to_gate")

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
        return parts | {name: stated[name] for name in (DISTILLED, LAYERS, SIDE) if name in stated}

    def sampling_defaults(self, size: int) -> SamplingDefaults:
        """The pipeline's own guidance, which the distilled one is without: it adds that much of the
        way from no prompt to the prompt.
        """
        scale = 0.0 if self.parts.get(DISTILLED) else 4.5
        return SamplingDefaults(sampler="base", guidance_scale=scale, guidance_rescale=0.0)

    def unseen(self, prompt: str) -> str:
        """The end of the template comes after what is cut, and is kept."""
        pipe = self.bare
        rest = pipe.prompt_template_encode_start_idx - pipe.prompt_template_encode_num_suffix_tokens
        text = pipe.prompt_template_encode_prefix + prompt
        return unseen([self.parts["tokenizer"]], text, TOKENS + rest)

    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        sigma = t / self.scheduler.config.num_train_timesteps
        key = (conditioning["prompt_embeds"].shape[1], *x.shape[-2:])
        ids = self.kept(key, partial(places, *key))
        return predict(self.transformer, self.dtype, x, sigma, conditioning, ids)


def places(tokens: int, height: int, width: int) -> Tensor:
    """(tokens + patches, 3), where those of text and of height times width latents stand."""
    from diffusers import Krea2Pipeline

    grid = height // PATCH, width // PATCH
    found: Tensor = Krea2Pipeline.prepare_position_ids(tokens, *grid, torch.device("cpu"))
    return found


def predict(
    transformer: Any,
    dtype: torch.dtype,
    x: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    ids: Tensor,
) -> Tensor:
    """The transformer's prediction in `dtype`. sigma: (n,); ids: `places`."""
    found = transformer(
        hidden_states=packed(x.to(dtype)),
        encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
        encoder_attention_mask=conditioning["prompt_embeds_mask"],
        timestep=sigma,
        position_ids=ids,
        return_dict=False,
    )[0]
    return unpacked(found, *x.shape[-2:])


def check_parts(source: str, parts: Parts) -> None:
    """Raises ValueError for parts of several models."""
    check_common(source, parts)
    config = parts["transformer"].config
    text = parts["text_encoder"].config.get_text_config()
    if parts.get(SIDE, PATCH) != PATCH:
        raise ValueError(f"`{source}`: its `{SIDE}` must be {PATCH}, got {parts[SIDE]}.")
    check_told(source, config.text_hidden_dim, text.hidden_size, "a token and layer")
    layers = parts.get(LAYERS)
    if layers is not None and len(layers) != config.num_text_layers:
        raise ValueError(
            f"`{source}`: the transformer is told {config.num_text_layers} layers of its text "
            f"encoder, `{LAYERS}` has {len(layers)}."
        )
    if layers is not None and max(layers) > text.num_hidden_layers:
        raise ValueError(
            f"`{source}`: `{LAYERS}` has layer {max(layers)}, its text encoder has "
            f"{text.num_hidden_layers}."
        )
