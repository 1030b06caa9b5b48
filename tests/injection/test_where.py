"""Which layers are adapted, and with which options; errors list what there is."""

import json

import pytest
import torch
from safetensors import safe_open
from tiny import disturb, tiny_unet, unet_inputs
from torch import nn

import dreamtune
from dreamtune.files.layers import factors_of_adapter
from dreamtune.files.native import load_adapter_file
from dreamtune.injection import targets
from dreamtune.injection.targets import TARGET_MODULES, find_targets


class Block(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.query, self.value = nn.Linear(6, 6), nn.Linear(6, 4)
        self.conv = nn.Conv2d(4, 6, 3, groups=groups)
        self.norm, self.table = nn.LayerNorm(6), nn.Embedding(3, 6)


def model(**options):
    torch.manual_seed(0)
    return nn.ModuleDict({"a": Block(**options), "b": Block(), "ab": nn.ModuleList([Block()])})


@pytest.mark.parametrize(
    "entries,paths",
    [
        ("query", ["a.query", "b.query", "ab.0.query"]),
        (["0.value", "query"], ["a.query", "b.query", "ab.0.query", "ab.0.value"]),
        (["b.query"], ["b.query"]),
        (["0.query"], ["ab.0.query"]),
        (["a.*"], ["a.query", "a.value", "a.conv"]),
        (["a?.0.[qv]*"], ["ab.0.query", "ab.0.value"]),
        (["re:(a|b).conv"], ["a.conv", "b.conv"]),
        ({"a.[!c]*": {"rank": 1}, "re:.*y": {}}, ["a.query", "a.value", "b.query", "ab.0.query"]),
    ],
)  # fmt: skip
def test_names_globs_and_expressions(entries, paths):
    assert list(find_targets(model(), entries)) == paths
    adapter = dreamtune.inject(model(), "lora", target_modules=entries)
    assert sorted(n for g in adapter.groups for n in g.names) == sorted(paths)


@pytest.mark.parametrize(
    "entries,method,options,message",
    [
        (["query", "qury"], "lora", {}, r"matches `qury`\. `ModuleDict` has `query` \(3 L"),
        (TARGET_MODULES, "lora", {}, r"`to_q`, `to_k`, .*`conv` \(3 Conv2d\)\. A name is a whole"),
        (["re:.*que", "a.query"], "lora", {}, r"no layer matches `re:\.\*que`"),
        (["norm"], "lora", {}, "`norm` matches only 3 LayerNorm; adapted are torch's `Linear` and"),
        (["re:.*(table|norm)"], "lora", {}, "matches only 3 LayerNorm, 3 Embedding"),
        (["b"], "lora", {}, "`b` matches only 1 Block"),
        ([], "lora", {}, "`target_modules` is empty"),
        (["re:("], "lora", {}, r"`re:\(` is no expression: missing \)"),
        ({"query": 3}, "lora", {}, "names with options of the method, got 'query': 3"),
        ({"*": {"rank": 2}, "query": {}}, "lora", {}, "`query` matches only layers of the entries"),
        ({"query": {"rnk": 2}}, "lora", {}, "_modules`, `query`: `lora` has no option `rnk`"),
        ({"query": {"rank": 0}}, "lora", {}, "_modules`, `query`: `rank` must be at least 1"),
        (["query", "a.value"], "ether", {"blocks": 4}, r"`a.query` \(6x6\), chosen by `query`: `b"),
        (["a.*"], "oft", {"blocks": 4}, r"`a.query` \(6x6\), chosen by `a.\*`: `blocks` must div"),
        ({"a.*": {"rank": 5}}, "deft", {"projection": "qr"}, r"`a.value` \(4x6\), chosen by `a.\*"),
        ({"a.*": {"timestep_floor": 0.5}, "b.*": {}}, "delora", {}, "`b.*`: the strength must de"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(entries, method, options, message):
    net = model()
    before = [type(m) for m in net.modules()]
    with pytest.raises(ValueError, match=message):
        dreamtune.inject(net, method, target_modules=entries, **options)
    assert [type(m) for m in net.modules()] == before


def test_layers_of_other_kinds_are_refused_by_name():
    class Quantized(nn.Linear):
        pass

    net = model(groups=2)
    with pytest.raises(ValueError, match="`a.conv` is a `Conv2d` of 2 groups: only 1 is supported"):
        dreamtune.inject(net, "lora", target_modules=["*.conv"])
    net["a"].query = Quantized(6, 6)
    with pytest.raises(ValueError, match="`a.query` must be a torch `Linear` or `Conv2d`, got `Qu"):
        dreamtune.inject(net, "lora", target_modules=["*.query"])
    net["a"].value = nn.Conv1d(1, 1, 1)
    with pytest.raises(ValueError, match="`a.value` must be a torch .* got `Conv1d`"):
        dreamtune.inject(net, "lora", target_modules=["value"])
    assert list(find_targets(net, ["*.value"])) == ["b.value", "ab.0.value"]
    net["b"].query.weight = nn.Parameter(torch.ones(6, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="weight of `b.query` is a `Tensor` of torch.int8: quant"):
        dreamtune.inject(net, "lora", target_modules=["b.query"])
    encoder = nn.TransformerEncoderLayer(8, 2)
    with pytest.raises(ValueError, match=r"`linear1` is of torch's .*set_fastpath_enabled"):
        dreamtune.inject(encoder, "lora", target_modules=["linear1"])


def test_the_weight_of_two_layers_is_not_merged():
    net = model()
    net["a"].query.weight = net["b"].query.weight
    net["again"] = net["b"]  # the layer itself twice is no other layer
    adapter = dreamtune.inject(net, "lora", target_modules=["b.query"])
    disturb(adapter)
    with pytest.raises(ValueError, match="`a.query` and `b.query` have one weight, which a"):
        adapter.merge()
    net["a"].query.weight = nn.Parameter(net["b"].query.weight.detach().clone())
    adapter.merge()
    assert not torch.equal(net["a"].query.weight, net["b"].query.weight)


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_weight_that_is_made_anew_is_not_merged(norm):
    made = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    norm(made[0])
    adapter = dreamtune.inject(made, "lora", rank=2, target_modules="0")
    with pytest.raises(ValueError, match="the weight of `0` is made anew at each forward"):
        adapter.merge()


def test_a_child_called_base_layer_is_a_child():
    made = nn.ModuleDict({"base_layer": nn.Linear(4, 4), "level1": nn.Linear(4, 4)})
    found = find_targets(nn.ModuleDict({"backbone": made}), "*")
    assert list(found) == ["backbone.base_layer", "backbone.level1"]


@pytest.mark.parametrize("form", ["native", "peft"])
def test_a_path_that_is_the_end_of_another_means_itself_alone(form, tmp_path):
    def nest():
        torch.manual_seed(0)
        inner = nn.ModuleDict({"proj": nn.Linear(4, 4)})
        return nn.ModuleDict({"proj": nn.Linear(4, 4), "inner": inner})

    adapter = dreamtune.inject(nest(), "lora", rank=2, target_modules="re:proj")
    disturb(adapter)
    file = dreamtune.export(adapter, tmp_path / "first", "peft")
    if form == "native":
        file = dreamtune.export(file, tmp_path / "second", form, base=nest())
        loaded = dreamtune.load(nest(), file)
        assert list(loaded.weights()) == ["proj"]
        return
    from peft import PeftModel

    x = torch.randn(3, 4)
    wrapped = PeftModel.from_pretrained(nest(), file.parent).base_model.model
    torch.testing.assert_close(wrapped["proj"](x), adapter.model["proj"](x))
    torch.testing.assert_close(wrapped["inner"]["proj"](x), adapter.model["inner"]["proj"](x))


@pytest.mark.parametrize("fast", [False, True])
def test_options_by_entry(fast, tmp_path):
    """Each layer is what it would be with its options alone; the file has them."""
    entries = {"*.attn1.*": {"rank": 3, "lambda_init": 2.0}, "re:.*ff\\.net\\.2": {}, "to_q": {}}
    unet, inputs = tiny_unet(torch.float64), unet_inputs(2, torch.float64)
    adapter = dreamtune.inject(unet, "delora", target_modules=entries, rank=2, _fast=fast)
    keys = {group.key for group in adapter.groups}
    assert {"32x32", "32x128", "48x48", "32x32:lambda_init=2.0,rank=3"} <= keys
    ranks = {n: g.adapter.A.shape[-2] for g in adapter.groups for n in g.names}
    assert {r for n, r in ranks.items() if ".attn1." in n} == {3}
    assert {r for n, r in ranks.items() if ".attn1." not in n} == {2}
    assert {n.rpartition("blocks.0.")[2] for n in ranks if ".attn1." not in n} == {
        "ff.net.2", "attn2.to_q",
    }  # fmt: skip
    assert adapter.options["rank"] == 2
    disturb(adapter)
    y = unet(*inputs).sample
    y.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())
    path = adapter.save(tmp_path)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["dreamtune"])
    assert about["format_version"] == 3 and about["target_modules"] == list(entries)
    assert len(about["layer_options"]) == 16
    other = tiny_unet(torch.float64)
    loaded = dreamtune.load(other, path)
    torch.testing.assert_close(other(*inputs).sample, y, rtol=0, atol=1e-9)
    first, again = adapter.file(), loaded.file()
    assert (again.layer_options, again.shapes, again.options, again.target_modules) == (
        first.layer_options, first.shapes, first.options, first.target_modules,
    )  # fmt: skip
    adapter.merge()
    torch.testing.assert_close(unet(*inputs).sample, y, rtol=0, atol=1e-9)


def test_ranks_by_entry_are_exported(tmp_path):
    unet, inputs = tiny_unet(torch.float64), unet_inputs(2, torch.float64)
    entries = {"attn1.to_q": {"rank": 1}, "to_v": {"rank": 3}}
    adapter = dreamtune.inject(unet, "delora", target_modules=entries)
    disturb(adapter)
    y = unet(*inputs).sample
    for source in (adapter, adapter.save(tmp_path)):
        path = dreamtune.export(source, tmp_path / "out", base=unet)
        dreamtune.load(other := tiny_unet(torch.float64), path)
        torch.testing.assert_close(other(*inputs).sample, y, rtol=0, atol=1e-5)


def test_rates_are_those_of_each_entry():
    entries = {"query": {"loraplus_lr_ratio": 4.0}, "value": {}}
    adapter = dreamtune.inject(model(), "lora", target_modules=entries)
    names = {id(p): n for n, p in adapter.named_parameters()}
    groups = adapter.parameter_groups(1.0)
    assert {g["lr"]: {names[id(p)] for p in g["params"]} for g in groups} == {
        1.0: {"6x6:loraplus_lr_ratio=4.0.A", "4x6.A", "4x6.B"},
        4.0: {"6x6:loraplus_lr_ratio=4.0.B"},
    }


def test_files_without_the_new_things_are_of_version_2(tmp_path):
    net = model()
    same = {"query": {"rank": 2}, "b.value": {}}  # what `rank=2` is for all anyway
    adapter = dreamtune.inject(net, "lora", target_modules=same, rank=2)
    assert [group.key for group in adapter.groups] == ["6x6", "4x6"]
    with safe_open(adapter.save(tmp_path), "pt") as file:
        about = json.loads(file.metadata()["dreamtune"])
    assert about["format_version"] == 2 and "layer_options" not in about
    assert load_adapter_file(tmp_path).layer_options == {}


def test_expressions_of_a_file_are_not_run(tmp_path, monkeypatch):
    """Somebody's expression may take ages: the layers are those that the file has."""
    adapter = dreamtune.inject(model(), "lora", target_modules=["re:(a|b).query"], rank=2)
    disturb(adapter)
    path = adapter.save(tmp_path)
    monkeypatch.setattr(targets, "matcher", lambda entry: pytest.fail("it was run"))
    loaded = dreamtune.load(model(), path)
    assert loaded.weights().keys() == {"a.query", "b.query"}
    assert loaded.target_modules == ("re:(a|b).query",)
    net = model()
    net["b"].query = nn.Linear(6, 5)
    with pytest.raises(ValueError, match=r"`b.query` is \(5, 6\) here and \(6, 6\) in the file"):
        dreamtune.load(net, path)


def test_layers_that_are_of_no_unet_leave_in_other_formats(tmp_path):
    adapter = dreamtune.inject(net := model(), "lora", target_modules=["query", "conv"], rank=2)
    disturb(adapter)
    wanted = {path: up @ down for path, (up, down) in factors_of_adapter(adapter).items()}
    for format in ("diffusers", "kohya"):
        with pytest.raises(
            ValueError, match="`a.query` is no layer of a UNet of diffusers, 6 layer"
        ):
            dreamtune.export(adapter, tmp_path, format)
    path = dreamtune.export(adapter, tmp_path, "peft")
    adapter.eject()
    loaded = factors_of_adapter(dreamtune.load(net, path))
    assert loaded.keys() == wanted.keys()
    for name, (up, down) in loaded.items():
        torch.testing.assert_close(up @ down, wanted[name], rtol=0, atol=1e-6)
