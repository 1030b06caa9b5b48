"""The tensors of a LoRA file, layer by layer, and the two factors that they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dreamtune.fields import UnreadableFile
from dreamtune.files.formats import LayerFactors
from dreamtune.files.stated import Stated
from dreamtune.files.tensors import FLOATS

# How a key ends -> which tensor of its layer it is.
ENDINGS = {
    ".lora_A.weight": "down", ".lora_down.weight": "down", ".lora.down.weight": "down",
    ".lora_B.weight": "up", ".lora_up.weight": "up", ".lora.up.weight": "up", ".alpha": "alpha",
    "_lora.down.weight": "down", "_lora.up.weight": "up",
}  # fmt: skip
DORA = ("lora_magnitude_vector", "dora_scale")

Parts = dict[str, Tensor]  # which tensor of a layer -> it


def by_layer(
    tensors: Mapping[str, Tensor], name_of: Callable[[str], str | None]
) -> tuple[dict[str, Parts], list[str]]:
    """Name of a layer -> its tensors; and the keys that are not understood.

    name_of: a key without what a format puts before the layer's name, None for another's key.

    Raises ValueError for a layer with two tensors of one kind, and for DoRA.
    """
    parts: dict[str, Parts] = {}
    unknown = []
    for key, tensor in tensors.items():
        if any(word in key for word in DORA):
            raise ValueError(
                f"it is a DoRA (`{key}`), which scales the rows of the whole weight, and is not"
                " read. Use `pipe.load_lora_weights` for one of diffusers or PEFT, or the tool"
                " that wrote it"
            )
        name, ending = name_of(key), next((e for e in ENDINGS if key.endswith(e)), None)
        if name is None or ending is None:
            unknown.append(key)
            continue
        layer, kind = name.removesuffix(ending), ENDINGS[ending]
        found = parts.setdefault(layer, {})
        if kind in found:
            raise ValueError(f"`{layer}` has its `{kind}` twice, `{key}` is the second")
        found[kind] = tensor
    whole = {layer: found for layer, found in parts.items() if {"up", "down"} <= found.keys()}
    return whole, unknown + [layer for layer in parts if layer not in whole]


def factors_of(layer: str, parts: Parts, stated: Stated | None) -> tuple[Tensor, Tensor]:
    """(up, down) in float32, the strength in up: what the file states for the layer, else its
    alpha / r, else 1. layer: module path.

    Raises ValueError as `check_pair`, and where the file contradicts itself.
    """
    check_pair(layer, parts)
    up, down = parts["up"].float(), parts["down"].float()
    scale = scale_of(layer, down.shape[0], parts.get("alpha"), stated)
    return (up if scale == 1 else up * scale), down


def scale_of(layer: str, rank: int, alpha: Tensor | None, stated: Stated | None) -> float:
    own = None if alpha is None else float(alpha) / rank
    if stated is None:
        return 1.0 if own is None or math.isclose(own, 1) else own
    if rank != stated.rank(layer):
        raise UnreadableFile(
            f"`{layer}` is of rank {rank}, {stated.place} says {stated.rank(layer)}"
        )
    scale = stated.scale(layer)
    if own is not None and not math.isclose(own, scale, rel_tol=1e-3):  # alpha may be in fp16
        raise UnreadableFile(
            f"`{layer}` has a strength of {own:g} by its alpha, of {scale:g} by {stated.place}"
        )
    return scale


def check_pair(layer: str, found: Parts) -> None:
    """Raises ValueError unless up (out, r) and down (r, in) are floats of one rank, and alpha, if
    any, one number.
    """
    for name in ("up", "down"):
        check_matrix(layer, name, found[name])
    up, down = tuple(found["up"].shape), tuple(found["down"].shape)
    if up[1] != down[0]:
        raise ValueError(f"`{layer}`: up {up} and down {down} must be of one rank")
    if "alpha" in found:
        check_alpha(layer, found["alpha"])


def check_matrix(layer: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise ValueError(f"`{name}` of `{layer}` must be floats, got {tensor.dtype}")
    if tensor.dim() != 2 or 0 in tensor.shape:
        raise ValueError(f"`{name}` of `{layer}` must be a matrix, got shape {tuple(tensor.shape)}")


def check_alpha(layer: str, alpha: Tensor) -> None:
    if alpha.numel() != 1 or alpha.is_complex() or not alpha.isfinite():
        raise ValueError(f"`alpha` of `{layer}` must be one finite number")


def check_finite(file: str, factors: LayerFactors) -> None:
    """Raises UnreadableFile for a change that is not finite in float32."""
    for path, (up, down) in factors.items():
        # The largest value that the product of the two may have.
        bound = float(up.double().norm()) * float(down.double().norm())
        if not bound <= torch.finfo(torch.float32).max:
            raise UnreadableFile(f"`{file}`: the change of `{path}` is not finite in float32")
