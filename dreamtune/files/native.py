"""The native file: every method's own parameters, by module path, and a JSON header."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field, PositiveInt
from torch import Tensor, nn

from dreamtune.adapters.in_parts import Parts
from dreamtune.fields import UnreadableFile, checker, from_file
from dreamtune.files.find import adapter_file
from dreamtune.files.fingerprint import PRINTS, fingerprint, uncovered
from dreamtune.files.formats import Change, ExportFormat, Prefixes
from dreamtune.files.layers import on_meta
from dreamtune.files.lora import check_low_rank
from dreamtune.files.names import exact_names
from dreamtune.files.tensors import FLOATS, TensorFile, read_tensors, write_new, write_tensors
from dreamtune.injection.adapter_file import AdapterFile
from dreamtune.injection.inject import InjectedAdapter
from dreamtune.injection.targets import REGEX, is_name
from dreamtune.models.load import prefixes_of
from dreamtune.version import __version__

# 1: without hashes; 3: convolutions, options of layers, targets by pattern; 4: parts of layers
FORMAT_VERSION = 4
HASHED_FROM, PATTERNS_FROM, PARTS_FROM = 2, 3, 4


def _of_layer(shape: list[int]) -> list[int]:
    if len(shape) not in (2, 4):
        raise ValueError("a layer is (out, in) or (out, in, kh, kw)")
    if math.prod(shape) > MOST:
        raise ValueError("no layer is so large")
    return shape


MOST = 1 << 40  # values of a weight: the product of larger sides is none of torch's integers
_Shape = Annotated[list[PositiveInt], AfterValidator(_of_layer)]
_Matrix = Annotated[_Shape, Field(min_length=2, max_length=2)]
SHAPES: Any = Annotated[dict[str, _Matrix], Field(min_length=1)]
_FIELDS: dict[str, Any] = {
    "method": str,
    "options": dict[str, Any],
    "target_modules": Annotated[list[str], Field(min_length=1)],
    "shapes": SHAPES,
    "fingerprint": PRINTS,
    "metadata": dict[str, Any],
}
_MORE: dict[str, Any] = {
    **_FIELDS,
    "shapes": Annotated[dict[str, _Shape], Field(min_length=1)],
    "layer_options": dict[str, dict[str, Any]],
}
_PARTS: dict[str, Any] = {**_MORE, "parts": dict[str, list[tuple[str, PositiveInt]]]}
_FOREIGN = {"exported_from": str}
_VERSION = checker({"format_version": PositiveInt}, needed=("format_version",), others=True)
_HEADERS = {
    since: checker(fields | _FOREIGN, needed=fields, others=True)
    for since, fields in ((1, _FIELDS), (PATTERNS_FROM, _MORE), (PARTS_FROM, _PARTS))
}


class Native(ExportFormat):
    """Exported are the parameters as they are, or the low-rank change as a LoRA."""

    file_name = "adapter.safetensors"

    def check(self, change: Change) -> str:
        if change.dtype != torch.float32:
            raise ValueError(
                f"a native file keeps float32, to train on, got {change.dtype}: export another"
                " format"
            )
        if change.max_rank is not None:
            check_low_rank(change)
            return "a plain LoRA"
        return "its own parameters"

    def needs_base(self, change: Change) -> str:
        if change.max_rank is not None and (why := super().needs_base(change)):
            return why
        bound = not uncovered(change.file)
        return "" if bound else "a native file has the fingerprint of its base, this one has none"

    def write(self, path: Path, change: Change, overwrite: bool) -> None:
        file = replace(change.file, exported_from=_foreign(change), metadata=_kept(change))
        if change.max_rank is not None:
            rank = max(down.shape[0] for _, down in change.factors.values())
            tensors = {}
            for layer, (up, down) in change.factors.items():
                tensors[f"{layer}.A"], tensors[f"{layer}.B"] = down.float(), up.float()
            file = replace(
                file,
                method="lora",
                options={"rank": rank},
                layer_options={},
                parts={},
                tensors=tensors,
            )
        if file.some_layers:
            names = exact_names(file.shapes, file.target_modules, change.network)
            entries = (f"{REGEX}{names}",) if isinstance(names, str) else tuple(names)
            file = replace(file, target_modules=entries, some_layers=False)
        write_new(path, file.tensors, about_of(file), overwrite)

    def usage(self, path: Path, change: Change) -> str:
        return f"import dreamtune\n\ndreamtune.load(pipe, {f'{path.parent.name}/{path.name}'!r})"

    def reads(self, file: TensorFile, prefixes: Prefixes) -> bool:
        return "method" in file.about

    def read(self, file: TensorFile, network: nn.Module | None, prefixes: Prefixes) -> AdapterFile:
        place = f"the `dreamtune` header of `{file.name}`"
        version = from_file(_VERSION, file.about, place)["format_version"]
        if version > FORMAT_VERSION:
            raise UnreadableFile(
                f"`{file.name}` has format version {version}, this dreamtune reads"
                f" up to {FORMAT_VERSION}: install a newer one"
            )
        if file.changed or (version >= HASHED_FROM and not file.hashed):
            what = file.difference() if file.hashed else "its hashes are gone, which"
            raise UnreadableFile(
                f"`{file.name}` is not what was written: {what} changed since. Take another copy of"
                " it"
            )
        rules = _HEADERS[max(since for since in _HEADERS if since <= version)]
        header = from_file(rules, file.about, place)
        found = AdapterFile(
            method=header["method"],
            options=header["options"],
            target_modules=tuple(header["target_modules"]),
            tensors=dict(file.tensors),
            metadata=header["metadata"],
            fingerprint=header["fingerprint"],
            shapes={name: tuple(shape) for name, shape in header["shapes"].items()},
            exported_from=header.get("exported_from"),
            source=file.name,
            layer_options=header["layer_options"] if version >= PATTERNS_FROM else {},
            parts=_parts(header["parts"], file.name) if version >= PARTS_FROM else {},
        )
        check_tensors(found)
        return found


def _parts(stated: Mapping[str, Sequence[tuple[str, int]]], name: str) -> dict[str, Parts]:
    """Of layers, from pairs: the keys of a header are sorted, and parts stand from above."""
    found: dict[str, Parts] = {path: dict(pairs) for path, pairs in stated.items()}
    for path, own in found.items():
        if len(own) != len(stated[path]):
            raise UnreadableFile(f"`{name}` has two parts of one name in `{path}`")
    return found


def check_tensors(file: AdapterFile) -> None:
    """Raises UnreadableFile unless tensors and fingerprint are those of the method's layers."""
    if missing := uncovered(file):
        raise UnreadableFile(
            f"`{file.source}`: the fingerprint of the base covers {len(file.shapes) - len(missing)}"
            f" of {len(file.shapes)} layers, `{missing[0]}` is not among them"
        )
    for what, own in {"options": file.layer_options, "parts": file.parts}.items():
        if lost := [path for path in own if path not in file.shapes]:
            raise UnreadableFile(f"`{file.source}` has {what}, but no shape, of `{lost[0]}`")
    expected = _expected(file)
    wrong = [key for key in {**expected, **file.tensors} if expected.get(key) != _kind(file, key)]
    if wrong:
        key = wrong[0]
        raise UnreadableFile(
            f"`{file.source}`: {len(wrong)} tensors do not fit `{file.method}` with {file.options}:"
            f" `{key}` must be {expected.get(key, 'absent')}, got {_kind(file, key) or 'none'}"
        )


def _expected(file: AdapterFile) -> dict[str, str]:
    """Key -> kind of each tensor, as the method would make it for such layers."""
    known: dict[tuple[int, int, str], Mapping[str, Tensor]] = {}
    expected = {}
    for path, (out, *inner) in file.shapes.items():
        own = file.layer_options.get(path, {}), list(file.parts.get(path, {}).items())
        key = out, math.prod(inner), json.dumps(own, sort_keys=True)
        if key not in known:
            try:
                known[key] = on_meta(file, path).state_dict()
            except (ValueError, RuntimeError) as error:
                raise UnreadableFile(f"`{file.source}`: {error}") from error
        for name, tensor in known[key].items():
            kind = _words(tuple(tensor.shape[1:]), tensor.dtype in FLOATS)
            expected[f"{path}.{name}"] = kind
    return expected


def _kind(file: AdapterFile, key: str) -> str | None:
    tensor = file.tensors.get(key)
    return None if tensor is None else _words(tuple(tensor.shape), tensor.dtype in FLOATS)


def _words(shape: tuple[int, ...], floats: bool) -> str:
    return f"{shape} {'floats' if floats else 'other values'}"


def _foreign(change: Change) -> str | None:
    """The method that the factors in it are of, where it is another one."""
    method = str(change.about["exported_from"])
    keeps = change.max_rank is None and method == change.file.method
    return None if keeps or method == "lora" else method


def _kept(change: Change) -> dict[str, Any]:
    cut = {"cut": change.about["cut"]} if "cut" in change.about else {}
    return {**change.about["metadata"], **cut}


FORMAT = Native()


def save_adapter(file: AdapterFile, path: str | Path) -> Path:
    """Writes one slot; a crash leaves an earlier file whole.

    path: the file, or a folder that gets `adapter.safetensors`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path / FORMAT.file_name
    about = about_of(file)
    for key, tensor in file.tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the adapter holds values that are not finite in `{key}`: not saved")
    write_tensors(path, file.tensors, about)
    return path


def about_of(file: AdapterFile) -> dict[str, Any]:
    """What the header says of it."""
    more = _needs_patterns(file)
    about: dict[str, Any] = {
        "format_version": PARTS_FROM if file.parts else PATTERNS_FROM if more else HASHED_FROM,
        "dreamtune_version": __version__,
        "method": file.method,
        "options": file.options,
        "target_modules": list(file.target_modules),
        "shapes": {name: list(shape) for name, shape in file.shapes.items()},
        "fingerprint": file.fingerprint or fingerprint(file.weights),
        "metadata": file.metadata,
    }
    if more:
        about["layer_options"] = file.layer_options
    if file.parts:
        about["parts"] = {path: list(own.items()) for path, own in file.parts.items()}
    return about if file.exported_from is None else {**about, "exported_from": file.exported_from}


def _needs_patterns(file: AdapterFile) -> bool:
    """Whether it holds what version 2 could not, which others are written as: older versions of
    dreamtune read them.
    """
    kernels = any(len(shape) > 2 for shape in file.shapes.values())
    own = bool(file.layer_options) or bool(file.parts)
    return kernels or own or not all(map(is_name, file.target_modules))


InjectedAdapter.write = staticmethod(save_adapter)


def load_adapter_file(path: str | Path) -> AdapterFile:
    """Reads a native file, or the one that a folder means (`adapter_file`); UnreadableFile says
    what is wrong with another.
    """
    file = read_tensors(adapter_file(path))
    if "dreamtune" not in file.header:
        raise UnreadableFile(f"`{file.name}` is not a native adapter file: no `dreamtune` header")
    prefixes = prefixes_of(None)
    if not FORMAT.reads(file, prefixes):
        raise UnreadableFile(f"`{file.name}` is an exported file, not a native one")
    return FORMAT.read(file, None, prefixes)
