"""What a scoring is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dreamtune.evaluation.layout import Found, Photos


@dataclass(frozen=True)
class Task:
    """What is scored against what.

    photos: by subject. gallery: subjects that one's own is looked for among, by default `photos`;
    one of its name or with a photo of it is itself. base: the base's images, by the same subjects,
    prompts and seeds. identifier: taken out of prompts of subjects whose words are not known.
    sampling: how the images were made, None where that is not known. skipped: names of other files
    in the folders. masks: what made those that were not given, None if nothing did.
    """

    images: Found
    photos: Mapping[str, Photos]
    source: Mapping[str, Any]
    gallery: Mapping[str, Photos] | None = None
    base: Found | None = None
    identifier: str = "sks"
    sampling: Mapping[str, Any] | None = None
    skipped: Sequence[str] = ()
    masks: Mapping[str, Any] | None = None

    @property
    def others(self) -> Mapping[str, Photos]:
        return self.photos if self.gallery is None else self.gallery
