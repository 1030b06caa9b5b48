"""A base model, or its trained network alone, by folder, file, hub id or "embedded"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dreamtune import embedded
from dreamtune.config import EMBEDDED
from dreamtune.models.folder import load_folder, load_unet, looks_like_a_path
from dreamtune.models.quiet import move, quiet_diffusers
from dreamtune.models.single_file import load_file
from dreamtune.models.stable_diffusion import Base

PACKAGED_MODEL = embedded.MODEL


def load_base(
    name_or_path: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Base:
    """The base from a folder, a single .safetensors file, a hub id, or "embedded".

    The UNet comes in `dtype` on `device`; autoencoder and text encoder wait on the CPU in float32.
    Raises ValueError for what is not a Stable Diffusion 1.x/2.x text-to-image model, and for a hub
    id that cannot be had.
    """
    device = torch.device(device)
    path = locate(name_or_path)
    ours = path is not None and path.resolve() == PACKAGED_MODEL.resolve()
    with quiet_diffusers():
        if path is not None and path.is_file():
            parts = load_file(path, prediction_type)
            name = path.stem
        else:
            parts = load_folder(str(path or name_or_path), revision, variant, dtype)
            name = EMBEDDED if ours else path.resolve().name if path else name_or_path
    unet, vae, text_encoder, tokenizer, scheduler = parts
    check_parts(name_or_path, unet, vae)
    if prediction_type is not None and scheduler.config.get("prediction_type") != prediction_type:
        scheduler = type(scheduler).from_config(scheduler.config, prediction_type=prediction_type)
    for module in (unet, vae, text_encoder):
        module.requires_grad_(False).eval()
    move(unet, device, dtype)
    for module in (vae, text_encoder):
        move(module, torch.device("cpu"), torch.float32)
    return Base(unet, vae, text_encoder, tokenizer, scheduler, name, ours, device, dtype)


def load_network(
    source: Any, *, revision: str | None = None, variant: str | None = None
) -> torch.nn.Module:
    """The trained network: itself, of a pipeline, or loaded alone in float32 on the CPU from all
    that `load_base` takes or from a folder of a UNet. Raises ValueError for anything else.
    """
    if not isinstance(source, (str, Path)):
        network = source if isinstance(source, torch.nn.Module) else getattr(source, "unet", None)
        if not isinstance(network, torch.nn.Module):
            raise ValueError(
                "`base` must be a UNet, a pipeline, a folder, a .safetensors file, a hub id or "
                f'"{EMBEDDED}", got {source!r}'
            )
        return network
    path = locate(source)
    with quiet_diffusers():
        if path is not None and path.is_file():
            network = load_file(path, prediction_type=None)[0]
        else:
            network = load_unet(str(path or source), revision, variant, torch.float32)
    return network.requires_grad_(False).eval()


def locate(name_or_path: str | Path) -> Path | None:
    """Where a base is on this machine, None for a hub id. Raises ValueError for a path with nothing
    there.
    """
    name = str(name_or_path)
    path = PACKAGED_MODEL if name == EMBEDDED else Path(name).expanduser()
    if path.exists():
        return path
    if path == PACKAGED_MODEL or looks_like_a_path(name):
        raise ValueError(
            f"there is no base model at `{name}`: a folder with model_index.json, a .safetensors "
            "file, or a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5."
        )
    return None


def check_parts(source: str, unet: Any, vae: Any) -> None:
    if unet.config.in_channels != vae.config.latent_channels:
        raise ValueError(
            f"`{source}`: the UNet takes {unet.config.in_channels} channels, its autoencoder gives "
            f"{vae.config.latent_channels}: inpainting, depth and image-conditioned models cannot "
            f"be tuned here."
        )
    if unet.config.addition_embed_type is not None or isinstance(
        unet.config.cross_attention_dim, (list, tuple)
    ):
        raise ValueError(
            f"`{source}` is not a Stable Diffusion 1.x/2.x model (SDXL?), and cannot be tuned here."
        )
