"""The fast way in a pipeline: the same pictures while nobody touches the model, plain layers and a
warning as soon as somebody does.
"""

import copy
import gc
import inspect
import warnings
import weakref

import pytest
import torch
from life import (
    NEW_BASE,
    OPERATIONS,
    ROUGH,
    D,
    adapt,
    base,
    call,
    quiet,
    right,
    sequential,
    state,
    style,
)
from tiny import disturb, images, tiny_pipeline, tiny_unet, unet_inputs

import dreamtune
from dreamtune import METHODS
from dreamtune.injection.attention import JointProjections
from dreamtune.injection.values import Answer

methods = pytest.mark.parametrize("method", list(METHODS))
# Nothing that the fast way stands for is another after these, or it is followed.
FOLLOWED = (
    "nothing", "frozen", "another state dict", "EMA copied", "one layer in place",
    "LoRA loaded and unloaded", "projections fused and unfused",
)  # fmt: skip
COPIES = ("deepcopy", "pickle", "average")


@pytest.fixture(autouse=True)
def _quiet():
    with quiet():
        yield


def joint(unet):
    return [m for m in unet.modules() if type(getattr(m, "processor", 0)) is JointProjections]


def fast(method):
    unet = base()
    adapter = adapt(unet, method)
    dreamtune.speed_up(unet)
    assert len(joint(unet)) == 6
    return unet, adapter


def close(got, method, name):
    first = name in NEW_BASE
    want = right(method, name, first)
    change = (want - right(None, name)).abs().max()
    assert (got - want).abs().max() < ROUGH.get(name, 1e-5) * change


@methods
def test_the_same_pictures_and_back(method):
    pipe = tiny_pipeline(tiny_unet(D).to(D))
    pipe.vae.to(D)
    adapter = dreamtune.inject(pipe.unet, method)
    disturb(adapter, size=0.3)
    before = {name: x.clone() for name, x in pipe.unet.state_dict().items()}
    kept = {name: type(m) for name, m in pipe.unet.attn_processors.items()}
    latents = torch.randn(2, 4, 8, 8, dtype=D)

    def pictures():
        g = torch.Generator().manual_seed(0)
        prompt, negative = torch.randn(2, 2, 5, 24, generator=g, dtype=D)
        return pipe(
            prompt_embeds=prompt, negative_prompt_embeds=negative, num_inference_steps=2,
            height=8, width=8, output_type="latent", latents=latents,
        ).images  # fmt: skip

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        want = pictures()
        dreamtune.speed_up(pipe)
        dreamtune.speed_up(pipe)
        assert joint(pipe.unet)
        torch.testing.assert_close(pictures(), want, rtol=0, atol=1e-11)
        adapter.scale = 0.5
        half = pictures()
        dreamtune.slow_down(pipe)
        dreamtune.slow_down(pipe)
        torch.testing.assert_close(pictures(), half, rtol=0, atol=1e-11)
    assert (half - want).abs().max() > 1e-3
    assert {name: type(m) for name, m in pipe.unet.attn_processors.items()} == kept
    for name, x in pipe.unet.state_dict().items():
        assert torch.equal(x, before[name])
        assert x.untyped_storage().nbytes() == x.nbytes, "its own storage again"
    adapter.eject()


@pytest.mark.parametrize("name", list(OPERATIONS))
@pytest.mark.parametrize("method", ["delora", "lora"])
def test_touched_while_it_is_sped_up(name, method):
    unet, adapter = fast(method)
    call(unet)
    unet = OPERATIONS[name](unet)
    if name in FOLLOWED or name in COPIES:
        close(call(unet), method, name)
        assert len(joint(unet)) == (0 if name in COPIES else 6)
    else:
        with pytest.warns(UserWarning, match="the adapter is slowed down, for "):
            got = call(unet)
        close(got, method, name)
        assert not joint(unet)
    close(call(unet), method, name)
    if name not in COPIES:
        adapter.eject()


def stacked(unet):
    dreamtune.get_adapters(unet)["default"].speed_up()


@pytest.mark.parametrize("speed", [lambda unet: None, stacked], ids=["plain", "fast"])
def test_a_forward_that_is_computed_again_has_what_the_first_took(speed, monkeypatch):
    """diffusers' UNet takes a T2I adapter's residuals out of the caller's list."""
    monkeypatch.setattr(Answer, "late", property(lambda answer: True))
    unet = base()
    adapter = adapt(unet, "delora")
    speed(unet)
    g = torch.Generator().manual_seed(0)
    kinds = {"generator": g, "dtype": D}
    sides = zip(unet.config.block_out_channels, (8, 4, 2))
    given = [torch.randn(2, n, side, side, **kinds) for n, side in sides]

    def called():
        return call(unet, down_intrablock_additional_residuals=list(given))

    want = called()
    assert (call(unet) - want).abs().max() > 1e-2
    for p in adapter.parameters():
        p.data.mul_(1 + 1e-7)
    torch.testing.assert_close(called(), want, rtol=0, atol=1e-5)


def test_a_model_that_moves_away_is_let_go():
    unet = base()
    adapt(unet, "delora")
    call(unet)
    gone = [weakref.ref(x.untyped_storage()) for x in unet.parameters()]
    unet.to(torch.float32)
    gc.collect()
    assert not [x for x in gone if x() is not None]


def test_what_diffusers_asks_a_processor():
    """The signature, at every call: at hand, and that of the method."""
    unet, _ = fast("lora")
    first = next(m for m in joint(unet) if not m.is_cross_attention)
    x = torch.randn(1, 3, first.to_q.in_features, dtype=D)
    found = inspect.signature(first.processor.__call__)
    assert found is inspect.signature(first.processor.__call__)
    assert found == inspect.signature(JointProjections.__call__.__get__(first.processor))
    with torch.no_grad():
        assert torch.equal(first.processor.__call__(first, x), first.processor(first, x))


def test_a_bias_written_to_is_seen():
    unet, _ = fast("lora")
    call(unet)
    other = base()
    for model in (unet, other):
        for name, module in model.named_modules():
            if name.endswith("to_out.0"):
                module.bias.data.add_(0.5)
    adapt(other, "lora")
    torch.testing.assert_close(call(unet), call(other), rtol=0, atol=1e-10)
    assert joint(unet)


def test_refused_where_it_would_pass_something_by():
    def hooked(unet):
        next(m for n, m in unet.named_modules() if n.endswith("to_k")).register_forward_hook(print)

    def sliced(unet):
        unet.set_attention_slice("max")

    reasons = {
        "to_k` has hooks": hooked,
        "is inside a `peft.tuners.lora.layer.Linear`: unload it": style,
        "the processor of .* is `SlicedAttnProcessor`": sliced,
        "the model is offloaded": sequential,
    }
    for reason, touch in reasons.items():
        unet = base()
        adapter = adapt(unet, "lora")
        touch(unet)
        with pytest.raises(ValueError, match=f"cannot be sped up: .*{reason}"):
            dreamtune.speed_up(unet)
        assert all(layer.projection is None for g in adapter.groups for layer in g.layers)
    with pytest.raises(ValueError, match="there is no adapter in this `UNet2DConditionModel`"):
        dreamtune.speed_up(base())
    adapter.eject()
    with pytest.raises(ValueError, match="is not in the model: it was ejected"):
        adapter.speed_up()


def stacked(unet):
    dreamtune.get_adapters(unet)["default"].speed_up()


@pytest.mark.parametrize("speed", [lambda unet: None, stacked], ids=["plain", "fast"])
@pytest.mark.parametrize(
    "device, late",
    [("cpu", False), ("cpu", True), pytest.param("cuda", True, marks=pytest.mark.gpu)],
)
def test_values_written_through_data_are_seen(device, late, speed, monkeypatch):
    """As diffusers' EMA writes them: of the adapter, then of the base. `late` as a GPU answers,
    while the forward runs.
    """
    if device == "cpu":
        monkeypatch.setattr(Answer, "late", property(lambda answer: late))
    ran = []

    def call(unet):
        x, t, text = (torch.as_tensor(x, device=unet.device) for x in unet_inputs(2, D))
        with torch.no_grad():
            return unet(x, t, text).sample.cpu()

    unet = base().to(device)
    unet.conv_out.register_forward_hook(lambda *given: ran.append(1))
    adapter = dreamtune.inject(unet, "delora")
    speed(unet)
    for _ in range(5 if device == "cuda" else 1):  # on a GPU the question is recorded by then
        start = call(unet)
    own = dreamtune.inject(base(), "delora")
    own.load_state_dict({k: v.clone() for k, v in state("delora").items()})
    for p, q in zip(adapter.parameters(), own.parameters(), strict=True):
        p.data.copy_(q.data)
    for group, other in zip(adapter.groups, own.groups):
        group.adapter.A0.data.copy_(other.adapter.A0)
        group.adapter.B0.data.copy_(other.adapter.B0)
    ran.clear()
    got = call(unet)
    assert len(ran) == 1 + late and (got - start).abs().max() > 1e-2
    close(got, "delora", "nothing")
    for p, q in zip(unet.parameters(), base(1).parameters(), strict=True):
        p.data.copy_(q.data)
    other = base(1)
    dreamtune.inject(other, "delora").load_state_dict(own.state_dict())
    error = 1e-10 if device == "cpu" else 1e-6  # the timestep is embedded in float32
    for expected in (1 + late, 1):  # once it is known, once more is enough
        ran.clear()
        torch.testing.assert_close(call(unet), call(other), rtol=0, atol=error)
        assert len(ran) == expected
    for model in (unet, other):
        name = [n for n, _ in model.named_modules() if n.endswith("attn2.to_v")][-1]
        model.get_submodule(name).weight.data.neg_()  # which leaves its norm
    torch.testing.assert_close(call(unet), call(other), rtol=0, atol=error)


@methods
def test_the_strength_of_a_call(method):
    """Plain and sped up; a LoRA above is scaled by diffusers, ours with it, and both for that call
    alone."""
    none, whole = right(None, "nothing"), right(method, "nothing")
    for unet in (base(), fast(method)[0]):
        if not joint(unet):
            adapt(unet, method)
        scaled = lambda s, unet=unet: call(unet, cross_attention_kwargs={"scale": s})  # noqa: E731
        torch.testing.assert_close(scaled(0.0), none, rtol=0, atol=1e-12)
        half = scaled(0.5)
        torch.testing.assert_close(call(unet), whole, rtol=0, atol=1e-10)
        dreamtune.InjectedAdapter.of(unet)[0].scale = 0.5
        torch.testing.assert_close(call(unet), half, rtol=0, atol=1e-12)
    unet = base()
    adapt(unet, method)
    style(unet)
    got = call(unet, cross_attention_kwargs={"scale": 0.0})
    torch.testing.assert_close(got, none, rtol=0, atol=1e-12)


def test_inference_mode_and_gradients_by_turns():
    for speed in (lambda unet: None, dreamtune.speed_up):
        unet = base()
        adapter = adapt(unet, "delora")
        speed(unet)
        with torch.inference_mode():
            first = call(unet)
        second = call(unet)
        unet.requires_grad_(False)
        third = unet(*unet_inputs(2, D)).sample
        third.square().sum().backward()
        assert all(p.grad is not None for p in adapter.parameters())
        for said in (first, second, third.detach()):
            torch.testing.assert_close(said, right("delora", "nothing"), rtol=0, atol=1e-10)


def test_a_copy_of_a_sped_up_model_is_plain():
    unet, _ = fast("delora")
    twin = copy.deepcopy(unet)
    assert not joint(twin) and joint(unet)
    for p in twin.parameters():
        assert p.untyped_storage().nbytes() == p.nbytes
    twin.to(torch.float32)
    close(call(unet), "delora", "nothing")
    assert joint(unet)


def test_images_of_a_pipeline_that_others_touch():
    """`unload_lora_weights`, `fuse_lora` and `disable_lora` are diffusers' for its own LoRAs: ours
    stays, exactly."""
    pipe = tiny_pipeline(tiny_unet())
    adapter = dreamtune.inject(pipe.unet, "lora")
    disturb(adapter, size=0.3)
    want = images(pipe)
    pipe.fuse_lora(), pipe.unfuse_lora(), pipe.unload_lora_weights()
    assert torch.equal(images(pipe), want)
    style(pipe.unet)
    pipe.unet.to(torch.float32)
    both = images(pipe)
    assert (both - want).abs().max() > 1e-3
    pipe.disable_lora()
    assert torch.equal(images(pipe), want)
    pipe.enable_lora(), pipe.fuse_lora()
    torch.testing.assert_close(images(pipe), both, rtol=0, atol=1e-5)
    pipe.unfuse_lora(), pipe.unload_lora_weights()
    torch.testing.assert_close(images(pipe), want, rtol=0, atol=1e-5)
