"""Bases in all the ways that folders hold weights, each without one of its tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",  # of XL
}
LAYOUTS = ("one file", "shards", ".bin", "fp16")


def write_part(folder: Path, name: str, tensors: dict[str, torch.Tensor], layout: str) -> None:
    """Weights by that layout, instead of those that are there."""
    for old in [*folder.glob("*.safetensors*"), *folder.glob("*.bin*")]:
        old.unlink()
    about = {"format": "pt"}
    if layout == ".bin":
        name = "pytorch_model" if name == "model" else name
        torch.save(tensors, folder / f"{name}.bin")
    elif layout == "fp16":
        half = {k: v.half() for k, v in tensors.items()}
        save_file(half, folder / f"{name}.fp16.safetensors", metadata=about)
    elif layout == "shards":
        keys, places = list(tensors), {}
        for i in range(2):
            file = f"{name}-{i + 1:05d}-of-00002.safetensors"
            part = {k: tensors[k] for k in keys[i::2]}
            save_file(part, folder / file, metadata=about)
            places |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(tensors, folder / f"{name}.safetensors", metadata=about)


def lay_out(base: Path, layout: str) -> dict[str, dict[str, torch.Tensor]]:
    """All parts of a folder in that layout; returns their tensors."""
    parts = {}
    for part, name in WEIGHTS.items():
        if not (base / part).is_dir():
            continue
        parts[part] = load_file(base / part / f"{name}.safetensors")
        write_part(base / part, name, parts[part], layout)
    return parts


def each_left_out(base: Path, layout: str, every: int = 1) -> Iterator[tuple[str, str]]:
    """(part, key): the folder lacks that tensor until the next. every: take each n-th.

    A shard lacks it while the index still names it: that is what a cut download is.
    """
    parts = lay_out(base, layout)
    for part, key in [(p, k) for p, tensors in parts.items() for k in tensors][::every]:
        folder, rest = base / part, {k: v for k, v in parts[part].items() if k != key}
        if layout == "shards":
            file = next(f for f in folder.glob("*.safetensors") if key in load_file(f))
            sound = file.read_bytes()
            own = {k: v for k, v in load_file(file).items() if k != key}
            save_file(own, file, metadata={"format": "pt"})
            yield part, key
            file.write_bytes(sound)
            continue
        write_part(folder, WEIGHTS[part], rest, layout)
        yield part, key
        write_part(folder, WEIGHTS[part], parts[part], layout)
