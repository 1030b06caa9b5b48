"""Several adapters in one pipeline, where calls are ended, names change and modes alternate."""

import copy
import threading

import pytest
import torch
from test_several_adapters import alone, close, files, inputs, said  # noqa: F401
from tiny import disturb, tiny_pipeline, tiny_unet

import dreamtune
from dreamtune.injection.bank import Bank, owners


@pytest.fixture
def unet(files):  # noqa: F811
    unet = tiny_unet()
    for name in ("dog", "cat"):
        dreamtune.load(unet, files[name], name=name)
    return unet


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_the_lock_is_free_after_a_call_that_was_ended(unet, error):
    dreamtune.set_adapters(unet, {"dog": 0.5})

    def end(*_):
        raise error

    for hooked in (
        lambda: unet.mid_block.register_forward_hook(end),
        lambda: unet.register_forward_pre_hook(end, prepend=True),
        lambda: unet.register_forward_hook(end),
    ):
        hook = hooked()
        with pytest.raises(error):
            said(unet)
        hook.remove()
        thread = threading.Thread(target=said, args=(unet, 1), daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
        assert not owners(unet, Bank)[0].lock.holds


def test_a_strength_follows_its_adapter(unet, files):  # noqa: F811
    dreamtune.set_adapters(unet, {"dog": 0.5})
    want = said(unet)
    dreamtune.get_adapters(unet)["dog"].name = "puppy"
    dreamtune.get_adapters(unet)["cat"].name = "kitten"
    assert torch.equal(said(unet), want)
    with dreamtune.route(unet, ["puppy", None, "kitten", None]):
        dreamtune.get_adapters(unet)["puppy"].name = "dog"
        close(said(unet)[0], alone(files, "dog", 4)[0])
        with pytest.raises(ValueError, match="a route that is open gives rows to `dog`"):
            dreamtune.unload(unet, "dog")
        with pytest.raises(ValueError, match="a route is open"):
            dreamtune.set_adapters(unet, {"dog": 1.0})
        other = copy.deepcopy(unet)
    assert torch.equal(said(unet), want)
    assert torch.equal(said(other), want)
    dreamtune.unload(unet, "dog")
    dreamtune.load(unet, files["dog"], name="dog")  # in use as it is
    close(said(unet), alone(files, "dog", 4))


def test_the_strength_of_one_call_is_in_no_merge(unet, files):  # noqa: F811
    want = said(unet)
    one = tiny_unet()
    dog = dreamtune.load(one, files["dog"])
    with torch.no_grad():
        for network in (unet, one):
            network(**inputs(2), cross_attention_kwargs={"scale": 0.3})
    dreamtune.merge(unet)
    close(said(unet), want, atol=1e-5)
    with pytest.raises(ValueError, match="a strength for one call was given"):
        unet(**inputs(2), cross_attention_kwargs={"scale": 0.3})
    dog.merge()
    close(said(one), alone(files, "dog", 4), atol=1e-5)


def test_two_threads_merge_once(unet):
    dreamtune.set_adapters(unet, {"dog": 1.0})
    lock, refused = owners(unet, Bank)[0].lock, []

    def merge():
        try:
            dreamtune.merge(unet)
        except ValueError as error:
            refused.append(error)

    threads = [threading.Thread(target=merge) for _ in range(2)]
    with lock:
        for thread in threads:
            thread.start()
        threads[0].join(0.2)
    for thread in threads:
        thread.join()
    assert len(refused) == 1
    dreamtune.unmerge(unet)
    base = tiny_unet().state_dict()
    assert all(torch.equal(x, base[k]) for k, x in unet.state_dict().items())


@pytest.mark.parametrize("routed", [True, False])
def test_gradients_after_inference_mode(unet, routed):
    dreamtune.set_adapters(unet, {"dog": [0.5, 0.2]} if routed else {"dog": 0.5, "cat": 0.3})
    with torch.inference_mode():
        want = unet(**inputs(2)).sample
    given = inputs(2)
    out = unet(**{**given, "sample": given["sample"].requires_grad_()}).sample
    close(out.detach(), want.clone())
    out.sum().backward()
    assert given["sample"].grad.abs().max() > 0


def test_what_is_not_in_use_keeps_no_merge_away(unet, tmp_path):
    late = dreamtune.inject(tiny_unet(), "delora", rank=2, timestep_floor=0.2)
    disturb(late)
    dreamtune.load(unet, late.save(tmp_path), name="late")
    with pytest.raises(ValueError, match="`late` depends on the timestep"):
        dreamtune.merge(unet)
    dreamtune.set_adapters(unet, {"dog": 1.0})
    want = said(unet)
    dreamtune.merge(unet)
    close(said(unet), want, atol=1e-5)


def test_arguments(unet, files):  # noqa: F811
    given, rows = inputs(2), ["dog", "cat"]
    with torch.no_grad(), dreamtune.route(unet, rows):
        want = unet(**given).sample
        given = {"timestep": torch.tensor([500]), **{k: given[k] for k in given if k != "timestep"}}
        given = dict(sorted(given.items(), reverse=True))
        assert next(iter(given)) == "timestep"
        assert torch.equal(unet(**given).sample, want)
    for strengths in (["dog"], {"dog": {"down": 0, "down_blocks": 1}}):
        with pytest.raises(ValueError, match=r"mapping name -> strength|given twice"):
            dreamtune.set_adapters(unet, strengths)
    for wrong in ([3], [["dog"]], {"dog": 1.0}, None):
        with pytest.raises(ValueError, match="`rows` must be"), dreamtune.route(unet, wrong):
            pass
    with torch.autocast("cpu", torch.bfloat16):
        dreamtune.load(tiny_unet(), files["cat"])  # of the same base, whatever the mode


def test_copies_of_the_rows_of_a_call(unet):
    class Three(type(tiny_pipeline(unet))):
        image_guidance_scale = 1.5
        do_classifier_free_guidance = True

    pipe = tiny_pipeline(unet)
    pipe.__class__ = Three
    with dreamtune.route(pipe, ["dog", None]):
        close(said(unet, 6)[1::2], said(tiny_unet(), 6)[1::2])
        with pytest.raises(ValueError, match="each three times under guidance: 6"):
            said(unet, 4)
