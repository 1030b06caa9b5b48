"""What Qwen-Image shares with the families that took its parts over: an autoencoder of videos, of
which a picture is one frame, and prompts with a mask.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dreamtune.models.base import Latents, Parts
from dreamtune.models.patches import PatchedBase, check_patches
from dreamtune.models.rules import VIDEO_AUTOENCODER
from dreamtune.models.transformer import TransformerBase

TOKENS = 512  # of a prompt, as the pipelines' calls have it
AUTOENCODER = (("diffusers", "AutoencoderKLQwenImage"),)
TOKENIZERS = (("transformers", "Qwen2Tokenizer"), ("transformers", "Qwen2TokenizerFast"))


class MaskedBase(PatchedBase):
    """A family that is told, beside the states of a prompt, which of its tokens are filled up."""

    autoencoder_rules = VIDEO_AUTOENCODER
    told = (
        "prompt_embeds", "prompt_embeds_mask",
        "negative_prompt_embeds", "negative_prompt_embeds_mask",
    )  # fmt: skip
    encoding = {**TransformerBase.encoding, "max_sequence_length": TOKENS}

    @property
    def latent_scale(self) -> int:
        return int(2 ** len(self.vae.config.temperal_downsample))

    def coded(self, pixels: Tensor) -> Any:
        return self.vae.encode(pixels.unsqueeze(2))

    def as_taken(self, codes: Tensor, std: Tensor | None) -> Latents:
        """By mean and deviation of each channel, without the frame."""
        config = self.vae.config
        mean, spread = (
            torch.tensor(numbers).view(1, -1, 1, 1).to(codes)
            for numbers in (config.latents_mean, config.latents_std)
        )
        taken = (codes.squeeze(2) - mean) / spread
        return Latents(taken, None if std is None else std.squeeze(2) / spread)

    @cached_property
    def bare(self) -> Any:
        """The pipeline without text encoders, which knows the template of prompts."""
        return self.pipeline(prompts=False)


def check_common(source: str, parts: Parts) -> None:
    """Raises ValueError for an autoencoder whose statistics are not of its channels, or that is not
    the transformer's.
    """
    vae, taken = parts["vae"].config, parts["transformer"].config.in_channels
    counts = {vae.z_dim, len(vae.latents_mean), len(vae.latents_std)}
    if counts != {vae.z_dim}:
        raise ValueError(
            f"`{source}`: the autoencoder has {vae.z_dim} channels, `latents_mean` "
            f"{len(vae.latents_mean)} numbers and `latents_std` {len(vae.latents_std)}."
        )
    check_patches(source, taken, vae.z_dim)
