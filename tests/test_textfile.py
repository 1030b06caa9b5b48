"""Text files of whatever editor: read right, or refused by name."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from hangs import no_hang

from dreamtune.configfile import read_yaml
from dreamtune.textfile import read_json, read_text

TEXT = "a sks dog in a café, 狗, 🐕\r\n"
MARKED = ["utf-8-sig", "utf-16", "utf-32"]


@pytest.mark.parametrize("encoding", ["utf-8", *MARKED])
def test_a_byte_order_mark_decides(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT.encode(encoding))
    assert read_text(tmp_path / "a.txt") == TEXT


@pytest.mark.parametrize("encoding", ["utf_16_be", "utf_32_be"])
def test_the_other_order_of_bytes(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(("\ufeff" + TEXT).encode(encoding))
    assert read_text(tmp_path / "a.txt") == TEXT


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a café".encode("cp1252"), "is not UTF-8 text: byte 5 is 0xe9. Save it as UTF-8"),
        ("собака".encode("cp1251"), "is not UTF-8 text: byte 0 is 0xf1"),
        ("a dog".encode("utf-16-le"), "is not UTF-8 text: it holds zero bytes"),
        (b"\xff\xfea\0b", "is not UTF-16-LE text: byte 4 is 0x62"),
        (b"x" * (1 << 18) + b"x", "it has more than 256 KiB, the most that is read"),
    ],
)
def test_what_does_not_decode_is_named(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ValueError, match=rf"a\.txt`.*{message}"):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder", "link", "missing"])
def test_only_regular_files_are_opened(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    path = tmp_path / "a.yaml"
    words = {
        "pipe": "it is a pipe", "socket": "it is a socket", "device": "it is a device",
        "folder": "it is a folder", "link": "it is a link to nowhere", "missing": "is not there",
    }  # fmt: skip
    made = {
        "pipe": lambda: os.mkfifo(path),
        "socket": lambda: socket.socket(socket.AF_UNIX).bind("a.yaml"),
        "device": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
        "link": lambda: path.symlink_to("nowhere"),
        "missing": lambda: None,
    }
    made[kind]()
    with no_hang(), pytest.raises(ValueError, match=rf"a\.yaml`: .*{words[kind]}"):
        read_text(path)
    if kind != "missing":
        with no_hang(), pytest.raises(ValueError, match=r"a\.yaml"):
            read_yaml(path)


@pytest.mark.parametrize("encoding", ["utf-8", *MARKED])
def test_settings_and_json_of_any_editor(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes("instance_prompt: a sks café\nseed: 3\n".encode(encoding))
    assert read_yaml(tmp_path / "a.yaml") == {"instance_prompt": "a sks café", "seed": 3}
    (tmp_path / "a.json").write_bytes('{"a": "café"}'.encode(encoding))
    assert read_json(tmp_path / "a.json") == {"a": "café"}


@pytest.mark.parametrize("text", ["{", "", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_json_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json` is not JSON"):
        read_json(tmp_path / "a.json")


def laughs(levels: int, width: int = 9) -> str:
    lines = ["a0: &a0 [" + ", ".join(["lol"] * width) + "]"]
    for i in range(1, levels):
        lines.append(f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * width) + "]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (laughs(12), "its aliases stand for more than 10000 values"),
        ("a: &a [*a]", "what line 1 begins holds itself"),
        ("a: &a {b: *a}", "what line 1 begins holds itself"),
        ("[" * 5000, "is not YAML: it is nested too deeply"),
        ("a: " + "9" * 5000, "line 1 has a number of too many digits"),
        ("a: 2024-99-99", "is not YAML: month must be in 1..12"),
        ("a: 1" + ":1" * 30_000, "line 1 has a number of too many digits"),
        ("{[a]: b}", "is not YAML: "),
    ],
)
def test_yaml_that_explodes_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with no_hang(), pytest.raises(ValueError, match=rf"a\.yaml` .*{message}") as error:
        read_yaml(tmp_path / "a.yaml")
    assert len(str(error.value)) < 1000


def test_aliases_and_merge_keys_of_an_honest_file(tmp_path: Path) -> None:
    text = "validation_prompt: &p [a, b]\noptions: {<<: {rank: 2}, also: *p}\n"
    (tmp_path / "a.yaml").write_text(text)
    read = {"validation_prompt": ["a", "b"], "options": {"rank": 2, "also": ["a", "b"]}}
    assert read_yaml(tmp_path / "a.yaml") == read
