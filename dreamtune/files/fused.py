"""One layer of a checkpoint that is several of diffusers': their outputs stand one below the other.

Both ways are exact. Factors of the parts, (out_i, r_i) and (r_i, in), are those of the whole with
up block-diagonal and down stacked, of rank sum r_i.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from dreamtune.adapters.maths import block_factors
from dreamtune.fields import UnreadableFile
from dreamtune.files.comfyui_names import Layer
from dreamtune.files.formats import LayerFactors
from dreamtune.files.parts import Parts, check_alpha, check_pair, factors_of, method_of
from dreamtune.files.stated import HEADER
from dreamtune.files.tensors import TensorFile
from dreamtune.injection.targets import layers_of

Pair = tuple[Tensor, Tensor]  # up (out, r), down (r, in)


def joined(pairs: Sequence[Pair | None], sizes: Sequence[int], swapped: bool) -> Pair:
    """Factors of the whole. pairs: of each part, None for one without a change, at least one has
    some. sizes: outputs of each part. swapped: see `separated`.

    A single part stays what it is, a convolution's kernels too.
    """
    there = [pair for pair in pairs if pair is not None]
    if len(pairs) == 1:
        up, down = there[0]
        return (halves_swapped(up) if swapped else up), down
    whole, down = block_factors(pairs, sizes)
    return (halves_swapped(whole) if swapped else whole), down


def put_together(
    factors: LayerFactors, names: Mapping[str, Layer], network: nn.Module
) -> LayerFactors:
    """Name in the checkpoint -> factors, of those of diffusers' layers."""
    sizes, found = _outputs(network), {}
    for name, layer in names.items():
        pairs = [factors.get(path) for path in layer.paths]
        found[name] = joined(pairs, [sizes[path] for path in layer.paths], layer.swapped)
    return found


def separated(
    name: str, parts: Parts, sizes: Sequence[int], swapped: bool, narrow: bool
) -> list[Parts]:
    """Tensors of each part, of those of the whole layer `name`.

    sizes: outputs of each part. swapped: the halves of the whole's outputs stand the other way
    round in diffusers. narrow: leave out of a part's factors the columns of up that are zero in its
    rows, so that of a block-diagonal up each part has its own block. A part that is zero keeps all.

    A part of a LoRA has its rows of up, the same down, and an alpha of the same strength. LoHa and
    LoKr become a LoRA first, with their strength in up.

    Raises ValueError where the tensors are no such factors, or of other sizes.
    """
    if method_of(parts) != "LORA" or "mid" in parts or parts["up"].dim() != 2:
        up, down = factors_of(name, parts, None)
        parts = {"up": up, "down": down}
    up, down = check_pair(name, parts, "up", "down")
    if len(up) != sum(sizes):
        raise UnreadableFile(
            f"`{name}` has {len(up)} outputs, in the network {' + '.join(map(str, sizes))}"
        )
    if "alpha" in parts:
        check_alpha(name, parts["alpha"])
    if swapped:
        up = halves_swapped(up)
    found = []
    for block in up.split(list(sizes)):
        kept = (block != 0).any(0) if narrow else torch.ones(len(down), dtype=torch.bool)
        if not kept.any():
            kept[:] = True
        own = {"up": block[:, kept].contiguous(), "down": down[kept]}
        if "alpha" in parts:
            own["alpha"] = torch.tensor(float(parts["alpha"]) * int(kept.sum()) / len(down))
        found.append(own)
    return found


def taken_apart(
    file: TensorFile,
    by_name: Mapping[str, Parts],
    names: Mapping[str, Layer],
    network: nn.Module,
    written: Collection[str],
) -> list[tuple[str, Parts]]:
    """Module path and tensors of each of diffusers' layers. Names that are not in `names` stay.

    written: module paths of the layers that our header has; of others, a part that is zero was not
        trained, and is left out.
    """
    sizes, narrow = _outputs(network), HEADER not in file.header
    found = []
    for name, own in by_name.items():
        layer = names.get(name, Layer((name,)))
        if len(layer.paths) == 1 and not layer.swapped:
            found.append((layer.paths[0], own))
            continue
        outputs = [sizes[path] for path in layer.paths]
        parts = separated(name, own, outputs, layer.swapped, narrow and len(outputs) > 1)
        found += [
            (path, part)
            for path, part in zip(layer.paths, parts)
            if not written or path in written or part["up"].any()
        ]
    return found


def _outputs(network: nn.Module) -> dict[str, int]:
    return {path: layer.weight.shape[0] for path, layer in layers_of(network).items()}


def halves_swapped(rows: Tensor) -> Tensor:
    """(shift, scale) and (scale, shift): the one becomes the other."""
    return rows.roll(len(rows) // 2, 0)
