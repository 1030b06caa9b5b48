"""The benchmark's driver in small: what is done is not done again, what is half done is finished;
parts over processes, and over a cluster by Ray."""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from galleries import write_images

from dreamtune import embedded
from dreamtune.evaluation.layout import Found, read_photos
from dreamtune.evaluation.protocol_file import find_protocol
from dreamtune.evaluation.results import read_results
from dreamtune.evaluation.scoring import Task, gallery_hash

sys.path.append(str(Path(__file__).parents[1] / "eval"))

import benchmark_parts  # noqa: E402
import benchmark_scores  # noqa: E402
import dreambench  # noqa: E402
from benchmark_parts import Plan  # noqa: E402

METHOD = "lora,rank=2"
SUBJECTS = {"backpack": "backpack", "backpack_dog": "backpack", "dog": "dog"}


@pytest.fixture(scope="session")
def flags(
    tiny_v_pipeline_dir: Path,
    photo_dir: Path,
    scorer_names: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[str]:
    """All but --work: three subjects in two parts, two prompts, two images of each."""
    root = tmp_path_factory.mktemp("bench")
    for name in SUBJECTS:
        shutil.copytree(photo_dir, root / "photos" / name)
        (root / "photos" / name / "1.txt").unlink()
    lines = "".join(f"{name},{noun}\n" for name, noun in SUBJECTS.items())
    text = f"Classes\n\nsubject_name,class\n{lines}\nPrompts\n'a {{0}} {{1}}'.format(a, b),\n"
    (root / "photos" / "prompts_and_classes.txt").write_text(text)
    protocol = {
        "like": "dreamtune", "name": "small", "metrics": ["dino", "clip_t", "dino_drift"],
        "prompts": ["a {} in the snow", "a red {}"], "images_per_prompt": 2,
        "unrelated": ["a pizza"], "sampling": {"steps": 2},
    }  # fmt: skip
    (root / "small.yaml").write_text(yaml.safe_dump(protocol))
    return [
        "--photos", str(root / "photos"), "--protocol", str(root / "small.yaml"), "--at_once", "2",
        *(x for k, v in scorer_names.items() for x in (f"--score_{k}", v)),
        "--pretrained_model_name_or_path", str(tiny_v_pipeline_dir), "--dino", "none", "--clip",
        "none", "--max_train_steps", "2", "--num_inference_steps", "2", "--validation_prompt",
        "a {}", "--validation_steps", "0", "--device", "cpu", "--guidance_scale", "3",
        "--holdout", "1",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def alone(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes."""
    work = tmp_path_factory.mktemp("alone")
    assert dreambench.main(["--work", str(work), "--methods", METHOD, *flags]) == 0
    return work


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.png")}


def test_what_is_half_done_is_finished(
    flags: list[str], alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path = tmp_path / "again"
    shutil.copytree(alone, tmp_path)
    asked = ["--work", str(tmp_path), "--methods", METHOD, *flags]
    results = read_results(tmp_path / "results" / METHOD)
    assert results.subjects == list(SUBJECTS)
    # two steps of subjects that share photos and words: nothing else is missing
    assert all("byte for byte" in warning for warning in results.warnings)
    assert len(results.images) == 3 * (2 + 1) * 2  # and one unrelated prompt
    assert results.scores()["dino"].n == len(results.base) == 3 * 2 * 2
    assert results.scores()["dino"].unit == "subjects"
    assert (tmp_path / "results" / METHOD / "report.html").is_file()
    # what a run held out is no photo that it saw; the base is sampled by the runs' flags
    assert {held for _, held in results.coverage["photos"].values()} == {1}
    marks = [json.loads(p.read_text()) for p in (tmp_path / "done").iterdir()]
    assert [m["sampling"]["guidance_scale"] for m in marks] == [3.0] * 4
    images, runs = tmp_path / "images", tmp_path / "runs" / METHOD / "seed-0"
    of_no_seed = images / METHOD / "dog" / "00" / "7.png"
    shutil.copy(of_no_seed.with_name("0.png"), of_no_seed)
    before = files(images)
    # one was cut off, one prompt is gone, and the mark of their part
    cut = images / METHOD / "backpack" / "00" / "1.png"
    cut.write_bytes(cut.read_bytes()[:90])
    shutil.rmtree(images / METHOD / "backpack_dog" / "01")
    (tmp_path / "done" / f"{METHOD}-seed-0-part-00.json").unlink()
    trained = {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert dreambench.main(asked) == 0
    assert files(images) == before
    assert {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.is_file()} == trained
    out = capsys.readouterr().out
    assert len(read_results(tmp_path / "results" / METHOD).images) == len(results.images)
    assert f"{METHOD}-seed-0-part-00: 4 images made" in out and out.count("was done") == 3
    assert f"{METHOD}: was scored" not in out
    assert dreambench.main(asked) == 0
    assert f"{METHOD}: was scored" in capsys.readouterr().out
    with pytest.raises(ValueError, match="`training` was .* is .*Name another --work"):
        dreambench.main([*asked, "--learning_rate", "1e-3"])


def test_parts_are_dealt_over_processes(
    flags: list[str], alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process does its share, whichever ends first; the first one scores."""
    work = tmp_path / "two"
    asked = ["--work", str(work), "--methods", METHOD, *flags]
    args, training = dreambench.parse(asked)
    plan = dreambench.planned(args, training, 2)
    work.mkdir()
    dreambench.prepare(work, plan, dreambench.sources("dreambooth", args.photos))
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert dreambench.main(asked) == 0
        names = sorted(p.name for p in (work / "done").iterdir())
        parts = ("01",) if rank == "1" else ("00", "01")
        assert names == [f"{m}-seed-0-part-{p}.json" for m in ("base", METHOD) for p in parts]
        assert (work / "results").is_dir() == (rank == "0")
    assert files(work / "images") == files(alone / "images")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max_train_stepz", "2"], "unknown flag --max_train_stepz. Did you mean"),
        (["--seed", "3"], "--seed is set for each part"),
        (["--only", "dogg"], "no subject `dogg`. Did you mean `dog`"),
        (["--methods", "lorra"], "unknown method `lorra`. Did you mean `lora`"),
        (["--methods", "base"], "unknown method `base`"),
        (["--methods", "lora,rnk=3"], "unknown flag --rnk. Did you mean `rank`"),
        (["--methods", "lora,seed=3"], "`seed` is no option of a method"),
        (["--methods", "lora,holdout=2"], "`holdout` must be that of .*give --holdout once"),
        (["--methods", "lora,variant=fp16"], "`variant` must be that of"),
        (["--methods", "lora,target_modules=a/b"], "has a separator of paths in it"),
        (["--methods", "lora", "dora", "lora"], "--methods has `lora` twice"),
        (["--seeds", "1", "1"], "--seeds has `1` twice"),
        (["--seeds", "-1"], "--seeds must be 0 or more, got -1"),
        (["--at_once", "-1"], "--at_once must be 1 or more, got -1"),
        (["--at_once", "0"], "--at_once must be 1 or more, got 0"),
        (["--ray", "local:0"], "--ray must be local:N .* got local:0"),
        (["--benchmark", "emojibench"], "--photos is of dreambooth, got .*emojibench has its own"),
        (["--protocol", "nope"], "unknown protocol `nope`"),
    ],
)
def test_refusals(flags: list[str], tmp_path: Path, more: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dreambench.main(["--work", str(tmp_path / "new"), "--methods", "lora", *flags, *more])
    assert not (tmp_path / "new").exists()


@pytest.fixture
def marked(tmp_path: Path) -> tuple[Path, Plan]:
    """A benchmark as its marks have it: `lora` failed for `b`, `dora` for all, both are scored."""
    plan = Plan("dreambooth", {"a": "cat", "b": "dog"}, [["a"], ["b"]], ["lora", "dora"], [0],
                "dreamtune")  # fmt: skip
    (tmp_path / "done").mkdir()
    (tmp_path / "scored").mkdir()
    for kind, number, failed in (
        ("base", 0, {}), ("base", 1, {}), ("lora", 0, {}), ("lora", 1, {"b": "no"}),
        ("dora", 0, {"a": "why"}), ("dora", 1, {"b": "why"}),
    ):  # fmt: skip
        said = {"failed": failed, "sampling": {} if failed else {"steps": 2}}
        mark = tmp_path / "done" / f"{kind}-seed-0-part-0{number}.json"
        mark.write_text(json.dumps(said))
    for method in plan.methods:
        wanted = benchmark_scores.scored_by(tmp_path, plan, method, {})
        benchmark_scores.mark_of(tmp_path, method).write_text(json.dumps(wanted))
    return tmp_path, plan


def test_a_mark_of_scores_is_of_one_plan(
    marked: tuple[Path, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a part is still to be done a method is not scored, and nothing is raised: the first
    process looks while the others are at it."""
    work, plan = marked
    assert benchmark_scores.is_scored(work, plan, "lora", {})
    assert not benchmark_scores.is_scored(work, replace(plan, seeds=[0, 1]), "lora", {})
    assert not benchmark_scores.is_scored(work, plan, "lora", {"dino": "other"})
    with pytest.raises(ValueError, match="not done yet: base-seed-1-part-00, "):
        benchmark_scores.score_method(work, replace(plan, seeds=[0, 1]), "lora", {})
    other = replace(find_protocol("dreamtune"), metrics=("dino",))
    monkeypatch.setattr(benchmark_scores, "find_protocol", lambda name: other)
    assert not benchmark_scores.is_scored(work, plan, "lora", {})


def test_subjects_of_the_embedded_base_are_found_among_all_of_them(
    tmp_path: Path, scorer_names: dict[str, str]
) -> None:
    """As `dreamtune score` finds those of its runs, so that the two compare; not among the
    benchmark's own, which are one here."""
    rule = {
        "like": "dreamtune", "name": "found", "metrics": ["dino_retrieval"], "unrelated": [],
        "encoders": {"dino": {"weights": scorer_names["dino"]}},
    }  # fmt: skip
    (tmp_path / "found.yaml").write_text(yaml.safe_dump(rule))
    name = embedded.subjects("report")[0].id
    plan = Plan(
        "emojibench", {name: "x"}, [[name]], ["lora"], [0], str(tmp_path / "found.yaml"),
        ["--pretrained_model_name_or_path", "embedded"],
    )  # fmt: skip
    benchmark_parts.prepare(tmp_path, plan, benchmark_parts.sources("emojibench", None))
    for kind in ("lora", "base"):
        write_images(tmp_path / "images" / kind, [name])
    benchmark_scores.write_scores(tmp_path, plan, "lora", {}, {"name": "lora"}, {"steps": 2})
    found = read_results(tmp_path / "results" / "lora")
    assert found.scores()["dino_retrieval"].n == 4
    every = read_photos(embedded.SUBJECTS)[0]
    assert len(every) == 42
    assert found.protocol["gallery"] == gallery_hash(Task(Found([], []), {}, {}, every))
    other = ["--pretrained_model_name_or_path", "a/b"]
    assert benchmark_scores.gallery_of(replace(plan, training=other)) is None


def test_what_failed_is_forgotten_before_anyone_waits_for_it(marked: tuple[Path, Plan]) -> None:
    work, plan = marked
    benchmark_parts.forget_failures(work, plan.tasks())
    left = ["base-seed-0-part-00", "base-seed-0-part-01", "lora-seed-0-part-00"]
    assert sorted(p.stem for p in (work / "done").iterdir()) == left
    assert not benchmark_scores.is_scored(work, plan, "lora", {})


def test_a_method_that_failed_for_all_is_said(marked: tuple[Path, Plan]) -> None:
    """Its images, of another seed of an earlier start, are not its images now."""
    work, plan = marked
    (work / "images" / "dora" / "a").mkdir(parents=True)
    assert benchmark_scores.sampling_of(work, plan, "dora") == {}
    assert benchmark_scores.failures(work, plan, "dora") == [("a", "why"), ("b", "why")]
    benchmark_scores.mark_of(work, "dora").unlink()
    said = benchmark_scores.score_method(work, plan, "dora", {})
    assert said == "dora: no images, for training failed: why; why"


def test_a_total_failure_is_no_success(
    marked: tuple[Path, Plan], flags: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The exit status, and the reasons, of a method none of whose subjects could be trained."""
    work, plan = marked
    plan = replace(plan, methods=["dora"])
    monkeypatch.setattr(dreambench, "read_plan", lambda work, asked: plan)
    monkeypatch.setattr(dreambench, "forget_failures", lambda work, tasks: None)
    monkeypatch.setattr(dreambench, "do_task", lambda work, plan, task: "")
    (work / "plan.json").write_text("{}")
    (work / "results").mkdir()
    assert dreambench.main(["--work", str(work), "--methods", "dora", *flags]) == 1
    assert capsys.readouterr().out.endswith("failed: dora: a: why\nfailed: dora: b: why\n")


def test_processes_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """None goes on before the last has come."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(dreambench, "SECONDS", 0.1)
    kept: list[Any] = []
    first = threading.Thread(target=lambda: kept.append(dreambench.meet(0, 2)))
    first.start()
    time.sleep(0.3)
    assert kept == []
    dreambench.meet(1, 2)
    first.join(20)
    assert len(kept) == 1 and dreambench.meet(0, 1) is None


def test_photos_of_a_start_that_was_cut_off(flags: list[str], tmp_path: Path) -> None:
    """By another number of processes: its parts would be trained as further subjects."""
    args, training = dreambench.parse(["--work", str(tmp_path), "--methods", METHOD, *flags])
    found = dreambench.sources("dreambooth", args.photos)
    plan = dreambench.planned(args, training, 1)
    dreambench.prepare(tmp_path, plan, found)
    (tmp_path / "plan.json").unlink()
    dreambench.prepare(tmp_path, plan, found)  # the same again goes on
    (tmp_path / "plan.json").unlink()
    args.at_once = 3
    with pytest.raises(ValueError, match="`01/dog`, which is no subject of this benchmark"):
        dreambench.prepare(tmp_path, dreambench.planned(args, training, 1), found)
    assert not (tmp_path / "plan.json").exists()


def test_a_protocol_of_other_images_is_another_benchmark(flags: list[str], tmp_path: Path) -> None:
    args, training = dreambench.parse(["--work", str(tmp_path), "--methods", METHOD, *flags])
    plan = dreambench.planned(args, training, 1)
    assert plan.images["prompts"] == ["a {} in the snow", "a red {}"]
    (tmp_path / "plan.json").write_text(json.dumps(asdict(plan)))
    assert benchmark_parts.read_plan(tmp_path, plan) == plan
    other = replace(plan, images={**plan.images, "images_per_prompt": 3})
    with pytest.raises(ValueError, match="was started otherwise: `images` was"):
        benchmark_parts.read_plan(tmp_path, other)
    (tmp_path / "plan.json").write_text(json.dumps({**asdict(plan), "images": {}}))
    assert benchmark_parts.read_plan(tmp_path, other) == other  # an older version's


@pytest.fixture
def own_photos(flags: list[str], tmp_path: Path) -> tuple[Path, list[str]]:
    """(a copy of the photos, the flags with it): to change."""
    photos = tmp_path / "own"
    shutil.copytree(flags[flags.index("--photos") + 1], photos)
    return photos, ["--work", str(tmp_path / "work"), "--methods", METHOD, *flags, "--photos",
                    str(photos)]  # fmt: skip


def _plan_of(asked: list[str]) -> Plan:
    args, training = dreambench.parse(asked)
    return dreambench.planned(args, training, 1)


def _prepared(asked: list[str], work: Path, photos: Path) -> Plan:
    plan = _plan_of(asked)
    benchmark_parts.prepare(work, plan, dreambench.sources("dreambooth", photos))
    return plan


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("change", ["photo", "name", "more", "reference", "caption"])
def test_other_photos_are_another_benchmark(
    own_photos: tuple[Path, list[str]], tmp_path: Path, older: bool, change: str
) -> None:
    """Also for the plan of an older version, by the copies; what is not copied does not matter."""
    (photos, asked), work = own_photos, tmp_path / "work"
    dog = photos / "dog"
    first, second = dog / "0.png", dog / "1.png"
    (dog / "reference").mkdir()
    shutil.copy(first, dog / "reference" / first.name)
    first.with_suffix(".txt").write_text("a sks dog at home")
    plan = _prepared(asked, work, photos)
    assert sorted(plan.photos) == sorted(SUBJECTS)
    # of three equal folders two are as they were, and the third has a caption more
    assert plan.photos["backpack"] == plan.photos["backpack_dog"] != plan.photos["dog"]
    saved = json.loads((work / "plan.json").read_text())
    assert saved["photos"] == plan.photos
    if older:
        del saved["photos"]
        (work / "plan.json").write_text(json.dumps(saved))
    (dog / "prompt.txt").write_text("mine")
    (dog / "notes.md").write_text("mine")
    assert benchmark_parts.read_plan(work, _plan_of(asked)) == plan
    if change == "photo":
        shutil.copy(second, first)
    elif change == "name":
        first.rename(first.with_name(f"other{first.suffix}"))
    elif change == "more":
        shutil.copy(first, first.with_name(f"other{first.suffix}"))
    elif change == "reference":
        shutil.copy(second, dog / "reference" / first.name)
    else:
        first.with_suffix(".txt").write_text("a sks dog outside")
    with pytest.raises(ValueError, match="captions of `dog` are not .*Name another --work"):
        dreambench.main(asked)
    assert sorted(p.name for p in work.iterdir()) == ["photos", "plan.json"]


def test_copies_of_another_start_are_not_taken_over(
    own_photos: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Of one that was cut off before its plan was written, with photos that are there no more."""
    photos, asked = own_photos
    _prepared(asked, tmp_path / "work", photos)
    (tmp_path / "work" / "plan.json").unlink()
    (photos / "dog" / "2.png").unlink()
    with pytest.raises(
        ValueError, match="/dog` holds other photos or texts than .*Take the folder"
    ):
        _prepared(asked, tmp_path / "work", photos)
    assert not (tmp_path / "work" / "plan.json").exists()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        ("cut", "cannot read the image `{file}`"),
        ("cut reference", "cannot read the image `{dog}/reference/0.png`"),
        ("caption", "`{text}` is not UTF-8 text"),
        ("twice", "in `{dog}` have one name"),
        ("none", "no photo in `{dog}`: looked for images"),
    ],
)
def test_a_broken_photo_is_said_before_anything_is_made(
    own_photos: tuple[Path, list[str]], tmp_path: Path, break_it: str, message: str
) -> None:
    """By its name in --photos, not by that of the copy."""
    photos, asked = own_photos
    dog = photos / "dog"
    file, text = dog / "2.png", dog / "2.txt"
    if break_it == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif break_it == "cut reference":
        (dog / "reference").mkdir()
        (dog / "reference" / "0.png").write_bytes(file.read_bytes()[:90])
    elif break_it == "caption":
        text.write_bytes(b"caf\xe9")
    elif break_it == "twice":
        shutil.copy(file, file.with_suffix(".webp"))
    else:
        shutil.rmtree(dog)
        dog.mkdir()
    with pytest.raises(ValueError, match=re.escape(message.format(dog=dog, file=file, text=text))):
        dreambench.main(asked)
    assert not (tmp_path / "work").exists()


def test_ray_is_asked_for_by_name(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    asked = ["--work", str(tmp_path), "--methods", "lora", *flags, "--ray", "local:2"]
    with pytest.raises(ValueError, match=r"pip install 'dreamtune\[ray\]'"):
        dreambench.main(asked)


class FakeRay:
    """A cluster of these resources, which does at once what it is asked for."""

    def __init__(self, **resources: float) -> None:
        self.resources = resources
        self.said: list[Any] = []

    def init(self, address: str, num_cpus: int | None, **_: Any) -> None:
        self.said.append(("init", address, num_cpus))

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def remote(self, num_cpus: int, num_gpus: int, max_retries: int) -> Any:
        self.said.append((num_cpus, num_gpus))
        return lambda function: SimpleNamespace(remote=function)

    def wait(self, waiting: list[str]) -> tuple[list[str], list[str]]:
        return waiting[:1], waiting[1:]

    def get(self, ready: list[str]) -> list[str]:
        return ready

    def shutdown(self) -> None:
        self.said.append("shutdown")


@pytest.mark.parametrize(
    ("where", "resources", "workers", "parts", "asked_for"),
    [
        ("auto", {"CPU": 16.0, "GPU": 3.0}, 3, ["backpack", "backpack_dog", "dog"], (1, 1)),
        ("auto", {"CPU": 2.0}, 2, ["backpack backpack_dog", "dog"], (1, 0)),
        ("a:6379", {"CPU": 64.0, "GPU": 2.0}, 2, ["backpack backpack_dog", "dog"], (1, 1)),
        ("auto", {}, 1, ["backpack backpack_dog dog"], (1, 0)),  # its hosts are still to come
        ("local:2", {"CPU": 2.0, "GPU": 8.0}, 2, ["backpack backpack_dog", "dog"], (1, 1)),
    ],
)
def test_a_cluster_s_parts_are_dealt_over_all_of_it(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], where: str, resources: dict[str, float], workers: int,
    parts: list[str], asked_for: tuple[int, int],
) -> None:  # fmt: skip
    ray, done = FakeRay(**resources), []

    def do_task(work: Path, plan: Plan, task: tuple[str, int, int]) -> str:
        done.append(task)
        mark = work / "done" / f"{benchmark_parts.name_of(task)}.json"
        mark.parent.mkdir(exist_ok=True)
        mark.write_text(json.dumps({"failed": {}, "sampling": {}}))
        return f"did {benchmark_parts.name_of(task)}"

    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(dreambench, "do_task", do_task)
    monkeypatch.setattr(dreambench, "finish", lambda work, plan: None)
    at = flags.index("--at_once")
    share = [*flags[:at], *flags[at + 2 :]]
    assert dreambench.main(
        ["--work", str(tmp_path), "--methods", "lora", *share, "--ray", where]
    ) == 0  # fmt: skip
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [" ".join(part) for part in plan["parts"]] == parts
    assert done == [(m, 0, n) for m in ("base", "lora") for n in range(len(parts))]
    local = where == "local:2"
    begin = ("init", "local" if local else where, 2 if local else None)
    assert ray.said == [begin, asked_for, asked_for, "shutdown"]
    out = capsys.readouterr().out
    assert f"did lora-seed-0-part-0{len(parts) - 1}\n" in out
    assert f" s of work by {workers} process{'es' * (workers > 1)}\n" in out


def test_a_cluster_is_left_where_nothing_can_be_done(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = FakeRay(CPU=2.0)
    monkeypatch.setitem(sys.modules, "ray", ray)
    asked = ["--work", str(tmp_path), "--methods", "lora", *flags, "--ray", "auto"]
    with pytest.raises(ValueError, match="no subject `dogg`"):
        dreambench.main([*asked, "--only", "dogg"])
    assert ray.said == [("init", "auto", None), "shutdown"]


@pytest.mark.cluster
def test_a_killed_worker_s_subjects_are_done_again(
    flags: list[str], alone: Path, tmp_path: Path
) -> None:
    """On a cluster of its own of two processes, whatever Ray's variable says; one kills itself
    while its subjects are half done.
    """
    pytest.importorskip("ray", reason="Ray is an extra: pip install dreamtune[ray]")
    asked = ["--methods", METHOD, *flags, "--ray", "local:2"]
    mark = tmp_path / "killed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dreambench, "do_task", _dying(str(mark)))
        patch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
        assert dreambench.main(["--work", str(tmp_path / "ray"), *asked]) == 0
    assert mark.read_text()  # it did die
    found = read_results(tmp_path / "ray" / "results" / METHOD)
    assert found.images == read_results(alone / "results" / METHOD).images
    assert files(tmp_path / "ray" / "images") == files(alone / "images")


def _dying(mark: str) -> Any:
    """`do_task` that takes its process down once, after training a part and before its images."""

    def do_task(work: Path, plan: Any, task: Any) -> str:
        import os
        import signal
        from pathlib import Path

        import benchmark_parts

        if task[0] != "base" and task[2] == 0 and not Path(mark).exists():
            benchmark_parts.trained(benchmark_parts.config_of(work, plan, task))
            Path(mark).write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return benchmark_parts.do_task(work, plan, task)

    return do_task


def test_a_folder_without_subjects_is_named(tmp_path: Path) -> None:
    (tmp_path / "photos" / ".hidden").mkdir(parents=True)
    with pytest.raises(ValueError, match="photos` holds no folder of a subject"):
        benchmark_parts.sources("dreambooth", tmp_path / "photos")


def test_ray_is_not_started_by_each_process_of_a_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = ["--benchmark", "emojibench", "--work", str(tmp_path), "--methods", "lora"]
    with pytest.raises(ValueError, match="2 processes of a launcher would each do all"):
        dreambench.main([*flags, "--ray", "local:2"])
