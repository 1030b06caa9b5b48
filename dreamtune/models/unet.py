"""What the Stable Diffusion families share: a UNet, an autoencoder, CLIP, a schedule of noise."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dreamtune.fields import UnreadableFile, from_file, shown
from dreamtune.models.base import Base, Latents, Parts
from dreamtune.models.clip_text import fit, load_text_encoder, load_tokenizer, unseen
from dreamtune.models.conditioning import Arguments, Conditioning, rows_together
from dreamtune.models.diffusion import Diffusion
from dreamtune.models.folder import ModelFolder
from dreamtune.models.prefixes import Prefixes
from dreamtune.models.quiet import quiet_diffusers
from dreamtune.models.rules import AUTOENCODER, NAMED, NETWORK, assumed, components
from dreamtune.models.scheduler import SCHEDULE, load_scheduler

# Part -> library and class, as model_index.json names them. The scheduler has its own table.
TOKENIZERS = (("transformers", "CLIPTokenizer"), ("transformers", "CLIPTokenizerFast"))
CLASSES = {
    "unet": (("diffusers", "UNet2DConditionModel"),),
    "vae": (("diffusers", "AutoencoderKL"), ("diffusers", "AutoencoderTiny")),
    "text_encoder": (("transformers", "CLIPTextModel"),),
    "tokenizer": TOKENIZERS,
    "text_encoder_2": (("transformers", "CLIPTextModelWithProjection"),),
    "tokenizer_2": TOKENIZERS,
}
TOKENIZER_OF = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
PROMPTS = 32  # encoded at once


class UNetBase(Base):
    """A family whose UNet is told the states of one or two CLIP text encoders.

    Attributes:
        told: what the pipeline's `encode_prompt` returns, by the names that its call has for it.
    """

    network_name = "unet"
    network_class = "UNet2DConditionModel"
    told: ClassVar[tuple[str, ...]] = ("prompt_embeds", "negative_prompt_embeds")
    prefixes = Prefixes(
        "unet.",
        "lora_unet_",
        (
            "down_blocks.", "mid_block.", "up_blocks.", "conv_in.", "conv_out.", "time_embedding.",
            "add_embedding.",
        ),
    )  # fmt: skip

    @classmethod
    def load_folder(
        cls, folder: ModelFolder, dtype: torch.dtype, prediction_type: str | None
    ) -> Parts:
        import diffusers

        place = folder.place("", "model_index.json")
        named = from_file(components(cls.folders), folder.index(), f"`{place}`")
        for part, known in CLASSES.items():
            if part in cls.folders and tuple(named[part]) not in known:
                words = " or ".join(".".join(k) for k in known)
                raise UnreadableFile(
                    f"`{place}` names {'.'.join(named[part])[:100]} as {part}; it must be {words}."
                )
        parts: Parts = {"scheduler": load_scheduler(folder, named["scheduler"], prediction_type)}
        tokenizers = [TOKENIZER_OF[name] for name in cls.encoder_names]
        parts |= {name: load_tokenizer(folder, name) for name in tokenizers}
        stated = folder.config("vae", AUTOENCODER)
        vae_class = getattr(diffusers, named["vae"][1])
        parts["unet"] = cls.load_network(folder, dtype)
        parts["vae"] = load_module(folder, "vae", vae_class, stated, torch.float32)
        parts |= cls.load_encoders(folder)
        for name in cls.encoder_names:
            fit(parts[TOKENIZER_OF[name]], parts[name], folder, TOKENIZER_OF[name])
        return parts

    @classmethod
    def load_encoders(cls, folder: ModelFolder) -> Parts:
        kinds = {name: CLASSES[name][0][1] for name in cls.encoder_names}
        return {n: load_text_encoder(folder, torch.float32, n, kind) for n, kind in kinds.items()}

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
                "--resolution 512 for Stable Diffusion 1.x and most of 2.x, 1024 for XL."
            )
        return sides.pop() * self.latent_scale

    @property
    def prediction_type(self) -> str:
        return str(self.scheduler.config.get("prediction_type", "epsilon"))

    @property
    def zero_snr(self) -> bool:
        """Whether the noisiest step holds no signal at all."""
        return bool(self.scheduler.config.get("rescale_betas_zero_snr", False))

    def process(self, snr_gamma: float | None = None) -> Diffusion:
        from diffusers import DDPMScheduler

        # all of it given: `from_config` would take another class's defaults for this one's own
        config = self.scheduler.config
        schedule: Any = DDPMScheduler(**{name: config[name] for name in SCHEDULE if name in config})
        alpha_bar = schedule.alphas_cumprod.float().to(self.device)
        return Diffusion(alpha_bar, self.prediction_type, snr_gamma)

    def latent_shift_and_scale(self) -> tuple[Any, Any]:
        """Latents are (codes - shift) * scale, as the family's pipeline undoes it."""
        config = self.vae.config
        return getattr(config, "shift_factor", None) or 0.0, config.scaling_factor

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, batch: int = 4) -> Latents:
        """(n, 3, h, w) in [-1, 1] -> (n, c, h / 8, w / 8), as the UNet takes them.

        Computed in float32: the autoencoders of SD 1.x and of XL overflow in fp16.
        """
        shift, scale = self.latent_shift_and_scale()
        means, stds = [], []
        with self.on_device(torch.float32, self.vae):
            for part in pixels.split(batch):
                encoded = self.vae.encode(part.to(self.device, torch.float32))
                spread = getattr(encoded, "latent_dist", None)
                mean = encoded.latents if spread is None else spread.mean
                means.append((mean - shift) * scale)
                if spread is not None:
                    stds.append(spread.std * scale)
        return Latents(torch.cat(means), torch.cat(stds) if stds else None)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """What `told` has but the negatives. A prompt that is too long is cut, with a warning."""
        return self._encoded(prompts, guided=False)

    def unseen(self, prompt: str) -> str:
        return unseen([self.parts[TOKENIZER_OF[name]] for name in self.encoder_names], prompt)

    def call_arguments(self, prompts: Sequence[str]) -> Arguments:
        encoded = self._encoded(prompts, guided=True)
        return {name: x.to(self.dtype) for name, x in encoded.items()}

    @torch.no_grad()
    def _encoded(self, prompts: Sequence[str], guided: bool) -> Conditioning:
        """By the pipeline's own `encode_prompt`, float32."""
        for prompt in prompts:
            if told := self.unseen(prompt):
                logging.getLogger("dreamtune").warning("%s: %s", told, prompt)
        parts: list[Conditioning] = []
        with self.on_device(torch.float32, *self.encoders().values()), quiet_diffusers():
            pipe = self.pipeline()
            for start in range(0, len(prompts), PROMPTS):
                found = pipe.encode_prompt(
                    list(prompts[start : start + PROMPTS]),
                    device=self.device,
                    num_images_per_prompt=1,
                    do_classifier_free_guidance=guided,
                )
                named = zip(self.told, found, strict=True)
                parts.append({name: x.float() for name, x in named if x is not None})
        return rows_together(parts)

    def scheduler_for(self, sampler: str) -> Any:
        from diffusers import DPMSolverMultistepScheduler

        kind = DPMSolverMultistepScheduler if sampler == "dpm++" else type(self.scheduler)
        return kind.from_config(self.scheduler.config)


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


def check_unet(source: str, parts: Mapping[str, Any], width: int) -> None:
    """width: numbers a token that the text encoders give. Raises ValueError for parts that do not
    belong together.
    """
    unet, latents = parts["unet"].config, parts["vae"].config.latent_channels
    if unet.in_channels != latents or unet.out_channels != unet.in_channels:
        raise ValueError(
            f"`{source}`: the UNet takes {unet.in_channels} channels and gives "
            f"{unet.out_channels}, its autoencoder gives {latents}: inpainting, depth and "
            "image-conditioned models cannot be tuned here."
        )
    if unet.cross_attention_dim != width:
        raise ValueError(
            f"`{source}`: the UNet is told {unet.cross_attention_dim} numbers a token, its text "
            f"encoders give {width}: they are not of the same model."
        )
