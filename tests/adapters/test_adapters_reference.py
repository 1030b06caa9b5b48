"""Parity with dense formulas written naively; what each method promises of its change.

Known deviations from the released code: ETHER with blocks on the input side is the block-diagonal
product here (theirs splits rows); DeLoRA's zero rows give zero, not NaN.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import make
from tiny import disturb

from dreamtune import METHODS


def reflection(u):
    u = u / u.norm()
    return torch.eye(len(u), dtype=u.dtype) - 2 * torch.outer(u, u)


def opposed(u, v):
    u, v = u / u.norm(), v / v.norm()
    return torch.eye(len(u), dtype=u.dtype) - torch.outer(u, u) + torch.outer(v, v)


def lora_scale(options):
    return options["alpha"] / options["rank"] ** (0.5 if options.get("use_rslora") else 1)


def dense_lora(p, weight, options):
    return weight + lora_scale(options) * p["B"] @ p["A"]


def dense_dora(p, weight, options):
    v = dense_lora(p, weight, options)
    return p["magnitude"][:, None] * v / v.norm(dim=1, keepdim=True)


def dense_delora(p, weight, options):
    def product(a, b):
        total = torch.zeros(b.shape[0], a.shape[1], dtype=a.dtype)
        for i in range(options["rank"]):
            if options["normalize"]:
                total += torch.outer(b[:, i] / b[:, i].norm(), a[i] / a[i].norm())
            else:
                total += torch.outer(b[:, i], a[i])
        return total

    change = product(p["A"], p["B"])
    if options["start"] == "residual":
        change -= product(p["A0"], p["B0"])
    change *= p["lambda_"] / options["rank"]
    if options["multiplicative"]:
        return weight @ (torch.eye(weight.shape[1], dtype=weight.dtype) + change)
    return weight + (change * weight.norm(dim=0) if options["weight_scaling"] else change)


def dense_ether(p, weight, options):
    h = torch.block_diag(*(reflection(u) for u in p["u"]))
    return weight @ h if options["side"] == "input" else h @ weight


def dense_ether_plus(p, weight, options):
    h = torch.block_diag(*(opposed(u, v) for u, v in zip(p["u"], p["v"])))
    if options["sides"] == 1:
        return h @ weight
    return h @ weight @ torch.block_diag(*(opposed(u, v) for u, v in zip(p["u_in"], p["v_in"])))


def dense_hra(p, weight, options):
    for u in p["u"]:
        weight = weight @ reflection(u)
    return weight


def dense_oft(p, weight, options):
    size = weight.shape[1] // options["blocks"]
    blocks = []
    for values in p["q"]:
        q = torch.zeros(size, size, dtype=weight.dtype)
        q[tuple(torch.triu_indices(size, size, 1))] = values
        q = q - q.T
        eye = torch.eye(size, dtype=weight.dtype)
        if options["exact"]:
            blocks.append((eye + q) @ torch.linalg.inv(eye - q))
        else:
            powers = [torch.linalg.matrix_power(q, k) for k in range(options["terms"])]
            blocks.append(powers[0] + 2 * sum(powers[1:-1], 0 * q) + powers[-1])
    return weight @ torch.block_diag(*blocks).T


def dense_deft(p, weight, options):
    def pair(matrix):
        if options["projection"] == "relu":
            return matrix, matrix.clamp_min(0)
        q, r = torch.linalg.qr(matrix)
        return (q * r.diagonal().sign(),) * 2

    (q, projection), (_, first) = pair(p["P"]), pair(p["P0"])
    scale = 1 if options["alpha"] is None else options["alpha"] / options["rank"]
    contents = first.T @ weight / scale + p["R"]  # the paper's R
    return weight - q @ projection.T @ weight + scale * q @ contents


def dense_norm_bounded(p, weight, options):
    """The Cayley map as the first columns of the whole orthogonal matrix."""
    free = torch.cat([p["P"], p["Q"]])
    (size, rank), out = free.shape, weight.shape[0]
    skew = torch.zeros(rank + size, rank + size, dtype=free.dtype)
    skew[rank:, :rank], skew[:rank, rank:] = free, -free.T
    eye = torch.eye(rank + size, dtype=free.dtype)
    both = ((eye - skew) @ torch.linalg.inv(eye + skew))[rank:, :rank]
    return weight + 2 * options["delta"] * both[:out] @ both[out:].T


DENSE = {
    "lora": (dense_lora, [{"rank": 3}, {"rank": 2, "alpha": 8}, {"rank": 4, "use_rslora": True}]),
    "dora": (dense_dora, [{}, {"rank": 2, "alpha": 8}, {"detach_norm": False}]),
    "delora": (
        dense_delora,
        [
            *({}, {"rank": 3}, {"rank": 5, "start": "peft"}),
            *({"normalize": False}, {"weight_scaling": False}, {"lambda_learning_rate": 0}),
            *({"multiplicative": True, "start": s} for s in ("residual", "peft")),
        ],
    ),
    "hra": (dense_hra, [{"rank": r} for r in (2, 4, 8)]),
    "oft": (dense_oft, [{}, {"blocks": 2}, {"terms": 2}, {"terms": 7}, {"exact": True}]),
    "deft": (dense_deft, [{"rank": 3}, {"rank": 3, "projection": "qr"}, {"rank": 4, "alpha": 2}]),
    "norm_bounded": (dense_norm_bounded, [{"rank": 3}, {"rank": 5, "delta": 0.3}]),
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


@pytest.mark.parametrize("method,options", [("hra", {"rank": 6}), ("oft", {"exact": True})])
def test_orthogonal_methods_keep_the_lengths_of_rows(method, options):
    adapter, weight = make(method, options, (24, 16))
    disturb(adapter, size=2)
    h = adapter.merged(torch.eye(16, dtype=torch.float64))[0].detach()
    torch.testing.assert_close(h @ h.T, torch.eye(16, dtype=torch.float64))
    assert float((h - torch.eye(16)).abs().max()) > 0.1


@pytest.mark.parametrize("terms,least,most", [(3, 1e-4, 1e-2), (5, 1e-7, 1e-4), (9, 1e-12, 1e-8)])
def test_oft_sum_nears_the_inverse(terms, least, most):
    """Cut off after `terms`, it errs by about 2 |Q|^terms."""
    cut, weight = make("oft", {"terms": terms})
    exact, _ = make("oft", {"exact": True})
    for adapter in (cut, exact):
        disturb(adapter, size=0.02)
    error = float((cut.merged(weight) - exact.merged(weight)).detach().abs().max())
    assert least < error < most


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 6),
    out=st.integers(1, 12),
    width=st.integers(1, 12),
    delta=st.floats(1e-3, 10),
    size=st.floats(-6, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_norm_bounded_for_any_parameters(rank, out, width, delta, size, seed):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=g, dtype=torch.float64)
    adapter = METHODS["norm_bounded"](weight, generator=g, rank=rank, delta=delta)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 10**size)
    change = (adapter.merged(weight)[0] - weight).detach()
    assert float(torch.linalg.matrix_norm(change, 2)) <= delta * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("share", [0.1, 0.9, 1.0])
def test_norm_bounded_reaches_every_change(share):
    """Any U S Vᵀ of rank r, its largest singular value up to the bound itself."""
    adapter, weight = make("norm_bounded", {"rank": 4, "delta": 0.7}, (24, 16))
    g = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(n, 4, generator=g).double())[0] for n in (24, 16))
    wanted = 0.7 * share * torch.tensor([1.0, 0.6, 0.3, 0.0], dtype=torch.float64)
    angles = torch.asin((wanted / 0.7).clamp_max(1)) / 2
    with torch.no_grad():  # Y whose YᵀY is I is mapped to -Y
        adapter.P.copy_(-u * angles.cos())
        adapter.Q.copy_(-v * angles.sin())
    change = adapter.merged(weight)[0].detach() - weight
    torch.testing.assert_close(change, u * wanted @ v.T, rtol=0, atol=1e-12)


def test_dora_trains_as_if_the_norms_were_constants():
    """Section 4.3 of the paper, the default; and the whole gradient on request."""
    target = torch.randn(24, 16, dtype=torch.float64)
    for detach in (True, False):
        adapter, weight = make("dora", {"rank": 3, "detach_norm": detach})
        disturb(adapter)
        p = {k: v[0].detach().clone().requires_grad_() for k, v in adapter.state_dict().items()}
        v = weight + p["B"] @ p["A"]
        norms = v.norm(dim=1, keepdim=True)
        naive = p["magnitude"][:, None] * v / (norms.detach() if detach else norms)
        (naive * target).sum().backward()
        (adapter.merged(weight)[0] * target).sum().backward()
        for name, parameter in adapter.named_parameters():
            torch.testing.assert_close(parameter.grad[0], p[name].grad, rtol=0, atol=1e-12)


def test_delora_strength_falls_with_the_timestep():
    adapter, _ = make("delora", {"timestep_floor": 0.25})
    at = adapter.strength_at(torch.tensor([0, 500, 1000]))
    torch.testing.assert_close(at, torch.tensor([1, 0.625, 0.25]))
    assert adapter.asks_for_timestep and not make("delora", {})[0].asks_for_timestep
    assert METHODS["delora"].no_plain_lora({"timestep_floor": 0.25}).endswith("0.25)")
    assert METHODS["delora"].no_plain_lora({"timestep_floor": 1.0}) == ""


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
