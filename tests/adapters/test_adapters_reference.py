"""Parity with dense formulas written naively, and with PEFT where it has the method.

Known deviations from the released code: ETHER with blocks on the input side is the block-diagonal
product here (theirs splits rows); DeLoRA's zero rows give zero, not NaN.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import make
from tiny import disturb
from torch import nn

from dreamtune import METHODS


def reflection(u):
    u = u / u.norm()
    return torch.eye(len(u), dtype=u.dtype) - 2 * torch.outer(u, u)


def opposed(u, v):
    u, v = u / u.norm(), v / v.norm()
    return torch.eye(len(u), dtype=u.dtype) - torch.outer(u, u) + torch.outer(v, v)


def dense_lora(p, weight, options):
    return weight + options["alpha"] / options["rank"] * p["B"] @ p["A"]


def dense_delora(p, weight, options):
    def product(a, b):
        total = torch.zeros_like(weight)
        for i in range(options["rank"]):
            total += torch.outer(b[:, i] / b[:, i].norm(), a[i] / a[i].norm())
        return total

    change = product(p["A"], p["B"])
    if options["start"] == "residual":
        change -= product(p["A0"], p["B0"])
    return weight + p["lambda_"] / options["rank"] * change * weight.norm(dim=0)


def dense_ether(p, weight, options):
    h = torch.block_diag(*(reflection(u) for u in p["u"]))
    return weight @ h if options["side"] == "input" else h @ weight


def dense_ether_plus(p, weight, options):
    h = torch.block_diag(*(opposed(u, v) for u, v in zip(p["u"], p["v"])))
    if options["sides"] == 1:
        return h @ weight
    return h @ weight @ torch.block_diag(*(opposed(u, v) for u, v in zip(p["u_in"], p["v_in"])))


DENSE = {
    "lora": (dense_lora, [{"rank": 3}, {"rank": 2, "alpha": 8}]),
    "delora": (dense_delora, [{}, {"rank": 3}, {"rank": 5, "start": "peft"}]),
    "ether": (
        dense_ether,
        [{"blocks": n, "side": side} for n in (1, 2, 4) for side in ("input", "output")],
    ),
    "ether+": (
        dense_ether_plus,
        [{"blocks": n, "sides": sides} for n in (1, 2, 4) for sides in (1, 2)],
    ),
}


@pytest.mark.parametrize(
    "method,options", [(name, options) for name, (_, many) in DENSE.items() for options in many]
)
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (20, 20)])
def test_dense_reference(method, options, shape):
    adapter, weight = make(method, options, shape, slots=2)
    disturb(adapter)
    for slot in range(2):
        parameters = {k: v[slot] for k, v in adapter.state_dict().items()}
        expected = DENSE[method][0](parameters, weight, adapter.options)
        torch.testing.assert_close(adapter.merged(weight)[slot], expected, rtol=0, atol=1e-12)


def test_every_method_here_has_a_reference():
    assert set(DENSE) == set(METHODS)


def test_ether_is_orthogonal_at_its_distance():
    adapter, _ = make("ether", {"blocks": 4}, (16, 16))
    eye = torch.eye(16, dtype=torch.float64)
    h = adapter.merged(eye)[0].detach()
    torch.testing.assert_close(h @ h.T, eye)
    assert float((h - eye).norm()) == pytest.approx(2 * 4**0.5)


@pytest.mark.parametrize("sides", [1, 2])
def test_ether_plus_bound(sides):
    adapter, _ = make("ether+", {"blocks": 4, "sides": 1}, (16, 16))
    disturb(adapter, size=5)
    eye = torch.eye(16, dtype=torch.float64)
    assert float((adapter.merged(eye)[0].detach() - eye).norm()) <= (2 * 4) ** 0.5 + 1e-9


@pytest.mark.parametrize("start,times", [("residual", 2), ("peft", 1)])
def test_delora_bound(start, times):
    adapter, weight = make("delora", {"rank": 3, "start": start, "lambda_init": 0.7}, (24, 16))
    disturb(adapter, size=5)
    with torch.no_grad():
        adapter.lambda_.fill_(0.7)
    change = adapter.merged(weight)[0].detach() - weight
    assert float(change.norm()) <= times * 0.7 * float(weight.norm(dim=0).max()) + 1e-9


@settings(max_examples=60, deadline=None)
@given(
    start=st.sampled_from(["residual", "peft"]),
    rank=st.integers(1, 6),
    out=st.integers(1, 12),
    width=st.integers(1, 12),
    strength=st.floats(-20, 20),
    seed=st.integers(0, 2**32 - 1),
)
def test_delora_bound_over_parameters(start, rank, out, width, strength, seed):
    """Columns of very different norm; parameters of any size; lambda of either sign."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=g, dtype=torch.float64)
    weight *= torch.randn(width, generator=g, dtype=torch.float64).mul(3).exp()
    adapter = METHODS["delora"](weight, generator=g, rank=rank, start=start)
    with torch.no_grad():
        for p in (adapter.A, adapter.B):
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype).mul(3).sinh())
        adapter.lambda_.fill_(strength)
        change = float((adapter.merged(weight)[0] - weight).norm())
    bound = (2 if start == "residual" else 1) * abs(strength) * float(weight.norm(dim=0).max())
    assert change <= bound * (1 + 1e-9) + 1e-9 * float(weight.norm())


@pytest.mark.parametrize("start,times", [("residual", 2), ("peft", 1)])
def test_delora_bound_is_reached(start, times):
    """All directions at the largest column, turned round: of W's norm it can be far more than
    `2 lambda / sqrt(in)`, which holds for columns of one norm."""
    for large, part in ((1.0, 16**-0.5), (100.0, 100 / (15 + 100**2) ** 0.5)):
        weight = torch.eye(16, dtype=torch.float64)
        weight[3, 3] = large
        adapter = METHODS["delora"](weight, rank=4, start=start, lambda_init=0.5)
        with torch.no_grad():
            adapter.A.copy_(weight[3].expand_as(adapter.A))
            adapter.B.copy_(torch.eye(16, 1).expand_as(adapter.B))
            if start == "residual":
                adapter.A0.copy_(adapter.A)
                adapter.B0.copy_(-adapter.B)
            change = adapter.merged(weight)[0] - weight
        assert float(change.norm()) == pytest.approx(times * 0.5 * large)
        assert float(change.norm() / weight.norm()) == pytest.approx(times * 0.5 * part)


@pytest.mark.parametrize("start,times", [("residual", 2**0.5), ("peft", 1)])
def test_delora_change_of_random_directions(start, times):
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    adapter = METHODS["delora"](weight, rank=16, start=start)
    for seed, p in enumerate((adapter.A, adapter.B)):
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(seed))
    part = float((adapter.merged(weight)[0].detach() - weight).norm() / weight.norm())
    assert part == pytest.approx(times * 4 / (16 * 256) ** 0.5, rel=0.05)


@pytest.mark.parametrize("dtype,limit", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("method", ["delora", "ether+"])
def test_small_changes_survive_the_compute_dtype(method, dtype, limit):
    """Near the start the change is small beside the products that it is the difference of."""
    adapter, weight = make(method, {}, (160, 128), dtype=torch.float32)
    disturb(adapter, size=1e-4)
    up, down = (x[0].detach().double() for x in adapter.factors(weight))
    cast = up.to(dtype).double() @ down.to(dtype).double()
    assert float((cast - up @ down).norm() / (up @ down).norm()) < limit


# PEFT


class Holder(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.to_q = nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(weight.dtype)
        self.to_q.weight = nn.Parameter(weight.clone())

    def forward(self, x):
        return self.to_q(x)


def peft_output(config, weight, parameters, x):
    """The output of PEFT's layer with the given parameters."""
    from peft import inject_adapter_in_model

    model = inject_adapter_in_model(config, Holder(weight)).double()
    layer = model.to_q
    with torch.no_grad():
        for name, value in parameters.items():
            holder = getattr(layer, name)["default"]
            target = holder.weight if isinstance(holder, nn.Module) else holder
            assert target.shape == value.shape
            target.copy_(value)
        return model(x)


@pytest.mark.parametrize("alpha", [None, 12])
def test_lora_is_peft_lora(alpha):
    from peft import LoraConfig

    adapter, weight = make("lora", {"rank": 6, "alpha": alpha})
    disturb(adapter)
    x = torch.randn(5, weight.shape[1], dtype=torch.float64)
    config = LoraConfig(r=6, lora_alpha=alpha or 6, target_modules=["to_q"])
    theirs = peft_output(config, weight, {"lora_A": adapter.A[0], "lora_B": adapter.B[0]}, x)
    torch.testing.assert_close(x @ adapter.merged(weight)[0].T, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("start", ["peft", "residual"])
def test_delora_is_peft_delora(start):
    """The residual form is PEFT's of rank 2r: lambda' = 2 lambda, A' = [A; A0], B' = [B, -B0]."""
    from peft import DeloraConfig

    rank = 4
    adapter, weight = make("delora", {"rank": rank, "start": start, "lambda_init": 3.0})
    disturb(adapter)
    a, b, strength = adapter.A[0], adapter.B[0], adapter.lambda_[0]
    if start == "residual":
        a, b = torch.cat([a, adapter.A0[0]]), torch.cat([b, -adapter.B0[0]], 1)
        strength, rank = 2 * strength, 2 * rank
    x = torch.randn(5, weight.shape[1], dtype=torch.float64)
    config = DeloraConfig(r=rank, delora_lambda=1, target_modules=["to_q"])
    parameters = {"delora_A": a, "delora_B": b, "delora_lambda": strength}
    theirs = peft_output(config, weight, parameters, x)
    torch.testing.assert_close(x @ adapter.merged(weight)[0].T, theirs, rtol=0, atol=1e-10)


def test_delora_first_step_follows_the_learning_rate():
    """PEFT's start jumps to the boundary at any rate; the residual start moves with the rate."""

    def moved(start, rate):
        options = {"rank": 16, "start": start, "lambda_init": 15.0}
        adapter, weight = make("delora", options, (64, 64), dtype=torch.float32)
        optimizer = torch.optim.Adam(adapter.parameters(), lr=rate)
        g = torch.Generator().manual_seed(1)
        (adapter.merged(weight)[0] * torch.randn(64, 64, generator=g)).sum().backward()
        optimizer.step()
        with torch.no_grad():
            return float((adapter.merged(weight)[0] - weight).norm() / weight.norm())

    assert moved("peft", 1e-2) / moved("peft", 1e-4) < 1.1
    assert moved("residual", 1e-2) / moved("residual", 1e-4) > 50
    assert moved("residual", 1e-4) < 1e-2 * moved("peft", 1e-4)


def test_delora_exposes_its_own_rate_for_lambda():
    assert METHODS["delora"].own_learning_rates == {"lambda_": 1e-3}
    assert METHODS["delora"].no_decay == {"lambda_"}
