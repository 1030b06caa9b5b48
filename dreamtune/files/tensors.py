"""Safetensors files: read with every value checked, written whole, never over other contents.

Each of ours has in its header the SHA-256 of every tensor and of the header's other values, so that
a flipped bit, an edit or a missing tensor is seen, and named. Equal contents are equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from dreamtune.fields import UnreadableFile, checker, from_file, from_json
from dreamtune.files.whole import whole

HEADER_LIMIT = 1 << 24  # bytes; a LoRA of every layer of SDXL has a header of 0.2 MB
AT_ONCE = 1 << 30  # bytes
SUMMED = 1 << 24  # values
HASHES, HEADER = "sha256", "its header"
SPEC = "modelspec.sai_model_spec"  # the string that a header with modelspec's must have
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_ANY = checker({}, others=True)
_HASHES = checker({"header": Hash, "tensors": dict[str, Hash]}, needed=("header", "tensors"))


@dataclass(frozen=True)
class TensorFile:
    """What stands in a file.

    Attributes:
        name: of the file, for messages.
        tensors: key -> tensor, all finite.
        header: its strings.
        about: the JSON of the one that is ours, without the hashes; {} in a foreign file.
        hashed: whether it has hashes; files of older versions have none.
        changed: what is not as it was written: keys of tensors that are others, missing or new,
            and HEADER. Empty without hashes.
        folder: where it lies.
    """

    name: str
    tensors: Mapping[str, Tensor]
    header: Mapping[str, str]
    about: Mapping[str, Any]
    hashed: bool
    changed: tuple[str, ...]
    folder: Path

    def difference(self) -> str:
        """`changed` in words."""
        keys = [key for key in self.changed if key != HEADER]
        total = len(self.tensors.keys() | set(keys))
        words = [HEADER] if HEADER in self.changed else []
        if keys:
            words.append(f"{len(keys)} of {total} tensors (`{keys[0]}` first)")
        return " and ".join(words)


def read_tensors(path: Path, loose: Collection[str] = ()) -> TensorFile:
    """Raises UnreadableFile for NaN, infinities, a damaged file, and one that cannot be read.

    loose: keys whose values need not be finite.

    Whether it is what was written is in `changed`, for the format to judge.
    """
    tensors, header = _opened(path, _at_once(path))
    floats = {k: x for k, x in tensors.items() if k not in loose and x.dtype in FLOATS}
    for key in not_finite(floats):
        raise UnreadableFile(f"`{path.name}` holds values that are not finite in `{key}`")
    about = _about(path, header)
    hashes = about.pop(HASHES, None)
    changed: tuple[str, ...] = ()
    if hashes is not None:
        place = _place(path)
        changed = _changed(from_file(_HASHES, hashes, f"{place}, `{HASHES}`"), tensors, about)
    hashed = hashes is not None
    return TensorFile(path.name, tensors, header, about, hashed, changed, path.parent)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Keys of floating-point tensors with NaN or infinities."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for x in tensors.values():
        by_dtype.setdefault(x.dtype, []).append(x.reshape(-1))
    sums = [_sum(part) for some in by_dtype.values() for part in _parts(some)]
    if all(map(math.isfinite, sums)):
        return []
    # or finite values add up to none
    return [key for key, x in tensors.items() if not torch.isfinite(x).all()]


def _parts(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Of no more values than are copied at once, but for a tensor that is larger."""
    part: list[Tensor] = []
    size = 0
    for x in tensors:
        if part and size + len(x) > SUMMED:
            yield part
            part, size = [], 0
        part.append(x)
        size += len(x)
    yield part


def _sum(parts: list[Tensor]) -> float:
    """A tenth of the time of looking at each tensor."""
    x = torch.cat(parts)
    return float(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)))


def read_keys(path: Path) -> TensorFile:
    """With empty tensors: what a file is, without reading it. Raises as `read_tensors`."""
    tensors, header = _opened(path, lambda file: dict.fromkeys(file.keys(), torch.empty(0)))
    about = _about(path, header)
    return TensorFile(path.name, tensors, header, about, HASHES in about, (), path.parent)


def _at_once(path: Path) -> Callable[[Any], dict[str, Tensor]]:
    """All tensors of an open file: of one that is no larger than adapters are from one piece of
    memory, a third of the time of asking for one after another.
    """

    def read(file: Any) -> dict[str, Tensor]:
        if path.stat().st_size > AT_ONCE:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        found = load(path.read_bytes())
        return {key: found[key] for key in file.keys()}  # noqa: SIM118

    return read


def _opened(
    path: Path, read: Callable[[Any], dict[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by key, the header's strings)."""
    try:
        size = int.from_bytes(_start(path), "little")
        if size > HEADER_LIMIT:
            raise UnreadableFile(f"`{path.name}` has a header of {size} bytes: no adapter has")
        with safe_open(str(path), framework="pt") as file:
            return read(file), dict(file.metadata() or {})
    except (SafetensorError, KeyError) as error:
        raise UnreadableFile(f"`{path.name}` is not a whole safetensors file: {error}") from error
    except OSError as error:
        raise UnreadableFile(f"`{path}` cannot be read: {error.strerror or error}") from error


def _place(path: Path) -> str:
    return f"the `dreamtune` header of `{path.name}`"


def _about(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    found = from_json(header.get("dreamtune", "{}"), _place(path))
    return from_file(_ANY, found, _place(path))


@contextmanager
def naming(file: str) -> Iterator[None]:
    """What is wrong with a file's contents is said with its name."""
    try:
        yield
    except ValueError as error:
        if file in str(error):
            raise
        raise UnreadableFile(f"`{file}`: {error}") from error


def _start(path: Path) -> bytes:
    if not path.is_file():
        raise UnreadableFile(f"`{path}` is {'not a file' if path.exists() else 'not there'}")
    with path.open("rb") as file:
        return file.read(8)


def _changed(
    hashes: Mapping[str, Any], tensors: Mapping[str, Tensor], about: Mapping[str, Any]
) -> tuple[str, ...]:
    saved, here = hashes["tensors"], {key: hash_of(t) for key, t in tensors.items()}
    keys = [k for k in sorted(saved.keys() | here.keys()) if saved.get(k) != here.get(k)]
    return (*keys, *([HEADER] if hashes["header"] != hash_of_json(about) else []))


def hash_of(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and bytes."""
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    found.update(data.numpy().data)
    return found.hexdigest()


def hash_of_json(values: Any) -> str:
    """SHA-256 of values as they come back from JSON, whatever their order was."""
    plain = json.loads(json.dumps(values))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    strings: Mapping[str, str] | None = None,
) -> None:
    """about: JSON values, for the header. strings: further ones there, that other programs read; of
    modelspec's the hash of the tensors is added.
    """
    ours = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    hashes = {
        "header": hash_of_json(about),
        "tensors": {key: hash_of(tensor) for key, tensor in ours.items()},
    }
    text = json.dumps(json.loads(json.dumps({**about, HASHES: hashes})), sort_keys=True)
    with whole(path) as partial:
        data = save(ours)
        header = {"dreamtune": text, "format": "pt", **dict(sorted((strings or {}).items()))}
        if SPEC in header:
            header["modelspec.hash_sha256"] = f"0x{_content_hash(data)}"
        partial.write_bytes(_in_order(data, header))


def _content_hash(data: bytes) -> str:
    """As modelspec 1.0 has it: SHA-256 of all that comes after the header."""
    start = 8 + int.from_bytes(data[:8], "little")
    return hashlib.sha256(memoryview(data)[start:]).hexdigest()


def _in_order(data: bytes, strings: Mapping[str, str]) -> bytes:
    """A safetensors file with these strings in its header, in this order: the library writes them
    in another one in every process.
    """
    size = int.from_bytes(data[:8], "little")
    header = {"__metadata__": dict(strings), **json.loads(data[8 : 8 + size])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def write_new(
    path: Path,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    overwrite: bool,
    strings: Mapping[str, str] | None = None,
) -> None:
    """As `write_tensors`, but values that are not finite, and without `overwrite` a file of that
    name with other contents, are a ValueError.
    """
    broken = not_finite({key: x for key, x in tensors.items() if x.dtype in FLOATS})
    if broken:
        raise ValueError(f"{len(broken)} tensors would not be finite, `{broken[0]}` first")
    if path.exists() and not overwrite:
        if not holds(path, tensors, about, strings or {}):
            raise other_contents(path)
        return
    write_tensors(path, tensors, about, strings)


def other_contents(path: Path) -> ValueError:
    return ValueError(
        f"`{path}` is there with other contents: pass `overwrite=True`, in the command --overwrite,"
        " to replace it"
    )


def holds(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], strings: Mapping[str, str]
) -> bool:
    """Whether a file is what `write_tensors` would write."""
    try:
        old = read_tensors(path)
    except ValueError:
        return False
    here = {key: hash_of(tensor) for key, tensor in tensors.items()}
    return (
        hash_of_json(old.about) == hash_of_json(about)
        and all(old.header.get(name) == text for name, text in strings.items())
        and here == {key: hash_of(tensor) for key, tensor in old.tensors.items()}
    )
