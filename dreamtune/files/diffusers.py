"""LoRA as diffusers names it: `unet.<module path>.lora_A.weight`, and as it did before; of a
transformer `transformer.`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from dreamtune.files.formats import Change, LayerFactors, Prefixes
from dreamtune.files.lora import PlainLora, in_peft_words
from dreamtune.files.names import of_module
from dreamtune.models.prefixes import TRANSFORMER


class Diffusers(PlainLora):
    """Without alpha: diffusers then takes alpha = rank, a scale of 1."""

    file_name = "pytorch_lora_weights.safetensors"

    def check(self, change: Change) -> str:
        if change.prefixes.peft == TRANSFORMER and not hasattr(change.network, "load_lora_adapter"):
            raise ValueError(
                f"diffusers loads no LoRA into `{type(change.network).__name__}`: export it as"
                " `peft` or as `merged`"
            )
        return super().check(change)

    def name(self, key: str, prefixes: Prefixes) -> str | None:
        """With the network's name before it, or without, as in files of the network alone."""
        if key.startswith(prefixes.peft):
            return key.removeprefix(prefixes.peft)
        return key if key.startswith(prefixes.roots) else None

    def paths(
        self, names: Iterable[str], layers: Iterable[str], network: nn.Module | None
    ) -> dict[str, str]:
        return {name: of_module(name) for name in names}

    def usage(self, path: Path, change: Change) -> str:
        return f"pipe.load_lora_weights({path.parent.name!r}, weight_name={path.name!r})"

    def tensors(self, factors: LayerFactors, change: Change) -> dict[str, Tensor]:
        return in_peft_words(factors, change.prefixes.peft)


FORMAT = Diffusers()
