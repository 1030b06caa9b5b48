"""Several adapters in one pipeline: each row as it is alone, sums, merges, and what is refused."""

import copy
import itertools
import threading
import warnings

import pytest
import torch
from tiny import disturb, images, tiny_pipeline, tiny_unet

import dreamtune
from dreamtune.injection.inject import InjectedAdapter

KINDS = {
    "dog": ("lora", {"rank": 4}),
    "cat": ("delora", {"rank": 2}),
    "fox": ("ether", {"blocks": 2}),
    "cow": ("dora", {"rank": 2}),
    "owl": ("oft", {"blocks": 2}),
    "bee": ("ether+", {"blocks": 2}),
}


def written(factory):
    """Name -> its native file, each of another method or rank."""
    found = {}
    for number, (name, (method, options)) in enumerate(KINDS.items()):
        adapter = dreamtune.inject(tiny_unet(), method, seed=number, **options)
        disturb(adapter)
        found[name] = adapter.save(factory.mktemp(name))
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return written(tmp_path_factory)


def pipe_with(files, *names):
    pipe = tiny_pipeline(tiny_unet())
    for name in names or files:
        dreamtune.load(pipe, files[name], name=name)
    return pipe


def inputs(rows):
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(rows, 4, 8, 8, generator=generator),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(rows, 7, 24, generator=generator),
    }


@torch.no_grad()
def said(unet, rows=4, pick=None):
    given = inputs(rows)
    if pick is not None:
        given = {k: x[pick : pick + 1] if x.dim() else x for k, x in given.items()}
    return unet(**given).sample


@torch.no_grad()
def alone(files, name, rows, scale=1.0):
    """Each row of the batch with one adapter alone in a model."""
    unet = tiny_unet()
    if name is not None:
        dreamtune.load(unet, files[name], scale=scale)
    return said(unet, rows)


def close(a, b, atol=2e-6):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_each_row_is_what_it_is_alone(files):
    unet = tiny_unet()
    for name in files:
        dreamtune.load(unet, files[name], name=name)
    rows = [*files, None]
    with dreamtune.route(unet, rows):
        got = said(unet, len(rows))
    for number, name in enumerate(rows):
        want = alone(files, name, len(rows))[number]
        close(got[number], want)
    assert torch.equal(got[-1], alone(files, None, len(rows))[-1])
    with dreamtune.route(unet, [None, None]):
        assert torch.equal(said(unet, 2), alone(files, None, 2))


def test_strengths_add_up_and_the_order_does_not_matter(files):
    """Of one layer alone the change is linear: the output is the base's and the sum of changes."""
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    x = torch.randn(3, 5, tiny_unet().get_submodule(layer).in_features)

    def out(unet):
        with torch.no_grad():
            return unet.get_submodule(layer)(x)

    base = out(tiny_unet())
    changes = {}
    for name in ("dog", "cat", "fox"):
        unet = tiny_unet()
        dreamtune.load(unet, files[name])
        changes[name] = out(unet) - base
    want = base + changes["dog"] + 0.4 * changes["cat"] - 0.5 * changes["fox"]
    for order in itertools.permutations(("dog", "cat", "fox")):
        unet = tiny_unet()
        for name in order:
            dreamtune.load(unet, files[name], name=name)
        dreamtune.set_adapters(unet, {"dog": 1.0, "cat": 0.4, "fox": -0.5})
        close(out(unet), want)
        dreamtune.set_adapters(unet, {})
        assert torch.equal(out(unet), base)
        dreamtune.set_adapters(unet, {"cat": {"down_blocks.0": 0.5}})
        close(out(unet), base + 0.5 * changes["cat"])
        dreamtune.set_adapters(unet, {"cat": {"up": 0.0, "mid": 2}})
        close(out(unet), base + changes["cat"])


def test_blocks_and_a_sweep(files):
    unet = tiny_unet()
    dreamtune.load(unet, files["dog"], name="dog")
    whole, base = said(unet, 1), said(tiny_unet(), 1)
    dreamtune.set_adapters(unet, {"dog": {"down": 0, "mid": 0, "up": 0}})
    assert torch.equal(said(unet, 1), base)
    dreamtune.set_adapters(unet, {"dog": {"down": 0}})
    assert not torch.allclose(said(unet, 1), whole, atol=1e-4)
    dreamtune.set_adapters(unet, {"dog": [0.0, 0.5, 1.0, {"down": 0}]})
    swept = said(unet, 4)
    for number, strength in enumerate((0.0, 0.5, 1.0)):
        close(swept[number], alone(files, "dog", 4, strength)[number])


def as_kind(pipe, kind):
    """The pipeline as one of another task, and what its call needs more. One picture for all:
    diffusers deals several to the images of a batch in another order than its prompts."""
    import diffusers

    parts, g = dict(pipe.components), torch.Generator().manual_seed(5)
    pictures = {"image": torch.rand(1, 3, 8, 8, generator=g), "strength": 0.7}
    if kind == "StableDiffusionPipeline":
        return pipe, {"height": 8, "width": 8}
    if kind == "StableDiffusionInpaintPipeline":
        pictures |= {"mask_image": (torch.rand(1, 1, 8, 8, generator=g) > 0.5).float()}
        pictures |= {"height": 8, "width": 8}
    if kind == "StableDiffusionControlNetPipeline":
        torch.manual_seed(3)
        parts["controlnet"] = diffusers.ControlNetModel.from_unet(
            pipe.unet, conditioning_channels=3, load_weights_from_unet=False
        ).eval()
        for x in parts["controlnet"].parameters():
            torch.nn.init.normal_(x, std=0.05)
        pictures = {"image": torch.rand(1, 3, 8, 8, generator=g), "height": 8, "width": 8}
    made = getattr(diffusers, kind)(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made, pictures


def draw(pipe, more, which, guidance, per_prompt=2):
    """Images of those prompts, two each."""
    g = torch.Generator().manual_seed(0)
    prompts, negative = torch.randn(2, 3, 5, 24, generator=g)
    seeds = [per_prompt * i + j for i in which for j in range(per_prompt)]
    if "mask_image" in more:  # the first generator draws the picture's code
        noise = torch.randn(6, 4, 8, 8, generator=g)[seeds]
        more, seeds = {**more, "latents": noise}, [0] * len(seeds)
    return pipe(
        prompt_embeds=prompts[which],
        negative_prompt_embeds=negative[which],
        num_images_per_prompt=per_prompt,
        generator=[torch.Generator().manual_seed(s) for s in seeds],
        guidance_scale=guidance,
        num_inference_steps=3,
        output_type="pt",
        **more,
    ).images


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize(
    "kind",
    [
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionControlNetPipeline",
    ],
)
def test_a_pipeline_s_batch_is_routed_by_prompts(files, kind, guidance):
    """Two images a prompt, with guidance and without, each as in a pipeline with that adapter
    alone."""
    names = ["dog", None, {"fox": 0.5, "cow": 1.0}]
    pipe, more = as_kind(pipe_with(files, "dog", "fox", "cow"), kind)
    with dreamtune.route(pipe, names):
        got = draw(pipe, more, [0, 1, 2], guidance)
    for number, name in enumerate(names):
        own = name if isinstance(name, dict) else {name: 1.0}
        one = pipe_with(files, *own) if name else tiny_pipeline(tiny_unet())
        if name:
            dreamtune.set_adapters(one, own)
        one, more = as_kind(one, kind)
        close(got[2 * number : 2 * number + 2], draw(one, more, [number], guidance), atol=2e-4)


def test_rows_that_do_not_fit(files):
    pipe = pipe_with(files, "dog", "cat")
    told = "3 rows are routed, each twice under guidance: 6 or"
    with dreamtune.route(pipe, ["dog", "cat", None]), pytest.raises(ValueError, match=told):
        images(pipe)
    told = "2 rows are routed but the batch has 4 rows"
    with dreamtune.route(pipe.unet, ["dog", "cat"]), pytest.raises(ValueError, match=told):
        said(pipe.unet, 4)
    images(pipe)  # the lock is free, the route is over


def test_inside_a_route_and_after_it(files):
    unet = tiny_unet()
    for name in ("dog", "cat"):
        dreamtune.load(unet, files[name], name=name)
    dreamtune.set_adapters(unet, {"dog": 0.5})
    before = said(unet)
    with dreamtune.route(unet, ["cat"] * 4):
        with dreamtune.route(unet, [{"dog": 0.5}] * 4):
            close(said(unet), before)
        close(said(unet), alone(files, "cat", 4))
    assert torch.equal(said(unet), before)
    adapter = dreamtune.get_adapters(unet)["dog"]
    adapter.scale = 2.0  # strengths are of the adapter as it is set
    close(said(unet), alone(files, "dog", 4))
    dreamtune.unload(unet, "cat")
    assert list(dreamtune.get_adapters(unet)) == ["dog"]
    close(said(unet), alone(files, "dog", 4))
    dreamtune.load(unet, files["fox"], name="fox")  # loaded after a choice: in use as it is
    close(said(unet) - said(tiny_unet()), said(unet) - said(tiny_unet()))


def test_threads_with_different_routes_never_mix(files):
    unet = tiny_unet()
    for name in ("dog", "cat"):
        dreamtune.load(unet, files[name], name=name)
    want = {name: alone(files, name, 2) for name in ("dog", "cat")}
    wrong, start = [], threading.Barrier(2)

    def work(name):
        start.wait()
        for _ in range(8):
            with dreamtune.route(unet, [name, name]):
                for _ in range(2):
                    if (said(unet, 2) - want[name]).abs().max() > 1e-5:
                        wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_merging_a_hundred_times_leaves_the_base(files):
    unet = tiny_unet()
    names = ["dog", "cat", "fox", "cow"]
    for name in names:
        dreamtune.load(unet, files[name], name=name)
    base = {k: v.clone() for k, v in unet.state_dict().items()}
    used = {"dog": 0.5, "cat": 1.0, "fox": {"up": 0.3}, "cow": 0.7}
    dreamtune.set_adapters(unet, used)
    want = said(unet)
    for number in range(100):
        if number in (1, 99):  # of one is quicker
            dreamtune.set_adapters(unet, {"dog": 0.5} if number == 1 else used)
        dreamtune.merge(unet)
        if number in (0, 99):
            close(said(unet), want, atol=2e-5)
            assert not torch.equal(unet.state_dict()[_weight(unet)], base[_weight(unet)])
        dreamtune.unmerge(unet)
    assert all(torch.equal(v, base[k]) for k, v in unet.state_dict().items())
    assert torch.equal(said(unet), want)


def _weight(unet):
    return next(k for k in unet.state_dict() if k.endswith("attn1.to_q.weight"))


def test_what_is_merged_is_left_alone(files):
    unet = tiny_unet()
    dog = dreamtune.load(unet, files["dog"], name="dog")
    with pytest.raises(ValueError, match="nothing is merged"):
        dreamtune.unmerge(unet)
    dreamtune.merge(unet)
    merged = "merged into the weights: `dreamtune.unmerge"
    for use in (
        lambda: dreamtune.merge(unet),
        lambda: dreamtune.set_adapters(unet, {"dog": 1.0}),
        lambda: dreamtune.load(unet, files["cat"], name="cat"),
        lambda: dreamtune.unload(unet, "dog"),
        lambda: dreamtune.speed_up(unet),
        dog.eject, dog.merge, dog.file,
        lambda: dreamtune.route(unet, ["dog"]).__enter__(),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=merged):
            use()
    weight = unet.get_parameter(_weight(unet))
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(ValueError, match="was changed after `merge`"):
        dreamtune.unmerge(unet)
    dreamtune.unmerge(unet, force=True)
    dreamtune.unload(unet, "dog")
    assert all(
        torch.equal(a, b)
        for a, b in zip(unet.state_dict().values(), tiny_unet().state_dict().values())
    )
    assert not unet._forward_pre_hooks and not unet._forward_hooks


def test_its_own_merge_is_at_the_strength_that_is_set(files):
    unet = tiny_unet()
    dog = dreamtune.load(unet, files["dog"], name="dog", scale=2.0)
    dreamtune.set_adapters(unet, {"dog": [0.5, 1.0]})
    with pytest.raises(ValueError, match="rows of a batch have changes of their own"):
        dog.merge()
    dreamtune.set_adapters(unet, {"dog": {"up": 0.25}})
    want = said(unet)
    dog.merge()
    close(said(unet), want, atol=2e-5)
    assert not unet._forward_pre_hooks


def test_layers_that_others_stand_for_are_not_merged(files):
    """As the adapter's own `merge`: the weights that would be written are not those in use."""
    pipe = pipe_with(files, "dog", "cat")
    pipe.unet.fuse_qkv_projections()
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    with pytest.raises(ValueError, match="call `unfuse_qkv_projections"):
        dreamtune.merge(pipe)
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())
    pipe.unet.unfuse_qkv_projections()
    dreamtune.merge(pipe)
    dreamtune.unmerge(pipe)


def test_refusals(files):
    unet = tiny_unet()
    with pytest.raises(ValueError, match="there is no adapter in this"):
        dreamtune.set_adapters(unet, {"dog": 1.0})
    dreamtune.load(unet, files["dog"], name="dog")
    dreamtune.load(unet, files["cat"], name="cat")
    before = said(unet)
    for strengths, message in (
        ({"dgo": 1.0}, "no adapter `dgo`. Did you mean `dog`"),
        ({"dog": float("nan")}, "strength of `dog` must be a finite number, got nan"),
        ({"dog": True}, "must be a finite number, got True"),
        ({"dog": {"middle": 1.0}}, "a part `middle` of this `UNet2DConditionModel`; there are"),
        ({"dog": [1.0, 0.5], "cat": [1.0]}, "one for each prompt, got `dog` 2, `cat` 1"),
    ):
        with pytest.raises(ValueError, match=message):
            dreamtune.set_adapters(unet, strengths)
    for rows, message in (
        ("dog", "must be a list with an entry for each prompt"),
        ([], "must be a list with an entry for each prompt"),
        (["dog", "cow"], "no adapter `cow`"),
        ([{"dog": "1"}], "must be a finite number, got '1'"),
    ):
        with pytest.raises(ValueError, match=message), dreamtune.route(unet, rows):
            pass
    with pytest.raises(ValueError, match="there is an adapter `dog` in this"):
        dreamtune.load(unet, files["fox"], name="dog")
    with pytest.raises(ValueError, match="there is an adapter `cat` in this"):
        dreamtune.get_adapters(unet)["dog"].name = "cat"
    with pytest.raises(ValueError, match="is adapted already"):
        dreamtune.inject(unet, "lora")
    with pytest.raises(ValueError, match="there are other adapters"):
        dreamtune.get_adapters(unet)["dog"].merge()
    assert torch.equal(said(unet), before)


def test_the_fast_way_is_left_with_a_warning_where_it_does_not_hold(files):
    unet = tiny_unet()
    dreamtune.load(unet, files["dog"], name="dog")
    want = said(unet)
    dreamtune.speed_up(unet)
    dreamtune.set_adapters(unet, {"dog": 1.0})  # as it is
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(said(unet), want)
    with pytest.warns(UserWarning, match="`dog` is slowed down"):
        dreamtune.set_adapters(unet, {"dog": 0.5})
    close(said(unet), alone(files, "dog", 4, 0.5))
    with pytest.raises(ValueError, match="strengths are not 1"):
        dreamtune.speed_up(unet)
    dreamtune.set_adapters(unet, {"dog": 1})
    dreamtune.speed_up(unet)
    with pytest.warns(UserWarning, match="`dog` is slowed down"):
        dreamtune.load(unet, files["cat"], name="cat")
    with pytest.raises(ValueError, match="holds several adapters"):
        dreamtune.speed_up(unet)


def test_a_copy_has_its_own(files):
    unet = tiny_unet()
    for name in ("dog", "cat"):
        dreamtune.load(unet, files[name], name=name)
    dreamtune.set_adapters(unet, {"dog": 0.5, "cat": {"up": 2.0}})
    want = said(unet)
    other = copy.deepcopy(unet)
    dreamtune.set_adapters(unet, {"cat": 1.0})
    assert torch.equal(said(other), want)
    assert [a.name for a in InjectedAdapter.of(other)] == ["dog", "cat"]
    dreamtune.set_adapters(other, {"dog": 1.0})
    close(said(other), alone(files, "dog", 4))
    close(said(unet), alone(files, "cat", 4))


def test_whoever_leaves_last_leaves_the_model_as_it_was(files):
    unet = tiny_unet().requires_grad_(True)
    dog = dreamtune.load(unet, files["dog"], name="dog")
    cat = dreamtune.load(unet, files["cat"], name="cat")
    dreamtune.set_adapters(unet, {"dog": 0.5})
    dog.eject()
    assert not any(p.requires_grad for p in unet.parameters())
    cat.eject()
    assert all(p.requires_grad for p in unet.parameters())
    assert not unet._forward_pre_hooks and not unet._forward_hooks
    assert not any("mix" in m.__dict__ for m in unet.modules())


def test_a_compiled_network(tmp_path):
    """Strengths and routes hold."""

    def net():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))

    for number, (name, method) in enumerate((("dog", "lora"), ("cat", "ether"))):
        adapter = dreamtune.inject(net(), method, target_modules=["0", "2"], seed=number)
        disturb(adapter)
        adapter.save(tmp_path / f"{name}.safetensors")
    model, x = net(), torch.randn(3, 8)
    for name in ("dog", "cat"):
        dreamtune.load(model, tmp_path / f"{name}.safetensors", name=name)
    compiled = torch.compile(model, backend="aot_eager")
    seen = []
    with torch.no_grad():
        for strengths in ({"dog": 1.0, "cat": 1.0}, {"dog": 0.5, "cat": 0.3}, {}):
            dreamtune.set_adapters(model, strengths)
            seen.append(model(x))
            close(compiled(x), seen[-1])
        assert torch.equal(seen[-1], net()(x))
        assert len({float(y.sum()) for y in seen}) == 3
        with dreamtune.route(model, ["dog", None, "cat"]):
            close(model(x)[1], net()(x)[1])
            close(compiled(x), model(x))
