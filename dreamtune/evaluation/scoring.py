"""Scores of folders of generated images: features once a picture, then pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dreamtune.data.photos import listed
from dreamtune.data.words import without_identifier
from dreamtune.evaluation.coverage import coverage_of, masks_of, warnings_of
from dreamtune.evaluation.gallery import renamed, rivals
from dreamtune.evaluation.layout import Generated, Photos
from dreamtune.evaluation.protocols import Protocol, check_encoders
from dreamtune.evaluation.results import Results, Row
from dreamtune.evaluation.task import Task
from dreamtune.files.tensors import hash_of_json
from dreamtune.metrics import Features, Metric, Scorers, TextExtractor, feature_cache
from dreamtune.metrics.similarity import RETRIEVAL
from dreamtune.metrics.store import INSIDE, OUTSIDE, FeatureStore, Picture


def score_images(task: Task, scorers: Scorers, protocol: Protocol) -> Results:
    """Raises ValueError for a subject without photos, encoders that are not the protocol's, and a
    picture that cannot be read, by its name."""
    check_encoders(protocol, scorers.protocol)
    subjects = list(dict.fromkeys(image.subject for image in task.images.images))
    if without := [s for s in subjects if s not in task.photos]:
        raise ValueError(
            f"no photos of {', '.join(f'`{s}`' for s in without)}; there are photos of "
            f"{listed(sorted(task.photos))}. A subject's folders of images and of photos have one "
            "name."
        )
    book = _Book(task, scorers, protocol)
    rows, base, levels = book.rows(task.images.images), [], book.levels(subjects)
    if task.base is not None:
        known = set(subjects)
        base = book.rows([i for i in task.base.images if i.subject in known and not i.unrelated])
    if not any(value is not None for row in rows for value in row.scores.values()):
        coverage = coverage_of(task, rows, protocol, book.store)
        raise ValueError(f"nothing can be scored. {' '.join(warnings_of(coverage))}")
    scored = scorers.protocol
    result = Results(
        source=task.source,
        protocol={
            **protocol.statement(),  # its `sampling` is part of what the images were made with
            "scorers": {k: v for k, v in scored.items() if k not in ("versions", "standard_error")},
            "gallery": gallery_hash(task) if book.needs_gallery else None,
            "sampling": task.sampling,
            **({"masks": task.masks} if task.masks else {}),
        },
        inputs={
            "images": short_hash([[*map(str, row.key), row.sha256] for row in rows]),
            "photos": {s: photos_hash(task.photos[s]) for s in subjects},
        },
        images=rows,
        base=base,
        levels=levels,
        versions=scored["versions"],
        seconds=book.store.seconds,
    )
    coverage = coverage_of(task, rows, protocol, book.store)
    twice = renamed([task.photos[s] for s in subjects], task.others) if book.needs_gallery else []
    return replace(result, coverage=coverage, warnings=[*warnings_of(coverage), *twice])


def gallery_hash(task: Task) -> str:
    return short_hash({name: photos_hash(p) for name, p in sorted(task.others.items())})


def photos_hash(photos: Photos) -> dict[str, str]:
    """Of a subject's photos, their masks, and the held-out ones with their captions."""
    kinds = {"photos": photos.photos, "held_out": photos.held_out}
    found = {
        kind: short_hash(sorted([p.digest, p.mask.digest if p.mask else ""] for p in pictures))
        for kind, pictures in kinds.items()
    }
    return {**found, "captions": short_hash(sorted(map(str, photos.captions)))}


def short_hash(values: Any) -> str:
    return hash_of_json(values)[:16]


@dataclass
class _Book:
    """Pictures of one scoring with their features."""

    task: Task
    scorers: Scorers
    protocol: Protocol
    store: FeatureStore = field(init=False)
    base: dict[Any, Picture] = field(init=False)

    def __post_init__(self) -> None:
        images = self.task.images.images
        named = {image.subject for image in images}
        own = [s for name, s in self.task.photos.items() if name in named]
        photos = [p for s in own for p in (*s.photos, *s.held_out)]
        made = [] if self.task.base is None else self.task.base.images
        of_images, of_photos = masks_of(self.task)
        masked = {
            m.extractor.name
            for m in self.scorers.metrics
            if m.masked and of_images and (of_photos or m.kind == "prompt")
        }
        kept = feature_cache.place()
        self.store = FeatureStore(self.scorers.extractors, sorted(masked), kept)
        self.store.add([*(i.picture for i in images), *photos, *(i.picture for i in made)])
        looking = [m.extractor.name for m in self.scorers.metrics if m.key.endswith(RETRIEVAL)]
        if looking:
            gallery = [p for s in self.task.others.values() for p in s.held_out or s.photos]
            self.store.add(gallery, list(dict.fromkeys(looking)))
        self.base = {i.key: i.picture for i in made}
        if kept is not None:
            feature_cache.trim(kept, feature_cache.limit())

    @property
    def needs_gallery(self) -> bool:
        return any(metric.key.endswith(RETRIEVAL) for metric in self.scorers.metrics)

    def rows(self, images: Sequence[Generated]) -> list[Row]:
        """Scores of each image, in their order."""
        found: dict[Any, Row] = {}
        for subject in dict.fromkeys(image.subject for image in images):
            for unrelated in (False, True):
                own = [i for i in images if i.subject == subject and i.unrelated == unrelated]
                for image, row in zip(own, self._rows(own), strict=True):
                    found[image.key] = row
        return [found[image.key] for image in images]

    def _rows(self, images: Sequence[Generated]) -> list[Row]:
        """Of one subject, either all of its prompts or all of unrelated ones."""
        if not images:
            return []
        scores: list[dict[str, float | None]] = [{} for _ in images]
        pairs: dict[str, int] = {}
        for metric in self.scorers.metrics:
            if metric.unrelated != images[0].unrelated:
                continue
            features = self.features(metric, images)
            for key, value in metric.values(features).items():
                constant = metric.comparison is not None and metric.comparison.constant
                if key != metric.key and constant:
                    continue  # of the photos alone, in `levels`
                pairs[key] = metric.pairs(features) if key == metric.key else 1
                numbers = value.tolist() if isinstance(value, Tensor) else [value] * len(images)
                for row, number in zip(scores, numbers, strict=True):
                    row[key] = self.reported(metric, number)
        pairs = {key: count for key, count in pairs.items() if count != 1}
        against = self.base if images[0].unrelated else {}
        theirs = [against[i.key].digest if i.key in against else "" for i in images]
        return [
            Row(*i.key[:3], i.unrelated, i.picture.name, i.picture.digest, own, pairs, base)
            for i, own, base in zip(images, scores, theirs, strict=True)
        ]

    def levels(self, subjects: Sequence[str]) -> dict[str, dict[str, float]]:
        """key -> subject -> what the photos are among themselves."""
        found: dict[str, dict[str, float]] = {}
        for metric in self.scorers.metrics:
            against = metric.comparison
            if against is None or not against.constant:
                continue
            for subject in subjects:
                photos = self.store.features(
                    metric.extractor.name, self.task.photos[subject].photos
                )
                index = torch.zeros(len(photos), dtype=torch.long)
                value = against.score(Features(photos, photos, index))
                if isinstance(value, float):
                    found.setdefault(metric.comparison_key, {})[subject] = value
        return found

    def reported(self, metric: Metric, value: float | None) -> float | None:
        """A cosine as the protocol reports it; None for nothing to compare with."""
        if value is None or math.isnan(value):
            return None
        if metric.kind != "prompt" or self.protocol.text_score == "cosine":
            return value
        return 100 * value if self.protocol.text_score == "100 cosine" else 2.5 * max(value, 0.0)

    def features(self, metric: Metric, images: Sequence[Generated]) -> Features:
        """What a metric looks at of one subject's images."""
        name, extractor = metric.extractor.name, self.scorers.extractors[metric.extractor.name]
        photos = self.task.photos[images[0].subject]
        pictures = [image.picture for image in images]
        texts = [self.plain(image) for image in images]
        distinct = list(dict.fromkeys(texts))
        found = Features(
            images=self.store.features(name, pictures),
            photos=self.store.features(name, photos.photos),
            index=torch.tensor([distinct.index(text) for text in texts]),
            texts=extractor.texts(distinct) if isinstance(extractor, TextExtractor) else None,
        )
        if photos.held_out:
            found = replace(
                found,
                held_out=self.store.features(name, photos.held_out),
                own_photo=self.own_photo(photos, images),
            )
        if metric.masked:
            return self.with_masks(found, name, photos, pictures)
        if metric.unrelated:
            return self.with_base(found, name, images)
        looking = metric.key.endswith(RETRIEVAL)
        return self.with_gallery(found, name, photos) if looking else found

    def plain(self, image: Generated) -> str:
        """What the text encoder is asked."""
        if self.protocol.identifier == "kept":
            return image.prompt
        words = self.task.photos[image.subject].words
        if words is not None:
            return words.plain(image.prompt)
        return without_identifier(image.prompt, self.task.identifier)

    def own_photo(self, photos: Photos, images: Sequence[Generated]) -> Tensor:
        captions = [caption or "" for caption in photos.captions]
        return torch.tensor(
            [captions.index(i.prompt) if i.prompt in captions else -1 for i in images]
        )

    def with_masks(
        self, found: Features, name: str, photos: Photos, pictures: Sequence[Picture]
    ) -> Features:
        masked = [p for p in photos.photos if p.mask]
        if name not in self.store.masked or not any(p.mask for p in pictures):
            return found
        return replace(
            found,
            inside=self.store.features(name, pictures, INSIDE),
            outside=self.store.features(name, pictures, OUTSIDE),
            photos_inside=self.store.features(name, masked, INSIDE) if masked else None,
        )

    def with_base(self, found: Features, name: str, images: Sequence[Generated]) -> Features:
        """Rows of nan for images whose prompt and seed the base has not made."""
        theirs = [self.base.get(image.key) for image in images]
        if not any(theirs):
            return found
        rows = self.store.features(name, [p for p in theirs if p is not None])
        base = torch.full((len(images), rows.shape[1]), torch.nan)
        base[torch.tensor([p is not None for p in theirs])] = rows
        return replace(found, base=base)

    def with_gallery(self, found: Features, name: str, own: Photos) -> Features:
        others = rivals(own, self.task.others).values()
        if not others:
            return found
        pictures = [p.held_out or p.photos for p in others]
        owners = [number for number, part in enumerate(pictures) for _ in part]
        rows = self.store.features(name, [picture for part in pictures for picture in part])
        return replace(found, others=rows, owners=torch.tensor(owners))
