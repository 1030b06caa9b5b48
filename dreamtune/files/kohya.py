"""LoRA as kohya's scripts name it: `lora_unet_<module path, _ for .>.lora_down.weight`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dreamtune.adapters import Adapter
from dreamtune.files.formats import LayerFactors, Prefixes
from dreamtune.files.lora import PlainLora
from dreamtune.files.names import LYCORIS, checkpoint_names, flat
from dreamtune.files.tensors import TensorFile


class Kohya(PlainLora):
    """With alpha = rank, a scale of 1."""

    file_name = "{name}_kohya.safetensors"
    shortens = "a kohya file shortens the names of its layers"

    def check(
        self, method: type[Adapter], options: Mapping[str, Any], network: nn.Module | None
    ) -> None:
        super().check(method, options, network)
        if getattr(network, "config", {}).get("addition_embed_type") == "text_time":
            raise ValueError(
                "kohya files of SDXL use other block names: export `diffusers` instead"
            )

    def prefix(self, prefixes: Prefixes) -> str:
        return prefixes.kohya

    def tensors(self, factors: LayerFactors, prefix: str) -> dict[str, Tensor]:
        found = {}
        for path, (up, down) in factors.items():
            key = prefix + flat(path)
            found[f"{key}.lora_down.weight"] = down
            found[f"{key}.lora_up.weight"] = up
            found[f"{key}.alpha"] = torch.tensor(float(down.shape[0]))
        return found

    def name(self, key: str, prefixes: Prefixes) -> str | None:
        start = next((s for s in (prefixes.kohya, LYCORIS) if key.startswith(s)), None)
        return None if start is None else key.removeprefix(start)

    def paths(
        self, names: Iterable[str], layers: Iterable[str], network: nn.Module | None
    ) -> dict[str, str]:
        known = {flat(path): path for path in layers}
        known |= {flat(name): path for name, path in checkpoint_names(layers, network).items()}
        return {name: known.get(name, name) for name in names}

    def doubt(self, file: TensorFile) -> str | None:
        alpha, rank = (file.header.get(f"ss_network_{name}") for name in ("alpha", "dim"))
        if alpha in (None, "None", rank):
            return None
        return f"its header has an alpha of {str(alpha)[:100]}, its layers have none"


FORMAT = Kohya()
