"""The fingerprint of base weights, and whether this base is the one of training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, FiniteFloat
from torch import Tensor

from dreamtune.adapters import find_method
from dreamtune.fields import UnreadableFile
from dreamtune.injection.adapter_file import AdapterFile, Fingerprint

PROJECTIONS = 16
PRINTS: Any = dict[
    str, Annotated[list[FiniteFloat], Field(min_length=PROJECTIONS, max_length=PROJECTIONS)]
]
"""The type of a fingerprint in a file."""


# Relative distance of a layer's projections. A cast to fp16 or bf16 moves them at most 2e-3,
# training of the layer by 1% about 7e-3.
TOLERANCE = 4e-3


@torch.no_grad()
def fingerprint(weights: Mapping[str, Tensor]) -> Fingerprint:
    """16 numbers a layer: `sᵀ W t` for fixed pairs of random sign vectors, float32. W of a
    convolution is (out, in * kh * kw).
    """
    prints = {}
    for name, weight in weights.items():
        weight = weight.flatten(1)
        if weight.device.type == "meta":
            raise ValueError("weights on the meta device have no fingerprint")
        left = signs("left", weight.shape[0], weight.device)
        right = signs("right", weight.shape[1], weight.device)
        with torch.autocast(weight.device.type, enabled=False):
            values = ((left @ weight.float()) * right).sum(-1)
        prints[name] = values
    if not prints:
        return {}
    table = torch.stack(list(prints.values())).cpu().tolist()  # one transfer for all layers
    return {name: [float(f"{v:.7g}") for v in row] for name, row in zip(prints, table)}


def signs(kind: str, width: int, device: torch.device) -> Tensor:
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


def uncovered(file: AdapterFile) -> list[str]:
    """Layers of the adapter without a fingerprint: on no base would they be compared."""
    return [path for path in file.shapes if path not in file.fingerprint]


def refuse_other_base(saved: Fingerprint, here: Fingerprint, run: Path) -> None:
    """Raises ValueError if a run that was started on one base is to go on with another."""
    if far := compare_fingerprints(saved, here):
        raise ValueError(
            f"the base is not the one that {run} was started with: {len(far)} of {len(saved)} "
            f"layers differ, most `{far[0]}`. Go on with that base, or start a new run with "
            "another --output_dir."
        )


def check_base(file: AdapterFile, here: Fingerprint, force: bool = False) -> str | None:
    """None on the base of training; else a warning, or a ValueError where the method needs W. With
    `force`, factors alone, which nothing can recompute, are tried as they are.
    """
    method = file.exported_from or file.method
    missing = uncovered(file)
    if missing and (file.fingerprint or find_method(method).depends_on_weight):
        raise UnreadableFile(
            f"`{file.source}`: the fingerprint of its base lacks {len(missing)} of its "
            f"{len(file.shapes)} layers, `{missing[0]}` first"
        )
    far = compare_fingerprints({p: file.fingerprint[p] for p in file.shapes if not missing}, here)
    if not far:
        return None
    what = (
        f"`{file.source}`: this base is not the one that the adapter was trained on: "
        f"{len(far)} of {len(file.shapes)} layers differ, most `{far[0]}`"
    )
    if not find_method(method).depends_on_weight or (force and file.exported_from is not None):
        return f"{what}; a `{method}` adapter can be tried on it"
    if force:
        return f"{what}; the factors of `{method}` were recomputed on this base's weights"
    raise ValueError(
        f"{what}. `{method}` contains the base weights: load it on its own base, or pass"
        " `force=True` to recompute it on this one"
    )
