"""The tensors of a LoRA file, layer by layer, and the two factors that they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dreamtune.fields import UnreadableFile
from dreamtune.files.formats import LayerFactors
from dreamtune.files.lycoris import Factors, as_factors, hadamard, kronecker
from dreamtune.files.stated import Stated
from dreamtune.files.tensors import FLOATS

# How a key ends -> which tensor of its layer it is.
ENDINGS = {
    ".lora_A.weight": "down", ".lora_down.weight": "down", ".lora.down.weight": "down",
    ".lora_B.weight": "up", ".lora_up.weight": "up", ".lora.up.weight": "up", ".alpha": "alpha",
    "_lora.down.weight": "down", "_lora.up.weight": "up",
    **{f".{name}": name for name in (
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "lokr_w1", "lokr_w1_a", "lokr_w1_b",
        "lokr_w2", "lokr_w2_a", "lokr_w2_b",
    )},
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
    whole = {layer: found for layer, found in parts.items() if method_of(found)}
    return whole, unknown + [layer for layer in parts if layer not in whole]


def method_of(parts: Parts) -> str | None:
    """In PEFT's words. None for tensors that are not all of one."""
    kinds = parts.keys() - {"alpha"}
    if kinds == {"up", "down"}:
        return "LORA"
    if kinds == {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}:
        return "LOHA"
    sides = [{k for k in kinds if k.startswith(w)} for w in ("lokr_w1", "lokr_w2")]
    whole = [side in ({w}, {f"{w}_a", f"{w}_b"}) for w, side in zip(("lokr_w1", "lokr_w2"), sides)]
    return "LOKR" if all(whole) and kinds == sides[0] | sides[1] else None


def factors_of(layer: str, parts: Parts, stated: Stated | None) -> tuple[Tensor, Tensor]:
    """(up, down) in float32, the strength in up: what the file states for the layer, else its
    alpha / r, else 1. layer: module path.

    Raises ValueError for tensors that are no such factors, and where the file contradicts itself.
    """
    method = method_of(parts)
    assert method is not None
    if stated and stated.method != method:
        raise UnreadableFile(f"`{layer}` is a {method}, {stated.place} says {stated.method}")
    if "alpha" in parts:
        check_alpha(layer, parts["alpha"])
    if method == "LORA":
        up, down = check_pair(layer, parts, "up", "down")
        scale = scale_of(layer, parts, stated)
        return (up.float() if scale == 1 else up.float() * scale), down.float()
    up, down = (kronecker if method == "LOKR" else hadamard)(*_lycoris(layer, parts, method))
    if up.shape[1] >= min(up.shape[0], down.shape[1]):
        raise UnreadableFile(
            f"`{layer}`: its {method} may change the layer of {up.shape[0]} by {down.shape[1]} at a"
            f" rank of {up.shape[1]}, which is no low rank. Use the tool that wrote it"
        )
    return (up * scale_of(layer, parts, stated)).float(), down.float()


def _lycoris(layer: str, parts: Parts, method: str) -> list[Factors]:
    """The factors in float64 of both matrices."""
    pairs, ranks = [], []
    for name in ("hada_w1", "hada_w2") if method == "LOHA" else ("lokr_w1", "lokr_w2"):
        if name in parts:
            check_matrix(layer, name, parts[name])
            pairs.append(as_factors(parts[name].double()))
            continue
        up, down = check_pair(layer, parts, f"{name}_a", f"{name}_b")
        pairs.append((up.double(), down.double()))
        ranks.append(down.shape[0])
    if len(set(ranks)) > 1:
        raise UnreadableFile(f"`{layer}`: its two matrices must be of one rank, got {ranks}")
    shapes = [(up.shape[0], down.shape[1]) for up, down in pairs]
    if method == "LOHA" and shapes[0] != shapes[1]:
        raise UnreadableFile(f"`{layer}`: its two matrices must be of one shape, got {shapes}")
    return pairs


def rank_of(parts: Parts) -> int | None:
    """What alpha is divided by. None for a LoKr of whole matrices, where LyCORIS does not look at
    alpha, and PEFT takes the rank that is stated.
    """
    names = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
    return next((parts[name].shape[0] for name in names if name in parts), None)


def scale_of(layer: str, parts: Parts, stated: Stated | None) -> float:
    rank, alpha = rank_of(parts), parts.get("alpha")
    own = None if alpha is None or rank is None else float(alpha) / rank
    if stated is None:
        return 1.0 if own is None or math.isclose(own, 1) else own
    if rank not in (None, stated.rank(layer)):
        raise UnreadableFile(
            f"`{layer}` is of rank {rank}, {stated.place} says {stated.rank(layer)}"
        )
    scale = stated.scale(layer)
    if own is not None and not math.isclose(own, scale, rel_tol=1e-3):  # alpha may be in fp16
        raise UnreadableFile(
            f"`{layer}` has a strength of {own:g} by its alpha, of {scale:g} by {stated.place}"
        )
    return scale


def check_pair(layer: str, found: Parts, left: str, right: str) -> tuple[Tensor, Tensor]:
    """The two. Raises ValueError unless they are floats, (out, r) and (r, in)."""
    for name in (left, right):
        check_matrix(layer, name, found[name])
    up, down = tuple(found[left].shape), tuple(found[right].shape)
    if up[1] != down[0]:
        raise ValueError(f"`{layer}`: {left} {up} and {right} {down} must be of one rank")
    return found[left], found[right]


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
