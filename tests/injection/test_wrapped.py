"""Compiled and otherwise wrapped models: the adapter is that of the model inside."""

import warnings

import pytest
import torch
from life import D, adapt, base, call, quiet, right
from safetensors.torch import load_file
from tiny import disturb
from torch import nn

import dreamtune
from dreamtune.injection.inject import InjectedAdapter


@pytest.fixture(autouse=True)
def _quiet():
    torch._dynamo.reset()
    with quiet():
        yield


def compiled(module):
    return torch.compile(module, backend="aot_eager")


def inside(unet):
    unet.down_blocks[0] = compiled(unet.down_blocks[0])
    unet.up_blocks[0].attentions[0] = compiled(unet.up_blocks[0].attentions[0])
    layer = unet.up_blocks[0].attentions[1].transformer_blocks[0].attn1
    layer.to_q = compiled(layer.to_q)
    return unet


WRAPPERS = {
    "compiled": compiled,
    "parallel": nn.DataParallel,
    "average": torch.optim.swa_utils.AveragedModel,
    "parts compiled": inside,
}


@pytest.mark.parametrize("how", list(WRAPPERS))
def test_files_carry_the_names_of_the_model_inside(how, tmp_path):
    plain = adapt(base(), "delora")
    want = load_file(plain.save(tmp_path / "plain"))
    lora = load_file(dreamtune.export(plain, tmp_path / "lora"))
    wrapped = WRAPPERS[how](base())
    adapter = adapt(wrapped, "delora")
    path = adapter.save(tmp_path / "wrapped")
    assert load_file(path).keys() == want.keys()
    assert load_file(dreamtune.export(adapter, tmp_path / "again")).keys() == lora.keys()
    adapter.eject()
    assert not InjectedAdapter.of(wrapped)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exported = dreamtune.export(path, tmp_path / "third", base=wrapped)
        loaded = dreamtune.load(wrapped, exported)
    assert load_file(exported).keys() == lora.keys()
    assert InjectedAdapter.of(wrapped) == [loaded]
    if "compiled" not in how:  # tracing is below
        torch.testing.assert_close(call(wrapped), right("delora", "nothing"), rtol=0, atol=1e-5)
    loaded.eject()


class OneAttention(nn.Module):
    """The least that an adapter goes into: tracing a UNet takes minutes."""

    def __init__(self):
        from diffusers.models.attention_processor import Attention

        super().__init__()
        self.attn = Attention(16, cross_attention_dim=24, heads=2, dim_head=8)

    def forward(self, x, text):
        return self.attn(x, text)


def one(method):
    torch.manual_seed(0)
    model = OneAttention().double()
    adapter = dreamtune.inject(model, method, target_modules=("to_v",)) if method else None
    if adapter:
        disturb(adapter, size=0.3)
    return model, adapter


def ask(model, grad=False):
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 9, 16, generator=g, dtype=D), torch.randn(2, 5, 24, generator=g).to(D)
    with torch.set_grad_enabled(grad):
        return model(x, text)


@pytest.mark.parametrize("method", ["delora", "ether+"])
def test_a_model_compiled_whole_follows(method):
    """In one graph; strength, parameters and weights change after it."""
    model, adapter = one(method)
    graph = torch.compile(model, backend="aot_eager", fullgraph=True)
    first = ask(graph)

    def as_eager():
        want = ask(model)
        torch.testing.assert_close(ask(graph), want, rtol=0, atol=1e-12)
        return want

    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch.equal(as_eager(), first)
    disturb(adapter, 1, 0.3)
    assert (as_eager() - first).abs().max() > 1e-3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    adapter.scale = 0.5
    second = as_eager()
    model.attn.to_v.weight.data.mul_(1.5)
    assert (as_eager() - second).abs().max() > 1e-3
    ask(graph, grad=True).square().sum().backward()
    gradients = [p.grad.clone() for p in adapter.parameters()]
    for p in adapter.parameters():
        p.grad = None
    ask(model, grad=True).square().sum().backward()
    for p, gradient in zip(adapter.parameters(), gradients):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-9, atol=1e-12)
    adapter.scale = 0.0
    base = ask(model)
    adapter.eject()
    torch.testing.assert_close(ask(graph), base, rtol=0, atol=1e-12)


def test_a_compiled_model_is_refused_what_an_eager_one_is():
    model, _ = one("lora")
    graph = torch.compile(model, backend="aot_eager")
    ask(graph)
    model.attn.to_v = nn.Linear(24, 16, bias=False).to(D)
    with pytest.raises(ValueError, match="to_v` was replaced"):
        ask(graph)


def test_an_adapter_comes_to_a_compiled_model():
    model, _ = one(None)
    graph = compiled(model)
    none = ask(graph)
    adapter = dreamtune.inject(graph, "ether", target_modules=("to_v",))
    twin, _ = one("ether")
    dreamtune.InjectedAdapter.of(twin)[0].load_state_dict(adapter.state_dict())
    want = ask(twin)
    assert (want - none).abs().max() > 1e-3
    torch.testing.assert_close(ask(graph), want, rtol=0, atol=1e-12)
    ask(graph, grad=True).square().mean().backward()
    assert all(torch.count_nonzero(p.grad) for p in adapter.parameters())
    adapter.eject()
    torch.testing.assert_close(ask(graph), none, rtol=0, atol=1e-12)
