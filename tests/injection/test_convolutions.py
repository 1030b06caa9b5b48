"""Convolutions: what a forward gives is what the merged weight and the loaded file give."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from tiny import cases, disturb
from torch import nn

import dreamtune
from dreamtune.injection.layer import AdaptedConv2d

SHAPES = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": (1, 3), "padding": (0, 1), "padding_mode": "reflect", "bias": False},
]


def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(8, 8, **shape) for shape in SHAPES]
    return nn.Sequential(*layers).double()


def picture(batch=2):
    return torch.randn(
        batch, 8, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


def adapted(method, options, **more):
    model = net()
    adapter = dreamtune.inject(model, method, target_modules=["*"], **options, **more)
    disturb(adapter)
    return model, adapter


@pytest.mark.parametrize("method,options", cases())
def test_forward_is_the_merged_weight_and_the_loaded_file(method, options, tmp_path):
    model, adapter = adapted(method, options)
    assert all(type(m) is AdaptedConv2d for m in model)
    x, base = picture(), net()(picture())
    y = model(x)
    assert (y - base).abs().max() > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(model(x[0]), y[0], rtol=0, atol=1e-9)  # without a batch
    path = adapter.save(tmp_path)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["dreamtune"])
    assert about["format_version"] == 3 and about["shapes"]["2"] == [8, 8, 3, 3]
    other = net()
    dreamtune.load(other, path)
    torch.testing.assert_close(other(x), y, rtol=0, atol=1e-9)
    fast, _ = adapted(method, options, _fast=True)
    torch.testing.assert_close(fast(x), y, rtol=0, atol=1e-9)
    adapter.scale = 0.5
    half = model(x)
    adapter.merge()
    assert all(type(m) is nn.Conv2d for m in model)
    torch.testing.assert_close(model(x), half, rtol=0, atol=1e-9)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora", "oft", "ether"])
def test_slots_and_routes(method, fast):
    """Blocks of the batch, rows by route, and their gradients, are each slot's alone."""
    model, adapter = adapted(method, {}, slots=2, seed=[1, 2], _fast=fast)
    x = picture(4)
    alone = []
    for slot in range(2):
        single = net()
        one = dreamtune.inject(single, method, target_modules=["*"])
        one.load_state_dict(adapter.state_dict(slot))
        alone.append(single(x))
    y = model(x)
    torch.testing.assert_close(y, torch.cat([alone[0][:2], alone[1][2:]]), rtol=0, atol=1e-9)
    y[:2].square().sum().backward()
    for p in adapter.parameters():
        assert torch.count_nonzero(p.grad[:, 0]) and not torch.count_nonzero(p.grad[:, 1])
    rows = torch.tensor([1, 0, 0, 1])
    adapter.route(rows)
    want = torch.stack([alone[slot][row] for row, slot in enumerate(rows)])
    with torch.no_grad():
        torch.testing.assert_close(model(x), want, rtol=0, atol=1e-9)


def test_a_change_is_not_lost_in_channels_last_or_autocast():
    model, adapter = adapted("delora", {"rank": 2})
    y = model(picture()).detach()
    model.to(memory_format=torch.channels_last)
    last = picture().to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(last), y, rtol=0, atol=1e-9)
    model.float()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        narrow = model(picture().float())
    assert narrow.dtype == torch.bfloat16
    assert float((narrow.double() - y).norm() / y.norm()) < 0.03


def test_a_copy_has_the_change():
    model, adapter = adapted("dora", {"rank": 2}, slots=2)
    x = picture()
    y = model(x)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), y)
    adapter.eject()
    torch.testing.assert_close(twin(x), y)


def test_the_fast_way_trains_and_lets_go():
    """Convolutions are rows of one tensor there, and their own again afterwards."""
    model, adapter = adapted("delora", {"rank": 2}, _fast=True)
    x, first = picture(), None
    optimizer = torch.optim.AdamW(adapter.parameter_groups(1e-2))
    for _ in range(5):
        loss = model(x).square().mean()
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.98 * first
    with torch.no_grad():
        y = model(x)
        plain = net()
        dreamtune.inject(plain, "delora", target_modules=["*"], rank=2).load_state_dict(
            adapter.state_dict()
        )
        torch.testing.assert_close(plain(x), y, rtol=0, atol=1e-9)
        adapter.slow_down()
        torch.testing.assert_close(model(x), y, rtol=0, atol=1e-9)
        adapter.speed_up()
        torch.testing.assert_close(model(x), y, rtol=0, atol=1e-9)
    adapter.eject()
    for layer, old in zip(model, net()):
        assert torch.equal(layer.weight, old.weight)
        assert layer.weight.untyped_storage().nbytes() == layer.weight.nbytes


def test_factors_stay_where_a_recorded_forward_reads_them():
    model, adapter = adapted("lora", {}, _fast=True)
    seen = []
    with torch.no_grad():
        for _ in range(2):
            model(picture())
            (part, *_) = adapter.groups[0].stack.parts
            seen.append((part.factors.up.data_ptr(), part.factors.up.clone()))
            disturb(adapter)
    assert seen[0][0] == seen[1][0] and not torch.equal(seen[0][1], seen[1][1])
