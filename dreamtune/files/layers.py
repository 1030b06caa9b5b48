"""An adapter's parameters layer by layer, and the change that they are of a base's weight."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from dreamtune.adapters import Adapter, find_method, resolve_options
from dreamtune.adapters.in_parts import make
from dreamtune.files.fingerprint import check_base, fingerprint
from dreamtune.files.formats import LayerFactors
from dreamtune.injection.adapter_file import AdapterFile, Fingerprint
from dreamtune.injection.inject import InjectedAdapter
from dreamtune.injection.targets import layer_at, weight_of


@torch.no_grad()
def factors_of_adapter(adapter: InjectedAdapter, slot: int = 0) -> LayerFactors:
    """Module path -> (up, down) of one slot at strength 1."""
    if not 0 <= slot < adapter.slots:
        raise ValueError(f"`slot` must be 0 to {adapter.slots - 1}, got {slot}")
    found = {}
    for group in adapter.groups:
        up, down = group.adapter.factors(group.weight)
        for path, u, d in zip(group.names, up[:, slot], down[:, slot]):
            found[path] = _finite(path, u, d)
    return found


@torch.no_grad()
def factors_of_file(
    file: AdapterFile, model: nn.Module | None, force: bool = False
) -> tuple[LayerFactors, Fingerprint]:
    """The same from a native file, with the fingerprint of the base that the factors belong to.
    `model` is the base, None where the method does not need it.
    """
    if model is None:
        return low_rank_of(file), file.fingerprint
    weights = weights_of(file, model)
    prints = fingerprint(weights)
    check_base(file, prints, force)
    return low_rank_of(replace(file, weights=weights)), prints


@torch.no_grad()
def low_rank_of(file: AdapterFile) -> LayerFactors:
    """The same of a file with the weights that the method needs."""
    assert file.weights or not find_method(file.method).depends_on_weight
    found = {}
    for path, shape in file.shapes.items():
        weight = file.weights[path] if file.weights else torch.zeros(shape).flatten(1)
        up, down = adapter_of_layer(file, path, weight).factors(weight)
        found[path] = _finite(path, up[0], down[0])
    return found


def own_tensors(file: AdapterFile, path: str) -> dict[str, Tensor]:
    """Those of one layer, by their names in the method."""
    start = f"{path}."
    return {k.removeprefix(start): t for k, t in file.tensors.items() if k.startswith(start)}


def adapter_of_layer(file: AdapterFile, path: str, weight: Tensor) -> Adapter:
    """The method of a native file with its tensors of one layer, (1, ...) each."""
    options, parts = file.options_at(path), file.parts.get(path, {})
    adapter = make(find_method(file.method), weight, parts, **options)
    own = own_tensors(file, path)
    adapter.load_state_dict({k: t.unsqueeze(0) for k, t in own.items()})
    return adapter


def on_meta(file: AdapterFile, path: str | None = None) -> Adapter:
    """The method of a file on one of its layers, the first by default, without values: for what it
    says of itself, its options with defaults filled in.

    Raises ValueError for options that are none, or do not fit; RuntimeError, torch's, for sizes
    beyond its integers.
    """
    method, path = find_method(file.method), path or next(iter(file.shapes))
    weight = torch.empty(file.shapes[path], device="meta").flatten(1)
    options = resolve_options(method, file.options_at(path))
    return make(method, weight, file.parts.get(path, {}), **options)


def weights_of(file: AdapterFile, model: nn.Module) -> dict[str, Tensor]:
    """Module path -> weight (out, in) of a base, (out, in * kh * kw) of a convolution. Raises
    ValueError where one does not fit.
    """
    return {path: _weight(model, path, shape) for path, shape in file.shapes.items()}


def _finite(path: str, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    if not (up.isfinite().all() and down.isfinite().all()):
        raise ValueError(f"the change of `{path}` is not finite")
    return up, down


def _weight(model: nn.Module, path: str, shape: tuple[int, ...]) -> Tensor:
    try:
        layer = layer_at(model, path)
    except AttributeError:
        raise ValueError(f"the base has no layer `{path}`, which the adapter changes") from None
    weight = layer.weight
    if not isinstance(weight, Tensor) or tuple(weight.shape) != tuple(shape):
        got = tuple(weight.shape) if isinstance(weight, Tensor) else None
        raise ValueError(f"`{path}` must be {tuple(shape)} in the base, got {got}")
    return weight_of(layer).flatten(1)
