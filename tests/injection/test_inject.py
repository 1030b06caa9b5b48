"""Injection: what the model computes, which tensors train, and that everything can be undone."""

import pytest
import torch
from tiny import cases, disturb, tiny_unet, unet_inputs
from torch import nn

import dreamtune
from dreamtune import METHODS
from dreamtune.injection.layer import AdaptedLinear

all_cases = pytest.mark.parametrize("method,options", cases())
COUNTS = [
    ("lora", {"rank": 4}, 797_184),
    ("lora", {"rank": 16}, 3_188_736),
    ("delora", {"rank": 16}, 3_188_864),
    ("ether", {}, 99_456),
    ("ether", {"blocks": 4}, 99_456),
    ("ether+", {}, 398_592),
]


@pytest.mark.parametrize("method,options,count", COUNTS)
def test_stable_diffusion_counts(method, options, count):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    adapter = dreamtune.inject(unet, method, **options)
    assert adapter.num_parameters == count
    assert sum(len(group.names) for group in adapter.groups) == 128
    assert len(adapter.groups) == 6
    assert dreamtune.inject(_ejected(adapter), method, slots=3, **options).num_parameters == count


def _ejected(adapter):
    adapter.eject()
    return adapter.model


@all_cases
@pytest.mark.parametrize("dtype,atol", [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_forward_is_the_merged_weight(method, options, dtype, atol):
    unet, inputs = tiny_unet(dtype), unet_inputs(2, dtype)
    adapter = dreamtune.inject(unet, method, **options)
    disturb(adapter)
    with torch.no_grad():
        injected = unet(*inputs).sample
        adapter.merge()
        assert not any(isinstance(m, AdaptedLinear) for m in unet.modules())
        torch.testing.assert_close(unet(*inputs).sample, injected, rtol=0, atol=atol)


@all_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start_is_the_base_where_promised(method, options, dtype):
    unet, inputs = tiny_unet(dtype), unet_inputs(2, dtype)
    with torch.no_grad():
        base = unet(*inputs).sample
        dreamtune.inject(unet, method, slots=2, **options).route(torch.arange(2))
        here = unet(*inputs).sample
    assert torch.equal(here, base) == METHODS[method].identity_at_start


@all_cases
def test_eject_restores_the_model(method, options):
    unet, inputs = tiny_unet(), unet_inputs(2)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    layers = dict(unet.named_modules())
    trained = {name for name, p in unet.named_parameters() if p.requires_grad}
    base = unet(*inputs).sample.detach()
    adapter = dreamtune.inject(unet, method, **options)
    assert unet.state_dict().keys() == before.keys()
    disturb(adapter)
    unet(*inputs).sample.sum().backward()
    adapter.eject()
    assert dict(unet.named_modules()) == layers
    assert {name for name, p in unet.named_parameters() if p.requires_grad} == trained
    for name, tensor in unet.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, "its own storage again"
    assert torch.equal(unet(*inputs).sample, base)


@all_cases
def test_gradients_reach_the_adapter_and_nothing_else(method, options):
    unet, inputs = tiny_unet(), unet_inputs(2)
    adapter = dreamtune.inject(unet, method, **options)
    disturb(adapter)
    unet(*inputs).sample.square().mean().backward()
    for name, p in adapter.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        assert all(torch.count_nonzero(layer) for layer in p.grad), name
    assert all(p.grad is None and not p.requires_grad for p in unet.parameters())
    own = {id(p) for p in adapter.parameters()}
    assert not own & {id(p) for p in unet.parameters()}


@all_cases
def test_slots_are_independent(method, options):
    """Three stacked adapters trained for two steps are each the one trained alone: the second step
    is from where no method starts."""

    def train(slots, seeds, x, t, c):
        unet = tiny_unet(torch.float64)
        adapter = dreamtune.inject(unet, method, slots=slots, seed=seeds, **options)
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.05)
        for _ in range(2):
            out = unet(x, t, c).sample
            loss = (out - x).square().reshape(slots, -1).mean(1).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return [adapter.state_dict(slot) for slot in range(slots)]

    x, t, c = unet_inputs(6, torch.float64)
    together = train(3, [5, 6, 7], x, t, c)
    for slot in range(3):
        rows = slice(2 * slot, 2 * slot + 2)
        (alone,) = train(1, 5 + slot, x[rows], t[rows], c[rows])
        for key, value in alone.items():
            torch.testing.assert_close(together[slot][key], value, rtol=0, atol=1e-9)


@all_cases
def test_route_and_scale(method, options):
    unet, (x, t, c) = tiny_unet(torch.float64), unet_inputs(3, torch.float64)
    adapter = dreamtune.inject(unet, method, slots=3, seed=[1, 2, 3], **options)
    with torch.no_grad():
        adapter.scale = 0
        adapter.route(torch.arange(3))
        base = unet(x, t, c).sample
        adapter.scale = 1
        disturb(adapter)
        blocks = unet(x, t, c).sample
        assert not torch.allclose(base, blocks, atol=1e-6)
        adapter.route(torch.tensor([2, 0, 0, 1]))
        rows = torch.tensor([2, 0, 0, 1])
        routed = unet(x[rows], t[rows], c[rows]).sample
        torch.testing.assert_close(routed, blocks[rows], rtol=0, atol=1e-9)
        with pytest.raises(ValueError, match="`route` was given 4 rows, but the batch has 8"):
            unet(*(torch.cat([v[rows], v[rows]]) for v in (x, t, c)))
    adapter.route(None)
    torch.testing.assert_close(unet(x, t, c).sample, blocks, rtol=0, atol=1e-9)
    adapter.scale = torch.tensor([1.0, 0.0, 1.0])
    mixed = unet(x, t, c).sample
    torch.testing.assert_close(mixed[1], base[1], rtol=0, atol=1e-9)
    torch.testing.assert_close(mixed[2], blocks[2], rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="a batch of 2 rows does not split into 3"):
        unet(x[:2], t[:2], c[:2])


def test_routed_gradients():
    unet, (x, t, c) = tiny_unet(torch.float64), unet_inputs(4, torch.float64)
    adapter = dreamtune.inject(unet, "delora", slots=2)
    disturb(adapter)
    adapter.route(torch.tensor([0, 0, 0, 0]))
    unet(x, t, c).sample.square().sum().backward()
    for _, p in adapter.named_parameters():
        assert torch.count_nonzero(p.grad[:, 0]) and not torch.count_nonzero(p.grad[:, 1])


@pytest.mark.parametrize(
    "rows",
    [torch.tensor([0.0]), torch.tensor([[0]]), torch.tensor([2]), torch.tensor([-1]), [0, 1], 0],
)
def test_bad_rows(rows):
    with pytest.raises(ValueError, match="`rows` must be"):
        dreamtune.inject(tiny_unet(), "lora", slots=2).route(rows)


@all_cases
def test_scale_is_linear_in_the_merged_weight(method, options):
    def merged(scale):
        unet = tiny_unet(torch.float64)
        adapter = dreamtune.inject(unet, method, **options)
        disturb(adapter)
        adapter.scale = scale
        adapter.merge()
        return dict(unet.named_parameters())

    none, half, full = merged(0.0), merged(0.5), merged(1.0)
    for name in none:
        middle = (none[name] + full[name]) / 2
        torch.testing.assert_close(half[name], middle, rtol=0, atol=1e-12)


def test_the_trainers_weights_are_views_of_one_stack():
    unet = tiny_unet()
    adapter = dreamtune.inject(unet, "lora", _fast=True)
    for group in adapter.groups:
        for i, layer in enumerate(group.layers):
            assert layer.weight.data_ptr() == group.weight[i].data_ptr()
    assert adapter.weights().keys() == {n for g in adapter.groups for n in g.names}


def test_layers_stay_linear_layers_and_the_model_saves(tmp_path):
    from diffusers import UNet2DConditionModel

    unet = tiny_unet()
    adapter = dreamtune.inject(unet, "delora")
    for group in adapter.groups:
        assert all(isinstance(unet.get_submodule(name), nn.Linear) for name in group.names)
    unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, unet.state_dict()[name])


def test_follows_a_cast_model():
    unet, inputs = tiny_unet(), unet_inputs(2)
    adapter = dreamtune.inject(unet, "delora")
    disturb(adapter)
    with torch.no_grad():
        wide = unet(*inputs).sample
        unet.to(torch.bfloat16)
        x, t, c = inputs
        narrow = unet(x.bfloat16(), t, c.bfloat16()).sample
    assert narrow.dtype == torch.bfloat16
    assert all(group.weight.dtype == torch.bfloat16 for group in adapter.groups)
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    torch.testing.assert_close(narrow.float(), wide, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("method", list(METHODS))
def test_factors_are_kept_until_something_changes(method, fast, monkeypatch):
    """And are then computed once for all layers of a shape; under gradients at each forward."""
    unet, inputs = tiny_unet(), unet_inputs(1)
    adapter = dreamtune.inject(unet, method, _fast=fast)
    calls = []
    kind = type(adapter.groups[0].adapter)
    original = kind.change
    monkeypatch.setattr(
        kind, "change", lambda self, *given: (calls.append(1), original(self, *given))[1]
    )

    def computed():
        unet(*inputs), unet(*inputs)
        times = len(calls) / len(adapter.groups)
        calls.clear()
        return times

    with torch.no_grad():
        computed()
        assert computed() == 0
        disturb(adapter)
        assert computed() == 1
        adapter.scale = 0.5
        assert computed() == 1
    assert computed() == 2
    with torch.inference_mode():
        assert computed() == 1
    with torch.no_grad():
        assert computed() <= 1


@pytest.mark.parametrize("slots", [1, 2])
def test_gradient_checkpointing_changes_nothing(slots):
    def gradients(checkpointing):
        unet, inputs = tiny_unet(torch.float64), unet_inputs(2, torch.float64)
        unet.train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        adapter = dreamtune.inject(unet, "delora", slots=slots)
        disturb(adapter)
        unet(*inputs).sample.square().sum().backward()
        return [p.grad for p in adapter.parameters()]

    for a, b in zip(gradients(False), gradients(True)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_autocast():
    unet, inputs = tiny_unet(), unet_inputs(2)
    for slots in (1, 2):
        adapter = dreamtune.inject(unet, "delora", slots=slots)
        disturb(adapter, size=0.3)
        with torch.no_grad():
            adapter.route(torch.arange(2) % slots)
            wide = unet(*inputs).sample
            adapter.route(None)
        with torch.autocast("cpu", torch.bfloat16):
            narrow = unet(*inputs).sample
        narrow.float().sum().backward()
        assert float((narrow.detach() - wide).norm() / wide.norm()) < 0.05
        adapter.eject()


@pytest.mark.parametrize("slots", [1, 2])
def test_compiled_block(slots):
    """Regional compile: a transformer block is traced without a graph break."""
    from diffusers.models.attention import BasicTransformerBlock

    unet, inputs = tiny_unet(), unet_inputs(2)
    adapter = dreamtune.inject(unet, "delora", slots=slots)
    disturb(adapter)
    unet(*inputs).sample.square().sum().backward()
    expected = [p.grad.clone() for p in adapter.parameters()]
    block = next(m for m in unet.modules() if isinstance(m, BasicTransformerBlock))
    block.compile(backend="aot_eager", fullgraph=True)
    for p in adapter.parameters():
        p.grad = None
    unet(*inputs).sample.square().sum().backward()
    for p, gradient in zip(adapter.parameters(), expected):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-4)


def test_parameter_groups():
    adapter = dreamtune.inject(tiny_unet(), "delora")
    groups = adapter.parameter_groups(1e-2, weight_decay=0.01)
    named = {id(p): n.rpartition(".")[2] for n, p in adapter.named_parameters()}
    assert {(g["lr"], g["weight_decay"]): {named[id(p)] for p in g["params"]} for g in groups} == {
        (1e-2, 0.01): {"A", "B"},
        (1e-3, 0.0): {"lambda_"},
    }
    torch.optim.AdamW(groups)
    recommended = adapter.parameter_groups()
    assert recommended[0]["lr"] == METHODS["delora"].learning_rate
    assert len({n for n, _ in adapter.named_parameters()}) == len(list(adapter.parameters()))


def test_seeds():
    def start(**kwargs):
        adapter = dreamtune.inject(tiny_unet(), "delora", **kwargs)
        return adapter.state_dict(adapter.slots - 1)

    def same(a, b):
        return all(torch.equal(a[key], b[key]) for key in a)

    assert same(start(seed=3), start(seed=3))
    assert same(start(seed=3), start(seed=[1, 3], slots=2))
    assert same(start(seed=3), start(seed=3, slots=2))
    assert not same(start(seed=3), start(seed=4))
    with pytest.raises(ValueError, match="`seed` must be one number or one a slot"):
        start(seed=[1, 2, 3], slots=2)


def test_refusals():
    unet = tiny_unet()
    with pytest.raises(ValueError, match=r"no layer matches `to_x`\. .* has `to_q` \(8 Linear\)"):
        dreamtune.inject(unet, target_modules=("to_q", "to_x"))
    with pytest.raises(ValueError, match=r"`to_q`, .*`Sequential` has `0` \(1 Linear\)"):
        dreamtune.inject(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="unknown method `dora2`"):
        dreamtune.inject(unet, "dora2")
    with pytest.raises(ValueError, match="has no option `rnk`. Did you mean `rank`"):
        dreamtune.inject(unet, rnk=4)
    with pytest.raises(ValueError, match="`blocks` must divide"):
        dreamtune.inject(unet, "ether", blocks=5)
    adapter = dreamtune.inject(unet)
    with pytest.raises(ValueError, match=r"is adapted already: call `eject\(\)`"):
        dreamtune.inject(unet)
    adapter.eject()
    adapter = dreamtune.inject(unet, slots=2)
    with pytest.raises(ValueError, match="`merge` needs one slot, got 2"):
        adapter.merge()
    adapter.eject()
    unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="is fused: call `unfuse_qkv_projections"):
        dreamtune.inject(unet)


def test_load_state_dict_is_strict():
    adapter = dreamtune.inject(tiny_unet(), "lora", rank=2)
    state = adapter.state_dict()
    key = next(iter(state))
    short = {k: v for k, v in state.items() if k != key}
    with pytest.raises(ValueError, match=f"state does not fit `lora`: missing `{key}`"):
        adapter.load_state_dict(short)
    with pytest.raises(ValueError, match="unexpected `other`"):
        adapter.load_state_dict({**state, "other": torch.zeros(1)})
    with pytest.raises(ValueError, match=f"`{key}` must be .*, got"):
        adapter.load_state_dict({**state, key: torch.zeros(1)})
    with pytest.raises(ValueError, match="`slot` must be 0 to 0, got 1"):
        adapter.state_dict(1)


@all_cases
@pytest.mark.parametrize("how", ["load_state_dict", "data"])
def test_a_base_loaded_anew_is_seen_by_the_next_factors(method, options, how):
    """Weights and biases written in place, the layers' bias padded for the room below included."""
    unet, other = tiny_unet(torch.float64), tiny_unet(torch.float64, seed=1)
    adapter = dreamtune.inject(unet, method, **options)
    disturb(adapter, size=0.3)
    inputs = unet_inputs(2, torch.float64)
    with torch.no_grad():
        unet(*inputs)
        if how == "data":  # as fusing a LoRA writes, which no version counts
            for p, new in zip(unet.parameters(), other.parameters(), strict=True):
                p.data.copy_(new.data)
        else:
            unet.load_state_dict(other.state_dict())
        adapter.refresh()
        got = unet(*inputs).sample
    training = unet(*inputs).sample.detach()
    fresh = dreamtune.inject(other, method, **options)
    fresh.load_state_dict(adapter.state_dict())
    with torch.no_grad():
        wanted = other(*inputs).sample
        fresh.scale = 0.0
        assert (other(*inputs).sample - wanted).abs().max() > 1e-3
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(training, wanted)


def test_what_a_method_takes_of_the_weight_stays_where_a_recorded_step_reads_it():
    unet, other = tiny_unet(), tiny_unet(seed=1)
    adapter = dreamtune.inject(unet, "delora", _fast=True)
    (kept,) = adapter.groups[0].stack.constants()
    with torch.inference_mode():
        unet.load_state_dict(other.state_dict())
        unet(*unet_inputs(2))
    (now,) = adapter.groups[0].stack.constants()
    assert now.data_ptr() == kept.data_ptr() and not now.is_inference()
    norms = adapter.groups[0].weight.norm(dim=-2)[:, None, None]
    torch.testing.assert_close(now, norms)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(
    "method,options",
    [
        ("delora", {}),
        ("delora", {"multiplicative": True}),
        ("delora", {"target_modules": ["conv1", "ff.net.2"]}),
    ],
)
def test_strength_falls_with_the_timestep_of_each_row(method, options, fast):
    """Each row as if its strength had been set by hand; under gradients too, and by keyword."""

    def alone(t, x, text):
        unet = tiny_unet(torch.float64)
        adapter = dreamtune.inject(unet, method, **options)
        disturb(adapter)
        adapter.scale = 1 - 0.75 * t / 1000
        with torch.no_grad():
            return unet(x, t, text).sample

    x, _, text = unet_inputs(3, torch.float64)
    times = [0, 400, 1000]
    unet = tiny_unet(torch.float64)
    adapter = dreamtune.inject(unet, method, timestep_floor=0.25, _fast=fast, **options)
    disturb(adapter)
    want = torch.cat([alone(t, x[i : i + 1], text[i : i + 1]) for i, t in enumerate(times)])
    t = torch.tensor(times)
    with torch.no_grad():
        got = unet(x, t, text).sample
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    torch.testing.assert_close(unet(x, t, text).sample, want, rtol=0, atol=1e-9)
    one = unet(sample=x, timestep=400, encoder_hidden_states=text).sample[1:2]
    torch.testing.assert_close(one, want[1:2], rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="depends on the timestep here: no weight holds it"):
        adapter.merge()


def test_the_strength_of_rows_stays_where_a_recorded_forward_reads_it():
    """It is computed before the forward, so that a replay finds it only in the same place."""
    unet, (x, _, text) = tiny_unet(), unet_inputs(3)
    adapter = dreamtune.inject(unet, "delora", timestep_floor=0.25, _fast=True)
    places, values = set(), []
    with torch.no_grad():
        for step in (900, 100):
            unet(x, step, text)
            places.add(adapter._use.at.data_ptr())
            values.append(adapter._use.at.tolist())
    assert len(places) == 1 and values == [pytest.approx([0.325] * 3), pytest.approx([0.925] * 3)]


@pytest.mark.parametrize("fast", [False, True])
def test_slots_have_the_timesteps_of_their_rows(fast):
    x, t, text = unet_inputs(4, torch.float64)
    both = dreamtune.inject(
        unet := tiny_unet(torch.float64), "delora", slots=2, timestep_floor=0, _fast=fast
    )
    disturb(both)
    outputs = unet(x, t, text).sample
    for slot in range(2):
        one = dreamtune.inject(alone := tiny_unet(torch.float64), "delora", timestep_floor=0)
        one.load_state_dict(both.state_dict(slot))
        rows = slice(2 * slot, 2 * slot + 2)
        want = alone(x[rows], t[rows], text[rows]).sample
        torch.testing.assert_close(outputs[rows], want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("what", ["rows", "scale"])
def test_a_tensor_that_is_set_is_not_taken_for_the_one_before_it(what, fast):
    """A new tensor may lie, and have the id, of one that is gone."""
    unet, (x, t, text) = tiny_unet(torch.float64), unet_inputs(3, torch.float64)
    adapter = dreamtune.inject(unet, "delora", slots=3, _fast=fast)
    disturb(adapter)

    def put(value):
        if what == "rows":
            adapter.route(value)
        else:
            adapter.scale = 1.0 if value is None else value

    def said(values, like=None):
        """With a tensor of these values; of the id of an earlier one."""
        value = torch.tensor(values)
        others = []
        while like not in (None, id(value)) and len(others) < 10_000:
            others.append(torch.empty(()) if len(others) % 2 else value)
            value = torch.tensor(values)
        put(value)
        with torch.no_grad():
            result = unet(x, t, text).sample
        put(None)
        return result, id(value)

    adapter.route(torch.tensor([0, 1, 2]))
    one, two = ([2, 0, 1], [1, 1, 0]) if what == "rows" else ([1.0, 0.5, 0.1], [0.1, 1.0, 2.0])
    want, _ = said(two)
    for _ in range(20):
        first, was = said(one)
        second, now = said(two, like=was)
        assert float((first - second).abs().max()) > 1e-3
        torch.testing.assert_close(second, want, rtol=0, atol=1e-9)
        if now == was:
            return
    pytest.skip("no tensor got the id of one before it")
