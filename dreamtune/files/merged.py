"""The changed weights themselves: a folder of diffusers, which needs nothing of ours."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreamtune.files.formats import Change, ExportFormat
from dreamtune.files.layers import adapter_of_layer, on_meta
from dreamtune.files.whole import whole_folder
from dreamtune.models.clip_text import WRAPPED
from dreamtune.models.load import FAMILIES, family_class

WEIGHTS = "diffusion_pytorch_model{suffix}.safetensors"
WEIGHTS_OF_TEXT = "model{suffix}.safetensors"
# Left out: they judge pictures, and a folder without them loads.
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
# Where a base lay on the machine that wrote it.
PLACES = ("_name_or_path", "name_or_path", "is_local", "local_files_only")


class Merged(ExportFormat):
    """A pipeline's folder, or the network's alone."""

    file_name = ""
    whole_model = True

    def check(self, change: Change) -> str:
        if change.max_rank is not None:
            raise ValueError(
                "`max_rank` cuts a low-rank change, and a merged model has no rank: export another"
                " format"
            )
        if on_meta(change.file).asks_for_timestep:
            raise ValueError(
                f"the strength of `{change.file.method}` depends on the timestep here, and no"
                " weight holds it: use the native file with `dreamtune.load`"
            )
        return "merged weights"

    def needs_base(self, change: Change) -> str:
        return "a merged model holds the weights of its base"

    def place(self, folder: Path, name: str) -> Path:
        return folder / f"{name}_merged"

    def usage(self, path: Path, change: Change) -> str:
        if (path / "model_index.json").exists():
            kind = json.loads((path / "model_index.json").read_text())["_class_name"]
        else:
            kind = json.loads((path / "config.json").read_text())["_class_name"]
        return f"from diffusers import {kind}\n\nmodel = {kind}.from_pretrained({path.name!r})"

    def write(self, path: Path, change: Change, overwrite: bool) -> None:
        """`overwrite` replaces no folder: it may hold what another put there."""
        if os.path.lexists(path):
            raise ValueError(
                f"`{path}` is there, and no folder is overwritten: take it away, or give another"
                " `name`, in the command --name"
            )
        assert change.network is not None
        if not hasattr(change.network, "save_config"):
            raise ValueError(
                f"`merged` writes models of diffusers, got a `{type(change.network).__name__}`: use"
                " `adapter.merge()` and save the model as its library does"
            )
        weights = merged_weights(change, change.network)
        with whole_folder(path) as partial:
            place = partial
            if change.pipeline is not None:
                place = partial / _network_name(change.pipeline)
                _save_others(change, partial, place.name)
            _config_of(change.network, place)
            about = {k: v for k, v in change.about.items() if k != "fingerprint"}
            _save(weights, place, WEIGHTS, change, dreamtune=json.dumps(about, sort_keys=True))
            for file in partial.rglob("*.json"):
                _without_places(file)


@torch.no_grad()
def merged_weights(change: Change, network: nn.Module) -> dict[str, Tensor]:
    """The network's state on the CPU, changed; computed in float32 at least, then cast."""
    state = _state(network, change.dtype)
    if strange := [k for k in state if ".base_layer." in k or "_orig_mod" in k or "lora_" in k]:
        raise ValueError(
            f"the base is wrapped (`{strange[0]}`): unload or fuse what is on it, or give the plain"
            " model"
        )
    for path, weight in change.file.weights.items():
        new = adapter_of_layer(change.file, path, weight).merged(weight)[0].to("cpu", change.dtype)
        new = new.view(change.file.shapes[path])
        if not bool(new.isfinite().all()):
            raise ValueError(
                f"the merged weight of `{path}` would not be finite in {change.dtype}: export"
                " another `dtype`"
            )
        if f"{path}.weight" not in state:
            raise ValueError(
                f"the base has no `{path}.weight` to hold the change: the layer makes its weight"
                " anew at each forward, by a weight norm or pruning"
            )
        state[f"{path}.weight"] = new
    return state


def _state(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    found = {}
    for key, tensor in module.state_dict().items():
        if tensor.device.type == "meta":
            raise ValueError(f"`{key}` of the base is offloaded: give the model where it is whole")
        found[key] = tensor.detach().to(
            "cpu", dtype if tensor.is_floating_point() else tensor.dtype
        )
    return found


def _network_name(pipe: Any) -> str:
    names = [family_class(family).network_name for family in FAMILIES]
    return next(name for name in names if name in pipe.components)


def _save_others(change: Change, folder: Path, network: str) -> None:
    """All parts of the pipeline but the network."""
    pipe = change.pipeline
    pipe.save_config(str(folder))
    index = json.loads((folder / "model_index.json").read_text())
    for name, part in pipe.components.items():
        if name in LEFT_OUT:
            index[name] = [None, None]
        elif isinstance(part, nn.Module) and name != network:
            _save_part(change, folder / name, part)
        elif hasattr(part, "save_vocabulary"):
            _save_tokenizer(part, folder / name)
        elif name != network and part is not None:
            part.save_pretrained(str(folder / name))
    if "safety_checker" in index:
        index["requires_safety_checker"] = False
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _save_part(change: Change, folder: Path, part: Any) -> None:
    """A network of diffusers, or a text encoder under the names that every transformers reads."""
    state = _state(part, change.dtype)
    _config_of(part, folder)
    if hasattr(part, "save_config"):
        return _save(state, folder, WEIGHTS, change)
    for new, old in WRAPPED.items() if part.config.model_type == "clip_text_model" else ():
        state = {re.sub(new, old, key): tensor for key, tensor in state.items()}
    _save(state, folder, WEIGHTS_OF_TEXT, change)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """With vocab.json and merges.txt, which transformers 5 leaves out and 4 asks for."""
    tokenizer.save_pretrained(str(folder))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    if model.get("type") == "BPE":
        pairs = (m if isinstance(m, str) else " ".join(m) for m in model["merges"])
        (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), "utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n", "utf-8")


def _config_of(part: Any, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    if hasattr(part, "save_config"):
        return part.save_config(str(folder))
    config = type(part.config).from_dict(part.config.to_dict())
    config.architectures = [type(part).__name__]
    config.save_pretrained(str(folder))


def _save(
    state: Mapping[str, Tensor], folder: Path, pattern: str, change: Change, **strings: str
) -> None:
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(
        dict(state),
        folder,
        filename_pattern=pattern,
        max_shard_size=change.shard_size,
        metadata={"format": "pt", **strings},
    )


def _without_places(file: Path) -> None:
    values = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(values, dict) and any(name in values for name in PLACES):
        kept = {k: v for k, v in values.items() if k not in PLACES}
        file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


FORMAT = Merged()
