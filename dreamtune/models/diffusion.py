"""Diffusion as DDPM has it: noise and targets of a schedule of signal shares."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamtune.models.base import Process

PREDICTIONS = ("epsilon", "v_prediction")


def rows(a: Tensor, like: Tensor) -> Tensor:
    """One number a row, shaped to multiply a batch of images."""
    return a.view(-1, *[1] * (like.ndim - 1))


def add_noise(x: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """sqrt(ā) x + sqrt(1 - ā) ε, ā (n,): DDPM, arXiv 2006.11239, eq. 4."""
    a = rows(alpha_bar, x)
    return a.sqrt() * x + (1 - a).sqrt() * noise


def target(x: Tensor, noise: Tensor, alpha_bar: Tensor, prediction: str) -> Tensor:
    """What the network should predict: ε, or v = sqrt(ā) ε - sqrt(1 - ā) x (arXiv 2202.00512)."""
    if prediction == "epsilon":
        return noise
    a = rows(alpha_bar, x)
    return a.sqrt() * noise - (1 - a).sqrt() * x


def min_snr_weight(alpha_bar: Tensor, gamma: float, prediction: str) -> Tensor:
    """min(SNR, γ) / SNR, for v-prediction / (SNR + 1): arXiv 2303.09556, with SNR = ā / (1 - ā).

    Written in ā, so that a terminal SNR of zero gives its limit (1 for ε, 0 for v) and not 0/0.
    """
    capped = torch.minimum(alpha_bar, gamma * (1 - alpha_bar))  # min(SNR, γ) (1 - ā)
    if prediction == "epsilon":
        return (capped / alpha_bar.clamp_min(1e-20)).masked_fill(alpha_bar <= 0, 1.0)
    return capped


class Diffusion(Process):
    """The process of a schedule: `alpha_bar` (T,), the share of signal of each timestep.

    prediction: "epsilon" or "v_prediction"; snr_gamma: of min-SNR weighting, None for none.
    """

    def __init__(
        self, alpha_bar: Tensor, prediction: str = "epsilon", snr_gamma: float | None = None
    ) -> None:
        self.alpha_bar, self.prediction, self.snr_gamma = alpha_bar, prediction, snr_gamma

    def timesteps(self, u: Tensor) -> Tensor:
        last = len(self.alpha_bar) - 1
        return (u * len(self.alpha_bar)).long().clamp_max(last)

    def noised(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return add_noise(latents, noise, self.alpha_bar[t])

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return target(latents, noise, self.alpha_bar[t], self.prediction)

    def weight(self, t: Tensor) -> Tensor | None:
        if self.snr_gamma is None:
            return None
        return min_snr_weight(self.alpha_bar[t], self.snr_gamma, self.prediction)

    def constants(self) -> list[Tensor]:
        return [self.alpha_bar]
