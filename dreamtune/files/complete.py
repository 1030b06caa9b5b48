"""Whether a LoRA file has the layers that it should: of these shapes, and none lost on the way."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from dreamtune.fields import UnreadableFile
from dreamtune.injection.targets import TARGET_MODULES

Shape = tuple[int, ...]

_IN_BLOCK = re.compile(r"(.+\.(?:attentions|resnets|transformer_blocks)\.\d+)\.(.+)")
# Kinds of layers that trainers choose together. Others may be left out of a block: kohya's scripts
# take a rank a block, 0 for none, and for 3x3 kernels one of its own.
_TOGETHER = (
    {"ff.net.0.proj", "ff.net.2"}, {"proj_in", "proj_out"}, {"conv1", "conv2"},
    {"time_emb_proj", "conv_shortcut"},
)  # fmt: skip


def check_layers(
    file: str, shapes: Mapping[str, Shape], layers: Mapping[str, Shape], prints: Collection[str]
) -> None:
    """Raises UnreadableFile where a layer is missing, or is of another shape than the network's.

    shapes: of the file's layers. layers: of the network's. prints: those that were written, where
        the file says it; else it is told by what the file has (`lost`).
    """
    missing = [path for path in prints or lost(shapes, layers) if path not in shapes]
    if missing:
        raise UnreadableFile(f"`{file}`: {len(missing)} layers have no keys, `{missing[0]}` first")
    for path, got in shapes.items():
        if got != layers[path]:
            raise UnreadableFile(f"`{file}`: `{path}` is {layers[path]} here and {got} in the file")


def lost(there: Collection[str], layers: Collection[str]) -> list[str]:
    """Layers of the network that a regular choice would have with those that are there: where some
    blocks and some kinds of layers are trained, each of these blocks has each of these kinds.
    """
    places = {path: place for path in layers if (place := _place(path)) is not None}
    own = [places[path] for path in there if path in places]
    blocks = {(family, block) for family, block, _ in own}
    kinds = {(family, kind) for family, _, kind in own}
    return [
        path
        for path, (family, block, kind) in places.items()
        if path not in there and (family, block) in blocks and (family, kind) in kinds
    ]


def _place(path: str) -> tuple[int, str, str] | None:
    """Family, block and kind, of attention projections `attn2.to_q`; None for a layer that stands
    alone.
    """
    target = next((t for t in TARGET_MODULES if path.endswith(f".{t}")), None)
    if target is not None:
        block, _, attention = path.removesuffix(f".{target}").rpartition(".")
        return -1, block, f"{attention}.{target}"
    match = _IN_BLOCK.fullmatch(path)
    if match is None:
        return None
    families = (n for n, kinds in enumerate(_TOGETHER) if match[2] in kinds)
    family = next(families, None)
    return None if family is None else (family, match[1], match[2])
