"""Scores as pure functions of features. Rows are L2-normalised float32, so products are cosines."""

from __future__ import annotations

import torch
from torch import Tensor


def normalize(features: Tensor) -> Tensor:
    """features / ||features||, rows of (N, D), in float32 whatever came in.

    Raises:
        ValueError: a row is zero or not finite, which no image or text should give.
    """
    features = features.float()
    norm = features.norm(dim=-1, keepdim=True)
    if not (torch.isfinite(norm) & (norm > 0)).all():
        raise ValueError("an image or text got a feature vector that is zero or not finite")
    return features / norm


def mean_to_set(a: Tensor, b: Tensor) -> Tensor:
    """mean_j cos(a_i, b_j): (N, D), (M, D) -> (N,). Its mean over i is the flat mean of all pairs,
    the averaging of DreamBooth's DINO and CLIP-I as OFT, ETHER and DeLoRA compute it."""
    return (a @ b.T).mean(dim=1)


def mean_among(a: Tensor) -> float | None:
    """Mean cos(a_i, a_j) over i != j: (N, D) -> float, or None for fewer than two rows.

    For a subject's photos this is the "real images" row of the DreamBooth table: what a perfect
    generator of new photos of the same subject would score.
    """
    n = len(a)
    if n < 2:
        return None
    cosines = a @ a.T
    return ((cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1))).item()


def matched(images: Tensor, texts: Tensor) -> Tensor:
    """cos(image_i, text_i): (N, D), (N, D) -> (N,). CLIP-T, raw: not times 100 or 2.5."""
    return (images * texts).sum(dim=1)


def shuffled(images: Tensor, texts: Tensor, index: Tensor) -> Tensor | None:
    """Mean cosine of each image with the prompts that are *not* its own.

    Args:
        images: (N, D).
        texts: (P, D), one row for each distinct prompt.
        index: (N,), the row of `texts` that image i was made from.

    Returns:
        (N,), or None where there is only one prompt. `matched` minus this is how much of a prompt
        arrives in the image: it is 0 for a generator that ignores its prompt, whatever the level of
        the cosines.
    """
    if len(texts) < 2:
        return None
    cosines = images @ texts.T
    own = cosines.gather(1, index[:, None])[:, 0]
    return (cosines.sum(dim=1) - own) / (len(texts) - 1)
