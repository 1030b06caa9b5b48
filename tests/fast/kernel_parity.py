"""Each kernel of the fused step against torch, and a step of the UNet against itself unfused.

Run by `test_fused.py` in a process of its own: where there is no GPU, TRITON_INTERPRET=1 has to be
set before triton is imported.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steps import make

from dreamtune.fast import fuse, ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, device=DEVICE)


def picture(*shape: int) -> torch.Tensor:
    return (randn(*shape) * 2 + 1).contiguous(memory_format=torch.channels_last)


def assert_same(
    ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...], inputs: list[torch.Tensor]
) -> None:
    """Values, and gradients of the inputs for random gradients of the outputs."""
    outs = [torch.randn_like(x) for x in theirs]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    grads = [torch.autograd.grad(x, inputs, outs) for x in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shape=st.sampled_from([(1, 4, 2, 3, 5), (2, 8, 2, 8, 8), (3, 32, 10, 4, 3), (1, 16, 60, 2, 2)]),
    silu=st.booleans(),
    add=st.booleans(),
    seed=st.integers(0, 99),
)
def test_group_norm(shape: tuple[int, ...], silu: bool, add: bool, seed: int) -> None:
    torch.manual_seed(seed)
    n, groups, each, height, width = shape
    channels = groups * each
    x = picture(n, channels, height, width).requires_grad_()
    weight, bias = randn(2, channels)
    more = randn(n, channels) if add else None
    given_x = x if more is None else x + more[:, :, None, None]
    y = F.group_norm(given_x, groups, weight, bias, 1e-5)
    ours = ops.group_norm(x, weight, bias, groups, 1e-5, silu, more)
    assert_same(ours, (F.silu(y) if silu else y, x + 0), [x])


@pytest.mark.parametrize("width", [24, 320, 1280])
@pytest.mark.parametrize("sum_up", [True, False])
def test_layer_norm(width: int, sum_up: bool) -> None:
    x, more = (randn(2, 7, width).requires_grad_() for _ in range(2))
    weight, bias = randn(2, width)
    total = x + more if sum_up else x + 0
    theirs = F.layer_norm(total, (width,), weight, bias, 1e-5), total
    ours = ops.layer_norm(x, weight, bias, 1e-5, more if sum_up else None)
    assert_same(ours, theirs, [x, more] if sum_up else [x])


def test_norms_of_small_values() -> None:
    """Of a variance near eps: an eps rounded to float32 would show at 1e-9."""
    x = (picture(2, 8, 4, 4) * 1e-2).requires_grad_()
    weight, bias = randn(2, 8)
    theirs = F.group_norm(x, 4, weight, bias, 1e-5)
    assert_same(ops.group_norm(x, weight, bias, 4, 1e-5), (theirs, x + 0), [x])
    rows = (randn(2, 7, 24) * 1e-2).requires_grad_()
    weight, bias = randn(2, 24)
    theirs = F.layer_norm(rows, (24,), weight, bias, 1e-5)
    assert_same(ops.layer_norm(rows, weight, bias, 1e-5), (theirs, rows + 0), [rows])


def test_geglu_and_sums() -> None:
    x = randn(2, 9, 2 * 40).requires_grad_()
    a, b = x.chunk(2, -1)
    assert_same((ops.geglu(x),), (a * F.gelu(b),), [x])
    p, q, bias = picture(2, 24, 3, 5), picture(2, 24, 3, 5), randn(24)
    p, q = p.requires_grad_(), q.requires_grad_()
    assert_same((ops.add_bias(p, q, bias),), (p + q + bias[:, None, None],), [p, q])


def test_a_fused_step_is_the_step() -> None:
    """Loss and parameters after a step of two slots, in float64."""
    small = {"train_batch_size": 1}  # the interpreter's time goes with the pictures
    plain_adapter, plain = make("delora", [0, 1], device=DEVICE, **small)
    adapter, step = make("delora", [0, 1], device=DEVICE, **small)
    before = adapter.state_dict(0)
    done = fuse.fuse(adapter.model)
    assert not done.left and len(done.modules) > 10
    plain(0, 1.0)
    step(0, 1.0)
    torch.testing.assert_close(step.loss, plain.loss, rtol=1e-12, atol=0)
    for slot in (0, 1):
        ours, theirs = adapter.state_dict(slot), plain_adapter.state_dict(slot)
        # Rounding leaves some 2e-14 (so does a weight moved by its last bit); an eps of the norms
        # that is off by float32's rounding, 1e-11.
        assert max((ours[n] - theirs[n]).abs().max().item() for n in ours) < 1e-12
    moved = adapter.state_dict(0)
    assert max((before[n] - moved[n]).abs().max().item() for n in before) > 1e-4
    done.undo()
    assert not any("forward" in m.__dict__ for m in adapter.model.modules())
