"""LoRA files of `tiny_transformers`, in ComfyUI's words."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from tiny_transformers import tiny
from torch import Tensor, nn

from dreamtune.files.fingerprint import PROJECTIONS
from dreamtune.files.formats import Change, LayerFactors, export_format, read_adapter
from dreamtune.injection.adapter_file import AdapterFile
from dreamtune.injection.targets import layers_of
from dreamtune.models.load import prefixes_of

C = "diffusion_model."


@cache
def model_of(kind: str) -> nn.Module:
    """One that no test leaves changed."""
    return tiny(kind)


def factors_for(network: nn.Module, rank: int = 2, seed: int = 1) -> LayerFactors:
    """Random ones of every layer."""
    g, found = torch.Generator().manual_seed(seed), {}
    for path, layer in layers_of(network).items():
        out, *inner = layer.weight.shape
        up = torch.randn(out, rank, generator=g)
        found[path] = up, torch.randn(rank, torch.Size(inner).numel(), generator=g)
    return found


def products(factors: LayerFactors) -> dict[str, Tensor]:
    return {path: up.double() @ down.double() for path, (up, down) in factors.items()}


def write(path: Path, network: nn.Module, factors: LayerFactors) -> Path:
    """As `export` does with the factors as they are."""
    layers = layers_of(network)
    shapes = {path: tuple(layers[path].weight.shape) for path in factors}
    prints = dict.fromkeys(factors, [0.0] * PROJECTIONS)
    change = Change(
        file=AdapterFile("lora", {}, ("x",), {}, {}, shapes),
        low_rank=lambda: factors,
        dtype=torch.float32,
        about={"exported_from": "lora", "fingerprint": prints, "metadata": {}},
        prefixes=prefixes_of(network),
        network=network,
    )
    target = export_format("comfyui")
    assert target.check(change) == "a plain LoRA"
    target.write(path, change, overwrite=True)
    return path


def read(path: Path, network: nn.Module) -> dict[str, Tensor]:
    file = read_adapter(path, network)
    pairs = {p: (file.tensors[f"{p}.B"], file.tensors[f"{p}.A"]) for p in file.shapes}
    return products(pairs)


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert got.keys() == wanted.keys()
    for path, change in wanted.items():
        torch.testing.assert_close(got[path].flatten(1), change.flatten(1), rtol=0, atol=atol)
