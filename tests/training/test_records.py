"""A run goes on from what was written, and from nothing else: state, files, settings, scorings."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import damage
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dreamtune.config import Config
from dreamtune.fields import UnreadableFile
from dreamtune.training import records, run_folder
from dreamtune.training.resume import find_checkpoint
from dreamtune.training.run import Run
from dreamtune.training.train import train

LAST = "checkpoint-6"


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, tiny_v_pipeline_dir: Path, photo_dir: Path
) -> Path:
    """A run of six steps with checkpoints 3 and 6."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    settings: dict[str, Any] = {
        "pretrained_model_name_or_path": str(tiny_v_pipeline_dir), "max_train_steps": 6,
        "instance_data_dir": str(photo_dir), "instance_prompt": "a sks dog",
        "validation_prompt": ["a {}"], "validation_steps": 3, "num_inference_steps": 1,
        "options": {"rank": 2}, "dino": "none", "clip": "none", "output_dir": str(folder),
    }  # fmt: skip
    train(Config(**settings))
    return folder


@pytest.fixture
def run_dir(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def json_edit(path: Path, edit: Callable[[Any], Any], seal: bool = False) -> None:
    """seal: as who knows how would, with a hash that fits."""
    values = json.loads(path.read_text())
    edit(values)
    if seal:
        values.pop("sha256")
        values["sha256"] = records.hash_of_json(values)
    path.write_text(json.dumps(values))


def old(state: dict[str, Any]) -> None:
    """What an older version wrote."""
    for name in ("format_version", "files", "metrics", "settings", "sha256"):
        del state[name]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_the_state_knows_its_files_settings_and_scorings(whole: Path) -> None:
    state = json.loads((whole / LAST / "run_state.json").read_text())
    assert state["format_version"] == 1 and state["step"] == 6
    assert set(state["files"]) == {
        "adapter.safetensors", "optimizer.safetensors", "best/adapter.safetensors",
        "best/pytorch_lora_weights.safetensors",
    }  # fmt: skip
    assert {"learning_rate", "seed", "options", "instance_prompt"} <= set(state["settings"])
    assert not {"output_dir", "device", *records.PLACES} & set(state["settings"])
    assert run_folder.damage(whole / LAST) is None


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors"])
def test_one_bit_of_a_checkpoint_is_seen_and_the_last_sound_one_named(
    run_dir: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(run_dir / LAST / name)
    assert find_checkpoint("latest", run_dir) == run_dir / "checkpoint-3"
    assert f"Skipped, damaged: {LAST}: `{name}` is not what was written" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"`{name}` is not what was written.*checkpoint-3 is whol"):
        find_checkpoint(str(run_dir / LAST), run_dir)


def test_files_of_another_step_are_seen(run_dir: Path) -> None:
    """Each is sound by itself."""
    for name, why in (
        ("adapter.safetensors", "its adapter.safetensors is of step 3"),
        ("optimizer.safetensors", "`checkpoint-6/optimizer.safetensors` is not what was written"),
        ("run_state.json", "its run_state.json is of step 3"),
    ):
        kept = (run_dir / LAST / name).read_bytes()
        shutil.copy(run_dir / "checkpoint-3" / name, run_dir / LAST / name)
        assert why in str(run_folder.damage(run_dir / LAST))
        (run_dir / LAST / name).write_bytes(kept)
    assert run_folder.damage(run_dir / LAST) is None


def test_an_optimizer_that_is_not_finite_is_refused(run_dir: Path) -> None:
    """Of an older version: there are no hashes."""
    checkpoint = run_dir / LAST
    json_edit(checkpoint / "run_state.json", old)
    tensors = load_file(checkpoint / "optimizer.safetensors")
    tensors["step.loss"].fill_(float("nan"))  # of a skipped step
    save_file(tensors, checkpoint / "optimizer.safetensors")
    assert run_folder.damage(checkpoint) is None
    tensors["optimizer.0.exp_avg"].view(-1)[0] = float("inf")
    save_file(tensors, checkpoint / "optimizer.safetensors")
    assert "holds values that are not finite in `optimizer.0.exp_avg`" in str(
        run_folder.damage(checkpoint)
    )
    assert find_checkpoint("latest", run_dir) == run_dir / "checkpoint-3"


def test_a_checkpoint_says_on_which_base_it_is(run_dir: Path) -> None:
    """With a fingerprint of some layers or none, as only an older version leaves unsealed, the
    check of the base would pass on any.
    """
    path = run_dir / LAST / "adapter.safetensors"
    json_edit(run_dir / LAST / "run_state.json", old)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["dreamtune"])
    tensors = load_file(path)
    del header["sha256"]
    header["format_version"] = 1
    for kept in (0, 1, len(header["fingerprint"])):
        prints = dict(list(header["fingerprint"].items())[:kept])
        text = json.dumps({**header, "fingerprint": prints})
        save_file(tensors, path, {"dreamtune": text, "format": "pt"})
        why, every = run_folder.damage(run_dir / LAST), len(header["fingerprint"])
        assert (why is None) == (kept == every)
        assert why is None or f"the fingerprint of the base covers {kept} of {every} layers" in why


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda s: s.update(step=5), "it changed since"),
        (lambda s: s["photos"].pop(), "it changed since"),
        (lambda s: s.pop("sha256"), "it changed since"),
        (lambda s: s.pop("format_version"), "it changed since"),
        (lambda s: s.update(format_version=2), "format version 2, this dreamtune reads up to 1"),
        (lambda s: (old(s), s.update(step="x")), "`step` must be a whole number, got 'x'"),
        (lambda s: (old(s), s.update(step=-1)), "`step` must be at least 0, got -1"),
        (lambda s: (old(s), s.pop("photos")), "`photos` is missing"),
        (lambda s: (old(s), s.update(photos=3)), "`photos` must be of type list, got 3"),
    ],
)
def test_the_state_is_checked(run_dir: Path, edit: Callable[[Any], Any], message: str) -> None:
    json_edit(run_dir / LAST / "run_state.json", edit)
    with pytest.raises(UnreadableFile, match=f"`{LAST}/run_state.json`.*{message}"):
        records.read_state(run_dir / LAST)
    assert find_checkpoint("latest", run_dir) == run_dir / "checkpoint-3"


@pytest.mark.parametrize("text", ["", "[]", "{", damage.DEEP, "\xff", "null"])
def test_a_state_that_is_none(run_dir: Path, text: str) -> None:
    (run_dir / LAST / "run_state.json").write_text(text, encoding="latin-1")
    with pytest.raises(UnreadableFile, match=f"`{LAST}/run_state.json`"):
        records.read_state(run_dir / LAST)


def test_a_run_of_an_older_version_goes_on(run_dir: Path) -> None:
    for checkpoint in run_folder.checkpoints(run_dir):
        json_edit(checkpoint / "run_state.json", old)
    given = {"resume_from_checkpoint": "latest", "output_dir": str(run_dir)}
    result = train(Config(**given, max_train_steps=7))
    assert [r["step"] for r in result.history] == [0, 3, 6, 7]
    assert "files" in records.read_state(run_dir / "checkpoint-7")


def line_of(run_dir: Path, number: int, text: str | None) -> None:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[number - 1 : number] = [] if text is None else [text]
    path.write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize(
    "text, why",
    [
        ('{"step": 3', "is not JSON"),
        ("", "is not JSON"),
        (damage.DEEP, "nested too deeply"),
        ("[]", "must hold names"),
        ('{"loss": 1}', "`step` is missing"),
        ('{"step": -3}', "`step` must be at least 0"),
        ('{"step": 3, "loss": NaN}', "`loss` must be finite"),
        ('{"step": 3, "dino": 1e999}', "`dino` must be a finite number, got inf"),
        ('{"step": 3, "dino": "0.5"}', "`dino` must be a finite number, got '0.5'"),
        ('{"step": 0}', "step 0 follows a later one"),
    ],
)
def test_a_line_that_is_no_scoring_is_named(run_dir: Path, text: str, why: str) -> None:
    """And the lines after it are not dropped."""
    line_of(run_dir, 2, text)
    with pytest.raises(UnreadableFile, match=f"line 2 of `.*metrics.jsonl`.*{why}"):
        records.read_metrics(run_dir)
    with pytest.raises(ValueError, match="line 2 of `.*metrics.jsonl`"):
        find_checkpoint("latest", run_dir)


def test_only_a_last_line_that_was_cut_is_left_out(run_dir: Path) -> None:
    path = run_dir / "metrics.jsonl"
    sound = path.read_text()
    every = records.read_metrics(run_dir)
    for cut in range(1, len(sound.splitlines()[-1])):
        path.write_text(sound[: -1 - cut])
        assert records.read_metrics(run_dir) == every[:2]
    path.write_text(sound[:-1])  # the last byte alone: the record is whole
    assert records.read_metrics(run_dir) == every
    path.write_text(sound[:-20] + "\n")
    with pytest.raises(UnreadableFile, match="line 3 of"):
        records.read_metrics(run_dir)


def test_scorings_that_are_not_those_of_the_checkpoint(run_dir: Path) -> None:
    saved = (run_dir / "metrics.jsonl").read_text()
    for number, text in ((2, None), (1, json.dumps({**json.loads(saved.splitlines()[0]), "x": 1}))):
        line_of(run_dir, number, text)
        why = "metrics.jsonl` up to step 6 is not what checkpoint-6 was written with"
        assert why in str(run_folder.damage(run_dir / LAST))
        (run_dir / "metrics.jsonl").write_text(saved)
    line_of(run_dir, 3, None)  # after checkpoint-3, which is what it was
    assert run_folder.damage(run_dir / LAST) and not run_folder.damage(run_dir / "checkpoint-3")


def test_what_is_not_finite_is_no_scoring(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the scoring of step 3: `dino` must be a finite number"):
        records.append_metrics(tmp_path, {"step": 3, "dino": float("nan")})
    assert not (tmp_path / "metrics.jsonl").exists()
    records.append_metrics(tmp_path, {"step": 3, "dino": None, "loss": None})
    assert records.read_metrics(tmp_path) == [{"step": 3, "dino": None, "loss": None}]


def config_edit(run_dir: Path, **changes: Any) -> None:
    path = run_dir / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


def test_edited_settings_are_named(run_dir: Path) -> None:
    given = {"resume_from_checkpoint": "latest", "output_dir": str(run_dir)}
    config_edit(run_dir, learning_rate=0.5, seed=3, report_to="tensorboard", device="cpu")
    changed = "config.yaml` is not what checkpoint-6 was written with: `seed`, `learning_rate` ch"
    with pytest.raises(UnreadableFile, match=changed):
        Run(Config(**given))
    config_edit(run_dir, learning_rate=0.01, seed=0, max_train_steps=9)
    with contextlib.closing(Run(Config(**given))) as run:  # a longer run of a constant rate
        assert run.given.max_train_steps == 9
    config_edit(run_dir, seed="many")
    with pytest.raises(UnreadableFile, match="config.yaml`: `seed` must be a whole number, got 'm"):
        Run(Config(**given))
    config_edit(run_dir, seed=0, sed=1)
    with pytest.raises(UnreadableFile, match="config.yaml`: `sed` is not known"):
        Run(Config(**given))


def test_another_base_is_not_gone_on_with(
    run_dir: Path, tmp_path: Path, tiny_v_pipeline_dir: Path
) -> None:
    base = shutil.copytree(tiny_v_pipeline_dir, tmp_path / "base")
    weights = next((base / "unet").glob("*.safetensors"))
    tensors = load_file(weights)
    name = next(k for k in tensors if k.endswith("attn1.to_q.weight"))
    save_file({**tensors, name: tensors[name] * 1.05}, weights, {"format": "pt"})
    config_edit(run_dir, pretrained_model_name_or_path=str(base))
    given = {"resume_from_checkpoint": "latest", "output_dir": str(run_dir)}
    with pytest.raises(ValueError, match="the base is not the one .*: 1 of 32 layers differ"):
        train(Config(**given, max_train_steps=7))


def test_a_best_of_another_step_is_not_taken(run_dir: Path) -> None:
    """That of the run is, where it is what the checkpoint had."""
    best = run_dir / LAST / "best"
    shutil.copy(run_dir / "checkpoint-3" / "best" / "adapter.safetensors", best)
    assert run_folder.place_of_best(run_dir / LAST) == run_dir / "best"
    flip(run_dir / "best" / "pytorch_lora_weights.safetensors")
    assert run_folder.damage(run_dir / LAST) == "its best/ is not whole"


def test_lost_pictures_cost_the_page_alone(
    settings: dict[str, Any], scorer_names: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    quick = {**settings, **scorer_names, "max_train_steps": 2, "validation_steps": 0}
    folder = train(Config(**quick)).run_dir
    page = (folder / "report.html").read_bytes()
    (folder / "samples" / "000000.png").write_bytes(b"no picture")
    given = {"resume_from_checkpoint": "latest", "output_dir": str(folder)}
    result = train(Config(**given, max_train_steps=3))
    assert [r["step"] for r in result.history] == [0, 2, 3]
    assert "No report: the images of step 0 in" in capsys.readouterr().out
    assert (folder / "report.html").read_bytes() == page


@pytest.mark.parametrize("number", range(4))
def test_no_damage_to_a_run_passes_in_silence(
    run_dir: Path, whole: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Small form of eval/reliability/files.py, without training: what it would go on from is what
    was saved, or it is said.
    """
    edits: dict[str, list[damage.Bytes]] = {
        "metrics.jsonl": [damage.edit_lines], f"{LAST}/run_state.json": [damage.edit_json_file],
        f"{LAST}/adapter.safetensors": damage.TENSORS, "config.yaml": [damage.edit_yaml],
        f"{LAST}/optimizer.safetensors": damage.TENSORS,
    }  # fmt: skip
    given = {"resume_from_checkpoint": "latest", "output_dir": str(run_dir)}
    with contextlib.closing(Run(Config(**given))) as run:
        wanted = run.given
    capsys.readouterr()
    for case in range(15):
        rng = random.Random(f"{number} {case}")
        name = rng.choice(list(edits))
        sound = (whole / name).read_bytes()
        (run_dir / name).write_bytes(rng.choice(edits[name] + damage.ANY)(sound, rng))
        try:
            with contextlib.closing(Run(Config(**given))) as run:
                same = run.start == 6 and fixed_of(run.given) == fixed_of(wanted)
                tensors = load_file(run_dir / f"checkpoint-{run.start}" / "adapter.safetensors")
        except ValueError as error:
            assert any(word in str(error) for word in (name, "checkpoint-", "config.yaml"))
        else:
            there = load_file(whole / f"checkpoint-{run.start}" / "adapter.safetensors")
            assert all(torch.equal(tensors[k], there[k]) for k in there)
            assert same or "Skipped, damaged: checkpoint-6" in capsys.readouterr().out
        (run_dir / name).write_bytes(sound)


def fixed_of(config: Config) -> dict[str, Any]:
    return records.hashes_of_settings(config.to_dict())
