"""The loss of a step of diffusers' scripts for the flow-matching families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from flow_models import STEPS, Flow
from torch import Tensor

from dreamtune.models.flux2_klein import Flux2Klein
from dreamtune.models.stable_diffusion_3 import StableDiffusion3


def flow_loss(flow: Flow, network: Any, batch: int) -> Callable[[], Tensor]:
    """That of train_dreambooth_lora_sd3.py, _z_image.py or _flux2_klein.py as of diffusers 0.42
    with their defaults, latents and prompts cached: the draw on the host, the place in the
    scheduler's table looked up from the timestep, the network, the loss.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.training_utils import (
        compute_density_for_timestep_sampling,
        compute_loss_weighting_for_sd3,
    )

    weight = next(network.parameters())
    device, dtype = weight.device, weight.dtype
    preconditioned = flow.family is StableDiffusion3  # --precondition_outputs 1
    scheme = "logit_normal" if preconditioned else "none"
    schedule = FlowMatchEulerDiscreteScheduler(STEPS, shift=flow.shift)
    latents = torch.randn(batch, *flow.latents, device=device, dtype=dtype)
    predict = asked(flow, network, batch)

    def sigmas_of(timesteps: Tensor) -> Tensor:
        sigmas, table = schedule.sigmas.to(device, dtype), schedule.timesteps.to(device)
        places = [(table == t).nonzero().item() for t in timesteps]  # the device is waited for
        return sigmas[places].view(-1, 1, 1, 1)

    def loss() -> Tensor:
        noise = torch.randn_like(latents)
        u = compute_density_for_timestep_sampling(scheme, batch, 0.0, 1.0, 1.29)
        timesteps = schedule.timesteps[(u * STEPS).long()].to(device)
        sigmas = sigmas_of(timesteps)
        noisy = (1.0 - sigmas) * latents + sigmas * noise
        said, target = predict(noisy, timesteps), noise - latents
        if preconditioned:
            said, target = said * -sigmas + noisy, latents
        weighting = compute_loss_weighting_for_sd3(scheme, sigmas)
        squares = weighting.float() * (said.float() - target.float()) ** 2
        return squares.reshape(batch, -1).mean(1).mean()

    return loss


def asked(flow: Flow, network: Any, batch: int) -> Callable[[Tensor, Tensor], Tensor]:
    """(noisy latents, timesteps) -> the network's prediction, as the scripts ask for it."""
    weight = next(network.parameters())
    told = flow.conditioning(batch, weight.device, weight.dtype)
    text = told["prompt_embeds"]

    def sd3(x: Tensor, t: Tensor) -> Tensor:
        pooled = told["pooled_prompt_embeds"]
        return network(x, text, pooled, t, return_dict=False)[0]

    def z_image(x: Tensor, t: Tensor) -> Tensor:
        pictures = list(x.unsqueeze(2).unbind())
        found = network(pictures, (STEPS - t) / STEPS, list(text), return_dict=False)[0]
        return -torch.stack(found).squeeze(2)

    if flow.family is Flux2Klein:
        return klein(network, text)
    return sd3 if flow.family is StableDiffusion3 else z_image


def klein(network: Any, text: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """`asked` of Flux.2: tokens, each told where it stands, put back by that."""
    from diffusers import Flux2KleinPipeline as Pipeline

    text_ids = Pipeline._prepare_text_ids(text).to(text.device)

    def ask(x: Tensor, t: Tensor) -> Tensor:
        ids = Pipeline._prepare_latent_ids(x).to(x.device)
        found = network(
            hidden_states=Pipeline._pack_latents(x),
            timestep=t / STEPS,
            guidance=None,
            encoder_hidden_states=text,
            txt_ids=text_ids,
            img_ids=ids,
            return_dict=False,
        )[0]
        return Pipeline._unpack_latents_with_ids(found, ids)

    return ask
