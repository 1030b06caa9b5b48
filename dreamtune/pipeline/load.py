"""Adapters in a diffusers pipeline: whatever would be ignored silently is an error here."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dreamtune.files.find import adapter_file
from dreamtune.files.fingerprint import check_base, fingerprint
from dreamtune.files.formats import read_adapter
from dreamtune.files.hub import Where
from dreamtune.files.tensors import naming
from dreamtune.injection.adapter_file import AdapterFile, Fingerprint
from dreamtune.injection.inject import InjectedAdapter, adapt, check_name
from dreamtune.injection.targets import REGEX, Choice, choose, choose_paths, unwrapped, weight_of
from dreamtune.models.load import load_network


def load(
    pipe: Any,
    path: str | Path,
    name: str = "default",
    scale: float = 1.0,
    force: bool = False,
    trainable: bool = False,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> InjectedAdapter:
    """Puts an adapter on the pipeline's UNet or transformer, or on a model, at `scale`, beside
    those that are there; `eject()` on the result takes it out.

    Args:
        pipe: a diffusers pipeline, or the model itself, whatever module it is.
        path: a native file, an exported one, another trainer's LoRA, LoHa or LoKr, or a folder: of
            a run (its best/), a checkpoint-N (its own step), one that PEFT saved, or one with such
            a file. A string that is no path here and looks like an id of the hub, "user/repo" or
            "hf://user/repo@revision/folder/file.safetensors", is that repository, read like a
            folder: the adapter and its settings are downloaded into the hub's cache.
        name: for `set_adapters` and `route`, each once; on the result as `.name`.
        scale: strength, linear in the change; change it later with `.scale`.
        force: recompute a method that contains the base weights on another base.
        trainable: leave the adapter's parameters to be trained on, in `.parameters()`.
        weight_name, subfolder: the file, and the folder that it is in, of a folder or repository.
        revision, token, cache_dir: of a repository, as in `load_lora_weights` of diffusers.
        local_files_only: what the hub's cache has, and nobody is asked.

    Raises:
        ValueError: keys that match no layer, layers without keys, values that are not finite,
        another base, a name that is taken, adapters that are merged; a repository that cannot be
        had, or that holds no adapter or several.
    """
    model = network_of(pipe)
    check_name(model, name)
    where = Where(weight_name, subfolder, revision, token, cache_dir, local_files_only)
    file = read_adapter(adapter_file(path, where), model)
    with naming(file.source):
        adapter = _inject(model, file, force, name)
    if not trainable:
        for parameter in list(adapter.parameters()):
            parameter.requires_grad_(False)
    adapter.scale = scale
    return adapter


def network_of(pipe: Any) -> nn.Module:
    """What adapters are put on, of a pipeline; a model itself."""
    return load_network(pipe.transformer if _has_transformer(pipe) else pipe)


def held_by(pipe: Any) -> nn.Module:
    """The same as its owner has it, compiled or otherwise wrapped."""
    if isinstance(pipe, nn.Module):
        return pipe
    network = network_of(pipe)
    parts = getattr(pipe, "components", {}).values()
    wrapped = (p for p in parts if isinstance(p, nn.Module) and unwrapped(p) is network)
    return next(wrapped, network)


def _has_transformer(pipe: Any) -> bool:
    """And no UNet: of a pipeline, not of a model that calls parts of it so."""
    parts = getattr(pipe, "components", None)
    return isinstance(parts, Mapping) and "transformer" in parts and "unet" not in parts


def _inject(model: nn.Module, file: AdapterFile, force: bool, name: str) -> InjectedAdapter:
    chosen = fitting(model, file)
    warning = check_base(file, _fingerprint(file, chosen), force)
    adapter = adapt(model, file.method, chosen, file.target_modules, file.options, beside=name)
    try:
        adapter.load_state_dict(file.tensors)
    except BaseException:
        adapter.eject()
        raise
    if warning:
        warnings.warn(warning, stacklevel=3)
    return adapter


def fitting(model: nn.Module, file: AdapterFile) -> dict[str, Choice]:
    """Module path -> layer that the file's adapter is for. Raises ValueError where one is of
    another shape, or is missing here or in the file.
    """
    chosen = _chosen(model, file)
    shapes = {path: tuple(choice.place.layer.weight.shape) for path, choice in chosen.items()}
    asked = file.shapes if file.some_layers else {**shapes, **file.shapes}
    wrong = [p for p in asked if shapes.get(p) != file.shapes.get(p)]
    if wrong:
        p = wrong[0]
        raise ValueError(
            f"the adapter is of another architecture: {len(wrong)} layers do not fit, `{p}` is"
            f" {shapes.get(p)} here and {file.shapes.get(p)} in the file"
        )
    for path, parts in file.parts.items():
        if list(parts.items()) != list((here := chosen[path].place.parts).items()):
            raise ValueError(
                f"the adapter is of another architecture: the parts of `{path}` are"
                f" {dict(here) or 'not known'} here and {dict(parts)} in the file"
            )
    return chosen


def _fingerprint(file: AdapterFile, chosen: Mapping[str, Choice]) -> Fingerprint:
    if not file.fingerprint:
        return {}  # nothing to be compared with
    return fingerprint({path: weight_of(chosen[path].place.layer) for path in file.shapes})


def _chosen(model: nn.Module, file: AdapterFile) -> dict[str, Choice]:
    """The layers that the file's entries mean here. A file's expressions are not run, they may take
    ages: then the layers that the file has, as where it has some of those that they mean.
    """
    if file.some_layers or any(entry.startswith(REGEX) for entry in file.target_modules):
        chosen = choose_paths(model, file.shapes)
    else:
        chosen = choose(model, file.target_modules)
    return {
        path: choice._replace(
            options=file.layer_options.get(path, {}), parts=file.parts.get(path, {})
        )
        for path, choice in chosen.items()
    }
