"""A frozen transformer's blocks through fused kernels: those of Flux.2 and of Z-Image.

A norm with its modulation, a gated sum, SwiGLU, and the norm and rotary embedding of queries and
keys are a kernel each, where diffusers has three to twelve. A block that is not known, one whose
modulation is trained or that somebody has changed inside, and a call with arguments that are not
known, run as diffusers wrote them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dreamtune.fast import rows
from dreamtune.fast.unet import unknown, untouched

Angles = tuple[Tensor, Tensor]
Forward = Callable[..., Any]


def plan(module: nn.Module) -> tuple[bool, Forward] | None:
    """Whether the block is known, and its fused forward; None for what is no such block."""
    found = BLOCKS.get(type(module).__name__)
    if found is None:
        return None
    knows, forward = found
    return knows(module), partial(forward, module, module.forward)


def by_root_mean_square(norm: Any) -> bool:
    """diffusers' or torch's, of the last dimension alone."""
    from diffusers.models.normalization import RMSNorm

    shape = norm.dim if type(norm) is RMSNorm else getattr(norm, "normalized_shape", ())
    one = type(norm) in (RMSNorm, nn.RMSNorm) and len(shape) == 1
    return one and norm.weight is not None and getattr(norm, "bias", None) is None


def plainly_normed(norm: Any) -> bool:
    return type(norm) is nn.LayerNorm and not norm.elementwise_affine


def eps_of(norm: Any, dtype: torch.dtype) -> float:
    """torch's own has one of the dtype where none was given."""
    return float(torch.finfo(dtype).eps if norm.eps is None else norm.eps)


def are_their_own(passed_by: Sequence[Any], attention: Any, processor: type) -> bool:
    """Whether the modules that a fused block does not call compute as diffusers wrote them: nobody
    has hooked into one or changed it, nor its attention.
    """
    return (
        type(attention.processor) is processor
        and not getattr(attention, "fused_projections", False)
        and untouched(*passed_by)
    )


def attended(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    """(N, tokens, heads, width) each -> (N, tokens, heads * width), by the backend it is set to."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    own = attention.processor
    found: Tensor = dispatch_attention_fn(
        query, key, value, attn_mask=mask, backend=own._attention_backend,
        parallel_config=own._parallel_config,
    )  # fmt: skip
    return found.flatten(2, 3)


def turned(norm: Any, x: Tensor, width: int, angles: Angles) -> Tensor:
    """(N, tokens, heads * width) -> (N, tokens, heads, width), normed and turned."""
    return rows.rotated(x.unflatten(-1, (-1, width)), norm.weight, *angles, eps_of(norm, x.dtype))


def knows_z_image(m: Any) -> bool:
    from diffusers.models.transformers import transformer_z_image as stock

    return (
        type(m) is stock.ZImageTransformerBlock
        and type(m.feed_forward) is stock.FeedForward
        and all(map(by_root_mean_square, z_image_norms(m)))
    )


def z_image_norms(m: Any) -> list[Any]:
    norms = [m.attention_norm1, m.attention_norm2, m.ffn_norm1, m.ffn_norm2]
    return [*norms, m.attention.norm_q, m.attention.norm_k]


def z_image_block(
    m: Any,
    original: Forward,
    x: Tensor,
    attn_mask: Tensor | None,
    freqs_cis: Tensor | None,
    adaln_input: Tensor | None = None,
    *rest: Any,
    **options: Any,
) -> Tensor:
    """`ZImageTransformerBlock.forward`."""
    from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor

    passed_by = [*z_image_norms(m), m.attention, m.feed_forward]
    gains: Sequence[Tensor | None] = [None] * 4
    if m.modulation and adaln_input is not None:
        gains = m.adaLN_modulation(adaln_input).unsqueeze(1).chunk(4, dim=2)
    other = unknown(rest, options) or freqs_cis is None or m.modulation != (adaln_input is not None)
    if (
        other
        or not are_their_own(passed_by, m.attention, ZSingleStreamAttnProcessor)
        or trained(*gains)
        or x.dtype != m.attention_norm1.weight.dtype
    ):
        return original(x, attn_mask, freqs_cis, adaln_input, *rest, **options)
    assert freqs_cis is not None
    of_attention, of_mlp = (None if g is None else 1 + g for g in gains[::2])
    gates = [None if g is None else g.tanh() for g in gains[1::2]]
    parts = torch.view_as_real(freqs_cis)
    y, x = normed(m.attention_norm1, x, of_attention)
    y = z_image_attention(m.attention, y, attn_mask, (parts[..., 0], parts[..., 1]))
    x, _ = normed(m.attention_norm2, y, gates[0], x)
    y, x = normed(m.ffn_norm1, x, of_mlp)
    y = m.feed_forward.w2(rows.swiglu(m.feed_forward.w1(y), m.feed_forward.w3(y)))
    return normed(m.ffn_norm2, y, gates[1], x)[0]


def trained(*given: Tensor | None) -> bool:
    """Whether somebody asks for the gradient of one: the kernels give it none."""
    return any(x is not None and x.requires_grad for x in given)


def normed(
    norm: Any, x: Tensor, gain: Tensor | None, skip: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return rows.rms_norm(x, norm.weight, eps_of(norm, x.dtype), gain, skip)


def z_image_attention(m: Any, x: Tensor, mask: Tensor | None, angles: Angles) -> Tensor:
    """`ZSingleStreamAttnProcessor`."""
    width = m.to_q.out_features // m.heads
    query = turned(m.norm_q, m.to_q(x), width, angles)
    key = turned(m.norm_k, m.to_k(x), width, angles)
    value = m.to_v(x).unflatten(-1, (m.heads, -1))
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None, :]
    y = attended(m, query, key, value, mask)
    for layer in m.to_out:
        y = layer(y)
    return y


def knows_flux2(m: Any) -> bool:
    from diffusers.models.transformers import transformer_flux2 as stock

    kinds = (stock.Flux2SingleTransformerBlock, stock.Flux2TransformerBlock)
    layers, norms = flux2_norms(m)
    return (
        type(m) in kinds
        and all(type(x) in (stock.Flux2FeedForward, stock.Flux2SwiGLU) for x in flux2_gated(m))
        and all(map(plainly_normed, layers))
        and all(map(by_root_mean_square, norms))
    )


def flux2_norms(m: Any) -> tuple[list[Any], list[Any]]:
    """Of tokens, and of queries and keys."""
    attn = m.attn
    if hasattr(m, "norm"):
        return [m.norm], [attn.norm_q, attn.norm_k]
    layers = [m.norm1, m.norm1_context, m.norm2, m.norm2_context]
    return layers, [attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k]


def flux2_gated(m: Any) -> list[Any]:
    """Its MLPs, and their activations."""
    if hasattr(m, "norm"):
        return [m.attn.mlp_act_fn]
    return [m.ff, m.ff.act_fn, m.ff_context, m.ff_context.act_fn]


def flux2_passed_by(m: Any) -> list[Any]:
    layers, norms = flux2_norms(m)
    return [*layers, *norms, *flux2_gated(m), m.attn]


def flux2_single(
    m: Any,
    original: Forward,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    temb_mod: Tensor,
    image_rotary_emb: Angles | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    split_hidden_states: bool = False,
    text_seq_len: int | None = None,
) -> Any:
    """`Flux2SingleTransformerBlock.forward`."""
    from diffusers.models.transformers import transformer_flux2 as stock

    attn, x = m.attn, hidden_states
    if (
        image_rotary_emb is None
        or joint_attention_kwargs
        or encoder_hidden_states is not None
        or split_hidden_states
        or not are_their_own(flux2_passed_by(m), attn, stock.Flux2ParallelSelfAttnProcessor)
        or not computed(x, attn.norm_q, temb_mod)
    ):
        return original(
            hidden_states, encoder_hidden_states, temb_mod, image_rotary_emb,
            joint_attention_kwargs, split_hidden_states, text_seq_len,
        )  # fmt: skip
    ((shift, scale, gate),) = stock.Flux2Modulation.split(temb_mod, 1)
    y, x = rows.layer_norm(x, m.norm.eps, 1 + scale, shift)
    inner = attn.inner_dim
    gated = attn.mlp_hidden_dim * attn.mlp_mult_factor
    q, k, v, y = attn.to_qkv_mlp_proj(y).split([inner, inner, inner, gated], -1)
    angles = angles_of(image_rotary_emb, x.device)
    q, k = (turned(n, z, attn.head_dim, angles) for n, z in ((attn.norm_q, q), (attn.norm_k, k)))
    seen = attended(attn, q, k, v.unflatten(-1, (-1, attn.head_dim)), None)
    y = attn.to_out(torch.cat([seen, rows.swiglu(y)], -1))
    return rows.gated(y, gate, x)


def computed(x: Tensor, norm: Any, *modulation: Tensor) -> bool:
    """Whether the kernels can: diffusers cuts fp16 off at its ends, and they do not."""
    usual = x.dtype != torch.float16 and x.dtype == norm.weight.dtype
    return usual and not trained(*modulation)


def angles_of(rotary: Angles, device: torch.device) -> Angles:
    """cos and sin (tokens, width), each value twice -> (1, tokens, width / 2) each."""
    cos, sin = (x.to(device)[None, :, ::2] for x in rotary)
    return cos, sin


def flux2_double(
    m: Any,
    original: Forward,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb_mod_img: Tensor,
    temb_mod_txt: Tensor,
    image_rotary_emb: Angles | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """`Flux2TransformerBlock.forward`."""
    from diffusers.models.transformers import transformer_flux2 as stock

    if (
        image_rotary_emb is None
        or joint_attention_kwargs
        or not are_their_own(flux2_passed_by(m), m.attn, stock.Flux2AttnProcessor)
        or not computed(hidden_states, m.attn.norm_q, temb_mod_img, temb_mod_txt)
    ):
        return original(  # type: ignore[no-any-return]
            hidden_states, encoder_hidden_states, temb_mod_img, temb_mod_txt, image_rotary_emb,
            joint_attention_kwargs,
        )  # fmt: skip
    of_image, of_text = (stock.Flux2Modulation.split(x, 2) for x in (temb_mod_img, temb_mod_txt))
    (shift, scale, gate), (text_shift, text_scale, text_gate) = of_image[0], of_text[0]
    y, x = rows.layer_norm(hidden_states, m.norm1.eps, 1 + scale, shift)
    z, text = rows.layer_norm(
        encoder_hidden_states, m.norm1_context.eps, 1 + text_scale, text_shift
    )
    y, z = flux2_attention(m.attn, y, z, angles_of(image_rotary_emb, x.device))
    x, text = rows.gated(y, gate, x), rows.gated(z, text_gate, text)
    x = flux2_mlp(m.norm2, m.ff, x, of_image[1])
    return flux2_mlp(m.norm2_context, m.ff_context, text, of_text[1]), x


def flux2_mlp(norm: Any, ff: Any, x: Tensor, modulation: Sequence[Tensor]) -> Tensor:
    shift, scale, gate = modulation
    y, x = rows.layer_norm(x, norm.eps, 1 + scale, shift)
    return rows.gated(ff.linear_out(rows.swiglu(ff.linear_in(y))), gate, x)


def flux2_attention(attn: Any, x: Tensor, text: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
    """`Flux2AttnProcessor`: the text's tokens come first."""
    width, first = attn.head_dim, text.shape[1]
    cos, sin = angles
    of_text, of_image = (cos[:, :first], sin[:, :first]), (cos[:, first:], sin[:, first:])

    def both(text_norm: Any, of: Tensor, norm: Any, image: Tensor) -> Tensor:
        parts = turned(text_norm, of, width, of_text), turned(norm, image, width, of_image)
        return torch.cat(parts, 1)

    query = both(attn.norm_added_q, attn.add_q_proj(text), attn.norm_q, attn.to_q(x))
    key = both(attn.norm_added_k, attn.add_k_proj(text), attn.norm_k, attn.to_k(x))
    value = torch.cat([attn.add_v_proj(text), attn.to_v(x)], 1).unflatten(-1, (-1, width))
    seen = attended(attn, query, key, value, None)
    y = seen[:, first:]
    for layer in attn.to_out:
        y = layer(y)
    return y, attn.to_add_out(seen[:, :first])


BLOCKS: dict[str, tuple[Callable[[Any], bool], Forward]] = {
    "ZImageTransformerBlock": (knows_z_image, z_image_block),
    "Flux2SingleTransformerBlock": (knows_flux2, flux2_single),
    "Flux2TransformerBlock": (knows_flux2, flux2_double),
}
