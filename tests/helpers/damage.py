"""Damage to files, seeded: what disks, editors and other tools do to them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

ODD: list[Any] = [
    None, True, -1, 0, 3, 10**400, 1e308, -1e308, float("nan"), float("inf"), "", "x", "../x",
    "\0", "é" * 300, [], [[]], [1, "a", None], {}, {"a": {"b": []}}, {"": 0}, 2**63, 0.5,
]  # fmt: skip
DEEP = "[" * 100_000
DTYPES = (
    torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int32, torch.bool,
    torch.float8_e4m3fn,
)  # fmt: skip

Bytes = Callable[[bytes, random.Random], bytes]


def flip(data: bytes, rng: random.Random, first: int = 0, last: int | None = None) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        out[rng.randrange(first, len(data) if last is None else last)] ^= 1 << rng.randrange(8)
    return bytes(out)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def longer(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.choice((1, 8, 4096)))


def blank(data: bytes, rng: random.Random) -> bytes:
    """A block that never reached the disk."""
    size = min(len(data), 512)
    start = rng.randrange(len(data) - size + 1)
    return data[:start] + bytes(size) + data[start + size :]


def garbage(data: bytes, rng: random.Random) -> bytes:
    return rng.choice((b"", rng.randbytes(64), b"\xff" * 8 + b"{}", b"<!DOCTYPE html>"))


ANY: list[Bytes] = [flip, flip, cut, longer, blank, garbage]


# Safetensors


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: str | dict[str, Any], body: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def flip_header(data: bytes, rng: random.Random) -> bytes:
    return flip(data, rng, 0, 8 + int.from_bytes(data[:8], "little"))


def flip_tensors(data: bytes, rng: random.Random) -> bytes:
    return flip(data, rng, 8 + int.from_bytes(data[:8], "little"))


def edit_entry(data: bytes, rng: random.Random) -> bytes:
    """A tensor's line in the header: renamed, of another dtype, shape or place, twice, gone."""
    header, body = split(data)
    key = rng.choice([k for k in header if k != "__metadata__"])
    entry = header[key]
    what = rng.randrange(7)
    if what == 0:
        header[rng.choice((key + "x", key[1:], "", key.replace("0", "1")))] = header.pop(key)
    elif what == 1:
        entry["dtype"] = rng.choice(("I32", "F16", "BF16", "F64", "BOOL", "U8", "X", "F8_E4M3"))
    elif what == 2:
        entry["shape"] = rng.choice((entry["shape"][::-1], [*entry["shape"], 1], [-1], [], [2**62]))
    elif what == 3:
        entry["data_offsets"] = rng.choice(([0, 0], [5, 1], [0, 2**63], entry["data_offsets"][:1]))
    elif what == 4:
        del header[key]
    elif what == 5:
        text = json.dumps(header)
        return joined(text[:-1] + f", {json.dumps(key)}: {json.dumps(entry)}}}", body)
    else:
        header[key] = rng.choice(ODD[:8])
    return joined(header, body)


def leaves(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything below."""
    pairs = list(value.items() if isinstance(value, dict) else enumerate(value))
    found = [(value, key) for key, _ in pairs]
    return found + [x for _, v in pairs if isinstance(v, (dict, list)) for x in leaves(v)]


def edit_json(text: str, rng: random.Random) -> str:
    """A value replaced, renamed, removed or added, or the whole of it."""
    value = json.loads(text)
    if rng.random() < 0.1:
        return rng.choice(("", "[]", "null", "{", DEEP, "1" * 5000, '"x"', "{}"))
    container, key = rng.choice(leaves(value))
    what = rng.randrange(5)
    if what == 0 and isinstance(container, dict):
        container[f"{key}x"] = container.pop(key)
    elif what == 1:
        del container[key]
    elif what == 2 and isinstance(container[key], (int, float)):
        container[key] += rng.choice((1, -1, 0.5, 1e9))
    else:
        container[key] = rng.choice(ODD)
    return json.dumps(value)


def edit_about(data: bytes, rng: random.Random) -> bytes:
    header, body = split(data)
    strings = header.get("__metadata__", {})
    if "dreamtune" in strings and rng.random() < 0.9:
        strings["dreamtune"] = edit_json(strings["dreamtune"], rng)
    else:
        header["__metadata__"] = rng.choice(({}, {"dreamtune": "{}"}, {"format": "np"}))
    return joined(header, body)


def edit_tensors(data: bytes, rng: random.Random) -> bytes:
    """Other values, dtypes, shapes, names, as a tool would write them; our header stays."""
    tensors, strings = load(data), split(data)[0].get("__metadata__", {})
    key = rng.choice(list(tensors))
    x, what = tensors[key], rng.randrange(9)
    if what == 0:
        flat = x.reshape(-1).clone()
        bad = (float("nan"), float("inf"), 3e38, 1e30, -7.0)
        flat[rng.randrange(flat.numel())] = rng.choice(bad)
        tensors[key] = flat.reshape(x.shape)
    elif what == 1:
        kind = rng.choice(DTYPES)
        several = list(tensors) if rng.random() < 0.3 else [key]
        tensors |= {k: tensors[k].to(kind) for k in several}
    elif what == 2:
        tensors[key] = x.mT.contiguous() if x.dim() > 1 else x.repeat(2)
    elif what == 3:
        tensors[key] = x[:-1].clone() if x.dim() else x[None]
    elif what == 4:
        tensors[key] = x[..., None].clone()
    elif what == 5:
        tensors[other_name(key)] = -x.clone()
    elif what == 6:
        del tensors[key]
    elif what == 7:
        tensors[key + rng.choice((".x", "", "_"))] = tensors.pop(key) * rng.choice((1, 2))
    else:
        tensors[key] = torch.zeros((0, *x.shape[1:]), dtype=x.dtype)
    return save({k: t.contiguous() for k, t in tensors.items()}, strings)


def other_name(key: str) -> str:
    """Of the same tensor, in the words of another tool."""
    for ours, theirs in (
        (".lora_A.weight", ".lora.down.weight"), (".lora_B.weight", ".lora_up.weight"),
        (".lora_down.weight", ".lora_A.weight"), (".lora_up.weight", ".lora.up.weight"),
    ):  # fmt: skip
        if key.endswith(ours):
            return key.replace(ours, theirs)
    return key + ".copy"


TENSORS: list[Bytes] = [*ANY, flip_header, flip_tensors, edit_entry, edit_about, edit_tensors]


def edit_lines(data: bytes, rng: random.Random) -> bytes:
    """metrics.jsonl: a line edited, gone, twice, or in another place."""
    lines = data.decode().splitlines()
    at, what = rng.randrange(len(lines)), rng.randrange(4)
    if what == 0:
        lines[at] = edit_json(lines[at], rng)
    elif what == 1:
        del lines[at]
    elif what == 2:
        lines.insert(at, lines[at])
    else:
        rng.shuffle(lines)
    return "".join(f"{line}\n" for line in lines).encode()


def edit_json_file(data: bytes, rng: random.Random) -> bytes:
    return edit_json(data.decode(), rng).encode()


def edit_yaml(data: bytes, rng: random.Random) -> bytes:
    """A line of a config edited, gone, twice, or broken."""
    lines = data.decode().splitlines()
    at, what = rng.randrange(len(lines)), rng.randrange(5)
    name = lines[at].partition(":")[0]
    if what == 0:
        lines[at] = f"{name}: {rng.choice(YAML)}"
    elif what == 1:
        del lines[at]
    elif what == 2:
        lines.append(f"{name}: 3")
    elif what == 3:
        lines[at] = f"{name}x{lines[at][len(name) :]}"
    else:
        return rng.choice(WHOLE_YAML).encode()
    return "\n".join(lines).encode()


YAML = (
    "", "~", "-1", "0", "1e400", ".nan", ".inf", "yes", "no", "[]", "{}", "[[1]]", "{a: b}", "x",
    "0x1F", "1_000", "12:30:45", "2001-99-99", "!!float x", "!!int ''", "!!bool x", "!!binary =",
    "!!timestamp x", "!!python/object/apply:os.system ['true']", "*nothing", "&a [*a]", "'", "\t",
    "9" * 5000, "9" * 30, "1.5", '"\\x00"', "é", "2147483648", "-0.0", "1e-400", "!!set {a, b}",
    "9007199254740993", "[1, a]", "{1: 2}",
)  # fmt: skip
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 10) + "]\n" for i in range(1, 12)
)
WHOLE_YAML = (
    "", "[]", "3", "a: b: c", "\t", "{", "[" * 5000, "a: " * 3000, BOMB, BOMB + "seed: *a11\n",
    BOMB + "options: *a11\n", BOMB + "validation_prompt: *a11\n", "? [1]\n: 2", "1: 2", "~: 3",
    "--- 1\n--- 2", "&x {seed: *x}", "seed: 1\nseed: 2", "options: [1]", "options: {1: 2}",
    "options: {rank: {}}", "method: [lora]", "method: {}", "method: 3", "\0", "\x85", "<<: 3",
    "<<: {seed: 3}", "options: {rank: 1e9}", "sweep: {seed: 1}", "rank: 99999999999999999999",
)  # fmt: skip


def equal(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = 0.0) -> bool:
    return a.keys() == b.keys() and all(
        a[k].shape == b[k].shape and bool((a[k] - b[k]).norm() <= rtol * b[k].norm()) for k in a
    )
