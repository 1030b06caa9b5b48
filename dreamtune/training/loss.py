"""The losses of a batch, a slot each."""

from __future__ import annotations

import torch
from torch import Tensor


def slot_losses(
    prediction: Tensor,
    target: Tensor,
    weight: Tensor | None,
    slots: int,
    batch: int,
    prior_weight: float,
) -> Tensor:
    """(S,) float32: mean squared error of each slot's photos, plus prior_weight times that of its
    class images.

    prediction, target (S * n, ...): S contiguous blocks, each `batch` photos and then n - batch
    class images; weight (S * n,) or None for 1.
    """
    if prediction.dtype != torch.float64:
        prediction, target = prediction.float(), target.float()
    errors = (prediction - target).square().flatten(1).mean(1)
    if weight is not None:
        errors = errors * weight
    errors = errors.view(slots, -1)
    loss = errors[:, :batch].mean(1)
    if errors.shape[1] > batch:
        loss = loss + prior_weight * errors[:, batch:].mean(1)
    return loss
