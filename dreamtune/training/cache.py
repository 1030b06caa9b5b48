"""What of the photos does not change while training: latents and embeddings, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dreamtune.config import Settings
from dreamtune.data.photos import Photo, listed
from dreamtune.data.views import views
from dreamtune.models.base import Base
from dreamtune.models.conditioning import Conditioning, rows_together


@dataclass
class Cache:
    """Everything that does not change while training, on the device.

    mean (N, ...): latents; std: of the encoder's distribution, None where it has none; caption
    (N,): row of the prompts; prompts: (P, ...) each, what the network is told of each prompt;
    pictures: (N, ...) each, and of each picture.
    """

    mean: Tensor
    std: Tensor | None
    caption: Tensor
    prompts: Conditioning
    pictures: Conditioning = field(default_factory=dict)

    def conditioning(self, entry: Tensor) -> Conditioning:
        """What the network is told of entries (n,)."""
        rows = self.caption[entry]
        told = {name: x[rows] for name, x in self.prompts.items()}
        return told | {name: x[entry] for name, x in self.pictures.items()}

    def tensors(self) -> list[Tensor]:
        """All that a step reads."""
        spread = [] if self.std is None else [self.std]
        return [self.mean, *spread, self.caption, *self.prompts.values(), *self.pictures.values()]


# For each slot the entries of the cache it draws from, (M_s,): an entry that stands twice is
# drawn twice as often.
Pool = Sequence[Tensor]


def build_cache(
    config: Settings, base: Base, photos: Sequence[Photo], class_photos: Sequence[Photo]
) -> tuple[Cache, list[list[torch.Tensor]]]:
    """Latents and embeddings of one subject on the device, and the pools (photos, then class
    images) to draw from.

    Raises ValueError that names the photos whose latents are not finite: every step that draws one
    would be skipped.
    """
    crops = 0 if config.center_crop else config.crops
    parts = [
        views(
            list(photos),
            config.resolution,
            config.instance_prompt,
            crops=crops,
            flip=config.random_flip,
            seed=config.seed,
        )
    ]
    if class_photos:
        parts.append(
            views(
                list(class_photos),
                config.resolution,
                config.class_prompt,
                crops=crops,
                seed=config.seed,
            )
        )
    mean, std = base.encode_images(torch.cat([p.pixels for p in parts]))
    check_finite(mean, std, [path for p in parts for path in p.paths])
    captions = [c for p in parts for c in p.captions]
    distinct = list(dict.fromkeys(captions))
    cache = Cache(
        mean,
        std,
        torch.tensor([distinct.index(c) for c in captions], device=base.device),
        base.encode_prompts(distinct),
        base.encode_frames([f for p in parts for f in p.frames]),
    )
    pools, start = [], 0
    for part in parts:
        weights = torch.tensor(part.weights, device=base.device)
        pools.append(
            [torch.arange(len(weights), device=base.device).repeat_interleave(weights) + start]
        )
        start += len(weights)
    return cache, pools


def check_finite(mean: Tensor, std: Tensor | None, paths: Sequence[Path]) -> None:
    """mean, std (N, ...), paths: of entry n."""
    sound = mean.isfinite().flatten(1).all(1)
    if std is not None:
        sound &= std.isfinite().flatten(1).all(1)
    if sound.all():
        return
    bad = list(dict.fromkeys(p.name for p, fine in zip(paths, sound.tolist()) if not fine))
    count = len(set(paths))
    cause = (
        "the autoencoder of the base is damaged"
        if len(bad) == count
        else "take them out, or save them anew"
    )
    raise ValueError(
        f"the base's autoencoder gives numbers that are not finite for {len(bad)} of {count} "
        f"pictures ({listed(bad)}): {cause}."
    )


Pools = list[list[Tensor]]  # photos, and class images; the tickets of each slot


def join(caches: Sequence[Cache], pools: Sequence[Pools]) -> tuple[Cache, Pools]:
    """One cache of several, and pools with the slots of all; a slot draws from its own part."""
    if len(caches) == 1:
        return caches[0], pools[0]
    captions, tickets = [], [[] for _ in pools[0]]  # type: tuple[list[Tensor], Pools]
    entries = prompts = 0
    for cache, own in zip(caches, pools, strict=True):
        captions.append(cache.caption + prompts)
        for kind, slots in zip(tickets, own, strict=True):
            kind.extend(t + entries for t in slots)
        entries += len(cache.mean)
        prompts += len(next(iter(cache.prompts.values())))
    stds = [c.std for c in caches if c.std is not None]
    joined = Cache(
        torch.cat([c.mean for c in caches]),
        torch.cat(stds) if stds else None,
        torch.cat(captions),
        rows_together([c.prompts for c in caches]),
        rows_together([c.pictures for c in caches]),
    )
    return joined, tickets
