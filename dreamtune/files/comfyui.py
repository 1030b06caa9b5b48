"""LoRA as ComfyUI reads it of every network: `diffusion_model.<name in the checkpoint>`, then the
words for up and down. Without alpha: a strength of 1.

A layer that the checkpoint has in one piece and diffusers in several is written and read whole.
diffusers 0.42 reads such files of its transformers but SD 3's; of Flux.1 and of Z-Image not the
layers outside the blocks, of Flux.2 `final_layer.adaLN_modulation.1` with its halves exchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from dreamtune.files.comfyui_names import (
    KOHYA,
    Layer,
    comfyui_names,
    family_of,
    known_networks,
)
from dreamtune.files.formats import Change, LayerFactors, Prefixes
from dreamtune.files.fused import joined, separated
from dreamtune.files.lora import PlainLora, about_of, check_low_rank
from dreamtune.files.names import COMFY
from dreamtune.files.parts import Parts
from dreamtune.files.stated import HEADER
from dreamtune.files.tensors import TensorFile
from dreamtune.injection.targets import layers_of, unwrapped


class ComfyUI(PlainLora):
    file_name = "{name}_comfyui.safetensors"
    shortens = "a ComfyUI file counts the blocks of a checkpoint"

    def check(self, change: Change) -> str:
        check_low_rank(change)
        if change.network is not None:
            _names(change)
        return "a plain LoRA"

    def needs_base(self, change: Change) -> str:
        return "a ComfyUI file names the layers as the base's checkpoint does"

    def usage(self, path: Path) -> str:
        return f"# {path.name} goes into ComfyUI's models/loras"

    def tensors(self, factors: LayerFactors, change: Change) -> dict[str, Tensor]:
        assert change.network is not None
        family, sizes = family_of(change.network), _outputs(change.network)
        down_key, up_key = KOHYA if family is None else family.keys
        found = {}
        for name, layer in _names(change).items():
            pairs = [factors.get(path) for path in layer.paths]
            up, down = joined(pairs, [sizes[path] for path in layer.paths], layer.swapped)
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
        known, sizes = comfyui_names(network), _outputs(network)
        written, narrow = about_of(file).get("fingerprint", {}), HEADER not in file.header
        found = []
        for name, own in by_name.items():
            layer = known.get(name, Layer((name,)))
            if len(layer.paths) == 1 and not layer.swapped:
                found.append((layer.paths[0], own))
                continue
            outputs = [sizes[path] for path in layer.paths]
            parts = separated(name, own, outputs, layer.swapped, narrow and len(outputs) > 1)
            # What our file is zero of was not trained, unless the header says that it was.
            found += [
                (path, part)
                for path, part in zip(layer.paths, parts)
                if not written or path in written or part["up"].any()
            ]
        return found


def _names(change: Change) -> dict[str, Layer]:
    """Of the checkpoint's layers that change. Raises ValueError for a network, or a layer, that has
    no name.
    """
    assert change.network is not None
    names, paths = comfyui_names(change.network), change.file.shapes
    if not names:
        kind = type(unwrapped(change.network)).__name__
        raise ValueError(
            f"the names of `{kind}` in ComfyUI are not known, known are those of"
            f" {known_networks()}: use the native file with `dreamtune.load`, or export it"
            " as `peft` or as `merged`"
        )
    found = {n: layer for n, layer in names.items() if any(path in paths for path in layer.paths)}
    named = {path for layer in found.values() for path in layer.paths}
    if missing := [path for path in paths if path not in named]:
        raise ValueError(
            f"{len(missing)} layers have no name in the checkpoint that ComfyUI reads,"
            f" `{missing[0]}` first: export it as `peft` or as `merged`, or leave them out of"
            " `target_modules`"
        )
    return found


def _outputs(network: nn.Module) -> dict[str, int]:
    return {path: layer.weight.shape[0] for path, layer in layers_of(network).items()}


FORMAT = ComfyUI()
