"""How LoRA files of UNets spell the names of layers, and the module paths that these mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

from dreamtune.injection.targets import TARGET_MODULES

PEFT = "base_model.model."  # of every key of a `PeftModel`
COMFY = (
    "diffusion_model."  # of a key in ComfyUI, before the layer's name in the first SD checkpoint
)
LYCORIS = "lycoris_"  # of a key of LyCORIS around a model, where kohya's scripts write their own
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.attentions\.0\.(.+)")


def flat(path: str) -> str:
    return path.replace(".", "_")


def other_layers(paths: Iterable[str]) -> list[str]:
    """Those that are no attention projections."""
    return [p for p in paths if not f".{p}".endswith(tuple(f".{t}" for t in TARGET_MODULES))]


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
    config: Mapping[str, object] = getattr(network, "config", {})
    layers = config.get("layers_per_block")
    if not isinstance(layers, int):
        return {}
    found = {}
    for path in paths:
        if match := _BLOCK.fullmatch(path):
            block, attention = int(match[2]), int(match[3])
            start = "output_blocks" if match[1] == "up" else "input_blocks"
            number = block * (layers + 1) + attention + (match[1] == "down")
            found[f"{start}.{number}.1.{match[4]}"] = path
        elif match := _MIDDLE.fullmatch(path):
            found[f"middle_block.1.{match[1]}"] = path
    return found


def block_of(name: str) -> str:
    """The part of the network that a layer stands in, of a module path or another spelling."""
    if match := re.search(r"(down|up)_blocks[._](\d+)[._]attentions[._](\d+)", name):
        return f"{match[1]}_blocks.{match[2]}.attentions.{match[3]}"
    if match := re.search(r"(input|output)_blocks[._](\d+)", name):
        return f"{match[1]}_blocks.{match[2]}"
    found = re.match(r"mid_block|middle_block|[^.]+(\.\d+)?", name)
    return found[0] if found else name
