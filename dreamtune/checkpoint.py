"""The native adapter file, and the fingerprint of the base weights that it was made on."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dreamtune.adapter_file import AdapterFile, Fingerprint
from dreamtune.find import ADAPTER, adapter_file
from dreamtune.inject import InjectedAdapter
from dreamtune.version import __version__

FORMAT_VERSION = 1
PROJECTIONS = 16
# Relative distance of a layer's projections. A cast to fp16 or bf16 moves them at most 2e-3,
# training of the layer by 1% about 7e-3.
TOLERANCE = 4e-3


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


@torch.no_grad()
def fingerprint(weights: Mapping[str, Tensor]) -> Fingerprint:
    """16 numbers a layer: `sᵀ W t` for fixed pairs of random sign vectors, float32."""
    prints = {}
    for name, weight in weights.items():
        if weight.device.type == "meta":
            raise ValueError("weights on the meta device have no fingerprint")
        left = _signs("left", weight.shape[0], weight.device)
        right = _signs("right", weight.shape[1], weight.device)
        values = ((left @ weight.float()) * right).sum(-1)
        prints[name] = values
    if not prints:
        return {}
    table = torch.stack(list(prints.values())).cpu().tolist()  # one transfer for all layers
    return {name: [float(f"{v:.7g}") for v in row] for name, row in zip(prints, table)}


def _signs(kind: str, width: int, device: torch.device) -> Tensor:
    """(16, width) of ±1 from a hash: the same on every machine and version."""
    size = PROJECTIONS * width // 8 + 1
    digest = hashlib.shake_256(f"dreamtune {kind} {width}".encode()).digest(size)
    bits = np.unpackbits(np.frombuffer(digest, np.uint8))[: PROJECTIONS * width]
    signs = torch.from_numpy(bits.astype(np.float32) * 2 - 1)
    return signs.reshape(PROJECTIONS, width).to(device)


def compare_fingerprints(saved: Fingerprint, here: Fingerprint) -> list[str]:
    """Layers, farthest first, whose weights are not those that were saved, up to a cast."""
    distances = {}
    for name, values in saved.items():
        if name not in here:
            distances[name] = float("inf")
            continue
        a, b = torch.tensor(values), torch.tensor(here[name])
        size = max(float(a.norm()), float(b.norm()))
        distances[name] = float((a - b).norm()) / size if size else 0.0
    far = [name for name, distance in distances.items() if not distance <= TOLERANCE]
    return sorted(far, key=lambda name: -distances[name])


def check_base(
    method: str, depends_on_weight: bool, saved: Fingerprint, here: Fingerprint, force: bool = False
) -> str | None:
    """None on the base of training; else a warning, or a ValueError where the method needs W."""
    far = compare_fingerprints(saved, here)
    if not far:
        return None
    what = (
        f"this base is not the one that the adapter was trained on: {len(far)} of {len(saved)}"
        f" layers differ, most `{far[0]}`"
    )
    if not depends_on_weight:
        return f"{what}; a `{method}` adapter can be tried on it"
    if force:
        return f"{what}; the factors of `{method}` were recomputed on this base's weights"
    raise ValueError(
        f"{what}. `{method}` contains the base weights: load it on its own base, or pass"
        " `force=True` to recompute it on this one"
    )
