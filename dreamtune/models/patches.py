"""Latents as a row of patches, 2 a side, as the pipelines of Flux.1 and later ones have them."""

from __future__ import annotations

from torch import Tensor

PATCH = 2  # latents a side


def packed(x: Tensor) -> Tensor:
    """(n, c, h, w) -> (n, h w / 4, 4 c)."""
    from diffusers import FluxPipeline

    found: Tensor = FluxPipeline._pack_latents(x, *x.shape)
    return found


def unpacked(patches: Tensor, height: int, width: int) -> Tensor:
    """The other way round."""
    from diffusers import FluxPipeline

    # in its units a pixel is a latent
    found: Tensor = FluxPipeline._unpack_latents(patches, height, width, vae_scale_factor=1)
    return found
