"""Layers that are several in one weight: which they are, and of which parts.

What `inject` adapts is such a layer part by part (`adapters.in_parts`); a change of the whole
weight, as other trainers' files have it, may be in it as well. The table is here and not with the
base families, for a network without its pipeline is adapted by its class alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from dreamtune.adapters.in_parts import Parts


def _q_k_v_mlp(attention: Any) -> Parts:
    """The two halves of the gated MLP are one part, as they are one layer in other blocks."""
    width = attention.inner_dim
    mlp = attention.mlp_hidden_dim * attention.mlp_mult_factor
    return {"q": width, "k": width, "v": width, "mlp": mlp}


# Class of diffusers, name of the layer in it -> outputs of its parts, from above.
FUSED: Mapping[tuple[str, str], Callable[[Any], Parts]] = {
    ("Flux2ParallelSelfAttention", "to_qkv_mlp_proj"): _q_k_v_mlp,
}


def parts_of(parent: nn.Module, name: str) -> Parts:
    """Name -> outputs, from above, of the parts of `parent`'s layer `name`; {} for one layer."""
    for kind in type(parent).__mro__:
        if (kind.__name__, name) in FUSED:
            return FUSED[kind.__name__, name](parent)
    return {}
