"""Files of other formats, exact on the base that the adapter was trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dreamtune.adapters.in_parts import Parts, apart, joined
from dreamtune.fields import one_part
from dreamtune.files.card import write_card
from dreamtune.files.find import adapter_file, name_of, run_settings
from dreamtune.files.fingerprint import check_base, fingerprint
from dreamtune.files.formats import (
    UNNAMED,
    Change,
    ExportFormat,
    LayerFactors,
    export_format,
    read_adapter,
)
from dreamtune.files.layers import factors_of_adapter, low_rank_of, weights_of
from dreamtune.files.lora import cut, cut_in_words, recompress, same_rank
from dreamtune.files.tensors import naming
from dreamtune.files.whole import check_writable
from dreamtune.injection.adapter_file import Fingerprint
from dreamtune.injection.inject import InjectedAdapter
from dreamtune.models.load import load_base, load_network, locate, prefixes_of

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
    max_rank: int | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    force: bool = False,
    card: bool = False,
    tell: Callable[[str], object] = lambda sentence: None,
) -> Path:
    """Writes the adapter at strength 1 in another format and returns the file's path, of "merged"
    the folder's.

    Args:
        source: an injected adapter, a file of any format, or a folder: of a run (its best/) or a
            checkpoint-N (its own step).
        format: a name in `dreamtune.files.formats.EXPORTS`, which says what reads it.
        base: a UNet, a pipeline, or where to load the UNet from: a model's folder or a UNet's, a
            .safetensors file, a hub id, or "embedded". A file of a method that contains the base
            weights needs it; left out, it is the base of the run that the file lies in. "merged"
            writes all of a pipeline's, of a UNet's the UNet.
        dtype: of the file: torch.float32, float16 or bfloat16, or their names ("fp16", "float16").
        slot: of an injected adapter.
        name: of the file, where the format leaves it open; the diffusers name is fixed. By default
            that of the run, or of a file that has a name of its own; else "adapter".
        metadata: of an injected adapter, to keep in the header as in `InjectedAdapter.save`.
            "prompt" becomes modelspec's trigger phrase; "title", "date", "author", "license" and
            "description" go there as they are.
        max_rank: the change of each layer is cut to its best approximation of that rank; how much
            of the squared Frobenius norm is kept stands in the header, under `cut`.
        max_shard_size: of "merged", bytes or such as "2GB".
        overwrite: replace a file of that name with other contents, otherwise an error.
        force: export on a base that is not the one of training.
        card: write README.md beside it, where there is none, with samples of the run.
        tell: gets each sentence on what was written.

    Raises:
        ValueError: no adapter at `source`, an unknown format or dtype, a method that the format
        does not hold, a base that is missing, cannot be had or is another one, a file that would
        change.
    """
    target, dtype = export_format(format), _dtype(dtype)
    if name is not None and not one_part(name):
        raise ValueError(f"`name` must be one part of a path, got {name!r}")
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"`max_rank` must be at least 1, got {max_rank}")
    check_writable(out_dir)
    path = None if isinstance(source, InjectedAdapter) else adapter_file(source)
    if isinstance(source, InjectedAdapter):
        change = _of_adapter(source, slot, metadata or {}, dtype)
        if target.whole_model and base is not None:
            change = replace(change, pipeline=_opened(base, whole=True)[1])
    else:
        assert path is not None
        change = _of_file(path, base, target, dtype)
    change = replace(
        change,
        title=name or (name_of(path) if path else UNNAMED),
        max_rank=max_rank,
        shard_size=max_shard_size,
        resolution=run_settings(path).get("resolution") if path else None,
    )
    held = target.check(change)
    if path is not None:
        change = _on_base(change, target, path, force, tell)
    if max_rank is not None:
        change, words = _cut(change, max_rank)
        tell(words)
    place = target.place(Path(out_dir), change.title)
    target.write(place, change, overwrite)
    tell(f"`{change.about['exported_from']}` was written as {held}.")
    if card:
        tell(write_card(place, target, change, held, path))
    return place


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}")
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    if dtype not in DTYPES.values():
        raise ValueError(f"`dtype` must be float32, float16 or bfloat16, got {dtype}")
    return dtype


def _of_adapter(
    source: InjectedAdapter, slot: int, metadata: Mapping[str, Any], dtype: torch.dtype
) -> Change:
    file, prints = source.file(slot, metadata), fingerprint(source.weights())
    return Change(
        file=replace(file, fingerprint=prints),
        low_rank=lambda: _small(factors_of_adapter(source, slot), file.parts),
        dtype=dtype,
        about=_about(source.method, prints, metadata),
        prefixes=prefixes_of(source.model),
        network=source.model,
    )


def _of_file(path: Path, base: Any, target: ExportFormat, dtype: torch.dtype) -> Change:
    """Before its base, if it has one, is compared."""
    network, pipeline = (None, None) if base is None else _opened(base, target.whole_model)
    file = read_adapter(path, network)
    return Change(
        file=file,
        low_rank=lambda: {},
        dtype=dtype,
        about=_about(file.exported_from or file.method, file.fingerprint, file.metadata),
        prefixes=prefixes_of(network),
        network=network,
        pipeline=pipeline,
    )


def _about(method: str, prints: Fingerprint, metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {"exported_from": method, "fingerprint": prints, "metadata": dict(metadata)}


def _on_base(
    change: Change,
    target: ExportFormat,
    path: Path,
    force: bool,
    tell: Callable[[str], object],
) -> Change:
    """With the base's weights, of the run's where it is needed and none was given."""
    network, pipeline = change.network, change.pipeline
    if network is None and (why := target.needs_base(change)):
        settings = _settings_of_run(path, why)
        network, pipeline = _opened(settings.pop("base"), target.whole_model, **settings)
    file = change.file
    if network is not None:
        with naming(path.name):
            file = replace(file, weights=weights_of(file, network))
            prints = fingerprint(file.weights)
            if warning := check_base(file, prints, force):
                tell(warning)
            file = replace(file, fingerprint=prints)

    def low_rank() -> LayerFactors:
        with naming(path.name):
            return _small(low_rank_of(file), file.parts)

    return replace(
        change,
        file=file,
        low_rank=low_rank,
        about={**change.about, "fingerprint": file.fingerprint},
        prefixes=prefixes_of(network),
        network=network,
        pipeline=pipeline,
    )


@torch.no_grad()
def _small(factors: LayerFactors, parts: Mapping[str, Parts]) -> LayerFactors:
    """Recompressed; each part of a layer for itself, so that up stays block-diagonal."""
    found = {}
    for path, pair in factors.items():
        heights = list(parts.get(path, {}).values()) or [len(pair[0])]
        own = [recompress(up, down) for up, down in apart(*pair, heights)]
        found[path] = joined(*zip(*own))
    return same_rank(found)


def _cut(change: Change, rank: int) -> tuple[Change, str]:
    """The change at a smaller rank, and how much of it is kept, in words and in the header."""
    before = max(down.shape[0] for _, down in change.factors.values())
    whole_layers = {
        path: recompress(*pair) if path in change.file.parts else pair
        for path, pair in change.factors.items()
    }
    factors, energies = cut(whole_layers, rank)
    kept, whole = (sum(column) for column in zip(*energies.values()))
    shares = {path: own / all_ if all_ else 1.0 for path, (own, all_) in energies.items()}
    worst = min(shares, key=shares.__getitem__)
    about = {
        "rank": min(rank, before),
        "from": before,
        "energy": kept / whole if whole else 1.0,
        "worst": [worst, shares[worst]],
    }
    found = replace(change, low_rank=lambda: factors, about={**change.about, "cut": about})
    return found, cut_in_words(about)


def _opened(base: Any, whole: bool, **revision: Any) -> tuple[nn.Module, Any]:
    """The trained network of a base and, with `whole`, its pipeline; None where it has none."""
    path = locate(base) if isinstance(base, (str, Path)) else None
    alone = path is not None and path.is_dir() and not (path / "model_index.json").exists()
    if whole and isinstance(base, (str, Path)) and not alone:
        base = load_base(str(base), **revision).pipeline()
    network = load_network(base, **revision)
    return network, base if whole and hasattr(base, "components") else None


def _settings_of_run(path: Path, why: str) -> dict[str, Any]:
    """Base, revision and variant of the run that a file lies in. Raises ValueError outside a run;
    why: a base is needed, the start of the sentence.
    """
    settings = run_settings(path)
    if "pretrained_model_name_or_path" not in settings:
        raise ValueError(
            f"{why}: pass the network as `base`, in the command as --pretrained_model_name_or_path"
        )
    names = {n: settings.get(n) for n in ("revision", "variant")}
    return {"base": settings["pretrained_model_name_or_path"], **names}


def network_of_run(path: Path, why: str) -> nn.Module:
    """The trained network of the base of the run that a file lies in; see `_settings_of_run`."""
    settings = _settings_of_run(path, why)
    return _opened(settings.pop("base"), whole=False, **settings)[0]
