"""Many adapters for one pipeline: each is read, checked and made plain factors once; those in use
are on the device, the others on the CPU or in their files.

    dreamtune.load_many(pipe, {"dog": "runs/dog", "cat": "cat.safetensors"}, device_budget=2 << 30)
    with dreamtune.route(pipe, ["dog", "cat"]):
        images = pipe([p0, p1]).images
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dreamtune.files.find import adapter_file
from dreamtune.files.fingerprint import check_base, fingerprint
from dreamtune.files.formats import read_adapter
from dreamtune.files.tensors import naming
from dreamtune.injection.adapter_file import AdapterFile, Fingerprint
from dreamtune.injection.bank import Bank, check_free
from dreamtune.injection.inject import InjectedAdapter, check_name, plainly
from dreamtune.injection.places import Place, unchanged, weight_of
from dreamtune.injection.plain import Layer, Plain, plain_factors
from dreamtune.injection.shelf import Entry, Shelf
from dreamtune.pipeline.load import fitting, network_of

BESIDE = "adapter_config.json"  # PEFT's, part of what such an adapter is


def load_many(
    pipe: Any,
    adapters: Mapping[str, str | Path],
    device_budget: int | None = None,
    cpu_budget: int | None = None,
    force: bool = False,
) -> None:
    """Brings adapters that `set_adapters` and `route` name; none is in use until it is named, at
    the strength that is given there. `unload` takes one out again.

    Their factors are those for the base as it is now, in its dtype; the pipeline's layers do not
    hold them, so that 500 cost no more at a call than those that it uses. Neither can they be
    trained, saved or sped up by themselves: `dreamtune.load` brings one so.

    Args:
        pipe: a diffusers pipeline, or the model itself.
        adapters: name -> what `dreamtune.load` takes.
        device_budget, cpu_budget: bytes of factors on the network's device, and on the CPU; 2 and
            4 GiB until they are given. Over it those go that were not used for longest, from the
            CPU back to their files, which are read again when they are named: they must stay as
            they are.
        force: as in `dreamtune.load`.

    Raises:
        ValueError: as `dreamtune.load`; a strength that depends on the timestep; budgets that are
        not positive. Then none of them is there.
    """
    model = network_of(pipe)
    check_free(model)
    if not isinstance(adapters, Mapping) or not all(isinstance(name, str) for name in adapters):
        raise ValueError(f"`adapters` must be a mapping name -> path, got {adapters!r}")
    budgets = {"device_budget": device_budget, "cpu_budget": cpu_budget}
    for name, value in budgets.items():
        if value is not None and (not isinstance(value, int) or value <= 0):
            raise ValueError(f"`{name}` must be a positive number of bytes, got {value!r}")
    bank = Bank.on(model, lambda: InjectedAdapter.of(model))
    with bank.lock:
        shelf, there = bank.shelf, []
        before = shelf.device_budget, shelf.cpu_budget
        shelf.device_budget = device_budget or shelf.device_budget
        shelf.cpu_budget = cpu_budget or shelf.cpu_budget
        try:
            with unchanged(model, shelf.spots) as shelf.spots:
                for name, path in adapters.items():
                    entry, factors, places = _made(model, shelf, name, path, force)
                    shelf.put(entry, factors, places)  # at once, for the budget holds for all
                    there.append(name)
        except BaseException:
            for name in there:
                shelf.drop(name)
            shelf.device_budget, shelf.cpu_budget = before
            if not InjectedAdapter.of(model):
                bank.remove_unless_used()
            raise
        if there:
            plainly(model)
        bank.share_shelf()
        shelf.fit()


@dataclass(frozen=True)
class _File:
    """Where an adapter is read from. digest: SHA-256 of its files, as they were."""

    path: Path
    digest: str
    model: nn.Module

    def read(self, layers: Mapping[str, Layer]) -> Plain:
        if _digest(self.path) != self.digest:
            raise ValueError(
                f"`{self.path.name}` is not what it was when it was loaded: `dreamtune.unload` and"
                " load it again"
            )
        with naming(self.path.name):
            return plain_factors(read_adapter(self.path, self.model), layers)


def _made(
    model: nn.Module, shelf: Shelf, name: str, path: str | Path, force: bool
) -> tuple[Entry, Plain, dict[str, Place]]:
    check_name(model, name)
    found = adapter_file(path)
    digest = _digest(found)
    file = read_adapter(found, model)
    with naming(file.source):
        places = {path: choice.place for path, choice in fitting(model, file).items()}
        warning = check_base(file, _prints(shelf, file, places), force)
        layers = {path: place.layer for path, place in places.items()}
        kinds = {(layer.weight.device, layer.weight.dtype) for layer in layers.values()}
        if len(kinds) > 1 or next(iter(kinds))[0].type == "meta":
            raise ValueError(
                "the layers must be of one dtype on one device, and not offloaded: `dreamtune.load`"
                " follows them where they are not"
            )
        factors = plain_factors(file, layers)
    if warning:
        warnings.warn(warning, stacklevel=4)
    source = _File(found, digest, model)
    entry = Entry(
        name, file.method, tuple(places), factors.nbytes, source, file.options, file.metadata
    )
    return entry, factors, places


def _prints(shelf: Shelf, file: AdapterFile, places: Mapping[str, Place]) -> Fingerprint:
    """Of the base, each layer's once."""
    if not file.fingerprint:
        return {}
    missing = [path for path in file.shapes if path not in shelf.prints]
    shelf.prints |= fingerprint({path: weight_of(places[path].layer) for path in missing})
    return {path: shelf.prints[path] for path in file.shapes}


def _digest(path: Path) -> str:
    found = hashlib.sha256(path.read_bytes())
    beside = path.parent / BESIDE
    if beside.is_file():
        found.update(beside.read_bytes())
    return found.hexdigest()
