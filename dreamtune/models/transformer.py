"""What the flow-matching families share: a transformer, and one way to train and to sample."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dreamtune.models.base import Parts
from dreamtune.models.flow import Density, FlowMatching, load_scheduler
from dreamtune.models.folder import ModelFolder
from dreamtune.models.latent import LatentBase
from dreamtune.models.rules import TRANSFORMER


def check_told(
    source: str, told: int, given: int, of: str = "a token", by: str = "its text encoder gives"
) -> None:
    """Raises ValueError where the transformer is told other numbers than there are."""
    if told != given:
        raise ValueError(
            f"`{source}`: the transformer is told {told} numbers {of}, {by} {given}: they are not "
            "of the same model."
        )


class TransformerBase(LatentBase):
    """A family whose transformer is trained by flow matching.

    Attributes:
        title: as users know it.
        density, of_picture: of `FlowMatching`, as diffusers' script for the family has them.
        apart: whether the pipeline encodes negative prompts in a call of their own, and has a
            forward of their own for them. `told` then has what the first call returns, and as much
            of the second.
        nothing: the negative prompt that stands for none, where they are apart.
    """

    network_name = "transformer"
    network_rules = TRANSFORMER
    title: ClassVar[str]
    density: ClassVar[Density] = "uniform"
    of_picture: ClassVar[bool] = False
    apart: ClassVar[bool] = False
    nothing: ClassVar[str] = ""

    def __init__(self, parts: Parts, **about: Any) -> None:
        super().__init__(parts, **about)
        self._kept: dict[Hashable, Tensor] = {}

    @classmethod
    def encoder_dtype(cls, dtype: torch.dtype) -> torch.dtype:
        """bf16 with a network in half precision: they have billions of weights, and those of T5
        overflow in fp16.
        """
        return torch.float32 if dtype == torch.float32 else torch.bfloat16

    @classmethod
    def load_scheduler(
        cls, folder: ModelFolder, named: Sequence[str], prediction_type: str | None
    ) -> Any:
        if prediction_type is not None:
            raise ValueError(
                f"`prediction_type` must be left out for {cls.title}, which always predicts the "
                f"way from the picture to the noise; got {prediction_type}."
            )
        return load_scheduler(folder, named)

    @property
    def prediction_type(self) -> None:
        return None

    def process(self, snr_gamma: float | None = None) -> FlowMatching:
        if snr_gamma is not None:
            raise ValueError(
                f"`snr_gamma` must be left out for {self.title}: min-SNR weights a loss of "
                f"diffusion, and this is flow matching; got {snr_gamma:g}."
            )
        return FlowMatching.of(self.scheduler, self.density, self.of_picture)

    def scheduler_for(self, sampler: str) -> Any:
        if sampler != "base":
            raise ValueError(
                f"`sampler` must be base for {self.title}, the scheduler in its own files: dpm++ "
                f"is for the noise of Stable Diffusion 1.x, 2.x and XL; got {sampler}."
            )
        return type(self.scheduler).from_config(self.scheduler.config)

    def rows_per_image(self, guidance_scale: float) -> int:
        """Where they are apart, a forward with the prompt, and one without."""
        return 1 if self.apart else super().rows_per_image(guidance_scale)

    def encoded_by(self, pipe: Any, prompts: list[str], guided: bool) -> Sequence[Any]:
        if not self.apart:
            return super().encoded_by(pipe, prompts, guided)
        count = len(self.told) // 2
        found = list(self.encoded_once(pipe, prompts)[:count])
        if not guided:
            return [*found, *[None] * count]
        return [*found, *self.encoded_once(pipe, [self.nothing] * len(prompts))[:count]]

    def encoded_once(self, pipe: Any, prompts: list[str]) -> Sequence[Any]:
        """What `encode_prompt` returns of these alone."""
        found: Sequence[Any] = pipe.encode_prompt(prompts, device=self.device, **self.encoding)
        return found

    def kept(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What is made, on the device, once for each key: a recorded step reads it where it is."""
        if key not in self._kept:
            self._kept[key] = make().to(self.device)
        return self._kept[key]
