"""Eject and merge of an adapter in a model that others touched, and what is refused by name."""

import copy

import pytest
import torch
from life import NEW_BASE, OPERATIONS, ROUGH, D, adapt, base, call, quiet, right, sequential, style
from tiny import disturb, unet_inputs
from torch import nn

import dreamtune
from dreamtune import METHODS
from dreamtune.injection.inject import InjectedAdapter

methods = pytest.mark.parametrize("method", list(METHODS))
STAY = [n for n in OPERATIONS if n not in ("deepcopy", "pickle", "average", *NEW_BASE)]


@pytest.fixture(autouse=True)
def _quiet():
    with quiet():
        yield


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("name", STAY)
@pytest.mark.parametrize("way", ["eject", "merge"])
def test_out_after_something_was_done(name, way):
    """It leaves what the operation leaves of a stock model; merged, the change as well."""
    unet = base()
    adapter = adapt(unet, "delora")
    unet = OPERATIONS[name](unet)
    call(unet)
    getattr(adapter, way)()
    want = right("delora" if way == "merge" else None, name)
    change = (right("delora", name) - right(None, name)).abs().max()
    assert (call(unet) - want).abs().max() < ROUGH.get(name, 1e-6) * change
    kinds = {type(m).__name__ for m in unet.modules()}
    assert "AdaptedLinear" not in kinds and not InjectedAdapter.of(unet)


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_after_a_cast_rounds_once(method, dtype):
    unet = base()
    adapter = adapt(unet, method)
    weights = {name: w.clone() for name, w in adapter.weights().items()}
    unet.to(dtype)
    adapter.merge()
    exact = base()
    for name, weight in weights.items():  # the base is what the cast left of it
        exact.get_submodule(name).weight.data.copy_(weight.to(dtype))
    adapt(exact, method).merge()
    for name in weights:
        got, want = (u.get_submodule(name).weight.to(D) for u in (unet, exact))
        bound = torch.finfo(dtype).eps * (want.abs().max())
        assert (got - want).abs().max() <= bound


def test_out_twice_or_after_a_merge():
    unet = base()
    adapter = adapt(unet, "lora")
    adapter.eject()
    with pytest.raises(ValueError, match="`default` is not in the model: it was ejected"):
        adapter.eject()
    second = adapt(unet, "delora")
    want = call(unet)
    for leave in (adapter.eject, adapter.merge):
        with pytest.raises(ValueError, match="is not in the model"):
            leave()
    close(call(unet), want)
    second.merge()
    with pytest.raises(ValueError, match="it was merged"):
        second.merge()
    with pytest.raises(ValueError, match="was merged: its base is gone"):
        second.save("/nowhere")


def test_loras_above_and_below_leave_in_any_order():
    both = right("delora", "LoRA")
    for ours_first in (True, False):
        for ours_leaves_first in (True, False):
            unet = base()
            if ours_first:
                adapter = adapt(unet, "delora")
                style(unet)
            else:
                style(unet)
                adapter = adapt(unet, "delora")
            close(call(unet), both, 1e-9)
            if ours_leaves_first:
                adapter.eject()
                close(call(unet), right(None, "LoRA"))
                unet.unload_lora()
            else:
                unet.unload_lora()
                close(call(unet), right("delora", "nothing"), 1e-9)
                adapter.eject()
            assert torch.equal(call(unet), right(None, "nothing"))
            assert all(type(m) is nn.Linear for n, m in unet.named_modules() if "to_q" in n)


@methods
def test_a_fused_lora_is_followed_or_refused(method):
    """A change that the weights are part of would become another one."""
    unet = base()
    adapter = adapt(unet, method)
    call(unet)
    style(unet).fuse_lora()
    if METHODS[method].depends_on_weight:
        for act in (lambda: call(unet), adapter.merge, adapter.speed_up):
            with pytest.raises(ValueError, match=r"`fuse_lora` wrote \['style'\] into the weights"):
                act()
        unet.unfuse_lora()
    close(call(unet), right(method, "LoRA"), 1e-9)


def test_fused_projections_are_refused_until_they_are_unfused():
    unet = base()
    adapter = adapt(unet, "ether")
    unet.fuse_qkv_projections()
    for act in (lambda: call(unet), adapter.merge):
        with pytest.raises(ValueError, match="`fuse_qkv_projections.*unfuse_qkv_projections"):
            act()
    unet.unfuse_qkv_projections()
    close(call(unet), right("ether", "nothing"), 1e-9)
    adapter.merge()
    unet.fuse_qkv_projections()
    close(call(unet), right("ether", "nothing"), 1e-9)


def test_a_replaced_layer_is_refused():
    unet = base()
    adapter = adapt(unet, "lora")
    name = next(n for n, _ in unet.named_modules() if n.endswith("attn1"))
    unet.get_submodule(name).to_k = nn.Linear(16, 16, bias=False).to(D)
    for act in (lambda: call(unet), adapter.merge):
        with pytest.raises(ValueError, match="to_k` was replaced: the adapter is no longer in"):
            act()
    adapter.eject()
    call(unet)


def test_a_forward_of_its_own_is_refused():
    unet = base()
    layer = next(m for n, m in unet.named_modules() if n.endswith("to_k"))
    layer.forward = lambda x: x
    with pytest.raises(ValueError, match="to_k` has a forward of its own"):
        adapt(unet, "lora")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_change_that_is_not_finite_is_not_merged(value, tmp_path):
    unet = base()
    before = {name: x.clone() for name, x in unet.state_dict().items()}
    adapter = adapt(unet, "lora")
    next(adapter.parameters()).data[-1, 0, 0] = value
    with pytest.raises(ValueError, match="merged weight of .* would not be finite"):
        adapter.merge()
    for name, x in unet.state_dict().items():
        assert torch.equal(x, before[name])
    for write in (adapter.save, lambda path: dreamtune.export(adapter, path)):
        with pytest.raises(ValueError, match="not finite"):
            write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_offloaded_weights_are_merged_where_they_are_kept():
    unet = base()
    adapter = adapt(unet, "delora")
    sequential(unet)
    assert all(p.device.type == "meta" for p in unet.parameters())
    call(unet)
    assert all(p.device.type == "cpu" for p in adapter.parameters())
    adapter.merge()
    close(call(unet), right("delora", "nothing"), 1e-9)


def test_a_copy_has_an_adapter_of_its_own():
    unet = base()
    adapter = adapt(unet, "delora")
    want = call(unet)
    twin = copy.deepcopy(unet)
    (other,) = InjectedAdapter.of(twin)
    assert other is not adapter and other.model is twin
    disturb(other, size=0.3)
    assert (call(twin) - want).abs().max() > 1e-3
    close(call(unet), want)
    other.load_state_dict(adapter.state_dict())
    twin.load_state_dict(base(1).state_dict())
    close(call(twin), right("delora", "another state dict", True), 1e-9)
    close(call(unet), want)
    other.eject()
    close(call(twin), call(base(1)))
    close(call(unet), want)


def test_a_copy_trains_while_the_other_rests():
    unet = base()
    adapt(unet, "ether+")
    unet(*unet_inputs(2, D)).sample.sum()  # its factors carry a graph
    twin = copy.deepcopy(unet)
    (other,) = InjectedAdapter.of(twin)
    twin(*unet_inputs(2, D)).sample.square().mean().backward()
    assert all(torch.count_nonzero(p.grad) for p in other.parameters())
    (own,) = InjectedAdapter.of(unet)
    assert all(p.grad is None for p in own.parameters())
