"""LoRA as ComfyUI saves it: `diffusion_model.<name in the checkpoint>.lora_up.weight`."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from dreamtune.files.formats import Prefixes
from dreamtune.files.lora import LoraFormat
from dreamtune.files.names import COMFY, checkpoint_names


class ComfyUI(LoraFormat):
    file_name = ""
    shortens = "a ComfyUI file counts the blocks of a checkpoint"

    def name(self, key: str, prefixes: Prefixes) -> str | None:
        return key.removeprefix(COMFY) if key.startswith(COMFY) else None

    def paths(
        self, names: Iterable[str], layers: Iterable[str], network: nn.Module | None
    ) -> dict[str, str]:
        known = checkpoint_names(layers, network)
        return {name: known.get(name, name) for name in names}


FORMAT = ComfyUI()
