"""The frozen parts of a Stable Diffusion model: load, encode images and prompts, sample."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dreamtune.models.quiet import move, quiet_diffusers


@dataclass
class Base:
    """A text-to-image model whose parts are frozen. `id` names it in files: a hub id or the last
    part of a path.
    """

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    id: str
    embedded: bool
    device: torch.device
    dtype: torch.dtype
    fused: bool = False
    compiled: bool = False

    @property
    def latent_scale(self) -> int:
        """Pixels a latent, along a side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def resolution(self) -> int:
        """The side in pixels that the base was trained at."""
        return int(self.unet.config.sample_size) * self.latent_scale

    @property
    def prediction_type(self) -> str:
        return str(self.scheduler.config.get("prediction_type", "epsilon"))

    @property
    def zero_snr(self) -> bool:
        """Whether the noisiest step holds no signal at all."""
        return bool(self.scheduler.config.get("rescale_betas_zero_snr", False))

    def alpha_bar(self) -> Tensor:
        """(T,) float32: the share of signal of each timestep."""
        from diffusers import DDPMScheduler

        return (
            DDPMScheduler.from_config(self.scheduler.config).alphas_cumprod.float().to(self.device)
        )

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, batch: int = 4) -> tuple[Tensor, Tensor | None]:
        """(n, 3, h, w) in [-1, 1] -> latents' mean and spread (n, c, h / 8, w / 8), as the UNet
        takes them.

        The spread is None for an autoencoder without one. Computed in float32: SD 1.x's overflows
        in fp16.
        """
        config = self.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        means, stds = [], []
        with self.on_device(torch.float32, self.vae):
            for part in pixels.split(batch):
                encoded = self.vae.encode(part.to(self.device, torch.float32))
                spread = getattr(encoded, "latent_dist", None)
                mean = encoded.latents if spread is None else spread.mean
                means.append((mean - shift) * config.scaling_factor)
                if spread is not None:
                    stds.append(spread.std * config.scaling_factor)
        return torch.cat(means), torch.cat(stds) if stds else None

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """(n, tokens, dim) float32. A prompt that is too long is cut, with a warning."""
        length = self.tokenizer.model_max_length
        for prompt in prompts:
            tokens = self.tokenizer(prompt, truncation=False, verbose=False).input_ids
            if len(tokens) > length:
                logging.getLogger("dreamtune").warning(
                    "The prompt has %d tokens, the text encoder takes %d; its end is not seen: %s",
                    len(tokens),
                    length,
                    prompt,
                )
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        with self.on_device(torch.float32, self.text_encoder):
            parts = [self.text_encoder(part.to(self.device))[0] for part in tokens.split(32)]
        return torch.cat(parts).float()

    @contextlib.contextmanager
    def on_device(self, dtype: torch.dtype, *modules: Any) -> Iterator[None]:
        """Copies of the modules' weights on the training device in `dtype`, dropped afterwards: the
        GPU is free while training, and the weights that wait on the CPU are never rounded.
        """
        if self.device.type == "cpu":  # no copies: there they are
            before = [next(m.parameters()).dtype for m in modules]
            for m in modules:
                move(m, self.device, dtype)
            try:
                yield
            finally:
                for m, old in zip(modules, before, strict=True):
                    move(m, self.device, old)
            return
        kept = [(t, t.data) for m in modules for t in (*m.parameters(), *m.buffers())]
        try:
            for t, here in kept:
                there = here.to(self.device, non_blocking=True)
                t.data = there.to(dtype) if there.is_floating_point() else there
            yield
        finally:
            for t, here in kept:
                t.data = here

    @contextlib.contextmanager
    def sampling(self, sampler: str = "base", prompts: bool = True) -> Iterator[Any]:
        """The pipeline, everything on the device for as long as the block runs. Without `prompts`
        it has no text encoder and takes embeddings, negative ones too.
        """
        parts = (self.vae, self.text_encoder) if prompts else (self.vae,)
        with self.on_device(self.dtype, *parts):
            training = self.unet.training
            self.unet.eval()
            try:
                with self.uncompiled():
                    yield self.pipeline(sampler, prompts)
            finally:
                self.unet.train(training)

    def uncompiled(self) -> contextlib.AbstractContextManager[Any]:
        """A batch of samples has another shape than a step: not worth compiling for."""
        if not self.compiled:
            return contextlib.nullcontext()
        return torch.compiler.set_stance("force_eager")

    def pipeline(self, sampler: str = "base", prompts: bool = True) -> Any:
        """A StableDiffusionPipeline of these very modules, without a safety checker, and without
        `prompts` without a text encoder. sampler: "base" or "dpm++".
        """
        from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        if sampler == "dpm++":
            scheduler = DPMSolverMultistepScheduler.from_config(self.scheduler.config)
        with quiet_diffusers():
            pipe: Any = StableDiffusionPipeline(
                vae=self.vae,
                text_encoder=self.text_encoder if prompts else None,
                tokenizer=self.tokenizer,
                unet=self.unet,
                scheduler=scheduler,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        pipe.set_progress_bar_config(disable=True)
        return pipe


def save_png(image: Image.Image, path: Path) -> None:
    """Whole or not at all: a class image that was cut off must not be taken for one."""
    partial = path.with_name(f".{path.name}.part")
    image.save(partial, "PNG")
    os.replace(partial, path)
