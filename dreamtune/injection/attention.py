"""The attention processor of adapted layers: query, key and value of one input are one product.

It computes what diffusers' `AttnProcessor2_0` does; an attention of another make, a mask, or an
input that it does not know is left to that.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamtune.injection.layer import AdaptedLinear
from dreamtune.injection.places import Place
from dreamtune.injection.projection import Projection


class JointProjections:
    """Stands for `original`, the processor of an attention with the joint projection `many`: of
    query, key and value, or of a text's key and value.

    To whoever asks for its class, as diffusers does to choose a processor or to make another of the
    kind, it is the one that it stands for. A copy is that one too.
    """

    def __init__(self, original: Any, many: Projection) -> None:
        self.original, self.many, self.cross = original, many, len(many.layers) == 2
        # diffusers asks for the signature of `processor.__call__` at every call of an attention; of
        # a method it is made anew each time: 40 us on a CPU core, and 4 where it is at hand.
        self.__dict__["__call__"] = _Signed(self)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.original)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _itself, (self.original,)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        source = encoder_hidden_states if self.cross else hidden_states
        if (
            attention_mask is not None
            or hidden_states.dim() != 3
            or source is None
            or (encoder_hidden_states is None) is self.cross
            or not self.many.together(source.device.type)
        ):
            return self.original(  # type: ignore[no-any-return]
                attn, hidden_states, encoder_hidden_states, attention_mask, temb
            )
        heads = attn.heads
        if torch.is_grad_enabled():
            parts = [by_head(x, heads) for x in self.many(source)]
        else:
            parts = list(by_head(self.many.stacked(source), heads).unbind(0))
        if self.cross:
            parts = [by_head(attn.to_q(hidden_states), heads), *parts]
        query, key, value = parts
        y = F.scaled_dot_product_attention(query, key, value)
        out = attn.to_out._modules["0"]  # `[0]` makes a string of it, and looks it up twice
        return out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class _Signed:
    """What `processor.__call__` finds, with its signature at hand."""

    def __init__(self, processor: JointProjections) -> None:
        self.processor, self.__signature__ = processor, SIGNATURE

    def __call__(self, *given: Any, **named: Any) -> Tensor:
        return JointProjections.__call__(self.processor, *given, **named)


SIGNATURE = inspect.signature(JointProjections.__call__.__get__(object()))


def by_head(x: Tensor, heads: int) -> Tensor:
    """(..., tokens, heads * d) -> (..., heads, tokens, d)."""
    return x.view(*x.shape[:-1], heads, x.shape[-1] // heads).transpose(-2, -3)


def plain(attn: nn.Module) -> bool:
    """Whether the attention does nothing but project, attend and project."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    return (
        type(attn) is Attention
        and type(attn.processor) is AttnProcessor2_0
        and attn.spatial_norm is None
        and attn.group_norm is None
        and not attn.norm_cross
        and attn.norm_q is None
        and attn.norm_k is None
        and not attn.residual_connection
        and attn.rescale_output_factor == 1
        and attn.to_out[1].p == 0
    )


def project_jointly(attentions: Iterable[nn.Module]) -> list[Any]:
    """Gives the attentions with joint projections their processor; returns them."""
    changed: list[Any] = []
    module: Any
    for module in attentions:
        layer = getattr(module, "to_k", None)
        many = layer.projection if type(layer) is AdaptedLinear else None
        if isinstance(many, Projection) and len(many.layers) > 1 and plain(module):
            module.processor = JointProjections(module.processor, many)
            changed.append(module)
    return changed


JOINT: dict[Any, tuple[str, ...]] = {True: ("to_k", "to_v"), False: ("to_q", "to_k", "to_v")}


def joint_layers(names: list[str], places: Mapping[str, Place]) -> list[list[str]]:
    """The names of a group's layers, those of one projection together."""
    parts: list[list[str]] = []
    place = 0
    while place < len(names):
        parent = names[place].rpartition(".")[0]
        cross = getattr(places[names[place]].attention, "is_cross_attention", None)
        together = JOINT.get(cross, ())
        wanted = [f"{parent}.{name}" for name in together]
        joint = bool(wanted) and names[place : place + len(wanted)] == wanted
        if joint and any(places[name].layer.bias is not None for name in wanted):
            joint = False
        parts.append(wanted if joint else [names[place]])
        place += len(parts[-1])
    return parts


def _itself(x: Any) -> Any:
    return x
