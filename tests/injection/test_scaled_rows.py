"""A gain on the fast way: the numbers of the plain one, and what is kept for the backward."""

import pytest
import torch
from kept import bytes_kept

from dreamtune.adapters import METHODS, oft
from dreamtune.injection.change import Factors, Use, combined
from dreamtune.injection.scaled_rows import ScaledRows


@pytest.mark.parametrize("slots", [None, 3])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_low_rank", [True, False])
def test_values_and_gradients_are_those_of_the_plain_form(slots, with_bias, with_low_rank):
    generator = torch.Generator().manual_seed(0)
    leading = () if slots is None else (slots,)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x, weight = draw(6, 5, 8), draw(7, 8)
    bias = draw(7) if with_bias else None
    leaves = [x, draw(*leading, 7)]
    leaves += [draw(*leading, 7, 2), draw(*leading, 2, 8)] if with_low_rank else []
    wanted, got = ([t.clone().requires_grad_() for t in leaves] for _ in range(2))
    x, gain, *pair = wanted
    up, down = pair or (None, None)
    factors = Factors(up=up, down=down, gain=gain)
    plain = combined(x, weight, bias, [(factors, Use(slots or 1))])
    x, gain, *pair = got
    up, down = pair or (None, None)
    rows = x.reshape(*(leading or ()), -1, 8)
    fast = ScaledRows.apply(rows, weight, bias, gain, up, down).view(plain.shape)
    torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12)
    into = draw(*plain.shape)
    plain.backward(into)
    fast.backward(into)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank_only", [True, False])
def test_no_gain_is_the_base_to_the_bit(rank_only):
    x, weight, bias = torch.randn(4, 8), torch.randn(6, 8), torch.randn(6)
    pair = (None, None) if rank_only else (torch.zeros(6, 2), torch.randn(2, 8))
    y = ScaledRows.apply(x, weight, bias, torch.zeros(6), *pair)
    assert torch.equal(y, torch.nn.functional.linear(x, weight, bias))


def test_no_output_is_kept():
    x, weight = torch.randn(1024, 32, requires_grad=True), torch.randn(64, 32)
    gain = torch.randn(64, requires_grad=True)
    held = bytes_kept(lambda: ScaledRows.apply(x, weight, None, gain, None, None))
    assert held == x.nbytes + weight.nbytes + gain.nbytes


@pytest.mark.parametrize("exact", [True, False])
def test_a_rotation_keeps_its_parameters_alone(exact):
    weight = torch.randn(2, 48, 64)
    adapter = METHODS["oft"](weight, exact=exact)
    assert bytes_kept(lambda: adapter.change(weight)) <= adapter.q.nbytes + adapter.above.nbytes


def test_a_rotation_in_parts_is_the_whole(monkeypatch):
    weight = torch.randn(5, 12, 16, dtype=torch.float64)
    adapter = METHODS["oft"](weight, blocks=2)
    torch.nn.init.normal_(adapter.q, std=0.1)
    rotation = adapter.change(weight).rotation
    into = torch.randn_like(rotation)
    (whole,) = torch.autograd.grad(rotation, adapter.q, into)
    monkeypatch.setattr(oft, "AT_ONCE", 2 * adapter.q[0].numel())
    parts = adapter.change(weight).rotation
    assert torch.equal(parts, rotation)
    assert torch.equal(torch.autograd.grad(parts, adapter.q, into)[0], whole)
