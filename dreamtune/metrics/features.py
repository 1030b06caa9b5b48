"""Scores as pure functions of features. Rows are L2-normalised float32, so products are cosines."""

from __future__ import annotations

import math

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


def mean_error(values: Tensor, index: Tensor) -> float | None:
    """Standard error of the mean of values (N,), one an image; None for fewer than two images.

    Images of one prompt are not independent: with several a prompt their deviations are added up
    before they are squared, P / (P - 1) * sum_p (sum_{i in p} (x_i - mean))^2 / N^2 for P prompts.
    Of few prompts that can be small by chance, so it is never less than the error over all images,
    std / sqrt(N), which is also that of a single prompt: its mean says nothing of other prompts.

    Args:
        index: (N,), the number of the prompt that image i was made from, from 0.
    """
    n, prompts = len(values), len(index.unique())
    if n < 2:
        return None
    deviations = values.double() - values.double().mean()
    variance = deviations.square().sum().item() / (n - 1) / n
    if 1 < prompts < n:
        sums = deviations.new_zeros(int(index.max()) + 1).index_add(0, index, deviations)
        variance = max(variance, sums.square().sum().item() * prompts / (prompts - 1) / n**2)
    return math.sqrt(variance)


def mean_among_error(a: Tensor) -> float | None:
    """Standard error of `mean_among` over the rows (N, D), by the jackknife: each row is in many
    pairs, so the pairs are not independent. None for fewer than three rows."""
    n = len(a)
    if n < 3:
        return None
    cosines = (a.double() @ a.double().T).fill_diagonal_(0)
    without = (cosines.sum() - 2 * cosines.sum(dim=1)) / ((n - 1) * (n - 2))
    return math.sqrt((n - 1) / n * (without - without.mean()).square().sum().item())


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


def nearest(a: Tensor, b: Tensor) -> Tensor:
    """max_j cos(a_i, b_j): (N, D), (M, D) -> (N,)."""
    return (a @ b.T).amax(dim=1)


def nearest_among(a: Tensor) -> float | None:
    """Mean over i of max_{j != i} cos(a_i, a_j) of rows (N, D), None for fewer than two."""
    if len(a) < 2:
        return None
    return (a @ a.T).fill_diagonal_(-torch.inf).amax(dim=1).mean().item()


def retrieved(images: Tensor, own: Tensor, others: Tensor, owners: Tensor) -> Tensor:
    """1 where the subject that an image is nearest to is its own, else 0: (N,).

    Near is the mean cosine to a subject's photos; a tie is not found.

    Args:
        images: (N, D).
        own: (M, D), photos of the subject.
        others: (G, D), photos of other subjects.
        owners: (G,), the number of the subject that a photo is of, from 0.
    """
    one_hot = torch.nn.functional.one_hot(owners).to(others.dtype)  # (G, subjects)
    means = (images @ others.T) @ one_hot / one_hot.sum(dim=0)
    return (mean_to_set(images, own) > means.amax(dim=1)).float()


def diversity(images: Tensor, index: Tensor) -> Tensor | None:
    """1 - mean cosine of an image and the others of its prompt: (N,); nan for an image that is the
    only one of its prompt, None where each is.

    Args:
        images: (N, D).
        index: (N,), the number of the prompt of image i.
    """
    same = index[:, None] == index
    same.fill_diagonal_(False)
    counts = same.sum(dim=1)
    if not counts.any():
        return None
    cosines = ((images @ images.T) * same).sum(dim=1) / counts
    return torch.where(counts > 0, 1 - cosines, torch.nan)
