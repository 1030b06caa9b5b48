"""Latents as a row of patches, 2 a side, as the pipelines of Flux.1 and later ones have them."""

from __future__ import annotations

from torch import Tensor

from dreamtune.models.transformer import TransformerBase

PATCH = 2  # latents a side


class PatchedBase(TransformerBase):
    """A family whose network is told patches, and whose pipeline encodes negative prompts apart."""

    apart = True
    multiple = 16

    @property
    def resolution(self) -> int:
        """That of the pipelines: no file says it."""
        return 128 * self.latent_scale


def check_patches(source: str, taken: int, channels: int) -> None:
    """Raises ValueError where the transformer takes other patches than those of the autoencoder's
    channels.
    """
    if taken != channels * PATCH**2:
        raise ValueError(
            f"`{source}`: the transformer takes {taken} channels, the patches of its autoencoder "
            f"have {channels * PATCH**2}: they are not of the same model."
        )


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
