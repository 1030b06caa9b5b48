"""The tensors of a LoRA file, layer by layer, and the two factors that they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dreamtune.fields import UnreadableFile
from dreamtune.files.formats import LayerFactors
from dreamtune.files.lycoris import Factors, as_factors, hadamard, kronecker, tucker
from dreamtune.files.stated import Stated
from dreamtune.files.tensors import FLOATS
from dreamtune.injection.targets import TARGET_MODULES

# How a key ends -> which tensor of its layer it is.
ENDINGS = {
    ".lora_A.weight": "down", ".lora_down.weight": "down", ".lora.down.weight": "down",
    ".lora_B.weight": "up", ".lora_up.weight": "up", ".lora.up.weight": "up", ".alpha": "alpha",
    "_lora.down.weight": "down", "_lora.up.weight": "up", ".lora_mid.weight": "mid",
    **{f".{name}": name for name in (
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1",
        "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    )},
}  # fmt: skip
_KERNELS = ("mid", "hada_t1", "lokr_t2", "lokr_w2", "down")  # the first of a layer has its kernel
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
        name, ending = name_of(key), ending_of(key)
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


def ending_of(key: str) -> str | None:
    """Of ENDINGS that which the key ends with."""
    parts = key.rsplit(".", 2)  # most keys end in whole words
    for usual in ("." + ".".join(parts[-2:]), "." + parts[-1]):
        if usual in ENDINGS and len(usual) < len(key):
            return usual
    return next((e for e in ENDINGS if key.endswith(e)), None)


def method_of(parts: Parts) -> str | None:
    """In PEFT's words. None for tensors that are not all of one."""
    kinds = parts.keys() - {"alpha"}
    if kinds - {"mid"} == {"up", "down"}:
        return "LORA"
    pairs = [{f"{w}_a", f"{w}_b"} for w in ("hada_w1", "hada_w2", "lokr_w1", "lokr_w2")]
    if kinds - {"hada_t1", "hada_t2"} == pairs[0] | pairs[1]:
        return "LOHA" if ("hada_t1" in kinds) == ("hada_t2" in kinds) else None
    ones = ({"lokr_w1"}, pairs[2])
    others = ({"lokr_w2"}, pairs[3], pairs[3] | {"lokr_t2"})
    return "LOKR" if any(kinds == one | other for one in ones for other in others) else None


def factors_of(layer: str, parts: Parts, stated: Stated | None) -> tuple[Tensor, Tensor]:
    """(up, down) in float32, (out, r) and (r, in), of a convolution (r, in * kh * kw), the strength
    in up: what the file states for the layer, else its alpha / r, else 1. layer: module path.

    Raises ValueError for tensors that are no such factors, and where the file contradicts itself.
    """
    method = method_of(parts)
    assert method is not None
    if stated and stated.method != method:
        raise UnreadableFile(f"`{layer}` is a {method}, {stated.place} says {stated.method}")
    if "alpha" in parts:
        check_alpha(layer, parts["alpha"])
    if method == "LORA":
        up, down = _lora(layer, parts)
        scale = scale_of(layer, parts, stated)
        return (up if scale == 1 else up * scale), down
    up, down = (kronecker if method == "LOKR" else hadamard)(*_lycoris(layer, parts, method))
    if up.shape[1] >= min(up.shape[0], down.shape[1]):
        raise UnreadableFile(
            f"`{layer}`: its {method} may change the layer of {up.shape[0]} by {down.shape[1]} at a"
            f" rank of {up.shape[1]}, which is no low rank. Use the tool that wrote it"
        )
    return (up * scale_of(layer, parts, stated)).float(), down.float()


def _lora(layer: str, parts: Parts) -> tuple[Tensor, Tensor]:
    """The factors in float32. Of a convolution down is (r, in, kh, kw) and up (out, r, 1, 1); or
    down is 1x1 too, and a core `mid`, (r, r, kh, kw), stands between them (LoCon's Tucker form).
    """
    up, down, mid = parts["up"], parts["down"], parts.get("mid")
    if up.dim() == down.dim() == 4 and up.shape[2:] == (1, 1):
        up = up.flatten(1)
        if mid is None:
            check_matrix(layer, "down", down, kernel=True)
            down = down.flatten(1)
    if mid is None:
        up, down = check_pair(layer, {"up": up, "down": down}, "up", "down")
        return up.float(), down.float()
    if down.dim() == 4 and down.shape[2:] == (1, 1):
        down = down.flatten(1)
    up, down = check_pair(layer, {"up": up, "down": down}, "up", "down")
    check_core(layer, "mid", mid, len(down))
    up, down = tucker(mid.double(), up.mT.double(), down.double())
    return up.float(), down.float()


def _lycoris(layer: str, parts: Parts, method: str) -> list[Factors]:
    """The factors in float64 of both matrices."""
    pairs, ranks = [], []
    word = "hada" if method == "LOHA" else "lokr"
    for one, core in ((f"{word}_w{n}", f"{word}_t{n}") for n in (1, 2)):
        if one in parts:
            check_matrix(layer, one, parts[one], kernel=True)
            pairs.append(as_factors(parts[one].flatten(1).double()))
        elif core in parts:
            up, down = parts[f"{one}_a"], parts[f"{one}_b"]  # both (r, ...)
            for end, side in (("a", up), ("b", down)):
                check_matrix(layer, f"{one}_{end}", side)
            if len(up) != len(down):
                raise ValueError(f"`{layer}`: {one}_a and {one}_b must be of one rank")
            check_core(layer, core, parts[core], len(down))
            pairs.append(tucker(parts[core].double(), up.double(), down.double()))
            ranks.append(len(down))
        else:
            up, down = check_pair(layer, parts, f"{one}_a", f"{one}_b")
            pairs.append((up.double(), down.double()))
            ranks.append(len(down))
    if len(set(ranks)) > 1:
        raise UnreadableFile(f"`{layer}`: its two matrices must be of one rank, got {ranks}")
    shapes = [(up.shape[0], down.shape[1]) for up, down in pairs]
    if method == "LOHA" and shapes[0] != shapes[1]:
        raise UnreadableFile(f"`{layer}`: its two matrices must be of one shape, got {shapes}")
    return pairs


def shape_of(
    parts: Parts, up: Tensor, down: Tensor, here: tuple[int, ...] | None
) -> tuple[int, ...]:
    """Of the layer that factors are of, (out, in) or (out, in, kh, kw). up, down: its
    `factors_of`. here: of the network's layer, whose kernel is taken where the tensors tell none.
    """
    kernels = (parts[name].shape[2:] for name in _KERNELS if name in parts)
    kernel = list(next(filter(len, kernels), ()))
    out, width = len(up), down.shape[1]
    untold = not kernel and not tells_kernel(parts)
    if untold and here is not None and math.prod(here[1:]) == width:
        return (out, *here[1:])
    return (out, width // math.prod(kernel), *kernel)


def tells_kernel(parts: Parts) -> bool:
    """LoHa and LoKr may hold a convolution's weight as a matrix."""
    return method_of(parts) == "LORA" or any(
        parts[name].dim() == 4 for name in _KERNELS if name in parts
    )


def check_kernels(parts: Mapping[str, Parts]) -> None:
    """Raises ValueError for layers that may be convolutions, where there is no network to ask."""
    for layer, own in parts.items():
        if not tells_kernel(own) and not layer.endswith(tuple(f".{t}" for t in TARGET_MODULES)):
            raise ValueError(
                f"the tensors of `{layer}` do not tell whether it is a convolution: pass the UNet"
                " as `base`, in the command as --pretrained_model_name_or_path"
            )


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


def check_matrix(layer: str, name: str, tensor: Tensor, kernel: bool = False) -> None:
    """kernel: whether it may be one of a convolution, (a, b, kh, kw)."""
    if tensor.dtype not in FLOATS:
        raise ValueError(f"`{name}` of `{layer}` must be floats, got {tensor.dtype}")
    if tensor.dim() not in ((2, 4) if kernel else (2,)) or 0 in tensor.shape:
        raise ValueError(
            f"`{name}` of `{layer}` must be a matrix{' or a kernel' if kernel else ''}, got shape"
            f" {tuple(tensor.shape)}"
        )


def check_core(layer: str, name: str, core: Tensor, rank: int) -> None:
    check_matrix(layer, name, core, kernel=True)
    if core.dim() != 4 or core.shape[:2] != (rank, rank):
        raise ValueError(
            f"`{name}` of `{layer}` must be ({rank}, {rank}, kh, kw), got {tuple(core.shape)}"
        )


def check_alpha(layer: str, alpha: Tensor) -> None:
    if alpha.numel() != 1 or alpha.is_complex() or not math.isfinite(float(alpha)):
        raise ValueError(f"`alpha` of `{layer}` must be one finite number")


def check_finite(file: str, factors: LayerFactors) -> None:
    """Raises UnreadableFile for a change that is not finite in float32."""
    # The largest value that the product of the two may have.
    for path, bound in zip(factors, _bounds(factors, torch.float32)):
        if not bound <= torch.finfo(torch.float32).max / 2:  # or a norm was too large for float32
            (bound,) = _bounds({path: factors[path]}, torch.float64)
        if not bound <= torch.finfo(torch.float32).max:
            raise UnreadableFile(f"`{file}`: the change of `{path}` is not finite in float32")


def _bounds(factors: LayerFactors, dtype: torch.dtype) -> list[float]:
    """Of each layer the product of the factors' norms."""
    if not factors:
        return []
    sides = [[f[side] for f in factors.values()] for side in (0, 1)]
    norms = [torch.stack(list(torch._foreach_norm(s, 2, dtype))).double() for s in sides]
    found: list[float] = torch.mul(*norms).tolist()
    return found
