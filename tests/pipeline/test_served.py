"""Recorded forwards: the same numbers as plain ones for every adapter, strength and route, no new
recording where only values are others, and nothing stale.
"""

import copy
import pickle
import threading
import warnings

import pytest
import torch
from test_several_adapters import close, inputs, said, written
from tiny import disturb, images, tiny_pipeline, tiny_unet
from tiny_transformers import tiny
from torch.utils import _pytree as pytree

import dreamtune
from dreamtune.fast.served import Forward, Served, served
from dreamtune.fast.watch import why_not_recorded
from dreamtune.injection.bank import Bank, owners
from dreamtune.injection.inject import InjectedAdapter


class Repeated(Served):
    """Where there is no GPU: a replay runs the forward that was recorded, into the same places."""

    def _capture(self, run):
        leaves, spec = run()

        def replay():
            for place, x in zip(leaves, run()[0], strict=True):
                place.copy_(x)

        return replay, (leaves, spec)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return written(tmp_path_factory)


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def device(request, monkeypatch):
    # channels-last convolutions are others than diffusers', and in TF32 differ by 1e-3
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return request.param


def recorded(unet):
    """The model sped up, as `dreamtune.speed_up` does it on a GPU."""
    if next(unet.parameters()).device.type == "cuda":
        dreamtune.speed_up(unet)
        return served(unet)
    for adapter in InjectedAdapter.of(unet):
        adapter.slow_down()
    return Repeated(unet, Bank.on(unet, lambda: InjectedAdapter.of(unet)))


@torch.no_grad()
def out(unet, rows=4, **more):
    device = next(unet.parameters()).device
    given = {k: x.to(device) for k, x in inputs(rows).items()}
    return unet(**given, **more).sample.cpu()


def both(files, device, loaded=("dog", "owl"), many=("cat", "cow", "bee")):
    """(recorded, plain) models with the same adapters."""
    made = []
    for _ in range(2):
        unet = tiny_unet().to(device)
        for name in loaded:
            dreamtune.load(unet, files[name], name=name)
        dreamtune.load_many(unet, {name: files[name] for name in many})
        made.append(unet)
    return recorded(made[0]), *made


def agree(fast, plain, rows=4, **more):
    tolerance = 1e-5 if next(plain.parameters()).device.type == "cpu" else 1e-4
    for _ in range(3):  # eager, recorded, replayed
        close(out(fast, rows, **more), out(plain, rows, **more), tolerance)


def test_base_strengths_and_routes(files, device):
    recorder, fast, plain = both(files, device)
    mixes = [
        {}, {"dog": 1.0}, {"dog": 0.5, "cat": 0.25}, {"cow": 1.0, "owl": -0.5, "bee": 2.0},
        {"dog": {"down": 0.2, "mid": 2.0}, "cat": {"up": 0.5}},
    ]  # fmt: skip
    for strengths in mixes:
        for unet in (fast, plain):
            dreamtune.set_adapters(unet, strengths)
        agree(fast, plain)
    rows = ["dog", "cat", None, {"owl": 0.5, "bee": 1.5, "cow": 0.5}]
    with dreamtune.route(fast, rows), dreamtune.route(plain, rows):
        agree(fast, plain)
    agree(fast, plain, cross_attention_kwargs={"scale": 0.5})
    assert recorder.replays > 0


def test_the_base_alone_and_gone_adapters(files, device):
    unet, plain = tiny_unet().to(device), tiny_unet().to(device)
    recorder = recorded(unet)
    agree(unet, plain)
    assert recorder.recorded == 1
    dreamtune.load_many(unet, {"dog": files["dog"]})
    dreamtune.load(unet, files["cat"], name="cat")
    for name in ("dog", "cat"):
        dreamtune.load(plain, files[name], name=name)
    for each in (unet, plain):
        dreamtune.set_adapters(each, {"dog": 1.0, "cat": 1.0})
    agree(unet, plain)
    for name in ("dog", "cat"):
        dreamtune.unload(unet, name)
        dreamtune.unload(plain, name)
    agree(unet, plain)
    dreamtune.slow_down(unet)
    assert "forward" not in unet.__dict__ and not unet._forward_pre_hooks
    agree(unet, plain)


def test_an_adapter_of_as_many_other_layers(tmp_path, device):
    files = {}
    for name in ("to_q", "to_k"):
        adapter = dreamtune.inject(tiny_unet(), "lora", target_modules=[f"*.attn1.{name}"], rank=2)
        disturb(adapter)
        files[name] = adapter.save(tmp_path / name)
    for bring in (
        lambda unet, name: dreamtune.load(unet, files[name], name=name),
        lambda unet, name: dreamtune.load_many(unet, {name: files[name]}),
    ):
        unet, plain = tiny_unet().to(device), tiny_unet().to(device)
        recorder = recorded(unet)
        for name in files:
            for each in (unet, plain):
                bring(each, name)
                dreamtune.set_adapters(each, {name: 1.0})
            agree(unet, plain)
            assert served(unet) is recorder  # seen, and not taken for somebody else's change
            for each in (unet, plain):
                dreamtune.unload(each, name)


def test_strengths_of_parts_are_not_rounded(files):
    unet = tiny_unet().bfloat16()
    dreamtune.load_many(unet, {"dog": files["dog"]})
    recorder = recorded(unet)
    dreamtune.set_adapters(unet, {"dog": {"mid": 0.3, "up": 0.7}})
    with torch.no_grad():
        unet(**{k: x.to(x.dtype if x.dim() == 0 else unet.dtype) for k, x in inputs(2).items()})
    (tables,) = recorder.placing.kept.values()
    shelf = recorder.bank.shelf
    for layer, ((placed, _),) in tables.pairs.items():
        path = shelf.paths[layer]
        strength = {"mid": 0.3, "up_": 0.7}.get(path[:3], 1.0)
        own = shelf.factors("dog", layer.weight).of[path]
        right = (own.up.float() * strength).bfloat16()
        assert torch.equal(placed.up[..., : own.up.shape[-1]], right)


def test_values_change_without_a_recording(files, device):
    recorder, fast, plain = both(files, device, loaded=("dog",), many=("cat", "bee"))
    for unet in (fast, plain):
        dreamtune.set_adapters(unet, {"dog": 1.0, "cat": 1.0})
    agree(fast, plain)
    count = recorder.recorded
    for strengths in ({"dog": 0.5}, {"cat": 2.0, "dog": -1.0}, {"dog": {"mid": 0.0}}):
        for unet in (fast, plain):
            dreamtune.set_adapters(unet, strengths)
        agree(fast, plain)
    for route in (["dog", "cat", None, "dog"], [None, "cat", {"dog": 0.5}, "cat"]):
        with dreamtune.route(fast, route), dreamtune.route(plain, route):
            agree(fast, plain)
    assert recorder.recorded == count + 1  # rows of their own are another forward, once
    parameters = [
        next(iter(dreamtune.get_adapters(u)["dog"].groups)).adapter for u in (fast, plain)
    ]
    for adapter in parameters:  # trained meanwhile
        with torch.no_grad():
            for tensor in adapter.state_dict(keep_vars=True).values():
                tensor.mul_(1.5)
    for unet in (fast, plain):
        dreamtune.set_adapters(unet, {"dog": 1.0})
        dreamtune.get_adapters(unet)["dog"].scale = 0.7
    agree(fast, plain)
    with torch.no_grad():  # the base's weights in place
        for unet in (fast, plain):
            unet.conv_in.weight.mul_(1.1)
            unet.mid_block.resnets[0].conv1.bias.add_(0.1)
    agree(fast, plain)
    assert recorder.recorded == count + 1


def test_other_shapes_and_arguments(files, device):
    recorder, fast, plain = both(files, device, loaded=("dog",), many=())
    for rows in (1, 4, 2, 4):
        agree(fast, plain, rows)
    for unet in (fast, plain):
        assert next(unet.parameters()).device.type == device
    given = {k: x.to(device) for k, x in inputs(2).items()}
    with torch.no_grad():
        for step in (1, 7, 500, 7):  # a number is no new graph
            a, b = (
                unet(given["sample"], step, given["encoder_hidden_states"], return_dict=False)[0]
                for unet in (fast, plain)
            )
            close(a.cpu(), b.cpu(), 1e-4)
    assert recorder.recorded == 4  # of 1, 4 and 2 rows, and of the last kind of call
    wild = out(fast, 4, class_labels=None)
    close(wild, out(plain, 4), 1e-4)
    for each in (fast, plain):  # with gradients it is the plain model
        x = given["sample"].clone().requires_grad_()
        each(x, 3, given["encoder_hidden_states"]).sample.sum().backward()
        each.found = x.grad.cpu()
    close(fast.found, plain.found, 1e-4)


def test_memory_that_no_graph_holds_is_not_recorded_into(monkeypatch):
    """A pool ends with its last graph: the next recording has a new one, and no error."""
    monkeypatch.setattr("dreamtune.fast.served.GRAPHS", 2)
    unet = tiny_unet()
    recorder, pools, failing = recorded(unet), [], []
    capture = recorder._capture

    def told(run):
        pools.append(recorder.pool.handle)
        if failing:
            raise RuntimeError(failing.pop())
        return capture(run)

    monkeypatch.setattr(recorder, "_capture", told)
    for rows in (1, 1, 2, 2):
        out(unet, rows)
    assert pools[0] == pools[1]  # shared while there is a graph
    for rows in (3, 4, 4):  # two kinds that came once let both go
        out(unet, rows)
    assert pools[2] != pools[1]
    recorder._look()
    failing.append("no memory")
    out(unet, 1)
    with pytest.raises(RuntimeError, match="no memory"):
        out(unet, 1)
    out(unet, 1)
    assert len(set(pools[2:])) == len(pools[2:]) == 3


def test_who_touches_the_model_has_it_plain(files, device):
    def with_hook(unet):
        unet.mid_block.register_forward_hook(lambda m, a, y: y * 2)

    def freeu(unet):
        for block in unet.up_blocks:
            block.s1, block.s2, block.b1, block.b2 = 0.9, 0.2, 1.2, 1.4

    def new_weight(unet):
        unet.conv_in.weight = torch.nn.Parameter(unet.conv_in.weight.detach() * 2)

    def processors(unet):
        unet.set_attention_slice(1)

    def cast(unet):
        unet.double().float()

    def replaced(unet):
        unet.conv_out = torch.nn.Conv2d(32, 4, 3, padding=1).to(unet.device)
        torch.nn.init.constant_(unet.conv_out.weight, 0.01)
        torch.nn.init.zeros_(unet.conv_out.bias)

    for touch in (with_hook, freeu, new_weight, processors, replaced, cast):
        recorder, fast, plain = both(files, device, loaded=("dog",), many=())
        agree(fast, plain)
        touch(fast)
        touch(plain)
        if touch is cast:  # may lie where it lay
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                agree(fast, plain)
            continue
        with pytest.warns(UserWarning, match="the network is slowed down, for"):
            found = out(fast)
        close(found, out(plain), 1e-4)
        assert served(fast) is None
        agree(fast, plain)
        if touch is with_hook:  # is not recorded, see below
            continue
        assert recorded(fast) is not recorder
        agree(fast, plain)


def test_values_written_through_data_are_seen(files, device):
    """As diffusers' EMA writes them."""
    _, fast, plain = both(files, device, loaded=("cat",), many=())
    agree(fast, plain)
    agree(fast, plain)
    for unet in (fast, plain):
        for group in dreamtune.get_adapters(unet)["cat"].groups:
            for tensor in group.adapter.state_dict(keep_vars=True).values():
                tensor.data.mul_(1.3)
    agree(fast, plain)
    for unet in (fast, plain):
        for parameter in unet.parameters():
            parameter.data.mul_(1.01)
    agree(fast, plain)


def test_a_hook_inside_is_refused(files):
    unet = tiny_unet()
    unet.mid_block.register_forward_hook(lambda m, a, y: y)
    assert "`mid_block` has hooks" in why_not_recorded(unet)


def test_a_cache_of_diffusers_is_refused_while_it_is_on():
    from diffusers.hooks import FirstBlockCacheConfig

    model = tiny("FluxTransformer2DModel")
    assert why_not_recorded(model) is None
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    assert "has a cache of diffusers" in why_not_recorded(model)
    model.disable_cache()
    assert why_not_recorded(model) is None


def test_merged_and_back(files, device):
    _, fast, plain = both(files, device, loaded=("dog",), many=("cat",))
    for unet in (fast, plain):
        dreamtune.set_adapters(unet, {"dog": 0.5, "cat": 1.0})
    agree(fast, plain)
    for unet in (fast, plain):
        dreamtune.merge(unet)
    agree(fast, plain)
    for unet in (fast, plain):
        dreamtune.unmerge(unet)
    agree(fast, plain)


def test_copies_are_plain(files):
    _, fast, plain = both(files, "cpu", loaded=("dog",), many=("cat",))
    for unet in (fast, plain):
        dreamtune.set_adapters(unet, {"dog": 0.5, "cat": 1.0})
    agree(fast, plain)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert not isinstance(twin.__dict__.get("forward"), Forward)
        close(said(twin), said(plain), 1e-5)
        (bank,) = owners(twin, Bank)
        assert bank.watcher is None
        with torch.no_grad():
            twin.conv_in.weight.zero_()
    agree(fast, plain)


def test_a_pipeline_and_two_threads(files, device):
    pipes = [tiny_pipeline(tiny_unet().to(device)) for _ in range(2)]
    for pipe in pipes:
        pipe.to(device)
        dreamtune.load_many(pipe, files)
    recorded(pipes[0].unet)
    routes = {"a": ["dog", "owl"], "b": ["cat", None]}
    expected = {}
    for key, rows in routes.items():
        with dreamtune.route(pipes[1], rows):
            expected[key] = images(pipes[1], num_images_per_prompt=2).cpu()
    found = {key: [] for key in routes}

    def work(key):
        pipe = copy.copy(pipes[0])  # its own scheduler: that is not the network's
        pipe.scheduler = copy.deepcopy(pipes[0].scheduler)
        for _ in range(3):
            with dreamtune.route(pipe, routes[key]):
                found[key].append(images(pipe, num_images_per_prompt=2).cpu())

    threads = [threading.Thread(target=work, args=(key,)) for key in routes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key, pictures in found.items():
        assert len(pictures) == 3
        for picture in pictures:
            close(picture, expected[key], 5e-4)


def test_leaves_are_told_apart():
    one = pytree.tree_flatten(([1, None], {"a": torch.ones(2)}))
    assert one[1] != pytree.tree_flatten(([1], {"a": torch.ones(2)}))[1]
