"""What one command for several runs becomes: labels, settings, words, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dreamtune.config import Config
from dreamtune.training.sweep import expand, in_folder, values_of


def test_every_combination_in_order() -> None:
    config = Config(sweep=["learning_rate=1e-3,1e-2", "seed=0,1"], slots="4", max_train_steps=7)
    runs = expand(config)
    assert list(runs) == [
        "learning_rate=1e-3,seed=0",
        "learning_rate=1e-3,seed=1",
        "learning_rate=1e-2,seed=0",
        "learning_rate=1e-2,seed=1",
    ]
    assert [(c.learning_rate, c.seed) for c in runs.values()] == [
        (1e-3, 0), (1e-3, 1), (1e-2, 0), (1e-2, 1),
    ]  # fmt: skip
    for run in runs.values():  # a run alone has nothing of the several
        assert (run.sweep, run.slots, run.subjects, run.max_train_steps) == ([], "auto", None, 7)


def test_options_are_of_the_swept_method() -> None:
    runs = expand(Config(sweep=["method=lora,delora", "rank=2,4"]))
    assert [(c.method, c.options) for c in runs.values()] == [
        ("lora", {"rank": 2}), ("lora", {"rank": 4}), ("delora", {"rank": 2}),
        ("delora", {"rank": 4}),
    ]  # fmt: skip
    kept = expand(Config(options={"start": "peft"}, sweep=["rank=2"]))
    assert kept["rank=2"].options == {"start": "peft", "rank": 2}


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (["seed"], "must be NAME=VALUE,VALUE,..., got 'seed'"),
        (["seed=1,1"], "has a value twice"),
        (["seed=1", "seed=2"], "names `seed` twice"),
        (["resolution=8,16"], "`resolution` cannot be swept.*method, seed, learning_rate, rank"),
        (["method=lora,lorra"], "unknown method `lorra`. Did you mean `lora`"),
        (["method=lora,ether", "rank=1,2"], "`rank` cannot be swept.*with method ether"),
        (["seed=0,-1"], "`seed` must be at least 0, got -1"),
        (["rank=4,0"], "`rank` must be at least 1, got 0"),
        (["start=peft,zero"], "`start` must be one of residual or peft; got 'zero'"),
    ],
)
def test_refusals(sweep: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand(Config(sweep=sweep))


def test_options_of_another_method_are_refused() -> None:
    with pytest.raises(ValueError, match="`start` is an option of delora, not of lora"):
        expand(Config(options={"start": "peft"}, sweep=["method=delora,lora"]))


def test_values_of() -> None:
    assert values_of("--alpha=4,0.5") == ("alpha", [("4", 4), ("0.5", 0.5)])
    assert values_of("start = residual, peft") == (
        "start", [("residual", "residual"), ("peft", "peft")],
    )  # fmt: skip


def subject(root: Path, name: str, prompt: str | None = None, **settings: object) -> None:
    (root / name).mkdir(parents=True)
    if prompt is not None:
        (root / name / "prompt.txt").write_text(prompt)
    if settings:
        (root / name / "config.yaml").write_text(yaml.safe_dump(settings))


def test_subjects_with_words_of_their_own(tmp_path: Path) -> None:
    subject(tmp_path, "cat", "a sks cat\na cat\n")
    subject(tmp_path, "dog", "a  zwx dog\n", identifier="zwx", learning_rate="2e-2", seed=5)
    subject(tmp_path, ".hidden")
    common = Config(subjects=str(tmp_path), instance_prompt="a sks thing", sweep=["rank=2,4"])
    runs = expand(common)
    assert list(runs) == ["cat,rank=2", "cat,rank=4", "dog,rank=2", "dog,rank=4"]
    cat, dog = runs["cat,rank=4"], runs["dog,rank=2"]
    assert (cat.instance_prompt, cat.class_prompt, cat.seed) == ("a sks cat", "a cat", 0)
    assert (dog.instance_prompt, dog.identifier, dog.seed) == ("a zwx dog", "zwx", 5)
    assert (dog.learning_rate, dog.options) == (0.02, {"rank": 2})
    assert cat.instance_data_dir == str(tmp_path / "cat") and cat.subjects is None


def test_a_subject_may_set_what_the_field_says(tmp_path: Path) -> None:
    subject(tmp_path, "cat", max_train_steps=3)
    with pytest.raises(ValueError, match="`max_train_steps` in .* cannot be a subject's own"):
        expand(Config(subjects=str(tmp_path)))
    (tmp_path / "cat" / "config.yaml").write_text("sed: 3")
    with pytest.raises(ValueError, match="`sed` in .* own. Did you mean `seed`"):
        expand(Config(subjects=str(tmp_path)))
    with pytest.raises(ValueError, match="is not a folder"):
        expand(Config(subjects=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="holds no folder"):
        expand(Config(subjects=str(tmp_path / "cat")))


def test_alone_is_a_run_in_its_own_folder() -> None:
    own = in_folder(Config(name="x", output_dir="all", seed=3), Path("all/seed=3"), resume=True)
    assert (own.name, own.output_dir, own.seed) == (None, "all/seed=3", 3)
    assert own.resume_from_checkpoint == "latest"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_prompts_of_any_editor(encoding: str, tmp_path: Path) -> None:
    subject(tmp_path, "dog")
    (tmp_path / "dog/prompt.txt").write_bytes("a sks café\r\na café\r\n".encode(encoding))
    config = expand(Config(subjects=str(tmp_path)))["dog"]
    assert (config.instance_prompt, config.class_prompt) == ("a sks café", "a café")


def test_a_prompt_that_does_not_decode_is_named(tmp_path: Path) -> None:
    subject(tmp_path, "dog")
    (tmp_path / "dog/prompt.txt").write_bytes("a sks café".encode("cp1252"))
    with pytest.raises(ValueError, match=r"prompt\.txt` is not UTF-8 text: byte 9 is 0xe9"):
        expand(Config(subjects=str(tmp_path)))


def test_folders_of_systems_are_no_subjects(tmp_path: Path) -> None:
    for name in ("dog", "__MACOSX", "@eaDir", "$RECYCLE.BIN", ".ipynb_checkpoints"):
        subject(tmp_path, name)
    assert list(expand(Config(subjects=str(tmp_path)))) == ["dog"]
