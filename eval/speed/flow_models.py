"""Transformers of the flow-matching families, of published shapes and seeded random weights, and
what goes into them at 1024 pixels. No text encoder and no autoencoder: latents and embeddings are
random ones of the right shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from random_models import random_weights
from torch import Tensor

from dreamtune.injection.targets import TARGET_MODULES
from dreamtune.models import flux2_klein, stable_diffusion_3, z_image
from dreamtune.models.conditioning import Conditioning
from dreamtune.models.flow import FlowMatching
from dreamtune.models.flux2_klein import Flux2Klein
from dreamtune.models.quiet import quiet_diffusers
from dreamtune.models.stable_diffusion_3 import StableDiffusion3
from dreamtune.models.transformer import TransformerBase
from dreamtune.models.z_image import ZImage
from dreamtune.training.cache import Cache

STEPS = 1000  # of the scheduler's table, in all their files


@dataclass(frozen=True)
class Flow:
    """latents: (c, h, w) of a picture; told: name -> shape of a prompt's row; shift: in training,
    of the family's scheduler file.
    """

    family: type[TransformerBase]
    config: dict[str, Any]
    latents: tuple[int, int, int]
    told: dict[str, tuple[int, ...]]
    shift: float

    def build(self, device: str, dtype: torch.dtype, seed: int = 0) -> Any:
        """The transformer, made on the device."""
        import diffusers

        with random_weights(seed, device, dtype):
            network = getattr(diffusers, self.family.network_class)(**self.config)
        with quiet_diffusers():
            network.eval().to(dtype)  # its tables of positions are float32
        network.flow = self  # `flow_of` finds it
        return network

    def conditioning(
        self, rows: int, device: str | torch.device, dtype: torch.dtype
    ) -> Conditioning:
        found = {
            name: torch.randn(rows, *shape, device=device, dtype=dtype)
            for name, shape in self.told.items()
        }
        return found

    def cache(self, entries: int, device: str, dtype: torch.dtype) -> Cache:
        """A prompt a picture; latents with a spread, where the trainer's have one."""
        mean = torch.randn(entries, *self.latents, device=device, dtype=dtype)
        std = None if self.family is Flux2Klein else torch.full_like(mean, 0.1)
        caption = torch.arange(entries, device=device)
        return Cache(mean, std, caption, self.conditioning(entries, device, dtype))

    def process(self) -> FlowMatching:
        return FlowMatching(STEPS, self.shift, self.family.density, self.family.of_picture)

    def predictor(self, network: Any) -> Callable[..., Tensor]:
        """(x, t, conditioning) -> the prediction, as the family has it."""
        weight = next(network.parameters())
        dtype = weight.dtype

        @cache  # a recorded step reads them where they are
        def kept(shape: tuple[int, ...]) -> Tensor:
            return flux2_klein.places((1, *shape)).to(weight.device)

        def predict(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            if self.family is StableDiffusion3:
                return stable_diffusion_3.predict(network, dtype, x, t, conditioning)
            if self.family is ZImage:
                return z_image.predict(network, dtype, x, t / STEPS, conditioning)
            ids = (kept(tuple(y.shape[1:])) for y in (x, conditioning["prompt_embeds"]))
            return flux2_klein.predict(network, dtype, x, t / STEPS, conditioning, *ids)

        return predict


def flow_of(network: Any) -> Flow | None:
    """None for a UNet."""
    return network.__dict__.get("flow")


def targets(network: Any) -> tuple[str, ...]:
    """Names of the layers that the trainer adapts of it."""
    flow = flow_of(network)
    return flow.family.target_modules if flow else TARGET_MODULES


# Of 1024 pixels: 128 x 128 latents of 16 numbers of SD 3.5's and Z-Image's autoencoders, 64 x 64
# patches of 2 x 2 x 32 of Flux.2's. Prompts: 77 tokens of CLIP and 256 of T5, as the pipeline's
# call has it; 512 of klein; of Z-Image, which fills up to a multiple of 32 only, a short one's 32.
FLOWS = {
    # transformer/config.json of stabilityai/stable-diffusion-3.5-medium, 2.243B; the rest of it
    # are the class's defaults. Shift 3: its scheduler_config.json.
    "sd35-medium": Flow(
        StableDiffusion3,
        {
            "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
            "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        (16, 128, 128),
        {
            "prompt_embeds": (77 + stable_diffusion_3.T5_TOKENS, 4096),
            "pooled_prompt_embeds": (2048,),
        },
        3.0,
    ),
    "sd35-tiny": Flow(
        StableDiffusion3,
        {
            "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2,
            "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24,
            "caption_projection_dim": 32, "pooled_projection_dim": 10, "pos_embed_max_size": 8,
            "dual_attention_layers": (0,), "qk_norm": "rms_norm",
        },
        (4, 8, 8),
        {"prompt_embeds": (6, 24), "pooled_prompt_embeds": (10,)},
        3.0,
    ),
    # The class's defaults are Z-Image's, 6.155B; 2560 is the width of Qwen3 4B. Shift 3: its
    # scheduler_config.json (Turbo).
    "z-image": Flow(ZImage, {}, (16, 128, 128), {"prompt_embeds": (32, 2560)}, 3.0),
    "z-image-tiny": Flow(
        ZImage,
        {
            "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2,
            "n_kv_heads": 2, "cap_feat_dim": 12, "axes_dims": [4, 6, 6], "axes_lens": [64, 16, 16],
        },
        (4, 8, 8),
        {"prompt_embeds": (32, 12)},
        3.0,
    ),
    # `Klein4BParams` of Black Forest Labs' own code, 3.876B: 5 double and 20 single blocks of
    # 3072, told three layers of Qwen3 4B, 3 x 2560; the rest are the class's defaults. Its
    # scheduler shifts by the size of pictures: 1 in training.
    "flux2-klein-4b": Flow(
        Flux2Klein,
        {
            "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24,
            "joint_attention_dim": 7680, "guidance_embeds": False,
        },
        (128, 64, 64),
        {"prompt_embeds": (flux2_klein.TOKENS, 7680)},
        1.0,
    ),
    "flux2-klein-tiny": Flow(
        Flux2Klein,
        {
            "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 8,
            "num_attention_heads": 4, "joint_attention_dim": 12, "timestep_guidance_channels": 8,
            "axes_dims_rope": (2, 2, 2, 2), "guidance_embeds": False,
        },
        (16, 4, 4),
        {"prompt_embeds": (6, 12)},
        1.0,
    ),
}  # fmt: skip
