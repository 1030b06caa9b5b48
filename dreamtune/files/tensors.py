"""Safetensors files: read with every value checked, written whole, never over other contents."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dreamtune.files.whole import whole


@dataclass(frozen=True)
class TensorFile:
    """What stands in a file.

    Attributes:
        name: of the file, for messages.
        tensors: key -> tensor, all finite.
        header: its strings. `about` is the JSON of the one that is ours, {} in a foreign file.
    """

    name: str
    tensors: Mapping[str, Tensor]
    header: Mapping[str, str]

    @property
    def about(self) -> dict[str, Any]:
        return dict(json.loads(self.header.get("dreamtune", "{}")))


def read_tensors(path: Path) -> TensorFile:
    """NaN, infinities and a damaged file are a ValueError."""
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            header = dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"`{path.name}` is not a whole safetensors file: {error}") from error
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"`{path.name}` holds values that are not finite in `{key}`")
    return TensorFile(path.name, tensors, header)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """about: JSON values, for the header."""
    with whole(path) as partial:
        save_file({k: t.cpu().contiguous() for k, t in tensors.items()}, partial, _header(about))


def write_new(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], overwrite: bool
) -> None:
    """As `write_tensors`, but values that are not finite, and without `overwrite` a file of that
    name with other contents, are a ValueError.
    """
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"{len(broken)} tensors would not be finite, `{broken[0]}` first")
    if path.exists() and not overwrite:
        if not _holds(path, tensors, about):
            raise ValueError(
                f"`{path}` is there with other contents: pass `overwrite=True`, in the command "
                "--overwrite, to replace it"
            )
        return
    write_tensors(path, tensors, about)


def _holds(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bool:
    try:
        old = read_tensors(path)
    except ValueError:
        return False
    return (
        old.header == _header(about)
        and old.tensors.keys() == tensors.keys()
        and all(
            t.dtype == tensors[k].dtype and torch.equal(t, tensors[k].cpu())
            for k, t in old.tensors.items()
        )
    )


def _header(about: Mapping[str, Any]) -> dict[str, str]:
    return {"format": "pt", "dreamtune": json.dumps(about)}
