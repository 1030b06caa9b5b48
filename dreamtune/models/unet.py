"""What the Stable Diffusion families share: a UNet, CLIP, a schedule of noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dreamtune.models.clip_text import unseen
from dreamtune.models.diffusion import Diffusion
from dreamtune.models.folder import ModelFolder
from dreamtune.models.latent import AUTOENCODERS, LatentBase, tokenizer_of
from dreamtune.models.prefixes import Prefixes
from dreamtune.models.rules import NETWORK
from dreamtune.models.scheduler import SCHEDULE, load_scheduler
from dreamtune.models.text import CLIP_TOKENIZERS

CLASSES = {
    "unet": (("diffusers", "UNet2DConditionModel"),),
    "vae": AUTOENCODERS,
    "text_encoder": (("transformers", "CLIPTextModel"),),
    "tokenizer": CLIP_TOKENIZERS,
}


class UNetBase(LatentBase):
    """A family whose UNet is told the states of one or two CLIP text encoders."""

    network_name = "unet"
    network_class = "UNet2DConditionModel"
    network_rules = NETWORK
    classes = CLASSES
    prefixes = Prefixes(
        "unet.",
        "lora_unet_",
        (
            "down_blocks.", "mid_block.", "up_blocks.", "conv_in.", "conv_out.", "time_embedding.",
            "add_embedding.",
        ),
    )  # fmt: skip

    @classmethod
    def load_scheduler(
        cls, folder: ModelFolder, named: Sequence[str], prediction_type: str | None
    ) -> Any:
        return load_scheduler(folder, named, prediction_type)

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

    def unseen(self, prompt: str) -> str:
        return unseen([self.parts[tokenizer_of(name)] for name in self.encoder_names], prompt)

    def scheduler_for(self, sampler: str) -> Any:
        from diffusers import DPMSolverMultistepScheduler

        kind = DPMSolverMultistepScheduler if sampler == "dpm++" else type(self.scheduler)
        return kind.from_config(self.scheduler.config)


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
