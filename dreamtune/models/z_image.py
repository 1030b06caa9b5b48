"""Z-Image (arXiv 2511.22699)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamtune.models.base import Parts, SamplingDefaults
from dreamtune.models.conditioning import Arguments, Conditioning
from dreamtune.models.latent import AUTOENCODERS
from dreamtune.models.prefixes import TRANSFORMER, Prefixes
from dreamtune.models.text import unseen_in_chat
from dreamtune.models.transformer import TransformerBase, check_told

PATCH = 2  # latents a side
TOKENS = 512  # of a prompt, as the pipeline's call has it


class ZImage(TransformerBase):
    """A transformer that is told the last states but one of Qwen3 on a chat with the prompt, rows
    of lengths of their own.
    """

    pipeline_name = "ZImagePipeline"
    network_class = "ZImageTransformer2DModel"
    title = "Z-Image"
    folders = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    classes = {
        "transformer": (("diffusers", "ZImageTransformer2DModel"),),
        "vae": AUTOENCODERS[:1],
        "text_encoder": (("transformers", "Qwen3Model"), ("transformers", "Qwen3ForCausalLM")),
        "tokenizer": (("transformers", "Qwen2Tokenizer"), ("transformers", "Qwen2TokenizerFast")),
    }
    prefixes = Prefixes(
        TRANSFORMER,
        "lora_unet_",
        (
            "all_x_embedder.", "all_final_layer.", "noise_refiner.", "context_refiner.",
            "t_embedder.", "cap_embedder.", "layers.",
        ),
    )  # fmt: skip
    multiple = 16
    encoding = {"max_sequence_length": TOKENS}

    def __init__(self, parts: Parts, **about: Any) -> None:
        """Raises ValueError for parts that do not belong together."""
        check_parts(about["id"], parts)
        super().__init__(parts, **about)

    @property
    def resolution(self) -> int:
        """That of the pipeline: no file says it."""
        return 1024

    def check_side(self, size: int) -> None:
        super().check_side(size)
        most = min(self.transformer.config.axes_lens[1:]) * PATCH * self.latent_scale
        if size > most:
            raise ValueError(
                f"`resolution` must be at most {most}, as far as the positions of `{self.id}` "
                f"reach; got {size}."
            )

    def sampling_defaults(self, size: int) -> SamplingDefaults:
        """Guidance as the pipeline itself would take it; distilled bases (Turbo) want 0."""
        return SamplingDefaults(sampler="base", guidance_scale=5.0, guidance_rescale=0.0)

    def rows_per_image(self, guidance_scale: float) -> int:
        """All rows with the prompt come first."""
        return 2 if guidance_scale > 0 else 1

    def unseen(self, prompt: str) -> str:
        return unseen_in_chat(self.parts["tokenizer"], prompt, TOKENS, thinking=True)

    def conditioning_of(self, encoded: Arguments) -> Conditioning:
        """Filled up with zeros, and the number of tokens (n,)."""
        rows = encoded["prompt_embeds"]
        counts = [len(row) for row in rows]
        filled = [F.pad(row, (0, 0, 0, max(counts) - len(row))) for row in rows]
        tokens = torch.tensor(counts, device=self.device)
        return {"prompt_embeds": torch.stack(filled), "prompt_tokens": tokens}

    def for_step(self, prompts: Conditioning) -> Conditioning:
        """Without the numbers of tokens where they are one number."""
        counts = set(prompts["prompt_tokens"].tolist())
        if len(counts) > 1:
            return prompts
        return {"prompt_embeds": prompts["prompt_embeds"][:, : counts.pop()].contiguous()}

    def why_not_captured(self, prompts: Conditioning) -> str:
        if "prompt_tokens" not in prompts:
            return ""
        counts = sorted(set(prompts["prompt_tokens"].tolist()))
        return (
            f"the network is told on the host how long a prompt is, and these have "
            f"{', '.join(map(str, counts[:-1]))} and {counts[-1]} tokens"
        )

    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        steps = self.scheduler.config.num_train_timesteps
        return predict(self.transformer, self.dtype, x, t / steps, conditioning)


def predict(
    transformer: Any, dtype: torch.dtype, x: Tensor, sigma: Tensor, conditioning: Conditioning
) -> Tensor:
    """The transformer's prediction in `dtype`: it is told the share of the picture, and gives the
    way back to it. sigma: (n,).
    """
    rows = list(conditioning["prompt_embeds"].to(dtype).unbind())
    if "prompt_tokens" in conditioning:
        rows = [row[:n] for row, n in zip(rows, conditioning["prompt_tokens"].tolist())]
    pictures = list(x.to(dtype).unsqueeze(2).unbind())
    found = transformer(pictures, 1 - sigma, rows, return_dict=False)[0]
    return -torch.stack(found).squeeze(2)


def check_parts(source: str, parts: Parts) -> None:
    """Raises ValueError for parts of several models."""
    config, latents = parts["transformer"].config, parts["vae"].config.latent_channels
    if config.in_channels != latents:
        raise ValueError(
            f"`{source}`: the transformer takes {config.in_channels} channels, its autoencoder "
            f"gives {latents}: they are not of the same model."
        )
    if PATCH not in config.all_patch_size:
        raise ValueError(
            f"`{source}`: the transformer must have patches of {PATCH} latents a side, got "
            f"{list(config.all_patch_size)}."
        )
    width = parts["text_encoder"].config.hidden_size
    check_told(source, config.cap_feat_dim, width)
