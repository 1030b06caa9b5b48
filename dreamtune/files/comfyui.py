"""LoRA as ComfyUI reads it of every network: `diffusion_model.<name in the checkpoint>`, then the
words for up and down. Without alpha: a strength of 1.

A layer that the checkpoint has in one piece and diffusers in several is written and read whole.
diffusers 0.42 reads such files of its transformers but SD 3's; of Flux.1 not the layers outside the
blocks, of Z-Image not `x_embedder` and `final_layer`, of Flux.2 `final_layer.adaLN_modulation.1`
with its halves exchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from dreamtune.files.comfyui_names import KOHYA, comfyui_names, family_of, names_of
from dreamtune.files.formats import Change, LayerFactors, Prefixes
from dreamtune.files.fused import put_together, taken_apart
from dreamtune.files.lora import PlainLora, about_of, check_low_rank
from dreamtune.files.names import COMFY
from dreamtune.files.parts import Parts
from dreamtune.files.tensors import TensorFile


class ComfyUI(PlainLora):
    file_name = "{name}_comfyui.safetensors"
    shortens = "a ComfyUI file counts the blocks of a checkpoint"

    def check(self, change: Change) -> str:
        check_low_rank(change)
        if change.network is not None:
            names_of(change)
        return "a plain LoRA"

    def needs_base(self, change: Change) -> str:
        return "a ComfyUI file names the layers as the base's checkpoint does"

    def usage(self, path: Path, change: Change) -> str:
        return f"# {path.name} goes into ComfyUI's models/loras"

    def tensors(self, factors: LayerFactors, change: Change) -> dict[str, Tensor]:
        assert change.network is not None
        family = family_of(change.network)
        down_key, up_key = KOHYA if family is None else family.keys
        found = {}
        whole = put_together(factors, names_of(change), change.network)
        for name, (up, down) in whole.items():
            found[f"{COMFY}{name}{down_key}"] = down
            found[f"{COMFY}{name}{up_key}"] = up
        return found

    def strings(self, change: Change) -> dict[str, str]:
        found = super().strings(change)
        del found["modelspec.implementation"]  # the names are not diffusers'
        return found

    def name(self, key: str, prefixes: Prefixes) -> str | None:
        return key.removeprefix(COMFY) if key.startswith(COMFY) else None

    def may_be_layer(self, name: str, prefixes: Prefixes) -> bool:
        return True  # what stands before it tells a network's key from a text encoder's

    def placed(
        self, file: TensorFile, by_name: Mapping[str, Parts], network: nn.Module | None
    ) -> list[tuple[str, Parts]]:
        """Names that the checkpoint does not have stay: some tools put `diffusion_model.` before
        module paths.
        """
        if network is None:
            return list(by_name.items())
        written = about_of(file).get("fingerprint", {})
        return taken_apart(file, by_name, comfyui_names(network), network, written)


FORMAT = ComfyUI()
