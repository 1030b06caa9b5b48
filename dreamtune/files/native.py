"""The native adapter file, and the fingerprint of the base weights that it was made on."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dreamtune.files.find import ADAPTER, adapter_file
from dreamtune.files.fingerprint import fingerprint
from dreamtune.injection.adapter_file import AdapterFile
from dreamtune.injection.inject import InjectedAdapter
from dreamtune.version import __version__

FORMAT_VERSION = 1


def save_adapter(file: AdapterFile, path: str | Path) -> Path:
    """Writes one slot: tensors by module path, a JSON header; a crash leaves an earlier file whole.

    path: the file, or a folder that gets `adapter.safetensors`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path / ADAPTER
    header = {
        "format_version": FORMAT_VERSION,
        "dreamtune_version": __version__,
        "method": file.method,
        "options": file.options,
        "target_modules": list(file.target_modules),
        "shapes": {name: list(shape) for name, shape in file.shapes.items()},
        "fingerprint": file.fingerprint or fingerprint(file.weights),
        "metadata": file.metadata,
    }
    tensors = {key: tensor.cpu().contiguous() for key, tensor in file.tensors.items()}
    write_safetensors(path, tensors, {"format": "pt", "dreamtune": json.dumps(header)})
    return path


InjectedAdapter.write = staticmethod(save_adapter)


def load_adapter_file(path: str | Path) -> AdapterFile:
    """Reads a native file, or the one that a folder means (`adapter_file`); a ValueError says what
    is wrong with another.
    """
    path = adapter_file(path)
    tensors, raw = read_safetensors(path)
    if "dreamtune" not in raw:
        raise ValueError(f"`{path.name}` is not a native adapter file: no `dreamtune` header")
    header = json.loads(raw["dreamtune"])
    if "method" not in header:
        raise ValueError(f"`{path.name}` is an exported file, not a native one")
    if header["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"`{path.name}` has format version {header['format_version']}, this dreamtune reads up"
            f" to {FORMAT_VERSION}: install a newer one"
        )
    return AdapterFile(
        method=header["method"],
        options=header["options"],
        target_modules=tuple(header["target_modules"]),
        tensors=tensors,
        metadata=header["metadata"],
        fingerprint=header["fingerprint"],
        shapes={name: (shape[0], shape[1]) for name, shape in header["shapes"].items()},
    )


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header strings; NaN, infinities and a damaged file are a ValueError."""
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            header = dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"`{path.name}` is not a whole safetensors file: {error}") from error
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"`{path.name}` holds values that are not finite in `{key}`")
    return tensors, header


def write_safetensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Writes beside the target and renames, so that the target is always a whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=header)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's is 0600
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
