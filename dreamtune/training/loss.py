"""Noise, targets and losses of a diffusion model: tensors in, tensor out."""

from __future__ import annotations

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction")


def rows(a: Tensor, like: Tensor) -> Tensor:
    """One number a row, shaped to multiply a batch of images."""
    return a.view(-1, *[1] * (like.ndim - 1))


def add_noise(x: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """sqrt(ā) x + sqrt(1 - ā) ε, ā (n,): DDPM, arXiv 2006.11239, eq. 4."""
    a = rows(alpha_bar, x)
    return a.sqrt() * x + (1 - a).sqrt() * noise


def target(x: Tensor, noise: Tensor, alpha_bar: Tensor, prediction: str) -> Tensor:
    """What the UNet should say: ε, or v = sqrt(ā) ε - sqrt(1 - ā) x (arXiv 2202.00512)."""
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


def slot_losses(
    prediction: Tensor,
    goal: Tensor,
    weight: Tensor | None,
    slots: int,
    batch: int,
    prior_weight: float,
) -> Tensor:
    """(S,) float32: mean squared error of each slot's photos, plus prior_weight times that of its
    class images.

    prediction, goal (S * n, c, h, w): S contiguous blocks, each `batch` photos and then n - batch
    class images; weight (S * n,) or None for 1.
    """
    if prediction.dtype != torch.float64:
        prediction, goal = prediction.float(), goal.float()
    errors = (prediction - goal).square().flatten(1).mean(1)
    if weight is not None:
        errors = errors * weight
    errors = errors.view(slots, -1)
    loss = errors[:, :batch].mean(1)
    if errors.shape[1] > batch:
        loss = loss + prior_weight * errors[:, batch:].mean(1)
    return loss
