"""The frozen parts of a Stable Diffusion model: load, encode images and prompts, sample."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dreamtune.fields import UnreadableFile, from_file, shown
from dreamtune.models.base import Base, Conditioning, Latents, SamplingDefaults
from dreamtune.models.clip_text import fit, load_text_encoder, load_tokenizer
from dreamtune.models.diffusion import Diffusion
from dreamtune.models.folder import ModelFolder
from dreamtune.models.prefixes import Prefixes
from dreamtune.models.quiet import move, quiet_diffusers
from dreamtune.models.rules import AUTOENCODER, COMPONENTS, NAMED, NETWORK, PARTS, assumed
from dreamtune.models.scheduler import SCHEDULE, load_scheduler

# Part -> library and class, as model_index.json names them. The scheduler has its own table.
CLASSES = {
    "unet": (("diffusers", "UNet2DConditionModel"),),
    "vae": (("diffusers", "AutoencoderKL"), ("diffusers", "AutoencoderTiny")),
    "text_encoder": (("transformers", "CLIPTextModel"),),
    "tokenizer": (("transformers", "CLIPTokenizer"), ("transformers", "CLIPTokenizerFast")),
}
SMALL_IMAGE = 256  # pixels; up to here less guidance is enough


class StableDiffusion(Base):
    """Stable Diffusion 1.x and 2.x: a UNet that is told a CLIP text encoder's states."""

    network_name = "unet"
    network_class = "UNet2DConditionModel"
    parts = PARTS
    prefixes = Prefixes(
        "unet.",
        "lora_unet_",
        (
            "down_blocks.", "mid_block.", "up_blocks.", "conv_in.", "conv_out.", "time_embedding.",
            "add_embedding.",
        ),
    )  # fmt: skip

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
        notes: Sequence[str] = (),
    ) -> None:
        """Raises ValueError for parts that do not belong together."""
        super().__init__(id, embedded, device, dtype, notes)
        check_parts(id, unet, vae, text_encoder)
        self.unet, self.vae, self.text_encoder = unet, vae, text_encoder
        self.tokenizer, self.scheduler = tokenizer, scheduler
        for module in (unet, vae, text_encoder):
            module.requires_grad_(False).eval()
        move(unet, device, dtype)
        for module in (vae, text_encoder):
            move(module, torch.device("cpu"), torch.float32)

    @classmethod
    def load_folder(
        cls, folder: ModelFolder, dtype: torch.dtype, prediction_type: str | None
    ) -> tuple[Any, ...]:
        import diffusers

        place = folder.place("", "model_index.json")
        named = from_file(COMPONENTS, folder.index(), f"`{place}`")
        for part, known in CLASSES.items():
            if tuple(named[part]) not in known:
                words = " or ".join(".".join(k) for k in known)
                raise UnreadableFile(
                    f"`{place}` names {'.'.join(named[part])[:100]} as {part}; it must be {words}."
                )
        scheduler = load_scheduler(folder, named["scheduler"], prediction_type)
        tokenizer = load_tokenizer(folder)
        stated = folder.config("vae", AUTOENCODER)
        vae_class = getattr(diffusers, named["vae"][1])
        parts = (
            cls.load_network(folder, dtype),
            load_module(folder, "vae", vae_class, stated, torch.float32),
            load_text_encoder(folder, torch.float32),
        )
        fit(tokenizer, parts[2], folder)
        return (*parts, tokenizer, scheduler)

    @classmethod
    def load_network(cls, folder: ModelFolder, dtype: torch.dtype) -> torch.nn.Module:
        from diffusers import UNet2DConditionModel

        part = "unet" if "config.json" in folder.names("unet") else ""
        there = "config.json" in folder.names(part)
        found = folder.config(part, NAMED).get("_class_name") if there else None
        if found != cls.network_class:
            raise UnreadableFile(
                f"`{folder.name}` holds no {cls.network_class}: its config.json must be in it or "
                f"in its unet/, got {str(found)[:100]}."
            )
        stated = folder.config(part, NETWORK)
        return load_module(folder, part, UNet2DConditionModel, stated, dtype)

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
        size = self.unet.config.sample_size
        sides = {size} if isinstance(size, int) else set(size or ())
        if len(sides) != 1:
            found = "no `sample_size`" if not sides else f"a `sample_size` of {list(size)}"
            raise ValueError(
                f"the UNet of `{self.id}` has {found}, so the side of images must be given: "
                "--resolution 512 for Stable Diffusion 1.x and most of 2.x."
            )
        return sides.pop() * self.latent_scale

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

        # all of it given: `from_config` would take another class's defaults for this one's own
        config = self.scheduler.config
        schedule: Any = DDPMScheduler(**{name: config[name] for name in SCHEDULE if name in config})
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
            if told := self.unseen(prompt):
                logging.getLogger("dreamtune").warning("%s: %s", told, prompt)
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

    def unseen(self, prompt: str) -> str:
        count = len(self.tokenizer(prompt, truncation=False, verbose=False).input_ids)
        length = self.tokenizer.model_max_length
        if count <= length:
            return ""
        return (
            f"The prompt has {count} tokens, the text encoder takes {length}; its end is not seen"
        )

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


def load_module(
    folder: ModelFolder, part: str, kind: Any, stated: dict[str, Any], dtype: torch.dtype
) -> Any:
    """A network of diffusers. stated: its config, checked. Raises UnreadableFile for a config of
    another class, and for weights that are not there.
    """
    place, name = folder.place(part, "config.json"), kind.__name__
    if (found := stated.get("_class_name", name)) != name:
        raise UnreadableFile(f"`{place}` is of a {shown(found)}, not of a {name}.")
    module = folder.load(part, kind, dtype)
    if unsaid := assumed(part or "unet", stated, module.config):
        folder.notes.append(f"`{place}` does not say, and it is assumed: {', '.join(unsaid)}.")
    return module


def check_parts(source: str, unet: Any, vae: Any, text_encoder: Any) -> None:
    inputs, outputs = unet.config.in_channels, unet.config.out_channels
    if inputs != vae.config.latent_channels or outputs != inputs:
        raise ValueError(
            f"`{source}`: the UNet takes {inputs} channels and gives {outputs}, its autoencoder "
            f"gives {vae.config.latent_channels}: inpainting, depth and image-conditioned models "
            "cannot be tuned here."
        )
    width = unet.config.cross_attention_dim
    if unet.config.addition_embed_type is not None or isinstance(width, (list, tuple)):
        raise ValueError(
            f"`{source}` is not a Stable Diffusion 1.x/2.x model (SDXL?), and cannot be tuned here."
        )
    if width != text_encoder.config.hidden_size:
        raise ValueError(
            f"`{source}`: the UNet is told {width} numbers a token, its text encoder gives "
            f"{text_encoder.config.hidden_size}: they are not of the same model."
        )
