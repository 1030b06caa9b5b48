"""The contract of a method, over the registry: whatever registers is tested here."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import make
from tiny import cases, disturb, tiny_unet, unet_inputs
from torch import Tensor, nn

import dreamtune
from dreamtune import METHODS, Adapter, register
from dreamtune.adapters import WeightChange
from dreamtune.adapters.base import _REGISTRY, find_method, resolve_options
from dreamtune.adapters.maths import bf16_parts, block_columns, unit

all_cases = pytest.mark.parametrize("method,options", cases())


def test_the_first_methods_are_registered():
    assert {"delora", "ether", "ether+", "lora"} <= set(METHODS)


@all_cases
def test_class_says_what_it_is(method, options):
    cls = METHODS[method]
    assert cls.name == method and cls.paper.startswith("https://") and cls.learning_rate > 0
    assert isinstance(cls.identity_at_start, bool) and isinstance(cls.depends_on_weight, bool)
    adapter, _ = make(method, options)
    names = dict(adapter.named_parameters())
    assert set(adapter.own_learning_rates) <= set(names) and set(adapter.rate_factors) <= set(names)
    assert cls.no_decay <= set(adapter.state_dict())
    assert resolve_options(cls, options).keys() == adapter.options.keys()
    assert {k: adapter.options[k] for k in options} == options


@all_cases
@settings(max_examples=15, deadline=None)
@given(
    leading=st.lists(st.integers(1, 3), max_size=2),
    slots=st.integers(1, 3),
    out=st.integers(1, 5),
    width=st.integers(1, 5),
)
def test_stacked_is_each_alone(method, options, leading, slots, out, width):
    """Factors of any leading dimensions are those of each layer and slot by itself."""
    adapter, weight = make(method, options, (*leading, 4 * out, 8 * width), slots)
    disturb(adapter)
    merged = adapter.merged(weight)
    assert merged.shape == (*leading, slots, 4 * out, 8 * width)
    state = adapter.state_dict()
    for index in torch.cartesian_prod(*(torch.arange(n) for n in (*leading, slots))).reshape(
        -1, len(leading) + 1
    ):
        *layer, slot = index.tolist()
        one = METHODS[method](weight[tuple(layer)], **options)
        one.load_state_dict({k: v[(*layer, slot)][None] for k, v in state.items()})
        alone = one.merged(weight[tuple(layer)])[0]
        torch.testing.assert_close(merged[(*layer, slot)], alone, rtol=0, atol=1e-12)


@all_cases
def test_merged_is_weight_plus_factors(method, options):
    if not METHODS[method].low_rank:
        pytest.skip("not low rank")
    adapter, weight = make(method, options, (2, 24, 16), slots=3)
    disturb(adapter)
    up, down = adapter.factors(weight)
    assert up.shape[:-1] == (2, 3, 24) and down.shape[:-2] == (2, 3) and down.shape[-1] == 16
    assert up.shape[-1] == down.shape[-2]
    torch.testing.assert_close(adapter.merged(weight), weight.unsqueeze(1) + up @ down)


@all_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_start(method, options, dtype):
    """Exactly the base where the method promises it, factors cast to any dtype."""
    adapter, weight = make(method, options, (3, 24, 16), slots=2, dtype=dtype)
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    change = adapter.merged(weight) - weight.unsqueeze(1).float()
    if METHODS[method].identity_at_start:
        assert torch.count_nonzero(change) == 0
        if METHODS[method].low_rank:
            up, down = (x.to(dtype) for x in adapter.factors(weight))
            assert torch.count_nonzero(up.float() @ down.float()) == 0
    else:
        assert change.abs().max() > 1e-2
    disturb(adapter)
    assert (adapter.merged(weight) - weight.unsqueeze(1).float()).abs().max() > 1e-3


@all_cases
def test_slot_starts_as_alone(method, options):
    both, weight = make(method, options, (3, 24, 16), slots=2)
    for slot in range(2):
        alone = METHODS[method](
            weight, generator=torch.Generator().manual_seed(100 + slot), **options
        )
        for key, value in alone.state_dict().items():
            assert torch.equal(value[:, 0], both.state_dict()[key][:, slot])


@all_cases
def test_gradients_match_finite_differences(method, options):
    if method == "dora":  # its usual gradient takes the norms as constants: see the references
        options = {**options, "detach_norm": False}
    adapter, weight = make(method, options, (8, 8), slots=2)
    disturb(adapter)
    names = [name for name, _ in adapter.named_parameters()]
    target = torch.randn(2, 8, 8, dtype=torch.float64)

    def loss(*values: Tensor) -> Tensor:
        state = dict(zip(names, values))
        return (
            torch.func.functional_call(Merged(adapter), _prefixed(state), (weight,))
            .mul(target)
            .sum()
        )

    assert torch.autograd.gradcheck(loss, tuple(adapter.parameters()))


class Merged(nn.Module):
    """`adapter.merged` as a forward."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, weight: Tensor) -> Tensor:
        return self.adapter.merged(weight)


def _prefixed(state):
    return {f"adapter.{key}": value for key, value in state.items()}


@all_cases
def test_every_trainable_value_gets_a_gradient(method, options):
    adapter, weight = make(method, options, (2, 24, 16), slots=2, dtype=torch.float32)
    disturb(adapter)
    merged = adapter.merged(weight)  # its own norm would not do: a reflection keeps it
    target = torch.randn(merged.shape, generator=torch.Generator().manual_seed(1))
    (merged * target).sum().backward()
    for name, p in adapter.named_parameters():
        assert p.grad is not None and torch.count_nonzero(p.grad) == p.numel(), name
    assert all(not b.requires_grad for b in adapter.buffers())


@all_cases
def test_zero_rows_are_finite(method, options):
    """A direction of norm zero has no direction: no change from it, and no NaN in its gradient."""
    adapter, weight = make(method, options, (2, 24, 16), dtype=torch.float32)
    with torch.no_grad():
        weight[0, :, 3] = 0
        for p in adapter.parameters():
            p.zero_()
    merged = adapter.merged(weight)
    merged.square().sum().backward()
    assert torch.isfinite(merged).all()
    assert all(torch.isfinite(p.grad).all() for p in adapter.parameters())


@all_cases
def test_factors_follow_the_weight(method, options):
    """Another weight of the same shape: the factors of that weight, not remembered ones."""
    adapter, weight = make(method, options)
    disturb(adapter)
    other = torch.randn_like(weight)
    adapter.merged(weight)
    here = adapter.merged(other)
    fresh = METHODS[method](other, **options)
    fresh.load_state_dict(adapter.state_dict())
    torch.testing.assert_close(here, fresh.merged(other))
    other.mul_(2)  # in place: the same storage, other values
    torch.testing.assert_close(adapter.merged(other), fresh.merged(other.clone()))


@pytest.mark.parametrize("method", ["ether", "ether+"])
@pytest.mark.parametrize(
    "blocks,message",
    [(5, "must divide every .* width, here 24, got 5"), (0, "must be at least 1, got 0")],
)
def test_blocks_must_divide(method, blocks, message):
    with pytest.raises(ValueError, match=f"`blocks` {message}"):
        METHODS[method](torch.zeros(24, 24), blocks=blocks)


@pytest.mark.parametrize(
    "method,options,message",
    [
        ("lora", {"rank": 0}, "`rank` must be at least 1, got 0"),
        ("delora", {"rank": -1}, "`rank` must be at least 1"),
        ("delora", {"start": "zero"}, "`start` must be one of residual or peft; got 'zero'"),
        ("ether", {"side": "left"}, "`side` must be one of input or output; got 'left'"),
        ("ether+", {"sides": 3}, "`sides` must be one of 1 or 2; got 3"),
        ("lora", {"slots": 0}, "`slots` must be at least 1"),
    ],
)
def test_bad_options(method, options, message):
    with pytest.raises(ValueError, match=message):
        METHODS[method](torch.zeros(8, 8), **options)


def test_unknown_names_get_suggestions():
    with pytest.raises(ValueError, match="unknown method `delroa`. Did you mean `delora`"):
        find_method("delroa")
    with pytest.raises(ValueError, match="`delora` has no option `rnak`. Did you mean `rank`"):
        resolve_options(METHODS["delora"], {"rnak": 4})


def test_taken_name_is_an_error():
    with pytest.raises(ValueError, match="method `lora` is taken by `dreamtune.adapters.lora`"):

        @register
        class Other(Adapter):
            name = "lora"


def test_unit_and_block_columns():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    torch.testing.assert_close(unit(x, -1), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    u = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    expected = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 4.0]])
    assert torch.equal(block_columns(u), expected)


@pytest.fixture
def toy():
    """A method in one place: IA3-like scaling of the outputs, which is not low rank."""

    @register
    class Scaled(Adapter):
        """`W' = diag(1 + s) W`."""

        name = "toy"
        paper = "https://example.org"
        identity_at_start = True
        low_rank = False
        depends_on_weight = True
        learning_rate = 1e-3

        def __init__(self, weight, *, slots=1, generator=None, start=0.0):
            super().__init__(weight, slots, generator, {"start": start})
            self.s = nn.Parameter(self.constant(weight, (weight.shape[-2],), start))

        def change(self, weight, *constants):
            return WeightChange(gain=self.s)

    yield Scaled
    del _REGISTRY["toy"]


def test_a_new_method_needs_only_its_class(toy):
    """Registered, it takes part in contract tests and injection, with nothing else edited."""
    assert ("toy", {}) in cases()
    checks = (test_class_says_what_it_is, test_slot_starts_as_alone, test_zero_rows_are_finite)
    for check in checks:
        check("toy", {})
    test_start("toy", {}, torch.float32)
    unet, inputs = tiny_unet(), unet_inputs(2)
    with torch.no_grad():
        base = unet(*inputs).sample
        adapter = dreamtune.inject(unet, "toy")
        assert torch.equal(unet(*inputs).sample, base)
        disturb(adapter)
        changed = unet(*inputs).sample
        adapter.merge()
        torch.testing.assert_close(unet(*inputs).sample, changed, rtol=0, atol=1e-5)
    assert not torch.allclose(changed, base, atol=1e-4)


def test_a_method_that_is_not_low_rank_is_not_exported(toy, tmp_path):
    adapter = dreamtune.inject(tiny_unet(), "toy")
    with pytest.raises(ValueError, match="`toy` is not a low-rank change.*export it as `merged`"):
        dreamtune.export(adapter, tmp_path)


def test_slots_of_a_method_that_is_not_low_rank(toy):
    unet, inputs = tiny_unet(torch.float64), unet_inputs(2, torch.float64)
    adapter = dreamtune.inject(unet, "toy", slots=2)
    disturb(adapter)
    with torch.no_grad():
        adapter.route(torch.tensor([0, 1]))
        both = unet(*inputs).sample
        adapter.route(torch.tensor([1, 0]))
        swapped = unet(*(x.flip(0) for x in inputs)).sample
    torch.testing.assert_close(swapped.flip(0), both, rtol=0, atol=1e-9)


def test_unit_and_its_gradient():
    """A zero row and one below the floor are divided by the floor."""
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    x[0, 0], x[1, 1] = 0, x[1, 1] * 1e-6
    for dim in (-1, -2):
        x.requires_grad_()
        y = unit(x, dim)
        naive = x / torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(1e-4)
        assert torch.equal(y, naive)
        grad = torch.randn_like(y)
        ours, theirs = (torch.autograd.grad(z, x, grad)[0] for z in (y, naive))
        torch.testing.assert_close(ours, theirs.nan_to_num(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("parts, bound", [(3, 0.0), (2, 2.0**-17)])
def test_bf16_parts_add_up(parts: int, bound: float):
    """What a GPU multiplies in bf16 is the float32 number: to the last bit, or to 16 bits."""
    x = torch.randn(2, 7, 5) * torch.logspace(-8, 8, 5)
    split = bf16_parts(x, parts)
    assert split.dtype == torch.bfloat16 and split.shape == (2, 7, 5 * parts)
    total = split.float().unflatten(-1, (parts, -1)).sum(-2)
    assert ((total - x) / x).abs().max() <= bound
    weight = torch.randn(2, 4, 7).bfloat16()
    exact = weight.double() @ x.double()
    product = (weight.float() @ split.float()).unflatten(-1, (parts, -1)).sum(-2)
    assert ((product - exact).norm(dim=1) / exact.norm(dim=1)).max() < max(1e-6, 2 * bound)


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("shape", [(12, 12), (12, 24)])
def test_ether_plus_columns_written_by_hand(sides: int, shape: tuple[int, int]):
    """Factors and gradients of what is written out, against autograd's through the formula."""
    weight = torch.randn(3, *shape, dtype=torch.float64)
    adapter = find_method("ether+")(weight, slots=2, blocks=3, sides=sides)
    disturb(adapter)
    change = torch.randn(3, 2, *shape, dtype=torch.float64)

    def reflection(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        u, v = (x / x.norm(dim=-1, keepdim=True) for x in (u, v))
        blocks = v.unsqueeze(-1) * v.unsqueeze(-2) - u.unsqueeze(-1) * u.unsqueeze(-2)
        rows = [[torch.block_diag(*b) for b in slots] for slots in blocks]
        dense = torch.stack([torch.stack(r) for r in rows])
        return dense + torch.eye(dense.shape[-1], dtype=dense.dtype)

    naive = reflection(adapter.u, adapter.v) @ weight.unsqueeze(1)
    if sides == 2:
        naive = naive @ reflection(adapter.u_in, adapter.v_in)
    ours = adapter.merged(weight)
    torch.testing.assert_close(ours, naive)
    parameters = list(adapter.parameters())
    gradients = [torch.autograd.grad((x * change).sum(), parameters) for x in (ours, naive)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)
