"""Compiled networks follow strengths and routes: the same numbers as plain ones, and one graph for
each kind of call.
"""

import copy
import warnings

import pytest
import torch
from pipelines import small_unet
from test_several_adapters import close
from tiny import disturb, images, tiny_pipeline
from torch import nn

import dreamtune
from dreamtune.injection.bank import owners
from dreamtune.injection.compiled import Around

METHODS = {"dog": "lora", "cat": "delora", "owl": "oft"}
LAYERS = ["first", "last"]


class Small(nn.Module):
    """Quick to compile."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, sample, cross_attention_kwargs=None):
        return self.last(torch.tanh(self.middle(torch.relu(self.first(sample)))))


def inputs(rows):
    return {"sample": torch.randn(rows, 3, 8, generator=torch.Generator().manual_seed(1))}


def written(network, folder, **more):
    found = {}
    for number, (name, method) in enumerate(METHODS.items()):
        options = {"blocks": 2} if method == "oft" else {"rank": 2}
        adapter = dreamtune.inject(network(), method, seed=number, **options, **more)
        disturb(adapter)
        found[name] = adapter.save(folder / name)
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return written(Small, tmp_path_factory.mktemp("small"), target_modules=LAYERS)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


class Counting:
    """A backend that counts the graphs that it is given, and runs them as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, given):
        self.graphs += 1
        return graph.forward


@torch.no_grad()
def out(unet, rows=2, **more):
    return unet(**inputs(rows), **more)


def pair(files, in_place):
    """(backend, what its owner has, the network in it, a plain one)."""
    unet, plain, backend = Small(), Small(), Counting()
    for each in (unet, plain):
        dreamtune.load(each, files["dog"], name="dog")
        dreamtune.load_many(each, {name: files[name] for name in ("cat", "owl")})
    if in_place:
        unet.compile(backend=backend)
        return backend, unet, unet, plain
    return backend, torch.compile(unet, backend=backend), unet, plain


@pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "in place"])
def test_other_values_are_no_other_graph(files, in_place):
    backend, compiled, _, plain = pair(files, in_place)
    both = (compiled, plain)
    counts = []
    for strengths in (
        {"dog": 1.0, "cat": 1.0}, {"dog": 0.5, "cat": 0.1}, {"cat": 2.0}, {"dog": {"first": 0.0}},
    ):  # fmt: skip
        for each in both:
            dreamtune.set_adapters(each, strengths)
        close(out(compiled), out(plain))
        counts.append(backend.graphs)
    assert len(set(counts)) == 1
    for rows in (["dog", "cat"], ["cat", None], [{"dog": 0.3, "cat": 0.5}, "dog"]):
        with dreamtune.route(compiled, rows), dreamtune.route(plain, rows):
            close(out(compiled), out(plain))
            counts.append(backend.graphs)
    assert len(set(counts)) == 2  # rows of their own are another graph, once
    if in_place:
        return
    # of another kind of change
    with dreamtune.route(compiled, ["owl", "dog"]), dreamtune.route(plain, ["owl", "dog"]):
        close(out(compiled), out(plain))


def test_parameters_and_weights_that_change_are_followed(files):
    backend, compiled, unet, plain = pair(files, in_place=False)
    for each in (compiled, plain):
        dreamtune.set_adapters(each, {"dog": 0.5})
    close(out(compiled), out(plain))
    count = backend.graphs
    with torch.no_grad():
        for each in (unet, plain):
            for group in dreamtune.get_adapters(each)["dog"].groups:
                for tensor in group.adapter.parameters():
                    tensor.data.mul_(1.5)
            each.middle.weight.mul_(1.1)
            dreamtune.get_adapters(each)["dog"].scale = 0.8
    close(out(compiled), out(plain))
    assert backend.graphs == count
    for each in (unet, plain):
        each.zero_grad()
        x = inputs(2)
        x["sample"].requires_grad_()
        (compiled if each is unet else plain)(**x).sum().backward()
        each.found = x["sample"].grad
    close(unet.found, plain.found, 1e-5)


def test_an_adapter_of_as_many_other_layers(tmp_path):
    compiled, plain = torch.compile(Small(), backend=Counting()), Small()
    for before, name in (("", "first"), ("first", "last")):
        (tmp_path / name).mkdir()
        file = written(Small, tmp_path / name, target_modules=[name])["dog"]
        for each in (compiled, plain):
            dreamtune.load_many(each, {name: file})
            if before:
                dreamtune.unload(each, before)
            dreamtune.set_adapters(each, {name: 0.5})
        close(out(compiled), out(plain))


def test_in_a_pipeline_and_back(tmp_path):
    files = written(small_unet, tmp_path)
    pipe, other = tiny_pipeline(small_unet()), tiny_pipeline(small_unet())
    pipe.unet = torch.compile(pipe.unet, backend=Counting())
    for each in (pipe, other):
        dreamtune.load_many(each, files)
    rows = ["dog", {"cat": 0.5, "owl": 1.0}]
    with dreamtune.route(pipe, rows), dreamtune.route(other, rows):
        close(images(pipe), images(other), 1e-5)
    twin = copy.deepcopy(pipe.unet)
    assert not isinstance(twin.forward, Around)
    (bank,) = owners(pipe.unet._orig_mod, type(owners(other.unet, object)[0]))
    assert bank.outside is not None
    for name in files:
        dreamtune.unload(pipe, name)
        dreamtune.unload(other, name)
    assert not isinstance(pipe.unet.forward, Around)


def test_what_is_compiled_inside_a_route(files):
    unet, plain = Small(), Small()
    for each in (unet, plain):
        dreamtune.load(each, files["dog"], name="dog")
    rows = ["dog", None]
    with dreamtune.route(unet, rows), dreamtune.route(plain, rows):
        compiled = torch.compile(unet, backend=Counting())
        close(out(compiled), out(plain))
        with dreamtune.route(compiled, rows[::-1]), dreamtune.route(plain, rows[::-1]):
            close(out(compiled), out(plain))
        close(out(compiled), out(plain))
