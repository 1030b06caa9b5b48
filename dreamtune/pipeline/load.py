"""Adapters in a diffusers pipeline: whatever would be ignored silently is an error here."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreamtune.adapters import find_method
from dreamtune.files.find import adapter_file
from dreamtune.files.fingerprint import check_base, fingerprint
from dreamtune.files.lora import plain_lora
from dreamtune.files.native import load_adapter_file, read_safetensors
from dreamtune.injection.adapter_file import AdapterFile
from dreamtune.injection.group import TARGET_MODULES, find_targets
from dreamtune.injection.inject import InjectedAdapter, inject
from dreamtune.models.load import load_network


def load(
    pipe: Any, path: str | Path, name: str = "default", scale: float = 1.0, force: bool = False
) -> InjectedAdapter:
    """Puts an adapter on the pipeline's UNet, at `scale`; `eject()` on the result takes it out.

    Args:
        pipe: a diffusers pipeline with a UNet, or a UNet.
        path: a native file, a diffusers or kohya LoRA of the attention projections, or a folder:
            of a run (its best/), a checkpoint-N (its own step), or one with such a file.
        name: kept on the result as `.name`.
        scale: strength, linear in the change; change it later with `.scale`.
        force: recompute a method that contains the base weights on another base.

    Raises:
        ValueError: keys that match no layer, layers without keys, values that are not finite,
        another base.
    """
    path = adapter_file(path)
    unet = load_network(pipe)
    tensors, header = read_safetensors(path)
    about = json.loads(header["dreamtune"]) if "dreamtune" in header else {}
    if "method" in about:
        adapter = _load_native(unet, load_adapter_file(path), force)
    else:
        adapter = _load_plain(unet, path.name, tensors, about, force)
    for parameter in list(adapter.parameters()):
        parameter.requires_grad_(False)
    adapter.scale, adapter.name = scale, name
    return adapter


def _load_native(unet: nn.Module, file: AdapterFile, force: bool) -> InjectedAdapter:
    targets = find_targets(unet, file.target_modules)
    shapes = {path: tuple(layer.weight.shape) for path, layer in targets.items()}
    wrong = [p for p in {**shapes, **file.shapes} if shapes.get(p) != file.shapes.get(p)]
    if wrong:
        p = wrong[0]
        raise ValueError(
            f"the adapter is of another architecture: {len(wrong)} layers do not fit, `{p}` is"
            f" {shapes.get(p)} here and {file.shapes.get(p)} in the file"
        )
    here = fingerprint({path: layer.weight.detach() for path, layer in targets.items()})
    method = find_method(file.method)
    warning = check_base(file.method, method.depends_on_weight, file.fingerprint, here, force)
    adapter = inject(unet, file.method, target_modules=file.target_modules, **file.options)
    try:
        adapter.load_state_dict(file.tensors)
    except ValueError:
        adapter.eject()
        raise
    if warning:
        warnings.warn(warning, stacklevel=3)
    return adapter


def _load_plain(
    unet: nn.Module, file: str, tensors: Mapping[str, Tensor], about: dict[str, Any], force: bool
) -> InjectedAdapter:
    factors, unknown = plain_lora(tensors)
    targets = find_targets(unet, TARGET_MODULES)
    named = {f"lora_unet_{path.replace('.', '_')}": path for path in targets}
    factors = {named.get(key, key): value for key, value in factors.items()}
    unknown += [key for key in factors if key not in targets]
    if unknown:
        raise ValueError(
            f"`{file}`: {len(unknown)} keys match no attention projection of this UNet,"
            f" `{unknown[0]}` first. For a LoRA of other layers use `pipe.load_lora_weights`"
        )
    used = tuple(t for t in TARGET_MODULES if any(key.endswith(f".{t}") for key in factors))
    expected = [path for path in targets if path.endswith(tuple(f".{t}" for t in used))]
    missing = [path for path in expected if path not in factors]
    if missing or not factors:
        first = missing[0] if missing else "all"
        raise ValueError(f"`{file}`: {len(missing)} layers have no keys, `{first}` first")
    for path, (up, down) in factors.items():
        got, shape = (up.shape[0], down.shape[1]), tuple(targets[path].weight.shape)
        if got != shape:
            raise ValueError(f"`{file}`: `{path}` is {shape} here and {got} in the file")
    if about.get("fingerprint"):
        here = fingerprint({path: targets[path].weight.detach() for path in factors})
        origin = about["exported_from"]
        needs_weight = find_method(origin).depends_on_weight and not force
        warning = check_base(origin, needs_weight, about["fingerprint"], here)
        if warning:
            warnings.warn(warning, stacklevel=3)
    rank = max(down.shape[0] for _, down in factors.values())
    adapter = inject(unet, "lora", rank=rank, target_modules=used)
    state = {}
    for path, (up, down) in factors.items():  # layers of a lower rank are filled up with zeros
        state[f"{path}.A"] = torch.zeros(rank, down.shape[1]).index_copy_(
            0, torch.arange(down.shape[0]), down
        )
        state[f"{path}.B"] = torch.zeros(up.shape[0], rank).index_copy_(
            1, torch.arange(up.shape[1]), up
        )
    adapter.load_state_dict(state)
    return adapter
