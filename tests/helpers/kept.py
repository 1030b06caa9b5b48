"""What autograd holds from the forward to the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def storages_kept(compute: Callable[[], Any]) -> list[int]:
    """Bytes of each distinct storage that autograd holds for the backward of `compute()`."""
    kept: dict[int, Tensor] = {}

    def hold(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda t: t):
        result = compute()
    sizes = [t.untyped_storage().nbytes() for t in kept.values()]
    del result
    return sizes


def bytes_kept(compute: Callable[[], Any]) -> int:
    """Of all of them."""
    return sum(storages_kept(compute))
