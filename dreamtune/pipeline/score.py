"""`dreamtune score`: an adapter, a run, a pipeline or a folder of images, by a named protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dreamtune import embedded
from dreamtune.data.english import article_of
from dreamtune.data.photos import is_picture_name
from dreamtune.data.words import SubjectWords, read_words
from dreamtune.evaluation.layout import (
    MASKS,
    PROMPT,
    Photos,
    caption_of,
    check_identifier,
    files,
    read_images,
    read_photos,
    read_subject,
    without,
)
from dreamtune.evaluation.protocol_file import find_protocol
from dreamtune.evaluation.protocols import Protocol, check_encoders
from dreamtune.evaluation.results import RESULTS, Results, write_results
from dreamtune.evaluation.scores_page import PAGE, write_page
from dreamtune.evaluation.scoring import score_images
from dreamtune.evaluation.task import Task
from dreamtune.files.find import CONFIG, adapter_file, name_of, run_of, run_settings
from dreamtune.files.formats import read_adapter
from dreamtune.files.whole import check_writable
from dreamtune.metrics import METRICS, Scorers
from dreamtune.metrics.names import EMBEDDED, PACKAGED, offline
from dreamtune.metrics.sam import Sam
from dreamtune.models.load import load_network
from dreamtune.pipeline.sampled import Sampler, sample_into
from dreamtune.training.records import hash_of_file

INDEX = "model_index.json"
EXTRACTORS = tuple(dict.fromkeys(metric.extractor.name for metric in METRICS.values()))


def score(
    source: str | Path,
    *,
    photos: str | Path | None = None,
    protocol: str | Path = "dreamtune",
    weights: Mapping[str, str] | None = None,
    base: str | None = None,
    base_images: str | Path | None = None,
    gallery: str | Path | None = None,
    instance_prompt: str | None = None,
    identifier: str | None = None,
    output_dir: str | Path | None = None,
    sam: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Results:
    """Scores, and results.json, per_image.csv, per_subject.csv and report.html of them.

    Args:
        source: a folder of images (`layout`), the folder of a run, an adapter's file of any format
            that is read, or the folder of a pipeline. An adapter and its base are sampled by the
            protocol first.
        photos: folder of the subjects' photos; of an adapter that of its one subject. A run has its
            own.
        protocol: a preset, or a YAML or JSON file.
        weights: by extractor; without, those of the protocol if they are on this machine, and the
            package's own where the embedded base is scored by a protocol that takes any.
        base: of an adapter that lies in no run.
        base_images: a folder like `source`, of the base's images.
        gallery: subjects that one's own is looked for among [photos].
        instance_prompt, identifier: the words of an adapter's subject, as it was trained.
        output_dir: a new folder [scores/<name>].
        sam: folder of a SAM, for the masks of pictures that have none.

    Raises:
        ValueError: with what to do about it.
    """
    chosen, path = find_protocol(protocol), Path(source).expanduser()
    file, kind = what_is(source)
    name = name_of(file) if file else path.resolve().name
    output = new_folder(Path(output_dir) if output_dir else Path("scores") / name)
    named = weights or {}
    maker = None if sam is None else mask_maker(sam, chosen)
    if kind == "folder":
        refuse(kind, instance_prompt=instance_prompt, pretrained_model_name_or_path=base)
        task = given(path, name, photos, base_images, identifier)
        scorers = load_scorers(chosen, named, False)
    else:
        refuse(kind, base_images=base_images)
        skipped: list[str] = []
        subject, words = subject_of(file, photos, instance_prompt, identifier, skipped)
        sampler = Sampler.of(
            file, base or (str(path) if kind == "pipeline" else None), chosen.sampling
        )
        scorers = load_scorers(chosen, named, sampler.base.embedded)
        about = stated(file, kind, name, sampler)
        how = sample_into(output, sampler, file, words, subject, chosen, tell)
        task = sampled(output, file, about, subject, how, skipped)
        if gallery is None and sampler.base.embedded:
            gallery = embedded.SUBJECTS
    if gallery is not None:
        others, more = read_photos(gallery, identifier)
        task = replace(task, gallery=others, skipped=[*task.skipped, *more])
    if maker is not None:
        tell(f"Masks by SAM into {output / MASKS}")
        task = masked_by(maker, task, output / MASKS)
    tell(f"Scoring {len(task.images.images)} images by protocol {chosen.name}")
    results = score_images(task, scorers, chosen)
    output.mkdir(parents=True, exist_ok=True)
    write_results(results, output)
    pictures = {image.key: image.picture for image in task.images.images}
    write_page(results, output, pictures, task.photos)
    tell(f"Wrote {output / RESULTS} and {output / PAGE}")
    return results


def given(
    folder: Path,
    name: str,
    photos: str | Path | None,
    base_images: str | Path | None,
    identifier: str | None,
) -> Task:
    """A folder of images that anything made."""
    if photos is None:
        raise ValueError("a folder of images needs --photos, what they are scored against.")
    images = read_images(folder)
    place = Path(photos).expanduser()
    known, skipped = photos_of(place, identifier)
    inner = [s for s in {i.subject: None for i in images.images} if (place / s).is_dir()]
    if len(known) == 1 and place.resolve().name in known and inner:
        stray = known[place.resolve().name].photos
        raise ValueError(
            f"`{stray[0].path}` ({len(stray)} in all) lies beside the folders of subjects, such as "
            f"`{inner[0]}`, so `{place}` reads as one subject: move it into the folder of its own."
        )
    if identifier is not None:
        check_identifier(identifier, images, known)
    return Task(
        images,
        known,
        {"kind": "a folder of images", "name": name},
        base=None if base_images is None else read_images(base_images),
        identifier=identifier or "sks",
        skipped=skipped,
    )


def sampled(
    output: Path,
    file: Path | None,
    about: Mapping[str, Any],
    subject: Photos,
    how: Mapping[str, Any],
    skipped: Sequence[str],
) -> Task:
    """The images that `sample_into` made."""
    return Task(
        read_images(output / "images"),
        {subject.name: subject},
        about,
        base=read_images(output / "base") if file else None,
        sampling=how,
        skipped=skipped,
    )


def mask_maker(folder: str, protocol: Protocol) -> Sam:
    """Raises ValueError where no score of the protocol would look at a mask."""
    if not any(METRICS[key].masked for key in protocol.metrics):
        raise ValueError(f"protocol `{protocol.name}` has no masked score: leave --sam out.")
    return Sam(folder, device())


def masked_by(sam: Sam, task: Task, masks: Path) -> Task:
    """The task with a mask for each image, and for each photo that images are compared with."""
    named = {image.subject for image in task.images.images}
    images = [replace(i, picture=sam.masked([i.picture], masks)[0]) for i in task.images.images]
    photos = {
        name: replace(own, photos=sam.masked(own.photos, masks)) if name in named else own
        for name, own in task.photos.items()
    }
    found = replace(task.images, images=images)
    return replace(task, images=found, photos=photos, masks=sam.protocol)


def what_is(source: str | Path) -> tuple[Path | None, str]:
    """(the adapter's file, if it is one; "run", "adapter", "pipeline" or "folder")."""
    path = Path(source).expanduser()
    if path.is_dir() and (path / INDEX).is_file():
        return None, "pipeline"
    try:
        file = adapter_file(source)
    except ValueError:
        if path.is_dir() and not (path / CONFIG).exists() and not any(path.glob("*.safetensors")):
            return None, "folder"
        raise
    return file, "run" if run_of(file) else "adapter"


def refuse(kind: str, **given: Any) -> None:
    """What would be ignored is an error."""
    if unused := [name for name, value in given.items() if value is not None]:
        source = "a folder of images" if kind == "folder" else f"{article_of(kind)} {kind}"
        raise ValueError(f"`{unused[0]}` has no meaning for {source}: leave it out.")


def new_folder(folder: Path) -> Path:
    """Raises ValueError for one that holds something: nothing is overwritten."""
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"`{folder}` is not empty: name another with --output_dir.")
    check_writable(folder)
    return folder


def photos_of(folder: Path, identifier: str | None = None) -> tuple[dict[str, Photos], list[str]]:
    """Of a folder of subjects, or of one subject's own. identifier: see `read_subject`."""
    if folder.is_dir() and any(is_picture_name(p) for p in files(folder)):
        skipped: list[str] = []
        found = read_subject(folder, None, skipped, identifier)
        return {found.name: found}, skipped
    return read_photos(folder, identifier)


def subject_of(
    file: Path | None,
    photos: str | Path | None,
    prompt: str | None,
    identifier: str | None,
    skipped: list[str] | None = None,
) -> tuple[Photos, SubjectWords]:
    """Whose images an adapter makes, from what was given, else from the run. skipped: gets the
    names of what is not read of its folder. Raises ValueError for what nothing tells."""
    run = run_settings(file) if file else {}
    said = photos or run.get("instance_data_dir")
    if said is None:
        raise ValueError("an adapter outside a run needs --photos, the folder of its subject.")
    own = str(said).removeprefix(f"{EMBEDDED}:")
    folder = embedded.subject(own).folder if own != str(said) else Path(said).expanduser()
    known, others = photos_of(folder, identifier or run.get("identifier"))
    if skipped is not None:
        skipped += others
    if len(known) != 1:
        raise ValueError(
            f"an adapter is of one subject, and `{folder}` holds {len(known)}: name its folder, "
            f"such as --photos {folder / next(iter(known))}."
        )
    found = without(next(iter(known.values())), str(run.get("holdout") or "0"))
    prompt = prompt or run.get("instance_prompt")
    if prompt is None and found.words is not None:
        own = found.words.identifier
        if identifier is not None and identifier.split() != own.split():
            raise ValueError(
                f"--identifier `{identifier}` is not in the `{PROMPT}` of `{found.name}`, which "
                f"says `{own}`: leave it out, or give the prompt with --instance_prompt."
            )
        return found, found.words
    identifier = identifier or run.get("identifier")
    captions = [c for p in found.photos if (c := caption_of(p.path)) is not None]
    if prompt is None and not captions:
        raise ValueError(
            "nothing says the subject's words: give --instance_prompt, such as 'a sks dog', as it "
            "was trained."
        )
    words = read_words(prompt, run.get("class_prompt"), identifier, captions)
    return replace(found, words=words), words


def load_scorers(protocol: Protocol, named: Mapping[str, str], on_embedded: bool) -> Scorers:
    """The protocol's extractors: those that are named, else what is on this machine."""
    weights, asked = {}, dict(named)
    for kind, encoder in protocol.encoders.items():
        own = EMBEDDED if on_embedded and kind in PACKAGED and not encoder.architecture else None
        weights[kind] = asked.pop(kind, own or encoder.weights)
    if asked:
        raise ValueError(
            f"--{next(iter(asked))} is of no metric of protocol `{protocol.name}`, which uses "
            f"{', '.join(protocol.encoders)}: leave it out."
        )
    resizings = {k: e.resizing for k, e in protocol.encoders.items() if e.resizing is not None}
    with offline(set(weights) - set(named)):
        found = Scorers.load(weights, protocol.metrics, device(), resizings=resizings)
    check_encoders(protocol, found.protocol)  # before hours of sampling
    return found


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def stated(file: Path | None, kind: str, name: str, sampler: Sampler) -> dict[str, Any]:
    """What a result says of its source; no path."""
    about = {"kind": f"{article_of(kind)} {kind}", "name": name, "base": sampler.base.id}
    if file is not None:
        read = read_adapter(file, load_network(sampler.base.network))
        about |= {"method": read.exported_from or read.method, "sha256": hash_of_file(file)}
    return about
