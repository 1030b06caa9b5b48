"""The frozen parts of a Stable Diffusion model: load, encode images and prompts, sample."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dreamtune.models.base import Base, Conditioning, Latents, SamplingDefaults
from dreamtune.models.diffusion import Diffusion
from dreamtune.models.folder import explained, hub_options, load_part, read_index
from dreamtune.models.prefixes import Prefixes
from dreamtune.models.quiet import move, quiet_diffusers

SMALL_IMAGE = 256  # pixels; up to here less guidance is enough


class StableDiffusion(Base):
    """Stable Diffusion 1.x and 2.x: a UNet that is told a CLIP text encoder's states."""

    network_name = "unet"
    network_class = "UNet2DConditionModel"
    prefixes = Prefixes("unet.", "lora_unet_", ("down_blocks.", "mid_block.", "up_blocks."))

    def __init__(
        self,
        unet: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        *,
        id: str,
        embedded: bool,
        device: torch.device,
        dtype: torch.dtype,
        prediction_type: str | None = None,
    ) -> None:
        """prediction_type: where the files do not say, or say it wrongly. Raises ValueError for
        parts that do not belong together.
        """
        super().__init__(id, embedded, device, dtype)
        check_parts(id, unet, vae)
        if prediction_type not in (None, scheduler.config.get("prediction_type")):
            config = scheduler.config
            scheduler = type(scheduler).from_config(config, prediction_type=prediction_type)
        self.unet, self.vae, self.text_encoder = unet, vae, text_encoder
        self.tokenizer, self.scheduler = tokenizer, scheduler
        for module in (unet, vae, text_encoder):
            module.requires_grad_(False).eval()
        move(unet, device, dtype)
        for module in (vae, text_encoder):
            move(module, torch.device("cpu"), torch.float32)

    @classmethod
    def load_folder(
        cls, source: str, revision: str | None, variant: str | None, dtype: torch.dtype
    ) -> tuple[Any, ...]:
        import diffusers
        import transformers

        index = read_index(source, revision)
        options, weights = hub_options(revision), hub_options(revision, variant)
        unet = cls.load_network(source, revision, variant, dtype)
        weights["torch_dtype"] = torch.float32
        with explained(source):
            vae = getattr(diffusers, index["vae"][1])
            scheduler = getattr(diffusers, index["scheduler"][1])
            return (
                unet,
                vae.from_pretrained(source, subfolder="vae", **weights),
                transformers.CLIPTextModel.from_pretrained(
                    source, subfolder="text_encoder", **weights
                ),
                transformers.CLIPTokenizer.from_pretrained(
                    source, subfolder="tokenizer", **options
                ),
                scheduler.from_pretrained(source, subfolder="scheduler", **options),
            )

    @classmethod
    def load_network(
        cls, source: str, revision: str | None, variant: str | None, dtype: torch.dtype
    ) -> torch.nn.Module:
        from diffusers import UNet2DConditionModel

        return load_part(UNet2DConditionModel, "unet", source, revision, variant, dtype)

    @property
    def network(self) -> Any:
        return self.unet

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

    def sampling_defaults(self, size: int) -> SamplingDefaults:
        return SamplingDefaults(
            sampler="base" if self.zero_snr else "dpm++",
            guidance_scale=4.0 if size <= SMALL_IMAGE else 7.5,
            guidance_rescale=0.3 if self.zero_snr else 0.0,
        )

    def process(self, snr_gamma: float | None = None) -> Diffusion:
        from diffusers import DDPMScheduler

        schedule = DDPMScheduler.from_config(self.scheduler.config)
        alpha_bar = schedule.alphas_cumprod.float().to(self.device)
        return Diffusion(alpha_bar, self.prediction_type, snr_gamma)

    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return predict(self.unet, self.dtype, x, t, conditioning)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, batch: int = 4) -> Latents:
        """(n, 3, h, w) in [-1, 1] -> (n, c, h / 8, w / 8), as the UNet takes them.

        Computed in float32: SD 1.x's autoencoder overflows in fp16.
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
        return Latents(torch.cat(means), torch.cat(stds) if stds else None)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """prompt_embeds (n, tokens, dim). A prompt that is too long is cut, with a warning."""
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
        return {"prompt_embeds": torch.cat(parts).float()}

    def call_arguments(self, conditioning: Conditioning, nothing: Conditioning) -> Conditioning:
        prompts = conditioning["prompt_embeds"].to(self.dtype)
        empty = nothing["prompt_embeds"].to(self.dtype).expand_as(prompts)
        return {"prompt_embeds": prompts, "negative_prompt_embeds": empty}

    def waiting_parts(self, prompts: bool) -> Sequence[torch.nn.Module]:
        return (self.vae, self.text_encoder) if prompts else (self.vae,)

    def pipeline(self, sampler: str = "base", prompts: bool = True) -> Any:
        """A StableDiffusionPipeline without a safety checker; see `Base`."""
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


def predict(
    unet: Any, dtype: torch.dtype, x: Tensor, t: Tensor, conditioning: Conditioning
) -> Tensor:
    """The UNet's prediction in `dtype`."""
    text = conditioning["prompt_embeds"]
    y: Tensor = unet(x.to(dtype), t, text.to(dtype), return_dict=False)[0]
    return y


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
