"""Files of other formats, exact on the base that the adapter was trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreamtune.adapters import Adapter, find_method
from dreamtune.fields import one_part
from dreamtune.files.find import adapter_file, name_of, run_settings
from dreamtune.files.fingerprint import check_base, fingerprint
from dreamtune.files.formats import Change, LayerFactors, export_format, read_adapter
from dreamtune.files.lora import recompress, same_rank
from dreamtune.files.tensors import naming
from dreamtune.files.whole import check_writable
from dreamtune.injection.adapter_file import AdapterFile, Fingerprint
from dreamtune.injection.inject import InjectedAdapter
from dreamtune.injection.targets import TARGET_MODULES, layer_at, weight_of
from dreamtune.models.load import load_network, prefixes_of

DTYPES = {
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
}  # fmt: skip


def export(
    source: InjectedAdapter | str | Path,
    out_dir: str | Path,
    format: str = "diffusers",
    *,
    base: Any = None,
    dtype: torch.dtype | str = torch.float32,
    slot: int = 0,
    name: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    force: bool = False,
) -> Path:
    """Writes the adapter at strength 1 in another format and returns the file's path.

    Args:
        source: an injected adapter, a file of any format, or a folder: of a run (its best/) or a
            checkpoint-N (its own step).
        format: a name in `dreamtune.files.formats.EXPORTS`, which says what reads it.
        base: a UNet, a pipeline, or where to load the UNet from: a model's folder or a UNet's, a
            .safetensors file, a hub id, or "embedded". A file of a method that contains the base
            weights needs it; left out, it is the base of the run that the file lies in.
        dtype: of the file: torch.float32, float16 or bfloat16, or their names ("fp16", "float16").
        slot: of an injected adapter.
        name: of the file, where the format leaves it open; the diffusers name is fixed. By default
            that of the run, or of a file that has a name of its own; else "adapter".
        metadata: of an injected adapter, to keep in the header as in `InjectedAdapter.save`.
        overwrite: replace a file of that name with other contents, otherwise an error.
        force: export on a base that is not the one of training.

    Raises:
        ValueError: no adapter at `source`, an unknown format or dtype, a method that no plain LoRA
        holds, a base that is missing, cannot be had or is another one, a file that would change.
    """
    target = export_format(format)
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}")
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    if dtype not in DTYPES.values():
        raise ValueError(f"`dtype` must be float32, float16 or bfloat16, got {dtype}")
    if name is not None and not one_part(name):
        raise ValueError(f"`name` must be one part of a path, got {name!r}")
    check_writable(out_dir)
    network: nn.Module | None
    if isinstance(source, InjectedAdapter):
        method, about, network = source.method, dict(metadata or {}), source.model
        for group in source.groups:
            target.check(find_method(method), group.adapter.options, network)
        _refuse_others(name for group in source.groups for name in group.names)
        factors, prints = factors_of_adapter(source, slot), fingerprint(source.weights())
    else:
        path = adapter_file(source)
        network = None if base is None else load_network(base)
        file = read_adapter(path, network)
        method, about = file.exported_from or file.method, file.metadata
        for layer in file.shapes if file.layer_options else list(file.shapes)[:1]:
            target.check(find_method(file.method), file.options_at(layer), network)
        _refuse_others(file.shapes)
        if network is None and find_method(file.method).depends_on_weight:
            network = network_of_run(path, f"`{method}` contains the base weights")
        with naming(path.name):
            factors, prints = factors_of_file(file, network, force)
    small = {path: recompress(up, down) for path, (up, down) in factors.items()}
    about = {"exported_from": method, "fingerprint": prints, "metadata": about}
    if name is None:
        name = "adapter" if isinstance(source, InjectedAdapter) else name_of(path)
    path = Path(out_dir) / target.file_name.format(name=name)
    target.write(
        path, Change(same_rank(small), dtype, about, prefixes_of(network), network), overwrite
    )
    return path


def other_layers(paths: Iterable[str]) -> list[str]:
    """Those that are no attention projections: no format but the native one has names for them."""
    return [p for p in paths if not f".{p}".endswith(tuple(f".{t}" for t in TARGET_MODULES))]


def _refuse_others(paths: Iterable[str]) -> None:
    if others := other_layers(paths):
        raise ValueError(
            f"`{others[0]}` is no attention projection, {len(others)} layers are none: use the"
            " native file with `dreamtune.load`, or `adapter.merge()` and save the model"
        )


def network_of_run(path: Path, why: str) -> nn.Module:
    """The trained network of the base of the run that a file lies in. Raises ValueError outside a
    run; why: a base is needed, the start of the sentence.
    """
    settings = run_settings(path)
    if "pretrained_model_name_or_path" not in settings:
        raise ValueError(
            f"{why}: pass the UNet as `base`, in the command as --pretrained_model_name_or_path"
        )
    return load_network(
        settings["pretrained_model_name_or_path"],
        revision=settings.get("revision"),
        variant=settings.get("variant"),
    )


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
    method = find_method(file.method)
    assert model is not None or not method.depends_on_weight
    weight_of: Callable[[str], Tensor]
    prints = file.fingerprint
    if model is not None:
        weights = weights_of(file, model)
        prints = fingerprint(weights)
        check_base(file, prints, force)
        weight_of = weights.__getitem__
    else:
        weight_of = lambda path: torch.zeros(file.shapes[path]).flatten(1)  # noqa: E731
    found = {}
    for path in file.shapes:
        weight = weight_of(path)
        up, down = adapter_of_layer(file, path, weight).factors(weight)
        found[path] = _finite(path, up[0], down[0])
    return found, prints


def adapter_of_layer(file: AdapterFile, path: str, weight: Tensor) -> Adapter:
    """The method of a native file with its tensors of one layer, (1, ...) each."""
    adapter = find_method(file.method)(weight, **file.options_at(path))  # type: ignore[arg-type]
    start = f"{path}."
    own = {k.removeprefix(start): t for k, t in file.tensors.items() if k.startswith(start)}
    adapter.load_state_dict({k: t.unsqueeze(0) for k, t in own.items()})
    return adapter


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
