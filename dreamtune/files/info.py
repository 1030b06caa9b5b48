"""What an adapter file is: format, method, the size of its change, metadata, base."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dreamtune.adapters import find_method
from dreamtune.files.find import adapter_file, run_settings
from dreamtune.files.fingerprint import compare_fingerprints, fingerprint
from dreamtune.files.formats import (
    Format,
    LayerFactors,
    Prefixes,
    open_adapter,
)
from dreamtune.files.layers import factors_of_file
from dreamtune.files.lora import LoraFormat
from dreamtune.files.names import block_of
from dreamtune.files.parts import method_of, scale_of
from dreamtune.files.tensors import TensorFile, naming
from dreamtune.injection.adapter_file import Fingerprint
from dreamtune.models.load import load_network, locate, prefixes_of

WORDS = {"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr"}


@dataclass(frozen=True)
class Info:
    """Of one file.

    Attributes:
        method: in words, with its options.
        layers: module paths; where the file shortens them and there is no base, its names.
        ranks: rank of the change -> number of layers.
        strengths: alpha / r, or what the file states -> number of layers; empty in a native file.
        sizes: block -> Frobenius norm of the change of its layers together, at strength 1. Empty
            where that takes the base's weights, and they are not here.
        shares: block -> the same over the norm of the weights themselves; empty without a base.
        metadata: ours, or the strings in another tool's header.
        base: the id that the metadata gives.
        prints: the base's fingerprint.
        far: layers whose weights are other ones in the base that was given; None without one.
        doubt: why the strengths may be meant to be other ones; "" for no reason.
        changed: what was changed since dreamtune wrote the file, in words; "" for nothing.
    """

    path: Path
    format: str
    method: str
    layers: tuple[str, ...] = ()
    ranks: Mapping[int, int] = field(default_factory=dict)
    strengths: Mapping[float, int] = field(default_factory=dict)
    sizes: Mapping[str, float] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None
    prints: Fingerprint = field(default_factory=dict)
    far: int | None = None
    doubt: str = ""
    changed: str = ""


@torch.no_grad()
def describe(path: str | Path, base: Any = None) -> Info:
    """Of a file of any format that is read, or the one that a folder means.

    base: a UNet, a pipeline or where to load one from. Left out, a method that contains the base's
        weights takes that of the run that the file lies in, if it is on this machine.

    Raises ValueError as loading it would.
    """
    place = adapter_file(path)
    network = None if base is None else load_network(base)
    given = None if network is None else prefixes_of(network)
    name, found, file, prefixes = open_adapter(place, given)
    info = Info(place, name, "", changed=file.difference() if file.changed else "")
    with naming(file.name):
        if isinstance(found, LoraFormat) and found.is_lora(file):
            info, factors = _of_lora(info, found, file, network, prefixes)
        else:
            info, factors, network = _of_adapter(info, found, file, network, prefixes)
    sizes, shares = _sizes(factors, network)
    return replace(info, sizes=sizes, shares=shares, far=_far(info.prints, network))


def _of_lora(
    info: Info, found: LoraFormat, file: TensorFile, network: nn.Module | None, prefixes: Prefixes
) -> tuple[Info, LayerFactors]:
    parts, stated, factors, _, about = found.content(file, network, prefixes)
    method = ", ".join(sorted({WORDS[str(method_of(x))] for x in parts.values()}))
    if "exported_from" in about:
        method = f"{about['exported_from']}, exported as {method}"
    metadata = about.get("metadata") or {
        k: v for k, v in file.header.items() if k not in ("dreamtune", "format")
    }
    scales = (float(f"{scale_of(path, own, stated):.4g}") for path, own in parts.items())
    return replace(
        info,
        method=method,
        layers=tuple(factors),
        ranks=Counter(down.shape[0] for _, down in factors.values()),
        strengths=Counter(scales),
        metadata=metadata,
        base=metadata.get("base"),
        prints=about.get("fingerprint", {}),
        doubt=found.doubts(file, parts, stated) or "",
    ), factors


def _of_adapter(
    info: Info, found: Format, file: TensorFile, network: nn.Module | None, prefixes: Prefixes
) -> tuple[Info, LayerFactors, nn.Module | None]:
    adapter = found.read(file, network, prefixes)
    method = find_method(adapter.method)
    if network is None and method.depends_on_weight:
        network = _base_here(info.path)
    factors: LayerFactors = {}
    if method.low_rank and (network is not None or not method.depends_on_weight):
        factors, _ = factors_of_file(adapter, network, force=True)
    options = [f"{name} {value}" for name, value in adapter.options.items() if value is not None]
    if adapter.layer_options:
        options.append(f"other options in {len(adapter.layer_options)} layers")
    if adapter.parts:
        options.append(f"part by part in {len(adapter.parts)} layers")
    return (
        replace(
            info,
            method=", ".join([adapter.method, *options]),
            layers=tuple(adapter.shapes),
            ranks=Counter(down.shape[0] for _, down in factors.values()),
            metadata=adapter.metadata,
            base=adapter.metadata.get("base"),
            prints=adapter.fingerprint,
        ),
        factors,
        network,
    )


def _base_here(file: Path) -> nn.Module | None:
    """The base of the file's run, if that is on this machine: nothing is fetched to look at a
    file.
    """
    settings = run_settings(file)
    name = settings.get("pretrained_model_name_or_path")
    try:
        if name is None or locate(name) is None:
            return None
    except ValueError:
        return None
    return load_network(name, variant=settings.get("variant"))


def _sizes(
    factors: LayerFactors, network: nn.Module | None
) -> tuple[dict[str, float], dict[str, float]]:
    """See `Info`."""
    squares: dict[str, float] = {}
    weights: dict[str, float] = {}
    for path in sorted(factors, key=_in_order):
        up, down = (x.double() for x in factors[path])
        # The norm of a product, without the product.
        square = float(((up.mT @ up) * (down @ down.mT)).sum())
        block = block_of(path)
        squares[block] = squares.get(block, 0.0) + max(square, 0.0)
        if network is not None:
            weight: Any = network.get_submodule(path).weight
            own = float(weight.detach().double().square().sum())
            weights[block] = weights.get(block, 0.0) + own
    sizes = {block: square**0.5 for block, square in squares.items()}
    return sizes, {block: sizes[block] / own**0.5 for block, own in weights.items() if own}


def _in_order(path: str) -> list[str | int]:
    return [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", path)]


def _far(prints: Fingerprint, network: nn.Module | None) -> int | None:
    if network is None or not prints:
        return None
    weights = {}
    for path in prints:
        try:
            weights[path] = network.get_submodule(path).weight
        except AttributeError:
            continue
    return len(compare_fingerprints(prints, fingerprint(weights)))  # type: ignore[arg-type]
