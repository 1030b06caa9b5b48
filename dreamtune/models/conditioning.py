"""What a network is told beside x and t, and what a pipeline is: a row a prompt or an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Conditioning = dict[str, Tensor]
# Of a pipeline's call: a list where the rows have lengths of their own.
Arguments = dict[str, Tensor | list[Tensor]]
NOTHING = " "  # a negative prompt that stands for none, as the card of Qwen-Image has it


def take(arguments: Mapping[str, Tensor | list[Tensor]], rows: Sequence[int]) -> Arguments:
    """These rows, in this order."""
    return {
        name: [x[i] for i in rows] if isinstance(x, list) else x[torch.tensor(rows).to(x.device)]
        for name, x in arguments.items()
    }


def together(parts: Sequence[Mapping[str, Tensor | list[Tensor]]]) -> Arguments:
    """The rows of all parts, one part after the other. Tokens (n, tokens, ...) of different number,
    and masks of them, are filled up with zeros: a family whose network would see these tells it
    their number, or has a mask.
    """
    found: Arguments = {}
    for name, first in parts[0].items():
        own = [part[name] for part in parts]
        if isinstance(first, list):
            found[name] = [row for rows in own for row in rows]
        else:
            found[name] = torch.cat(_filled([x for x in own if isinstance(x, Tensor)]))
    return found


def rows_together(parts: Sequence[Conditioning]) -> Conditioning:
    """`together` of what is a tensor throughout."""
    return {name: x for name, x in together(parts).items() if isinstance(x, Tensor)}


def _filled(parts: list[Tensor]) -> list[Tensor]:
    if parts[0].ndim < 2:
        return parts
    length = max(x.shape[1] for x in parts)
    return [F.pad(x, (0, 0) * (x.ndim - 2) + (0, length - x.shape[1])) for x in parts]
