"""Whether a network is small enough for the device, asked before a weight is read."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path

import torch

from dreamtune.models.checkpoint import NETWORK, opened
from dreamtune.models.folder import ModelFolder, has
from dreamtune.models.weights import SHARD, choose

GIB = 2**30


def weights_of_file(path: Path, start: str = NETWORK) -> int:
    """Numbers in the tensors of a .safetensors file whose names start so."""
    with opened(path) as file:
        names = [name for name in file.keys() if name.startswith(start)]  # noqa: SIM118
        return sum(prod(file.get_slice(name).get_shape()) for name in names)


def weights_of_folder(folder: ModelFolder, part: str) -> int | None:
    """Numbers in a part's .safetensors files, those that are read; None for a pickle. Raises
    ValueError where there are none.
    """
    names = folder.names(part)
    variant = folder.variant if has(names, folder.variant) else None
    chosen = choose(names, variant, folder.place(part))
    if not chosen.safetensors:
        return None
    end = f"{chosen.variant}.safetensors" if chosen.variant else "safetensors"
    mine = [n for n in names if SHARD.sub("", n).partition(".")[2] == end]
    return sum(weights_of_file(folder.path / part / name, "") for name in mine)


def check_room(
    name: str, weights: Callable[[], int | None], dtype: torch.dtype, device: torch.device
) -> None:
    """weights: counts those of the network. Raises ValueError for more than the device's whole
    memory holds; what is wrong with the files is said where they are read.
    """
    if device.type != "cuda":
        return
    try:
        count = weights()
    except ValueError:
        return
    if count is None:
        return
    total = torch.cuda.get_device_properties(device).total_memory
    needed = count * dtype.itemsize
    if needed < total:
        return
    raise ValueError(
        f"the network of `{name}` has {count / 1e9:.1f} billion weights, {needed / GIB:.1f} GiB "
        f"in {str(dtype).removeprefix('torch.')}, and {device} has {total / GIB:.1f} GiB: use a "
        "card with more memory, or a smaller base."
    )
