"""A frozen UNet's forward through fused kernels: same modules, same weights, fewer passes.

Stock diffusers runs a norm, an activation and each sum as kernels of their own, and copies pictures
between two memory layouts around every one of them: in a captured training step most of the time.
Known are `ResnetBlock2D`, `Transformer2DModel` and its `BasicTransformerBlock`s as Stable Diffusion
has them; a block that is not known, or a call with arguments that are not, runs as diffusers wrote
it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dreamtune.fast import ops as ops


def plan(module: nn.Module, shared: SiLU) -> tuple[bool, Callable[..., Any]] | None:
    """Whether the block is known, and its fused forward; None for what is no such block."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    if type(module) is ResnetBlock2D:
        known = knows_resnet(module)
        bias = time_bias(module) if known else None
        return known, partial(resnet, module, module.forward, shared, bias)
    if type(module) is Transformer2DModel:
        return knows_transformer(module), partial(transformer, module, module.forward)
    if type(module) is BasicTransformerBlock:
        return knows_block(module), partial(block, module, module.forward)
    return None


def knows_norm(norm: Any) -> bool:
    return (
        type(norm) is nn.GroupNorm
        and norm.affine
        and ops.fits_group_norm(norm.num_channels, norm.num_groups)
    )


def apply_norm(
    norm: nn.GroupNorm, x: Tensor, silu: bool = False, add: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return ops.group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu, add)


class SiLU:
    """silu(x), computed once for the same tensor: all blocks of a forward get one embedding."""

    def __init__(self) -> None:
        self.of: Tensor | None = None
        self.value: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.of is not x or self.value is None:
            self.of, self.value = x, F.silu(x)
        return self.value


def knows_resnet(m: Any) -> bool:
    convolutions = [c for c in (m.conv1, m.conv2, m.conv_shortcut) if c is not None]
    return (
        knows_norm(m.norm1)
        and knows_norm(m.norm2)
        and type(m.nonlinearity) is nn.SiLU
        and m.time_embedding_norm == "default"
        and m.time_emb_proj is not None
        and not m.skip_time_act
        and m.upsample is None
        and m.downsample is None
        and m.dropout.p == 0
        and m.output_scale_factor == 1
        and all(type(c) is nn.Conv2d and c.bias is not None for c in convolutions)
        and all(simple(c) for c in (m.conv1, m.conv2))
    )


def simple(c: nn.Conv2d) -> bool:
    """Whether its weight and padding are all that it computes with."""
    usual = c.stride == c.dilation == (1, 1) and c.groups == 1 and c.padding_mode == "zeros"
    return usual and not isinstance(c.padding, str)


def time_bias(m: Any) -> Tensor:
    """The bias of the time projection and of the first convolution in one: both are added there."""
    return (m.time_emb_proj.bias + m.conv1.bias).detach()


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def untouched(*modules: Any) -> bool:
    """Whether nobody has hooked into one or replaced its forward, which a block that does not call
    it would leave out.
    """
    return not any(
        "forward" in m.__dict__ or any(getattr(m, hooks) for hooks in HOOKS) for m in modules
    )


def plain(*layers: Any) -> bool:
    """Whether their weights are all that they compute with: an adapted layer is of another class,
    and a block that takes its weight would leave the change out.
    """
    given = [layer for layer in layers if layer is not None]
    return all(type(layer) in (nn.Linear, nn.Conv2d) for layer in given) and untouched(*given)


def resnet(
    m: Any, original: Callable[..., Tensor], silu: SiLU, bias: Any, x: Tensor, temb: Tensor
) -> Tensor:
    """`ResnetBlock2D.forward`."""
    layers = plain(m.conv1, m.conv2, m.conv_shortcut, m.time_emb_proj)
    if not (layers and untouched(m.norm1, m.norm2, m.nonlinearity)):
        return original(x, temb)
    h, x = apply_norm(m.norm1, x, silu=True)
    h = ops.convolution(h, m.conv1.weight, m.conv1.padding)
    time = F.linear(silu(temb), m.time_emb_proj.weight, bias)
    h, _ = apply_norm(m.norm2, h, silu=True, add=time)
    h = ops.convolution(h, m.conv2.weight, m.conv2.padding)
    if m.conv_shortcut is not None:
        x = pointwise(x, m.conv_shortcut)
    return ops.add_bias(h, x, m.conv2.bias)


def pointwise(x: Tensor, layer: Any) -> Tensor:
    """A 1x1 convolution of a channels-last picture is a linear layer."""
    weight = layer.weight.flatten(1)
    return F.linear(x.permute(0, 2, 3, 1), weight, layer.bias).permute(0, 3, 1, 2)


def unknown(rest: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether a call has an argument beyond those that a fused forward takes."""
    return any(x is not None for x in (*rest, *options.values()))


def knows_transformer(m: Any) -> bool:
    return bool(
        m.is_input_continuous
        and knows_norm(m.norm)
        and type(m.proj_in) in (nn.Linear, nn.Conv2d)
        and type(m.proj_out) in (nn.Linear, nn.Conv2d)
    )


def transformer(
    m: Any,
    original: Callable[..., Any],
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    *rest: Any,
    return_dict: bool = True,
    **options: Any,
) -> Any:
    """`Transformer2DModel.forward`, of pictures."""
    own = plain(m.proj_in, m.proj_out) and untouched(m.norm)
    other = unknown(rest, options) or not own
    if return_dict or m.gradient_checkpointing or other:
        return original(
            hidden_states, encoder_hidden_states, *rest, return_dict=return_dict, **options
        )
    n, _, height, width = hidden_states.shape
    y, skip = apply_norm(m.norm, hidden_states)
    y = F.linear(y.permute(0, 2, 3, 1).flatten(1, 2), m.proj_in.weight.flatten(1), m.proj_in.bias)
    for inner in m.transformer_blocks:
        y = inner(y, encoder_hidden_states=encoder_hidden_states)
    y = F.linear(y, m.proj_out.weight.flatten(1), m.proj_out.bias)
    return (y.view(n, height, width, -1).permute(0, 3, 1, 2) + skip,)


def knows_block(m: Any) -> bool:
    from diffusers.models.activations import GEGLU

    norms = [m.norm1, m.norm2, m.norm3]
    layers = list(m.ff.net)
    return bool(
        m.norm_type == "layer_norm"
        and all(type(n) is nn.LayerNorm and n.elementwise_affine for n in norms)
        and all(n.bias is not None for n in norms)
        and m.pos_embed is None
        and m.attn2 is not None
        and not m.only_cross_attention
        and m._chunk_size is None
        and type(layers[0]) is GEGLU
        and all(type(x) is nn.Linear or getattr(x, "p", 1) == 0 for x in layers[1:])
    )


def block(
    m: Any,
    original: Callable[..., Tensor],
    hidden_states: Tensor,
    attention_mask: Any = None,
    encoder_hidden_states: Tensor | None = None,
    *rest: Any,
    **options: Any,
) -> Tensor:
    """`BasicTransformerBlock.forward`, with each sum in the norm that follows it."""
    own = plain(m.ff.net[0].proj) and untouched(m.norm1, m.norm2, m.norm3, m.ff, m.ff.net[0])
    other = unknown(rest, options) or not own
    if attention_mask is not None or other:
        return original(hidden_states, attention_mask, encoder_hidden_states, *rest, **options)
    y, x = apply_layer_norm(m.norm1, hidden_states)
    y, x = apply_layer_norm(m.norm2, m.attn1(y), x)
    y, x = apply_layer_norm(m.norm3, m.attn2(y, encoder_hidden_states=encoder_hidden_states), x)
    gate, *rest = m.ff.net
    y = ops.geglu(F.linear(y, gate.proj.weight, gate.proj.bias))
    for layer in rest:
        y = layer(y)
    return y + x


def apply_layer_norm(
    norm: nn.LayerNorm, x: Tensor, more: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps, more)
