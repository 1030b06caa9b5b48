"""A layer that is several in one weight: each method acts on each part as on a layer of its own."""

from __future__ import annotations

import copy
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tiny import cases, disturb
from torch import Tensor, nn

import dreamtune
from dreamtune import METHODS
from dreamtune.adapters.in_parts import apart, joined
from dreamtune.fields import UnreadableFile
from dreamtune.files.native import load_adapter_file
from dreamtune.files.tensors import read_tensors, write_tensors
from dreamtune.injection import parts as table
from dreamtune.injection.bank import Bank, owners
from dreamtune.injection.inject import InjectedAdapter
from dreamtune.injection.placing import Placing

SIZES = {"q": 16, "k": 16, "v": 16, "mlp": 32}
HEIGHTS = list(SIZES.values())
LAYER = "to_qkv_mlp_proj"


def block(bias: bool = False) -> nn.Module:
    from diffusers.models.transformers.transformer_flux2 import Flux2ParallelSelfAttention

    return Flux2ParallelSelfAttention(16, heads=2, dim_head=8, mlp_ratio=1.0, bias=bias)


class Net(nn.Module):
    """Two fused layers, and one of a piece that has the shape of a part."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([block(bias), block(bias)])
        self.plain = nn.Linear(16, 16)

    def forward(self, sample: Tensor, cross_attention_kwargs: Any = None) -> Tensor:
        first, second = (b.get_submodule(LAYER) for b in self.blocks)
        y = torch.tanh(first(torch.tanh(self.plain(sample))))
        return second(y[..., :16] + y[..., -16:])  # type: ignore[no-any-return]


def sample(rows: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 3, 16, generator=torch.Generator().manual_seed(1), dtype=dtype)


def injected(method: str, net: nn.Module | None = None, **more: Any) -> InjectedAdapter:
    net = Net().double() if net is None else net
    targets = more.pop("target_modules", [LAYER, "plain"])
    adapter = dreamtune.inject(net, method, target_modules=targets, **more)
    disturb(adapter, size=0.3)
    return adapter


def alone(method: str, options: dict[str, Any], weight: Tensor, state: dict[str, Tensor]) -> Tensor:
    """W', each part's rows by the method on a weight that is that part."""
    found = []
    for name, rows in zip(SIZES, weight.split(HEIGHTS)):
        adapter = METHODS[method](rows.clone(), **options)  # type: ignore[arg-type]
        own = {k: t[None] for k, t in state.items() if k.startswith(f"{name}.")}
        adapter.load_state_dict({k.removeprefix(f"{name}."): t for k, t in own.items()})
        found.append(adapter.merged(rows)[0].detach())
    return torch.cat(found)


def dense(adapter: InjectedAdapter, options: dict[str, Any], slot: int = 0) -> Tensor:
    """The output of `Net`, by weights that are made whole."""
    net, weights, state = Net().double(), adapter.weights(), adapter.state_dict(slot)
    options = METHODS[adapter.method].one_slot(options, slot)
    for path, weight in weights.items():
        own = {k.removeprefix(f"{path}."): t for k, t in state.items() if k.startswith(f"{path}.")}
        if path == "plain":
            whole = METHODS[adapter.method](weight.clone(), **options)  # type: ignore[arg-type]
            whole.load_state_dict({k: t[None] for k, t in own.items()})
            new = whole.merged(weight)[0].detach()
        else:
            new = alone(adapter.method, options, weight, own)
        net.get_submodule(path).weight.data = new
    return net(sample()).detach()  # type: ignore[no-any-return]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(("method", "options"), cases())
def test_each_part_is_a_layer_of_its_own(
    method: str, options: dict[str, Any], fast: bool, tmp_path: Path
) -> None:
    """Forward, saved and loaded, merged: all are the method on each part, made dense."""
    adapter = injected(method, _fast=fast, **options)
    net = adapter.model
    assert {g.key for g in adapter.groups} == {"80x16(q,k,v,mlp)", "16x16"}
    wanted, plain = dense(adapter, options), Net().double()(sample()).detach()
    assert float((wanted - plain).abs().max()) > 1e-3
    y = net(sample())
    close(y, wanted)
    y.square().sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in adapter.parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in adapter.parameters()) == len(list(adapter.parameters()))
    path = adapter.save(tmp_path)
    other = Net().double()
    again = dreamtune.load(other, path)
    with torch.no_grad():
        close(other(sample()), wanted)
    assert again.parts == {f"blocks.{i}.{LAYER}": SIZES for i in range(2)}
    assert again.file().tensors.keys() == adapter.file().tensors.keys()
    adapter.merge()
    close(net(sample()), wanted)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fast", [False, True])
def test_slots_and_routes(method: str, fast: bool) -> None:
    """Each row has the adapter of its slot, which starts as it would alone."""
    rows = torch.tensor([1, 0, 0, 1])
    start = dreamtune.inject(Net().double(), method, target_modules=LAYER, seed=4).state_dict()
    both = dreamtune.inject(Net().double(), method, target_modules=LAYER, seed=[3, 4], slots=2)
    for name, tensor in both.state_dict(1).items():
        assert torch.equal(tensor, start[name]), name
    adapter = injected(method, slots=2, seed=[3, 4], _fast=fast)
    wanted = torch.stack([dense(adapter, {}, slot) for slot in range(2)])
    close(adapter.model(sample()), torch.cat([wanted[0, :2], wanted[1, 2:]]))  # equal blocks
    adapter.route(rows)
    with torch.no_grad():
        close(adapter.model(sample()), wanted[rows, torch.arange(4)])


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu(method: str) -> None:
    """In bf16, where a part's rows, a view, have kernels of their own; and recorded."""
    net = Net().to("cuda", torch.bfloat16)
    adapter = injected(method, net, _fast=True)
    x = sample().to("cuda", torch.bfloat16)
    with torch.no_grad():
        y = net(x)
        weights = {p: w.double().cpu() for p, w in adapter.weights().items()}
        state = {k: t.double().cpu() for k, t in adapter.state_dict().items()}
        other = Net().double()
        for path, weight in weights.items():
            other.get_submodule(path).weight.data = weight
        other.plain.bias.data = net.plain.bias.double().cpu()
        dreamtune.inject(other, method, target_modules=[LAYER, "plain"]).load_state_dict(state)
        wanted = other(sample().bfloat16().double())
        assert float((y.double().cpu() - wanted).norm() / wanted.norm()) < 0.02
        adapter.refresh()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = net(x)
        graph.replay()
        assert torch.equal(recorded, y)


def test_strengths_of_slots_and_lambdas() -> None:
    adapter = injected("delora", slots=2, rank=2, lambda_init=[2.0, 6.0])
    for slot, strength in enumerate((2.0, 6.0)):
        file = adapter.file(slot)
        assert file.options["lambda_init"] == strength and not file.layer_options
    options = {"rank": 2, "lambda_init": [2.0, 6.0]}
    wanted = [dense(adapter, options, slot) for slot in range(2)]
    close(adapter.model(sample()), torch.cat([wanted[0][:2], wanted[1][2:]]))


def test_options_of_an_entry(tmp_path: Path) -> None:
    """A fused layer with options of its own, in a forward, a file and a plain one."""
    entries = {f"*.0.{LAYER}": {"rank": 3}, LAYER: {}}
    adapter = injected("delora", rank=2, target_modules=entries)
    keys = {g.key: g.adapter.parts[0].A.shape[-2] for g in adapter.groups}  # type: ignore[attr-defined]
    assert keys == {"80x16(q,k,v,mlp):rank=3": 3, "80x16(q,k,v,mlp)": 2}
    wanted = adapter.model(sample())
    for path in (adapter.save(tmp_path), dreamtune.export(adapter, tmp_path / "p", "peft")):
        other = Net().double()
        dreamtune.load(other, path)
        close(other(sample()), wanted, 1e-5)
    assert load_adapter_file(tmp_path).layer_options == {f"blocks.0.{LAYER}": {"rank": 3}}


def test_rates_are_those_of_the_method() -> None:
    for method, ratios in {"lora": {"B": 4.0}, "delora": {"lambda_": 0.1}}.items():
        options = {"loraplus_lr_ratio": 4.0} if method == "lora" else {"lambda_learning_rate": 0.1}
        adapter = injected(method, **options)
        names = {id(p): n for n, p in adapter.named_parameters()}
        assert "80x16(q,k,v,mlp).mlp.A" in names.values()
        for group in adapter.parameter_groups(1.0, weight_decay=0.5):
            for p in group["params"]:
                name = names[id(p)].rpartition(".")[2]
                assert group["lr"] == ratios.get(name, 1.0), names[id(p)]
                assert group["weight_decay"] == (0.0 if name == "lambda_" else 0.5)


def test_blocks_that_do_not_divide_a_part_are_refused_with_its_width() -> None:
    net = Net()
    with pytest.raises(ValueError, match=r"its part `q` \(16x16\).*output width, here 16, got 5"):
        dreamtune.inject(net, "ether", target_modules=LAYER, blocks=5, side="output")
    with pytest.raises(ValueError, match=r"`blocks.0.\w+` \(80x16\), chosen by .*here 16, got 17"):
        dreamtune.inject(net, "deft", target_modules=LAYER, rank=17, projection="qr")
    assert all(type(b.get_submodule(LAYER)) is nn.Linear for b in net.blocks)


def test_sizes_that_are_not_the_layers_are_refused() -> None:
    net = Net()
    net.blocks[1].inner_dim = 15  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"blocks.1.* of 80 outputs are `q` 15, `k` 15, `v` 15, "):
        dreamtune.inject(net, "lora", target_modules=LAYER)
    assert all(type(b.get_submodule(LAYER)) is nn.Linear for b in net.blocks)


def test_another_fused_layer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Joint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width, self.kv = 6, nn.Linear(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.kv(x)  # type: ignore[no-any-return]

    line = {("Joint", "kv"): lambda layer: {"k": layer.width, "v": layer.width}}
    monkeypatch.setattr(table, "FUSED", line)
    adapter = dreamtune.inject(Joint(), "lora", target_modules="kv", rank=1)
    assert adapter.parts == {"kv": {"k": 6, "v": 6}}
    assert {n: tuple(t.shape) for n, t in adapter.state_dict().items()} == {
        "kv.k.A": (1, 4), "kv.k.B": (6, 1), "kv.v.A": (1, 4), "kv.v.B": (6, 1),
    }  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    ranks=st.data(),
    width=st.integers(1, 6),
    seed=st.integers(0, 10**6),
)
def test_factors_of_parts_are_those_of_the_whole(
    sizes: list[int], ranks: st.DataObject, width: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    each = [ranks.draw(st.integers(1, 3)) for _ in sizes]
    pairs = [
        (torch.randn(2, h, r, generator=g), torch.randn(2, r, width, generator=g))
        for h, r in zip(sizes, each)
    ]
    up, down = joined(*zip(*pairs))
    assert up.shape == (2, sum(sizes), len(sizes) * max(each)) and down.shape[-1] == width
    close(up @ down, torch.cat([u @ d for u, d in pairs], -2), 1e-5)
    for (u, d), (own_up, own_down) in zip(pairs, apart(up, down, sizes), strict=True):
        close(own_up @ own_down, u @ d, 1e-5)
        assert own_up.shape[-1] == max(each)


# Files


def whole(monkeypatch: pytest.MonkeyPatch, method: str, path: Path, **more: Any) -> InjectedAdapter:
    """As before there were parts: an adapter of the whole layers, saved."""
    with monkeypatch.context() as patch:
        patch.setattr(table, "FUSED", {})
        adapter = injected(method, **more)
        adapter.save(path)
    return adapter


@pytest.mark.parametrize("method", METHODS)
def test_files_of_whole_layers_are_of_whole_layers(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 2, of those that knew no parts: alone, with an adapter in parts, and of many."""
    old = whole(monkeypatch, method, tmp_path / "old.safetensors")
    with safe_open(tmp_path / "old.safetensors", "pt") as file:
        about = json.loads(file.metadata()["dreamtune"])
    assert about["format_version"] == 2 and "parts" not in about
    new = injected(method, seed=5).save(tmp_path / "new.safetensors")
    files = {"old": tmp_path / "old.safetensors", "new": new}
    net, base = Net().double(), Net().double()(sample())
    with torch.no_grad():
        wanted = old.model(sample())
        assert dreamtune.load(net, files["old"], name="old").parts == {}
        close(net(sample()), wanted)
        dreamtune.load(net, files["new"], name="new")
        weights = {}
        for scale in (0.0, 1.0):
            dreamtune.set_adapters(net, {"new": 1.0, "old": scale})
            merged = copy.deepcopy(net)
            dreamtune.merge(merged)
            close(net(sample()), merged(sample()))
            weights[scale] = merged.blocks[0].get_submodule(LAYER).weight.clone()  # type: ignore[union-attr]
        change = (
            old.groups[0]
            .changes[0]
            .difference(Net().double().blocks[0].get_submodule(LAYER).weight)
        )  # type: ignore[arg-type]
        close(weights[1.0] - weights[0.0], change)
        dreamtune.set_adapters(net, {"new": 1.0})
        alone_new = net(sample())
        with dreamtune.route(net, ["old", "new", None, {"old": 0.5, "new": 0.5}]):
            routed = net(sample())
        many = Net().double()
        dreamtune.load_many(many, files)
        with dreamtune.route(many, ["old", "new", None, {"old": 0.5, "new": 0.5}]):
            close(many(sample()), routed, 1e-6)
    close(routed[0], wanted[0])
    close(routed[1], alone_new[1])
    close(routed[2], base[2].detach())


def edited(path: Path, **values: Any) -> Path:
    file = read_tensors(path)
    write_tensors(path, file.tensors, {**json.loads(json.dumps(file.about)), **values})
    return path


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"x": [["q", 80]]}, "has parts, but no shape, of `x`"),
        ({f"blocks.0.{LAYER}": [["q", 16]]}, "a weight of 80 outputs are `q` 16"),
        ({f"blocks.0.{LAYER}": [["q", -16], ["k", 96]]}, "`parts` must be at least 1"),
        ({f"blocks.0.{LAYER}": [["q", 40], ["q", 40]]}, "two parts of one name"),
        ({f"blocks.0.{LAYER}": [["a.b", 40], ["c", 40]]}, "a name of its own, got 'a.b'"),
        ({f"blocks.0.{LAYER}": [["slots", 40], ["c", 40]]}, "a name of its own, got 'slots'"),
        ({f"blocks.0.{LAYER}": []}, "tensors do not fit"),
        ({f"blocks.0.{LAYER}": 3}, "`parts` must be of type list"),
        ([], "`parts` must be of type dict"),
        (
            {f"blocks.{i}.{LAYER}": [["k", 16], ["q", 16], ["v", 16], ["mlp", 32]] for i in (0, 1)},
            r"parts of `blocks.0.\w+` are \{'q': 16, .* here and \{'k': 16, .* in the file",
        ),
    ],
)
def test_headers_are_checked(parts: Any, message: str, tmp_path: Path) -> None:
    path = edited(injected("lora", rank=2).save(tmp_path / "a.safetensors"), parts=parts)
    kind = ValueError if "in the file" in message else UnreadableFile
    net = Net().double()
    with pytest.raises(kind, match=message):
        dreamtune.load(net, path)
    assert all(type(b.get_submodule(LAYER)) is nn.Linear for b in net.blocks)


def test_the_header_tells_the_parts_in_their_order(tmp_path: Path) -> None:
    path = injected("lora", rank=2).save(tmp_path / "a.safetensors")
    file = load_adapter_file(path)
    assert [list(own.items()) for own in file.parts.values()] == [list(SIZES.items())] * 2
    assert read_tensors(path).about["format_version"] == 4
    plain = injected("lora", rank=2, target_modules="plain").save(tmp_path / "b.safetensors")
    assert read_tensors(plain).about["format_version"] == 2


@pytest.mark.parametrize(("method", "options"), [("dora", {"rank": 3, "alpha": 6}), ("hra", {})])
def test_in_pefts_own_words(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    """DoRA in parts is one of the whole, others a plain LoRA; rotations of parts are refused."""
    from peft import PeftModel

    adapter = injected(method, Net(bias=True).float(), **options)
    wanted = adapter.model(sample(dtype=torch.float32))
    path = dreamtune.export(adapter, tmp_path, "peft")
    there = PeftModel.from_pretrained(Net(bias=True), path.parent)
    close(there(sample(dtype=torch.float32)), wanted, 2e-5)
    config = json.loads((path.parent / "adapter_config.json").read_text())
    assert bool(config.get("use_dora")) is (method == "dora")
    here = Net(bias=True)
    assert dreamtune.load(here, path).parts == {}
    close(here(sample(dtype=torch.float32)), wanted, 2e-5)
    with pytest.raises(ValueError, match=r"parts q, k, v, mlp of `blocks.0.*export it as `merged`"):
        dreamtune.export(injected("oft"), tmp_path / "o", "peft")


def test_in_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a compiled network and a recorded forward have it: rotations of parts beside one of the
    whole, of as many blocks.
    """
    whole(monkeypatch, "oft", tmp_path / "old.safetensors", blocks=8)
    new = injected("oft", seed=5, blocks=2).save(tmp_path / "new.safetensors")
    net = Net().double()
    dreamtune.load(net, tmp_path / "old.safetensors", name="old")
    dreamtune.load_many(net, {"new": new})
    (bank,) = owners(net, Bank)
    mixes: list[Any] = [{"old": 1.0, "new": 1.0}, {"new": 0.5}]
    rows = ["new", None, {"new": 0.5, "old": 2.0}, "old"]
    with torch.no_grad():
        for strengths in (*mixes, rows):
            with ExitStack() as routed:
                if strengths is rows:
                    routed.enter_context(dreamtune.route(net, rows))
                else:
                    dreamtune.set_adapters(net, strengths)
                wanted = net(sample())
                tables = Placing(net, bank).tables()
                assert tables is not None
                layers = [layer for layer in tables.pairs if layer.weight.shape[0] == 80]
                kinds = [{f.rotation.shape[-3:] for f, _ in tables.pairs[x]} for x in layers]  # type: ignore[union-attr]
                assert kinds[0] <= {(8, 2, 2), (8, 8, 8)} and kinds[0]
                with tables.placed():
                    close(net(sample()), wanted)
