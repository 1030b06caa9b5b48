"""The parts of a benchmark that `dreambench.py` deals out: subjects that train stacked, then their
images. `benchmark_scores` scores them.

A part is a function of files: run again it does what is missing, so it may be stopped anywhere and
go on anywhere that sees the folder.

    WORK/plan.json                                what is fixed by the first start
    WORK/photos/<part>/<subject>/                 photos, reference/, prompt.txt
    WORK/runs/<method>/seed-<n>/<part>/<subject>/ runs of the trainer
    WORK/images/<method>/<subject>/<prompt>/      and of the base in images/base
    WORK/done/                                    a file for each part that is finished
    WORK/results/<method>/                        results.json, report.html
    WORK/results/report.html                      all methods on one page; comparisons.txt
    WORK/scored/                                  what each method's results are of
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmark_photos import check_photos, copy_photos, fingerprint, first_other

from dreamtune import embedded
from dreamtune.config import Config
from dreamtune.evaluation.layout import Found, Photos, read_photos, without
from dreamtune.evaluation.prompts import templates, unrelated
from dreamtune.evaluation.protocol_file import find_protocol
from dreamtune.evaluation.protocols import Protocol
from dreamtune.files.find import adapter_file
from dreamtune.files.whole import whole
from dreamtune.flags import train_config
from dreamtune.pipeline.load import load
from dreamtune.pipeline.sampled import Sampler, make, named_prompts
from dreamtune.training.train import train_stacked

BASE = "base"
PLAN, CLASSES, IDENTIFIER = "plan.json", "prompts_and_classes.txt", "sks"
# What a continuation may not change, and of a protocol file what its images depend on.
KEPT = ("benchmark", "subjects", "protocol", "training", "images", "photos")
IMAGES = ("prompts", "images_per_prompt", "first_seed", "unrelated", "sampling")


@dataclass(frozen=True)
class Plan:
    """What is made. subjects: name -> class noun. parts: subjects that train at once. methods: each
    a name and its options, `oft,blocks=4`. seeds: of training. training: flags of the trainer.
    images: what the protocol says of them. photos: subject -> fingerprint of its photos. Both are
    {} in the plan of an older version."""

    benchmark: str
    subjects: dict[str, str]
    parts: list[list[str]]
    methods: list[str]
    seeds: list[int]
    protocol: str
    training: list[str] = field(default_factory=list)
    images: dict[str, Any] = field(default_factory=dict)
    photos: dict[str, str] = field(default_factory=dict)

    def tasks(self) -> list[tuple[str, int, int]]:
        """(method or BASE, training seed, number of the part), in an order that deals well."""
        kinds = [BASE, *self.methods]
        return [(m, s, p) for s in self.seeds for m in kinds for p in range(len(self.parts))]


def images_by(protocol: Protocol) -> dict[str, Any]:
    """What `Plan.images` holds, as it comes back from the plan's file."""
    said = protocol.statement()
    found: dict[str, Any] = plain_json({name: said[name] for name in IMAGES})
    return found


def plain_json(values: Any) -> Any:
    """As they come back from a file."""
    return json.loads(json.dumps(values))


def name_of(task: tuple[str, int, int]) -> str:
    method, seed, part = task
    return f"{method}-seed-{seed}-part-{part:02}"


def sources(benchmark: str, photos: Path | None) -> dict[str, tuple[Path, str]]:
    """Subject -> (its photo folder, its class noun). Raises ValueError for what is not there."""
    if benchmark == "emojibench":
        return {s.id: (s.folder, s.class_word) for s in embedded.subjects("report")}
    if photos is None or not photos.is_dir():
        raise ValueError("`dreambooth` needs --photos: the data set, a folder a subject.")
    lines = (photos / CLASSES).read_text().splitlines() if (photos / CLASSES).is_file() else []
    nouns = dict(
        line.strip().split(",") for line in lines if line.count(",") == 1 and "'" not in line
    )
    folders = [p for p in sorted(photos.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    if not folders:
        raise ValueError(f"`{photos}` holds no folder of a subject: name another by --photos.")
    if without := [p.name for p in folders if p.name not in nouns]:
        raise ValueError(
            f"`{photos / CLASSES}` must say the class of each subject, a line `name,class`; it "
            f"lacks {', '.join(without)}."
        )
    return {p.name: (p, nouns[p.name]) for p in folders}


def prepare(work: Path, plan: Plan, found: dict[str, tuple[Path, str]]) -> None:
    """Copies the photos, with the words of each subject, and writes the plan. Raises ValueError for
    a photo that cannot be read, before anything is copied, and where there are others: the trainer
    would take them for subjects."""
    wanted = {f"{n:02}/{subject}" for n, part in enumerate(plan.parts) for subject in part}
    there = {p.relative_to(work / "photos").as_posix() for p in (work / "photos").glob("*/*")}
    if others := sorted(there - wanted):
        raise ValueError(
            f"`{work / 'photos'}` holds `{others[0]}`, which is no subject of this benchmark: a "
            "start that was cut off may have left it. Take the folder away, or name another --work."
        )
    for subject in plan.subjects:
        check_photos(found[subject][0])
    for subject, target in copies(work, plan).items():
        source, noun = found[subject]
        copy_photos(source, target)
        (target / "prompt.txt").write_text(f"a {IDENTIFIER} {noun}\na {noun}\n")
    with whole(work / PLAN) as partial:
        partial.write_text(json.dumps(asdict(plan), indent=1))


def copies(work: Path, plan: Plan) -> dict[str, Path]:
    """Subject -> the folder of the copies of its photos."""
    parts = enumerate(plan.parts)
    return {name: work / "photos" / f"{n:02}" / name for n, part in parts for name in part}


def read_plan(work: Path, asked: Plan) -> Plan:
    """The plan of the folder, with the methods and seeds asked for now. Raises ValueError where it
    is of another benchmark, or of other photos."""
    saved = Plan(**json.loads((work / PLAN).read_text()))
    photos = saved.photos or {name: fingerprint(p) for name, p in copies(work, saved).items()}
    saved = replace(saved, images=saved.images or asked.images, photos=photos)
    if other := [n for n in KEPT if getattr(saved, n) != getattr(asked, n)]:
        told = [
            f"`{n}` was {getattr(saved, n)!r}, is {getattr(asked, n)!r}"
            for n in other
            if n != "photos"
        ]
        if saved.photos != asked.photos and saved.subjects == asked.subjects:
            told.append(
                f"the photos, reference photos or captions of "
                f"`{first_other(saved.photos, asked.photos)}` are not those that "
                f"`{work / 'photos'}` has copies of"
            )
        raise ValueError(f"`{work}` was started otherwise: {'; '.join(told)}. Name another --work.")
    return replace(asked, parts=saved.parts)


def do_task(
    work: Path, plan: Plan, task: tuple[str, int, int], tell: Callable[[str], None] = print
) -> str:
    """Trains and samples what is missing of a part; says what was done. Marked when whole."""
    done = work / "done" / f"{name_of(task)}.json"
    if done.is_file() and not json.loads(done.read_text())["failed"]:  # what failed is tried again
        return f"{name_of(task)}: was done"
    method, seed, part = task
    began = time.perf_counter()
    folder, protocol = work / "photos" / f"{part:02}", find_protocol(plan.protocol)
    config = config_of(work, plan, task)
    failed = {} if method == BASE else trained(config)
    known = {n: p for n, p in read_photos(folder)[0].items() if n not in failed}
    count, how = sampled(work, protocol, config, task, known) if known else (0, {})
    done.parent.mkdir(exist_ok=True)
    with whole(done) as partial:
        partial.write_text(json.dumps({"failed": failed, "sampling": how}))
    said = f"{name_of(task)}: {count} images made" + (f", {len(failed)} failed" if failed else "")
    return f"{said}, {time.perf_counter() - began:.1f} s"


def forget_failures(work: Path, tasks: Sequence[tuple[str, int, int]]) -> None:
    """Takes away the marks of parts that failed in an earlier start: they are tried again, and who
    waits for them shall not take those for this start's."""
    for task in tasks:
        mark = work / "done" / f"{name_of(task)}.json"
        if mark.is_file() and json.loads(mark.read_text())["failed"]:
            mark.unlink()


def method_flags(method: str) -> list[str]:
    """Of `oft,blocks=4`, for the trainer."""
    name, *options = method.split(",")
    return [*(f"--{option}" for option in options), "--method", name]


def config_of(work: Path, plan: Plan, task: tuple[str, int, int]) -> Config:
    """Of the trainer, for the subjects of a part."""
    method, seed, part = task
    flags = [] if method == BASE else method_flags(method)
    return train_config([
        *plan.training, *flags, "--seed", str(seed),
        "--subjects", str(work / "photos" / f"{part:02}"),
        "--output_dir", str(work / "runs" / method / f"seed-{seed}" / f"{part:02}"),
        "--resume_from_checkpoint", "latest",
    ])  # fmt: skip


def trained(config: Config) -> dict[str, str]:
    """Subject -> why it could not be trained; trains what is not yet."""
    assert config.output_dir is not None
    mark = Path(config.output_dir) / "trained.json"
    if not mark.is_file():
        failed: dict[str, str] = dict(train_stacked(config).failed)
        if failed:
            return failed
        with whole(mark) as partial:
            partial.write_text(json.dumps(failed))
    found: dict[str, str] = json.loads(mark.read_text())
    return found


def sampled(
    work: Path,
    protocol: Protocol,
    config: Config,
    task: tuple[str, int, int],
    known: dict[str, Photos],
) -> tuple[int, dict[str, Any]]:
    """(images made now, what a result says of them). Training seed n has image seeds of its own."""
    method, seed, _ = task
    assert config.output_dir is not None
    files = {n: adapter_file(Path(config.output_dir) / n) for n in known} if method != BASE else {}
    first = next(iter(files.values()), None)
    # the base as the runs of the same flags are sampled
    settings = None if files else {k: v for k, v in config.to_dict().items() if v is not None}
    name = config.pretrained_model_name_or_path
    sampler = Sampler.of(first, name, protocol.sampling, settings)
    seeds, count = image_seeds(protocol, seed), 0
    alike: dict[tuple[str, ...], Path] = {}
    with sampler.base.sampling(sampler.sampling.sampler) as pipe:
        for subject, photos in known.items():
            assert photos.words is not None
            on_embedded, noun = sampler.base.embedded, photos.words.class_noun
            captions = without(photos, config.holdout).captions
            own = templates(protocol.prompts, noun, on_embedded, captions)
            others = unrelated(protocol.unrelated, noun, on_embedded)
            prompts = named_prompts(photos.words, own, others)
            folder = work / "images" / method / subject
            adapter = load(pipe, files[subject]) if files else None
            if adapter is not None:
                adapter.speed_up()  # nobody else has this pipeline
            try:
                if adapter is None and (same := alike.get(tuple(prompts.values()))):
                    shutil.copytree(same, folder, dirs_exist_ok=True)  # subjects of one class
                count += make(pipe, folder, prompts, seeds, sampler.sampling)
            finally:
                if adapter is not None:
                    adapter.eject()
            alike.setdefault(tuple(prompts.values()), folder)
    return count, sampler.statement()


def image_seeds(protocol: Protocol, seed: int) -> range:
    """Of the images of a training seed."""
    start = protocol.first_seed + seed * protocol.images_per_prompt
    return range(start, start + protocol.images_per_prompt)


def of_seeds(found: Found, seeds: Container[int | str]) -> Found:
    """The images of the seeds asked for; there may be those of an earlier plan."""
    return replace(found, images=[i for i in found.images if i.seed in seeds])


def embedded_base(plan: Plan) -> bool:
    config = train_config([*plan.training, "--subjects", "photos"])
    return config.pretrained_model_name_or_path == "embedded"
