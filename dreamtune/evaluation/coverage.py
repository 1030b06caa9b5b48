"""What a scoring had and what it lacked: counted, and said in sentences. Nothing is left out of the
means in silence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamtune.data.photos import listed
from dreamtune.evaluation.layout import is_picture_file
from dreamtune.evaluation.prompt_sets import prompt_counts
from dreamtune.evaluation.protocols import Protocol
from dreamtune.evaluation.results import Row
from dreamtune.evaluation.task import Task
from dreamtune.metrics import METRICS, Metric
from dreamtune.metrics.similarity import RETRIEVAL
from dreamtune.metrics.store import BLACK, PLAIN, FeatureStore, Picture

LACKING = {
    "_held_out": "there are no photos in `reference/`",
    "_own_photo": "no photo in `reference/` has a prompt as its caption",
    RETRIEVAL: "there is no gallery of other subjects",
    "_diversity": "each prompt has one image",
}
# By the ending of a key: what is looked at, and what one that shows nothing does there.
LOOKED_AT = {
    "": ("images", "they count in every mean"),
    "_photos": ("photos", "their subject is compared with them all the same"),
    "_held_out": ("held-out photos", "their subject is compared with them all the same"),
    "_gallery": ("photos of the gallery", "images are compared with them all the same"),
    "_base": ("images of the base", "they count in its means"),
    "_masks": ("masks", "masked scores count their pictures all the same"),
}
FEW = 2  # subjects below which a result says nothing of others


def coverage_of(
    task: Task, rows: Sequence[Row], protocol: Protocol, store: FeatureStore
) -> dict[str, Any]:
    """Counts, and the names of what lacks or is odd, as plain data."""
    found, photos = task.images, task.photos
    images = [image for image in found.images if not image.unrelated]
    subjects = list(dict.fromkeys(image.subject for image in images))
    prompts = list(dict.fromkeys(image.prompt for image in images))
    counts = Counter((image.subject, image.prompt) for image in images)
    expected = protocol.images_per_prompt
    digests = Counter(image.picture.digest for image in found.images)
    trained = {s: {p.digest for p in photos[s].photos} for s in subjects}
    related = {key: not METRICS[key].unrelated for key in protocol.metrics}
    return {
        "subjects": len(subjects),
        "missing_subjects": sorted(set(photos) - set(subjects)),
        "prompts": len(prompts),
        "images": len(images),
        "unrelated_images": len(found.images) - len(images),
        "photos": {s: [len(photos[s].photos), len(photos[s].held_out)] for s in subjects},
        **prompt_counts(images, photos, task.identifier, protocol),
        "images_per_prompt": [min(counts.values()), max(counts.values())],
        "incomplete_prompts": sorted(
            f"{subject}: {prompt} ({count} of {expected})"
            for (subject, prompt), count in counts.items()
            if count < expected
        ),
        "scored": {
            key: [
                sum(r.scores.get(key) is not None for r in rows),
                sum(r.unrelated != of_subject for r in rows),
            ]
            for key, of_subject in related.items()
        },
        "masks": dict(zip(("images", "photos"), masks_of(task), strict=True)),
        "base": base_of(task, protocol),
        **empty_pictures(task, store),
        "repeated": sorted(i.picture.name for i in found.images if digests[i.picture.digest] > 1),
        "copies_of_photos": sorted(
            i.picture.name for i in images if i.picture.digest in trained[i.subject]
        ),
        **skipped_of([*found.skipped, *task.skipped]),
    }


def masks_of(task: Task) -> tuple[int, int]:
    """How many of the images, and of the photos that they are compared with, have a mask."""
    images = [image for image in task.images.images if not image.unrelated]
    subjects = {image.subject for image in images}
    photos = [p for name, own in task.photos.items() if name in subjects for p in own.photos]
    return sum(i.picture.mask is not None for i in images), sum(p.mask is not None for p in photos)


def skipped_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Pictures that lie where none is looked for, and what is none."""
    kinds: dict[str, list[str]] = {"skipped_pictures": [], "skipped_files": []}
    for name in sorted(names):
        picture = not name.endswith("/") and is_picture_file(Path(name).name)
        kinds["skipped_pictures" if picture else "skipped_files"].append(name)
    return kinds


def base_of(task: Task, protocol: Protocol) -> dict[str, Any] | None:
    """What the base has made of what the images are of; None without images of the base. Those of
    unrelated prompts count where the protocol looks at them."""
    if task.base is None:
        return None
    drift = any(METRICS[key].unrelated for key in protocol.metrics)
    ours, theirs = (
        {i.key: i.picture.name for i in found.images if drift or not i.unrelated}
        for found in (task.images, task.base)
    )
    subjects, there = ({key[0] for key in keys} for keys in (ours, theirs))
    lacking = [key for key in ours if key not in theirs]
    return {
        "subjects": [len(subjects & there), len(subjects)],
        "images": [len(ours) - len(lacking), len(ours)],
        "missing_subjects": sorted(subjects - there),
        "missing_images": sorted(ours[key] for key in lacking if key[0] in there),
        "others": sorted(name for key, name in theirs.items() if key not in ours),
        **skipped_of(task.base.skipped),
    }


def empty_pictures(task: Task, store: FeatureStore) -> dict[str, list[str]]:
    """Names of the pictures that are black, or of one colour, by the endings of `LOOKED_AT`."""
    own = task.photos.values()
    seen = [*(i.picture for i in task.images.images), *(p for s in own for p in s.photos)]
    gallery = () if task.gallery is None else task.gallery.values()
    pictures: dict[str, list[Picture]] = {
        "": [image.picture for image in task.images.images],
        "_photos": [picture for subject in own for picture in subject.photos],
        "_held_out": [picture for subject in own for picture in subject.held_out],
        "_gallery": [picture for other in gallery for picture in other.held_out or other.photos],
        "_masks": [picture.mask for picture in seen if picture.mask is not None],
        "_base": [] if task.base is None else [image.picture for image in task.base.images],
    }
    return {
        f"{key}{ending}": sorted(p.name for p in some if store.looks.get(p.digest) == look)
        for ending, some in pictures.items()
        for key, look in (("black", BLACK), ("one_colour", PLAIN))
    }


def warnings_of(coverage: Mapping[str, Any]) -> list[str]:
    """Sentences on what is odd in it."""
    said = [
        *(
            (coverage[f"{key}{ending}"], f"{what} are {look}; {effect}")
            for ending, (what, effect) in LOOKED_AT.items()
            for key, look in (("black", "black"), ("one_colour", "of one colour"))
        ),
        (coverage["repeated"], "images are byte for byte another one"),
        (coverage["copies_of_photos"], "images are byte for byte a training photo"),
        (coverage["incomplete_prompts"], "prompts have fewer images than the protocol makes"),
        (lacking_prompts(coverage), "subjects lack prompts that others have"),
        (coverage["subjects_with_fewer_prompts"], "subjects have fewer prompts than others"),
        (coverage["unnamed_subjects"], "subjects are named by none of their prompts"),
        (coverage["missing_subjects"], "subjects have photos and no images"),
        (coverage["skipped_pictures"], "pictures lie where none belongs, and were skipped"),
        (coverage["skipped_files"], "files or folders are no pictures, and were skipped"),
    ]
    if base := coverage["base"]:
        said += [
            (base["missing_subjects"], "subjects have no images of the base"),
            (
                base["missing_images"],
                "images have none of the base of their prompt and seed to be compared with",
            ),
            (base["others"], "images of the base are of a subject, prompt or seed without images"),
            (
                base["skipped_pictures"],
                "pictures of the base lie where none belongs, and were skipped",
            ),
            (
                base["skipped_files"],
                "files or folders of the base are no pictures, and were skipped",
            ),
        ]
    warnings = [f"{len(names)} {what}: {brief(names)}." for names, what in said if names]
    if (asked := coverage["protocol_prompts"]) and asked[0] < asked[1]:
        warnings.append(
            f"{asked[0]} of {asked[1]} prompts of the protocol are there; no subject has "
            f"{brief(coverage['prompts_of_no_subject'])}."
        )
    low, high = coverage["images_per_prompt"]
    if low != high:
        warnings.append(f"Prompts have {low} to {high} images: those with more weigh more.")
    if coverage["subjects"] < FEW:
        drawn = "prompts" if coverage["prompts"] > 1 else "images"
        warnings.append(
            f"One subject: intervals are over its {drawn}, and say nothing of other subjects."
        )
    for key, (count, total) in coverage["scored"].items():
        if not count:
            why = needs(METRICS[key], coverage["masks"])
            warnings.append(f"{METRICS[key].title} is not known: {why}.")
        elif count < total:
            warnings.append(f"{METRICS[key].title}: {count} of {total} images have it.")
    return warnings


def brief(names: list[str]) -> str:
    return listed(names).removesuffix(", ...") + ", …" * (len(names) > 5)


def lacking_prompts(coverage: Mapping[str, Any]) -> list[str]:
    """Subjects with what they lack."""
    return [
        f"{subject} ({brief([f'`{prompt}`' for prompt in prompts])})"
        for subject, prompts in sorted(coverage["missing_prompts"].items())
    ]


def needs(metric: Metric, masks: Mapping[str, int]) -> str:
    """masks: how many images and photos have one. Prompts are followed around the subject of an
    image alone, photos need no mask for that."""
    if metric.masked:
        sides = ("images",) if metric.kind == "prompt" else ("images", "photos")
        without = [side for side in sides if not masks[side]]
        if not without:
            return "no subject has masks of both its images and its photos"
        return f"the {' and the '.join(without)} have no masks"
    if metric.unrelated:
        return "it needs images of unrelated prompts, of the method and of the base"
    for ending, lacking in LACKING.items():
        if metric.key.endswith(ending):
            return lacking
    return "there is nothing to compare the images with"
