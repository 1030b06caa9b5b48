"""How LoRA files of UNets spell the names of layers, and the module paths that these mean."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from dreamtune.injection.targets import TARGET_MODULES, last
from dreamtune.models.prefixes import Prefixes

PEFT = "base_model.model."  # of every key of a `PeftModel`
COMFY = (
    "diffusion_model."  # of a key in ComfyUI, before the layer's name in the first SD checkpoint
)
LYCORIS = "lycoris_"  # of a key of LyCORIS around a model, where kohya's scripts write their own
_BLOCK = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(attentions|resnets|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
# Module path -> name in the first SD checkpoints, of what stands outside the blocks; in a resnet.
_TOP = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
_RESNET = {
    "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
_FIRST = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.2.")


def flat(path: str) -> str:
    return path.replace(".", "_")


def is_layer_name(name: str, prefixes: Prefixes) -> bool:
    """Whether it may be a layer of the family's networks, where there is none to ask: of a module
    path or another spelling of one.
    """
    full = f"{name}."
    known = (*prefixes.roots, *_FIRST)
    if full.startswith(known) or flat(full).startswith(tuple(map(flat, known))):
        return True
    return flat(f".{name}").endswith(tuple(flat(f".{t}") for t in TARGET_MODULES))


def ends_of(paths: Iterable[str]) -> tuple[str, ...]:
    """The last names of layers, each once; those of projections as adapters order them."""
    ends = {last(path) for path in paths}
    known = tuple(t for t in TARGET_MODULES if t in ends)
    return known + tuple(sorted(ends.difference(known)))


def exact_names(
    paths: Collection[str], ends: Iterable[str], network: nn.Module | None
) -> list[str] | str:
    """The ends of names, where they mean these layers of the network and no other; else paths;
    where a path is the end of another's too, an expression for whole paths.
    """
    if network is None:
        return sorted(paths)
    there = [path for path, _ in network.named_modules()]
    for names in (sorted(ends), sorted(paths)):
        dotted = tuple(f".{name}" for name in names)
        if {path for path in there if f".{path}".endswith(dotted)} == set(paths):
            return names
    return "|".join(re.escape(path) for path in sorted(paths))


def of_module(name: str) -> str:
    """The module path where LoRA layers stood in the attention's processor, as before diffusers
    0.21: `attn1.processor.to_out` is `attn1.to_out.0`. Other names stay.
    """
    owner, processor, layer = name.rpartition(".processor.")
    return f"{owner}.{layer}{'.0' if layer == 'to_out' else ''}" if processor else name


def checkpoint_names(paths: Iterable[str], network: nn.Module | None) -> dict[str, str]:
    """Name of a layer in the first SD checkpoints, `input_blocks.1.1...`, -> module path.

    There the blocks are counted through: conv_in, then `layers_per_block` and a downsampler a
    block; upwards a layer more, the upsampler in the last one. {} for a network without such a
    count.
    """
    config: Mapping[str, Any] = getattr(network, "config", {})
    layers = config.get("layers_per_block")
    if not isinstance(layers, int):
        return {}
    ups = config.get("up_block_types") or ()
    names = {path: _in_checkpoint(path, layers, ups) for path in paths}
    return {name: path for path, name in names.items() if name is not None}


def _in_checkpoint(path: str, layers: int, ups: Sequence[str]) -> str | None:
    """None for a layer that has no name there."""
    match = _BLOCK.fullmatch(path)
    if match is None:
        return _TOP.get(path)
    side, block, kind, number, rest = (
        match[1],
        int(match[2] or 0),
        match[3],
        int(match[4]),
        match[5],
    )
    first = block * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op" if rest == "conv" else None
    if kind == "upsamplers":  # after the resnet and the attention, where there is one
        if rest != "conv" or block >= len(ups):
            return None
        return f"output_blocks.{first + layers}.{2 if 'Attn' in ups[block] else 1}.conv"
    inner = rest if kind == "attentions" else _RESNET.get(rest)
    if inner is None:
        return None
    attention = int(kind == "attentions")
    if side is None:
        return f"middle_block.{2 * number + attention}.{inner}"
    start = "output_blocks" if side == "up" else "input_blocks"
    return f"{start}.{first + number + (side == 'down')}.{attention}.{inner}"


def block_of(name: str) -> str:
    """The part of the network that a layer stands in, of a module path or another spelling."""
    parts = r"(down|up)_blocks[._](\d+)[._](attentions|resnets|downsamplers|upsamplers)[._](\d+)"
    if match := re.search(parts, name):
        return f"{match[1]}_blocks.{match[2]}.{match[3]}.{match[4]}"
    if match := re.search(r"(input|output)_blocks[._](\d+)", name):
        return f"{match[1]}_blocks.{match[2]}"
    found = re.match(r"mid_block|middle_block|[^.]+(\.\d+)?", name)
    return found[0] if found else name
