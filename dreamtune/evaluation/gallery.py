"""The subjects that one's own is looked for among: which of a gallery are others than itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dreamtune.evaluation.layout import Photos


def rivals(own: Photos, gallery: Mapping[str, Photos]) -> dict[str, Photos]:
    """Those of the gallery that are not the subject itself, by name or by a photo of both."""
    return {
        name: other
        for name, other in gallery.items()
        if name != own.name and not shared(own, other)
    }


def shared(a: Photos, b: Photos) -> set[str]:
    """Digests of the files that both have, held out or not."""
    first, second = ({p.digest for p in (*own.photos, *own.held_out)} for own in (a, b))
    return first & second


def renamed(subjects: Iterable[Photos], gallery: Mapping[str, Photos]) -> list[str]:
    """A sentence for each subject that the gallery has under another name."""
    return [
        f"Gallery: `{name}` has {count} photo{'s' * (count != 1)} of `{own.name}`, so it is taken "
        f"for the same subject: `{own.name}` is not looked for among its photos."
        for own in subjects
        for name, other in gallery.items()
        if name != own.name and (count := len(shared(own, other)))
    ]
