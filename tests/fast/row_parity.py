"""Each kernel of a fused transformer against torch, and whole transformers against themselves
unfused. Run by `test_fused.py` in a process of its own, as `kernel_parity.py` is.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_parity import DEVICE, assert_same, randn
from tiny_transformers import output, tiny
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import dreamtune
from dreamtune.fast import rows
from dreamtune.fast.fuse import fuse

FEW = settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
BATCHES = st.sampled_from([1, 2])
WIDTHS = st.sampled_from([6, 24, 320])


@FEW
@given(n=BATCHES, width=WIDTHS, shared=st.booleans(), sum_up=st.booleans(), seed=st.integers(0, 99))
def test_rms_norm(n: int, width: int, shared: bool, sum_up: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x, skip = (randn(n, 7, width).requires_grad_() for _ in range(2))
    weight, gain = randn(width), randn(1 if shared else n, 1, 2 * width).chunk(2, -1)[1]
    y = F.rms_norm(x, (width,), weight, 1e-5) * gain
    if not sum_up:
        assert_same(rows.rms_norm(x, weight, 1e-5, gain), (y, x + 0), [x])
        bare = F.rms_norm(x, (width,), weight, 1e-5)
        return assert_same(rows.rms_norm(x, weight, 1e-5), (bare, x + 0), [x])
    ours = rows.rms_norm(x, weight, 1e-5, gain, skip)
    assert_same(ours, (y + skip, x + 0), [x, skip])


@FEW
@given(n=BATCHES, width=WIDTHS, shared=st.booleans(), seed=st.integers(0, 99))
def test_layer_norm_and_gated_sum(n: int, width: int, shared: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x, skip = (randn(n, 7, width).requires_grad_() for _ in range(2))
    shift, gain, gate = randn(1 if shared else n, 1, 3 * width).chunk(3, -1)
    y = F.layer_norm(x, (width,), None, None, 1e-6) * gain + shift
    assert_same(rows.layer_norm(x, 1e-6, gain, shift), (y, x + 0), [x])
    assert_same((rows.gated(x, gate, skip),), (gate * x + skip,), [x, skip])


@pytest.mark.parametrize("n", [1, 2])
def test_swiglu(n: int) -> None:
    """Of two tensors, of the halves of one, and of a part of a wider one."""
    torch.manual_seed(0)
    a, b = (randn(n, 7, 40).requires_grad_() for _ in range(2))
    assert_same((rows.swiglu(a, b),), (F.silu(a) * b,), [a, b])
    wide = randn(n, 7, 100).requires_grad_()
    halves = wide[..., 20:].chunk(2, -1)
    assert_same((rows.swiglu(wide[..., 20:]),), (F.silu(halves[0]) * halves[1],), [wide])
    turned = randn(1, n, 40).requires_grad_()  # of one token, whose step is that of no batch
    a, b = turned.transpose(0, 1).chunk(2, -1)
    assert_same((rows.swiglu(turned.transpose(0, 1)),), (F.silu(a) * b,), [turned])


@FEW
@given(
    n=BATCHES, half=st.sampled_from([3, 4, 32]), shared=st.booleans(), part=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_rotated(n: int, half: int, shared: bool, part: bool, seed: int) -> None:
    """As a product of complex numbers; of a tensor of its own, and of a part of a wider one."""
    torch.manual_seed(seed)
    length, heads, width = 5, 3, 2 * half
    wide = randn(n, length, 2 * heads * width).requires_grad_()
    x = wide[..., heads * width :] if part else wide[..., : heads * width].contiguous()
    x, weight = x.unflatten(-1, (heads, width)), randn(width)
    angles = torch.polar(randn(1 if shared else n, length, half).abs(), randn(length, half))
    tables = torch.view_as_real(angles)
    pairs = F.rms_norm(x, (width,), weight, 1e-6).unflatten(-1, (half, 2))
    theirs = torch.view_as_complex(pairs) * angles[:, :, None]
    theirs = torch.view_as_real(theirs).flatten(3)
    ours = rows.rotated(x, weight, tables[..., 0], tables[..., 1], 1e-6)
    assert_same((ours,), (theirs,), [wide])


def test_angles_that_are_not() -> None:
    x, angles = randn(2, 5, 3, 8), randn(1, 5, 4)
    with pytest.raises(ValueError, match=r"must be \(1 or 2, 5, 4\) at steps of \(8, 2\), got"):
        rows.rotated(x, randn(8), angles, angles, 1e-6)


def forbidden(*given: Any, **named: Any) -> Any:
    raise AssertionError("a block runs as diffusers wrote it")


def half(x: Tensor) -> Tensor:
    return x * 0.5


def halved(forward: Any, *given: Any, **named: Any) -> Any:
    return tree_map(half, forward(*given, **named))


KINDS = ["Flux2Transformer2DModel", "ZImageTransformer2DModel"]
called = output.__wrapped__  # type: ignore[attr-defined] # with gradients


def on_device(kind: str) -> nn.Module:
    """Frozen; what it is called with follows it there."""

    def moved(_: nn.Module, *given: Any) -> Any:
        return tree_map(lambda x: x.to(DEVICE) if torch.is_tensor(x) else x, given)

    model = tiny(kind).to(DEVICE).requires_grad_(False)
    model.register_forward_pre_hook(moved, with_kwargs=True)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_transformer_is_the_transformer(kind: str) -> None:
    """Output and gradients of an adapter; each block is fused, and undone."""
    found: list[list[Tensor]] = []
    for fused in (False, True):
        model = on_device(kind)
        done = fuse(model) if fused else None
        if done is not None:
            for block in done.modules:  # nothing falls back
                own: Any = block.forward
                block.forward = partial(own.func, own.args[0], forbidden)  # type: ignore[method-assign]
        adapter = dreamtune.inject(model, "lora", rank=2, seed=0)
        torch.manual_seed(1)
        for p in adapter.parameters():
            torch.nn.init.normal_(p, std=0.2)
        y = called(model)
        found.append([y, *torch.autograd.grad(y.square().sum(), list(adapter.parameters()))])
        if done is not None:
            blocks = [m for m in model.modules() if type(m).__name__.endswith("TransformerBlock")]
            assert done.modules == blocks and not done.left
            done.undo()
            torch.testing.assert_close(output(model), found[0][0], rtol=1e-5, atol=1e-5)
    assert found[0][0].std() > 1e-2 and all(x.abs().max() > 1e-4 for x in found[0][1:])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_prompts_of_other_lengths(dtype: torch.dtype, tolerance: float) -> None:
    """Pictures and prompts of a batch filled up, with a mask; in bf16 to its own rounding."""
    g, found = torch.Generator().manual_seed(3), []
    pictures = [torch.randn(4, 1, *size, generator=g).to(dtype) for size in ((4, 4), (16, 12))]
    prompts = [torch.randn(n, 12, generator=g).to(dtype) for n in (5, 40)]
    for fused in (False, True):
        model = tiny(KINDS[1], axes_lens=[128, 16, 16]).to(DEVICE, dtype).requires_grad_(False)
        if fused:
            fuse(model)
        with torch.no_grad():
            given = tree_map(lambda x: x.to(DEVICE), (pictures, torch.tensor([0.3, 0.8]), prompts))
            out = model(*given, return_dict=False)[0]
        found.append(torch.cat([x.flatten() for x in out]))
    scale = found[0].abs().max().item()
    torch.testing.assert_close(*found, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_trained_modulation(kind: str) -> None:
    """Such blocks run as diffusers wrote them: what they do is in the output."""
    model = on_device(kind)
    fuse(model)
    before = output(model)
    target = "*modulation*" if kind.startswith("Z") else "*_modulation*.linear"
    adapter = dreamtune.inject(model, "lora", rank=2, target_modules=[target])
    for p in adapter.parameters():
        torch.nn.init.normal_(p, std=0.5)
    y = called(model)
    assert (y - before).abs().max() > 1e-3
    grads = torch.autograd.grad(y.sum(), list(adapter.parameters()))
    assert all(g.abs().max() > 0 for g in grads)


PASSED_BY = {
    KINDS[0]: ["attn", "norm", "norm1", "norm2_context", "norm_q", "norm_added_k", "ff", "act_fn",
               "mlp_act_fn"],
    KINDS[1]: ["attention", "attention_norm1", "ffn_norm2", "norm_k", "feed_forward"],
}  # fmt: skip


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize(("kind", "name"), [(k, name) for k in KINDS for name in PASSED_BY[k]])
def test_what_somebody_changes_inside_is_in_the_output(
    kind: str, name: str, replaced: bool
) -> None:
    """A hook, or a forward of its own, of a module that a fused block does not call."""
    found = []
    for fused in (False, True):
        model = on_device(kind)
        before = output(model)
        if fused:
            fuse(model)
        for path, module in model.named_modules():
            if path.rpartition(".")[2] == name:
                own = module.forward
                if replaced:
                    module.forward = partial(halved, own)  # type: ignore[method-assign]
                else:
                    module.register_forward_hook(lambda m, given, out: tree_map(half, out))
        found.append(output(model))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert (found[0] - before).abs().max() > 1e-5
