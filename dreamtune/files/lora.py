"""Plain LoRA: what its formats share, and factors that keep their accuracy in fp16."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamtune.adapters import METHODS, Adapter
from dreamtune.fields import UnreadableFile, checker, from_file
from dreamtune.files.fingerprint import PRINTS
from dreamtune.files.formats import Change, ExportFormat, LayerFactors, Prefixes
from dreamtune.files.tensors import FLOATS, TensorFile, write_new
from dreamtune.injection.adapter_file import AdapterFile
from dreamtune.injection.targets import TARGET_MODULES, find_targets

_ABOUT = checker(
    {"metadata": dict[str, Any], "fingerprint": PRINTS, "exported_from": str}, others=True
)


def recompress(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product in float64, orthogonal on both sides, its size split evenly between them.

    Factors that cancel, or of very different size, lose accuracy in fp16; these do not. The rank
    stays, unless a side of the layer is narrower.
    """
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().mT)
    left, size, right = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    root = size.sqrt()
    return q_up @ (left * root), (root.unsqueeze(-1) * right) @ q_down.mT


def same_rank(factors: LayerFactors) -> LayerFactors:
    """Fills up with zeros to one rank: PEFT mixes up the alphas of a file of several ranks."""
    rank = max(up.shape[-1] for up, _ in factors.values())
    return {
        path: (F.pad(up, (0, rank - up.shape[-1])), F.pad(down, (0, 0, 0, rank - down.shape[-2])))
        for path, (up, down) in factors.items()
    }


class PlainLora(ExportFormat):
    """What the formats of plain LoRA share: a file has the two factors of a layer, and its alpha if
    any, under three keys that begin with the layer.
    """

    def check(self, method: type[Adapter], network: nn.Module | None) -> None:
        if not method.low_rank:
            low = ", ".join(sorted(name for name, cls in METHODS.items() if cls.low_rank))
            raise ValueError(
                f"`{method.name}` is not a low-rank change and no plain LoRA holds it: use "
                "`adapter.merge()` and save the model, the native file with `dreamtune.load`, or "
                f"train one of {low}"
            )

    @abstractmethod
    def prefix(self, prefixes: Prefixes) -> str:
        """Of every key."""

    @abstractmethod
    def tensors(self, factors: LayerFactors, prefix: str) -> dict[str, Tensor]:
        """Key -> tensor, of scale 1."""

    def paths(self, names: Iterable[str], layers: Iterable[str] | None) -> dict[str, str]:
        """Name of a layer in the file -> module path; unknown names stay. layers: module paths of
        the network.
        """
        return {name: name for name in names}

    def write(self, path: Path, change: Change, overwrite: bool) -> None:
        cast = {p: (u.to(change.dtype), d.to(change.dtype)) for p, (u, d) in change.factors.items()}
        tensors = self.tensors(cast, self.prefix(change.prefixes))
        write_new(path, tensors, change.about, overwrite)

    def reads(self, file: TensorFile, prefixes: Prefixes) -> bool:
        return any(key.startswith(self.prefix(prefixes)) for key in file.tensors)

    def read(self, file: TensorFile, network: nn.Module | None, prefixes: Prefixes) -> AdapterFile:
        """As an adapter of the method LoRA. One that another tool has changed since we wrote it is
        read, with a warning that counts what changed.
        """
        about = from_file(_ABOUT, file.about, f"the `dreamtune` header of `{file.name}`")
        if file.changed:
            warnings.warn(
                f"`{file.name}` is not what was written: {file.difference()} changed since. It is"
                " loaded as it is now",
                stacklevel=2,
            )
        layers = None
        if network is not None:
            targets = find_targets(network, TARGET_MODULES)
            layers = {path: tuple(layer.weight.shape) for path, layer in targets.items()}
        by_name, unknown = plain_factors(file.tensors, self.prefix(prefixes))
        paths = self.paths(by_name, layers)
        factors = {paths[name]: pair for name, pair in by_name.items()}
        if len(factors) < len(by_name):
            raise UnreadableFile(f"`{file.name}` has two names for one layer")
        if layers is not None:
            unknown += [path for path in factors if path not in layers]
        if unknown or not factors:
            raise UnreadableFile(
                f"`{file.name}`: {len(unknown)} keys match no attention projection,"
                f" `{[*unknown, 'none'][0]}` first. For a LoRA of other layers use"
                " `pipe.load_lora_weights`"
            )
        check_factors(file.name, factors)
        used = tuple(t for t in TARGET_MODULES if any(p.endswith(f".{t}") for p in factors))
        shapes = {path: (up.shape[0], down.shape[1]) for path, (up, down) in factors.items()}
        if layers is not None:
            _check_layers(file.name, shapes, layers, used)
        tensors = {}
        for path, (up, down) in same_rank(factors).items():
            tensors[f"{path}.A"], tensors[f"{path}.B"] = down, up
        return AdapterFile(
            method="lora",
            options={"rank": max(down.shape[0] for _, down in factors.values())},
            target_modules=used,
            tensors=tensors,
            metadata=about.get("metadata", {}),
            shapes=shapes,
            fingerprint=about.get("fingerprint", {}),
            exported_from=about.get("exported_from"),
            source=file.name,
        )


def _check_layers(
    file: str,
    shapes: Mapping[str, tuple[int, ...]],
    layers: Mapping[str, tuple[int, ...]],
    used: tuple[str, ...],
) -> None:
    """Every layer of a projection that is in the file, and of the network's shapes."""
    expected = [path for path in layers if path.endswith(tuple(f".{t}" for t in used))]
    missing = [path for path in expected if path not in shapes]
    if missing:
        raise UnreadableFile(f"`{file}`: {len(missing)} layers have no keys, `{missing[0]}` first")
    for path, got in shapes.items():
        if got != layers[path]:
            raise UnreadableFile(f"`{file}`: `{path}` is {layers[path]} here and {got} in the file")


ENDINGS = {
    ".lora_A.weight": "down", ".lora_down.weight": "down", ".lora.down.weight": "down",
    ".lora_B.weight": "up", ".lora_up.weight": "up", ".lora.up.weight": "up", ".alpha": "alpha",
}  # fmt: skip


def check_factors(file: str, factors: LayerFactors) -> None:
    """Raises UnreadableFile for a change that is not finite in float32."""
    for path, (up, down) in factors.items():
        # The largest value that the product of the two may have.
        bound = float(up.double().norm()) * float(down.double().norm())
        if not bound <= torch.finfo(torch.float32).max:
            raise UnreadableFile(f"`{file}`: the change of `{path}` is not finite in float32")


def check_pair(layer: str, found: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless up (out, r) and down (r, in) are floats of one rank, and alpha, if
    any, one number.
    """
    for name in ("up", "down"):
        tensor = found[name]
        if tensor.dtype not in FLOATS:
            raise ValueError(f"`{name}` of `{layer}` must be floats, got {tensor.dtype}")
        if tensor.dim() != 2 or 0 in tensor.shape:
            raise ValueError(
                f"`{name}` of `{layer}` must be a matrix, got shape {tuple(tensor.shape)}"
            )
    up, down = tuple(found["up"].shape), tuple(found["down"].shape)
    if up[1] != down[0]:
        raise ValueError(f"`{layer}`: up {up} and down {down} must be of one rank")
    if "alpha" in found and (
        found["alpha"].numel() != 1 or found["alpha"].is_complex() or not found["alpha"].isfinite()
    ):
        raise ValueError(f"`alpha` of `{layer}` must be one finite number")


def plain_factors(tensors: Mapping[str, Tensor], prefix: str) -> tuple[LayerFactors, list[str]]:
    """Name of a layer, which is what stands between prefix and ending -> (up, down) in float32,
    alpha in up; and the keys that are not understood.

    Raises ValueError for a layer with two tensors of one kind, and as `check_pair`.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        ending = next((e for e in ENDINGS if key.endswith(e)), None)
        if ending is None or not key.startswith(prefix):
            unknown.append(key)
            continue
        layer = key.removesuffix(ending).removeprefix(prefix)
        kinds = parts.setdefault(layer, {})
        if ENDINGS[ending] in kinds:
            raise ValueError(f"`{layer}` has its `{ENDINGS[ending]}` twice, `{key}` is the second")
        kinds[ENDINGS[ending]] = tensor
    factors = {}
    for layer, found in parts.items():
        if "up" not in found or "down" not in found:
            unknown.append(prefix + layer)
            continue
        check_pair(layer, found)
        up, down = found["up"].float(), found["down"].float()
        rank = down.shape[0]
        alpha = float(found["alpha"]) if "alpha" in found else float(rank)
        factors[layer] = (up * (alpha / rank) if not math.isclose(alpha, rank) else up, down)
    return factors, unknown
