"""YAML files and odd values on the command line: an answer that names the file or the flag."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import damage
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamtune.config import FIELDS, Config
from dreamtune.configfile import read_yaml
from dreamtune.fields import UnreadableFile, checker, shown, validated
from dreamtune.files.find import run_settings
from dreamtune.flags import train_config


@pytest.mark.parametrize(
    "text, message",
    [
        ("seed: x", "`seed` must be a whole number, got 'x'"),
        ("seed: 1\nseed: 2", "has `seed` twice"),
        ("seed: [1", "is not YAML"),
        ("[" * 5000, "nested too deeply"),
        ("1: 2", "a name must be a word, got 1"),
        ("~: 2", "a name must be a word, got None"),
        ("- 1", "must hold `name: value` lines, got list"),
        ("a: 2001-99-99", "is not YAML: month must be in 1..12"),
        ("a: !!float x", "is not YAML"),
        ("a: !!bool x", "is not YAML"),
        ("a: !!timestamp x", "is not YAML"),
        ("a: !!python/object/apply:os.system [true]", "is not YAML"),
        (f"a: {'9' * 5000}", "is not YAML: line 1 has a number of too many digits"),
        ("options: 3", "`options` must be of type dict, got 3"),
        ("method: [lora]", "`method` must be of type str, got .'lora'."),
        ("seed: 9223372036854775808", "`seed` must be below 9223372036854775808"),
        ("train_batch_size: 1000000001", "`train_batch_size` must be at most 1000000000"),
        (damage.BOMB + "validation_prompt: *a11", "aliases stand for more than 10000 values"),
        ("\x85\x00", "holds zero bytes"),
    ],
)
def test_a_config_file_is_checked_by_name(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(text)
    with pytest.raises(UnreadableFile, match=f"some.yaml`.*{message}") as caught:
        train_config(["--config", str(path)])
    assert len(str(caught.value)) < 1000
    path.write_bytes(b"seed: \xff")
    with pytest.raises(UnreadableFile, match="some.yaml` is not UTF-8 text: byte 6 is 0xff"):
        read_yaml(path)


def test_what_is_no_config_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with (tmp_path / "large.yaml").open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    for name, message in (
        ("pipe.yaml", "pipe.yaml`: it is a pipe"),
        ("folder.yaml", "folder.yaml`: it is a folder"),
        ("large.yaml", "large.yaml`: it has more than 256 KiB"),
        ("none.yaml", "there is no config file"),
    ):
        with pytest.raises(UnreadableFile, match=message):
            read_yaml(tmp_path / name)


def test_what_a_run_says_of_itself_is_checked(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("num_inference_steps: many\nmixed_precision: no")
    with pytest.raises(UnreadableFile, match="config.yaml`: `num_inference_steps` must be a whole"):
        run_settings(tmp_path / "adapter.safetensors")
    (tmp_path / "config.yaml").write_text("num_inference_steps: 3\nmixed_precision: no")
    found = run_settings(tmp_path / "adapter.safetensors")
    assert found == {"num_inference_steps": 3, "mixed_precision": "no"}


def test_values_are_shown_in_bounds() -> None:
    value: list[Any] = []
    value.append(value)
    bomb = yaml.safe_load(damage.BOMB)
    assert len(shown(bomb)) < 400 and len(shown(value)) < 100
    with pytest.raises(ValueError, match="`seed` must be of type int, got"):
        Config(seed=bomb)
    assert shown({"rank": 3}) == "{'rank': 3}" and shown(0.5) == "0.5" and shown("x") == "'x'"
    with pytest.raises(ValueError, match="`a` is missing."):
        validated(checker({"a": int}, needed=("a",)), {})
    with pytest.raises(ValueError, match="`resolution` must be a multiple of 8, got 1000"):
        Config(resolution=10**400 + 1)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--rank", "{a: ["], "--rank is not YAML"),
        (["--rank", "99999999999999999999"], "`rank` must be at most 4096"),
        (["--method", "lora", "--alpha", ".nan"], "`alpha` must be finite, got nan"),
        (["--lambda_init", ".inf"], "`lambda_init` must be finite, got inf"),
        (["--blocks", "9" * 12, "--method", "ether"], "`blocks` must be at most 1000000000"),
        (["--slots", "9" * 5000], "`slots` must be auto or at least 1"),
        (["--resolution", "80000"], "`resolution` must be at most 16384"),
        (["--seed", "9" * 5000], "`seed`"),
        (["--" + "x" * 10**6, "3"], "unknown flag"),
    ],
)
def test_odd_values_of_flags(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_config(words)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_no_file_and_no_flag_crashes(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    rng = random.Random(seed)
    path = tmp_path_factory.getbasetemp() / "odd.yaml"
    sound = "".join(f"{name}: 1\n" for name in FIELDS)
    path.write_bytes(rng.choice([damage.edit_yaml] * 3 + damage.ANY)(sound.encode(), rng))
    name, value = rng.choice(list(FIELDS)), rng.choice(damage.YAML)
    for words in (["--config", str(path)], [f"--{name}={value}"]):
        try:
            train_config(words)
        except ValueError as error:
            fields = [
                "unknown option",
                "unknown method",
                *(f"`{field}" for field in (*FIELDS, "rank")),
            ]
            assert any(word in str(error) for word in ("odd.yaml", name, *fields))
        except SystemExit as stop:  # --random_flip=3: a switch takes no value
            assert stop.code == 2
