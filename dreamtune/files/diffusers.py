"""LoRA as diffusers and PEFT name it: `unet.<module path>.lora_A.weight`."""

from __future__ import annotations

from torch import Tensor

from dreamtune.files.formats import LayerFactors, Prefixes
from dreamtune.files.lora import PlainLora


class Diffusers(PlainLora):
    """Without alpha: diffusers then takes alpha = rank, a scale of 1."""

    file_name = "pytorch_lora_weights.safetensors"

    def prefix(self, prefixes: Prefixes) -> str:
        return prefixes.peft

    def tensors(self, factors: LayerFactors, prefix: str) -> dict[str, Tensor]:
        found = {}
        for path, (up, down) in factors.items():
            found[f"{prefix}{path}.lora_A.weight"] = down
            found[f"{prefix}{path}.lora_B.weight"] = up
        return found


FORMAT = Diffusers()
