"""LoRA as kohya's scripts name it: `lora_unet_<module path, _ for .>.lora_down.weight`; of SDXL and
of transformers the path is that of the first checkpoint, whose fused layers are written whole.

ComfyUI reads all layers of it; diffusers 0.36 those that kohya's scripts train: not `conv_in`,
`conv_out` and the time embedding, which it warns of and leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dreamtune.files.comfyui_names import Layer, comfyui_names, family_of, may_be_flat, names_of
from dreamtune.files.formats import Change, LayerFactors, Prefixes
from dreamtune.files.fused import put_together, taken_apart
from dreamtune.files.header import is_xl, kohya
from dreamtune.files.lora import PlainLora, about_of
from dreamtune.files.names import LYCORIS, checkpoint_names, flat
from dreamtune.files.parts import Parts
from dreamtune.files.tensors import TensorFile
from dreamtune.injection.targets import layers_of
from dreamtune.models.prefixes import TRANSFORMER

SGM = "https://github.com/Stability-AI/generative-models"  # whose names those of SDXL are


class Kohya(PlainLora):
    """With alpha = rank, a scale of 1."""

    file_name = "{name}_kohya.safetensors"
    shortens = "a kohya file shortens the names of its layers"

    def check(self, change: Change) -> str:
        held = super().check(change)
        if change.prefixes.peft == TRANSFORMER:
            names_of(change)
        return held

    def needs_base(self, change: Change) -> str:
        if why := super().needs_base(change):
            return why
        if is_xl(change):
            return "a kohya file of SDXL counts the blocks of its first checkpoint"
        told = any("transformer_blocks" in path for path in change.file.shapes)
        if change.network is None and not told:
            return "a kohya file has other names for SDXL, and these layers do not tell it"
        return ""

    def usage(self, path: Path, change: Change) -> str:
        return (
            f"# {path.name} goes into ComfyUI's models/loras or A1111's models/Lora; in diffusers:"
            f"\npipe.load_lora_weights({str(path.parent.name)!r}, weight_name={path.name!r})"
        )

    def tensors(self, factors: LayerFactors, change: Change) -> dict[str, Tensor]:
        if change.network is not None and change.prefixes.peft == TRANSFORMER:
            factors = put_together(factors, names_of(change), change.network)
        names = {path: path for path in factors}
        if is_xl(change):
            names = {path: name for name, path in checkpoint_names(factors, change.network).items()}
        if missing := [path for path in factors if path not in names]:
            raise ValueError(
                f"{len(missing)} layers have no name in SDXL's first checkpoint, `{missing[0]}`"
                " first: export `diffusers` instead"
            )
        found = {}
        for path, (up, down) in factors.items():
            key = change.prefixes.kohya + flat(names[path])
            found[f"{key}.lora_down.weight"] = down
            found[f"{key}.lora_up.weight"] = up
            found[f"{key}.alpha"] = torch.tensor(float(down.shape[0]))
        return found

    def strings(self, change: Change) -> dict[str, str]:
        found = super().strings(change) | kohya(change)
        if change.prefixes.peft == TRANSFORMER:
            del found["modelspec.implementation"]  # the names are not diffusers'
        return found | ({"modelspec.implementation": SGM} if is_xl(change) else {})

    def name(self, key: str, prefixes: Prefixes) -> str | None:
        start = next((s for s in (prefixes.kohya, LYCORIS) if key.startswith(s)), None)
        return None if start is None else key.removeprefix(start)

    def paths(
        self, names: Iterable[str], layers: Iterable[str], network: nn.Module | None
    ) -> dict[str, str]:
        known = {flat(path): path for path in layers}
        known |= {flat(name): path for name, path in checkpoint_names(layers, network).items()}
        return {name: known.get(name, name) for name in names}

    def may_be_layer(self, name: str, prefixes: Prefixes) -> bool:
        return super().may_be_layer(name, prefixes) or may_be_flat(name)

    def placed(
        self, file: TensorFile, by_name: Mapping[str, Parts], network: nn.Module | None
    ) -> list[tuple[str, Parts]]:
        if network is None or family_of(network) is None:
            return super().placed(file, by_name, network)
        names = {flat(path): Layer((path,)) for path in layers_of(network)}
        names |= {flat(name): layer for name, layer in comfyui_names(network).items()}
        written = about_of(file).get("fingerprint", {})
        return taken_apart(file, by_name, names, network, written)

    def doubt(self, file: TensorFile) -> str | None:
        alpha, rank = (file.header.get(f"ss_network_{name}") for name in ("alpha", "dim"))
        if alpha in (None, "None", rank):
            return None
        return f"its header has an alpha of {str(alpha)[:100]}, its layers have none"


FORMAT = Kohya()
