"""Plain LoRA files, exact on the base that the adapter was trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreamtune.adapters import METHODS, find_method
from dreamtune.files.find import LORA, adapter_file, run_settings
from dreamtune.files.fingerprint import check_base, fingerprint
from dreamtune.files.lora import LayerFactors, diffusers_keys, kohya_keys, recompress, same_rank
from dreamtune.files.native import load_adapter_file, read_safetensors, write_safetensors
from dreamtune.injection.adapter_file import AdapterFile, Fingerprint
from dreamtune.injection.inject import InjectedAdapter
from dreamtune.models.load import load_network

FILE_NAMES = {"diffusers": LORA, "kohya": "{name}_kohya.safetensors"}
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
    name: str = "adapter",
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    force: bool = False,
) -> Path:
    """Writes the adapter at strength 1 as a plain LoRA and returns the file's path.

    Args:
        source: an injected adapter, a native file, or a folder: of a run (its best/) or a
            checkpoint-N (its own step).
        format: "diffusers" (`pipe.load_lora_weights`) or "kohya" (ComfyUI, A1111).
        base: a UNet, a pipeline, or where to load the UNet from: a model's folder or a UNet's, a
            .safetensors file, a hub id, or "embedded". A file of a method that contains the base
            weights needs it; left out, it is the base of the run that the file lies in.
        dtype: of the file: torch.float32, float16 or bfloat16, or their names ("fp16", "float16").
        slot: of an injected adapter.
        name: of the kohya file; the diffusers name is fixed.
        metadata: of an injected adapter, to keep in the header as in `InjectedAdapter.save`.
        overwrite: replace a file of that name with other contents, otherwise an error.
        force: export on a base that is not the one of training.

    Raises:
        ValueError: no adapter at `source`, an unknown format or dtype, a method that no plain LoRA
        holds, a base that is missing, cannot be had or is another one, a file that would change.
    """
    if format not in FILE_NAMES:
        raise ValueError(f"`format` must be one of {', '.join(FILE_NAMES)}, got {format!r}")
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}")
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    if dtype not in DTYPES.values():
        raise ValueError(f"`dtype` must be float32, float16 or bfloat16, got {dtype}")
    if isinstance(source, InjectedAdapter):
        method, about = source.method, dict(metadata or {})
        model: nn.Module | None = source.model
        _refuse(method, format, model)
        factors = factors_of_adapter(source, slot)
        prints = fingerprint(source.weights())
    else:
        path = adapter_file(source)
        file = load_adapter_file(path)
        method, about = file.method, file.metadata
        model = _base_for(path, method) if base is None else load_network(base)
        _refuse(method, format, model)
        factors, prints = factors_of_file(file, model, force)
    small = {path: recompress(up, down) for path, (up, down) in factors.items()}
    tensors = (diffusers_keys if format == "diffusers" else kohya_keys)(same_rank(small), dtype)
    header = {
        "format": "pt",
        "dreamtune": json.dumps(
            {"exported_from": method, "fingerprint": prints, "metadata": about}
        ),
    }
    path = Path(out_dir) / FILE_NAMES[format].format(name=name)
    _write(path, tensors, header, overwrite)
    return path


def _base_for(path: Path, method: str) -> nn.Module | None:
    """That of the run that the file lies in, where the method needs one."""
    if not find_method(method).depends_on_weight:
        return None
    settings = run_settings(path)
    if "pretrained_model_name_or_path" not in settings:
        raise ValueError(
            f"`{method}` contains the base weights: pass the UNet as `base`, in the command as "
            "--pretrained_model_name_or_path"
        )
    return load_network(
        settings["pretrained_model_name_or_path"],
        revision=settings.get("revision"),
        variant=settings.get("variant"),
    )


def _refuse(method: str, format: str, model: nn.Module | None) -> None:
    if not find_method(method).low_rank:
        low = ", ".join(sorted(name for name, cls in METHODS.items() if cls.low_rank))
        raise ValueError(
            f"`{method}` is not a low-rank change and no plain LoRA holds it: use `adapter.merge()`"
            f" and save the model, the native file with `dreamtune.load`, or train one of {low}"
        )
    config = getattr(model, "config", {})
    if format == "kohya" and config.get("addition_embed_type") == "text_time":
        raise ValueError("kohya files of SDXL use other block names: export `diffusers` instead")


@torch.no_grad()
def factors_of_adapter(adapter: InjectedAdapter, slot: int = 0) -> LayerFactors:
    """Module path -> (up, down) of one slot at strength 1."""
    if not 0 <= slot < adapter.slots:
        raise ValueError(f"`slot` must be 0 to {adapter.slots - 1}, got {slot}")
    found = {}
    for group in adapter.groups:
        up, down = group.adapter.factors(group.weight)
        for path, u, d in zip(group.names, up[:, slot], down[:, slot]):
            found[path] = (u, d)
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
        weights = {path: _weight(model, path, shape) for path, shape in file.shapes.items()}
        prints = fingerprint(weights)
        check_base(file.method, method.depends_on_weight, file.fingerprint, prints, force)
        weight_of = weights.__getitem__
    else:
        weight_of = lambda path: torch.zeros(file.shapes[path])  # noqa: E731
    found = {}
    for path in file.shapes:
        weight = weight_of(path)
        adapter = method(weight, **file.options)  # type: ignore[arg-type]
        start = f"{path}."
        own = {k.removeprefix(start): t for k, t in file.tensors.items() if k.startswith(start)}
        adapter.load_state_dict({k: t.unsqueeze(0) for k, t in own.items()})
        up, down = adapter.factors(weight)
        found[path] = (up[0], down[0])
    return found, prints


def _weight(model: nn.Module, path: str, shape: tuple[int, int]) -> Tensor:
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"the base has no layer `{path}`, which the adapter changes") from None
    weight = layer.weight
    if not isinstance(weight, Tensor) or tuple(weight.shape) != tuple(shape):
        got = tuple(weight.shape) if isinstance(weight, Tensor) else None
        raise ValueError(f"`{path}` must be {tuple(shape)} in the base, got {got}")
    return weight.detach()


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, str], overwrite: bool) -> None:
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"{len(broken)} tensors would not be finite, `{broken[0]}` first")
    if path.exists() and not overwrite:
        try:
            old, old_header = read_safetensors(path)
            same = (
                old_header == header
                and old.keys() == tensors.keys()
                and all(
                    old[k].dtype == tensors[k].dtype and torch.equal(old[k], tensors[k])
                    for k in old
                )
            )
        except ValueError:
            same = False
        if not same:
            raise ValueError(
                f"`{path}` is there with other contents: pass `overwrite=True` to replace it"
            )
        return
    write_safetensors(path, tensors, header)
