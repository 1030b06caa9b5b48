"""Loading into a pipeline: the images of training, and errors where stock loaders stay silent."""

import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import cases, disturb, images, tiny_pipeline, tiny_unet, unet_inputs

import dreamtune
from dreamtune import METHODS

all_cases = pytest.mark.parametrize("method,options", cases())


@all_cases
def test_load_gives_the_trained_images(method, options, tmp_path):
    trained = tiny_pipeline(tiny_unet())
    adapter = dreamtune.inject(trained.unet, method, **options)
    disturb(adapter)
    expected = images(trained)
    sources = [adapter.save(tmp_path)]
    if METHODS[method].low_rank:
        sources.append(dreamtune.export(adapter, tmp_path / "lora"))
        sources.append(dreamtune.export(adapter, tmp_path / "lora", "kohya"))
    pipe = tiny_pipeline(tiny_unet())
    base = images(pipe)
    for source in sources:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            loaded = dreamtune.load(pipe, source, name="dog")
        assert loaded.name == "dog" and not list(loaded.parameters())
        assert float((images(pipe) - expected).abs().max()) < 1e-3
        loaded.scale = 0.0
        assert float((images(pipe) - base).abs().max()) < 1e-4
        loaded.eject()
        assert torch.equal(images(pipe), base)


def test_scale_and_folder(tmp_path):
    unet = tiny_unet()
    adapter = dreamtune.inject(unet, "delora")
    disturb(adapter)
    adapter.save(tmp_path)
    adapter.scale = 0.4
    pipe = tiny_pipeline(unet)
    expected = images(pipe)
    adapter.eject()
    loaded = dreamtune.load(pipe, tmp_path, scale=0.4)
    torch.testing.assert_close(images(pipe), expected)
    loaded.eject()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no `adapter.safetensors` or `pytorch_lora_weights"):
        dreamtune.load(pipe, tmp_path / "empty")
    with pytest.raises(ValueError, match="no adapter file at"):
        dreamtune.load(pipe, tmp_path / "x.safetensors")


@all_cases
def test_two_slots_under_guidance(method, options):
    """The rows without the prompt go to the slot of their prompt; no route, or half a one, is
    refused: the batch does not tell guidance from two images a prompt."""
    pipe = tiny_pipeline(tiny_unet())
    adapter = dreamtune.inject(pipe.unet, method, slots=2, seed=[1, 2], **options)
    disturb(adapter)
    with pytest.raises(ValueError, match=r"an adapter of 2 slots needs `route\(rows\)`"):
        images(pipe)
    adapter.route(torch.tensor([0, 1]))
    with pytest.raises(
        ValueError, match=r"given 2 rows, but the batch has 4: .*`rows.repeat\(2\)`"
    ):
        images(pipe)
    adapter.route(torch.tensor([0, 1]).repeat(2))
    both = images(pipe)
    for slot in (0, 1):
        alone = tiny_pipeline(tiny_unet())
        dreamtune.inject(alone.unet, method, **options).load_state_dict(adapter.state_dict(slot))
        assert float((images(alone)[slot] - both[slot]).abs().max()) < 1e-4


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("kind", ["native", "exported"])
def test_another_base(method, kind, tmp_path):
    if kind == "exported" and not METHODS[method].low_rank:
        pytest.skip("not low rank")
    adapter = dreamtune.inject(tiny_unet(), method)
    disturb(adapter)
    path = adapter.save(tmp_path) if kind == "native" else dreamtune.export(adapter, tmp_path)
    other = tiny_pipeline(tiny_unet(seed=1))
    if not METHODS[method].depends_on_weight:
        with pytest.warns(UserWarning, match="32 of 32 layers differ.*can be tried on it"):
            dreamtune.load(other, path)
        return
    with pytest.raises(ValueError, match="32 of 32 layers differ.*load it on its own base"):
        dreamtune.load(other, path)
    assert not any(hasattr(m, "factors") for m in other.unet.modules()), "nothing was changed"
    with pytest.warns(UserWarning, match="trained on"):
        loaded = dreamtune.load(other, path, force=True)
    if kind == "native":
        group = loaded.groups[0]
        theirs = adapter.groups[0].adapter.merged(group.weight)
        torch.testing.assert_close(group.adapter.merged(group.weight), theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_base_is_the_same_base(dtype, tmp_path):
    adapter = dreamtune.inject(tiny_unet(), "ether+")
    path = adapter.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = dreamtune.load(tiny_unet(dtype), path)
    own = adapter.state_dict()
    assert all(torch.equal(own[k], v) for k, v in loaded.state_dict().items())


def test_other_architecture(tmp_path):
    from diffusers import UNet2DConditionModel

    path = dreamtune.inject(tiny_unet(), "lora").save(tmp_path)
    config = {**tiny_unet().config, "cross_attention_dim": 16}
    with pytest.raises(ValueError, match="another architecture: 8 layers do not fit"):
        dreamtune.load(UNet2DConditionModel.from_config(config), path)


@pytest.fixture
def exported(tmp_path):
    adapter = dreamtune.inject(tiny_unet(), "lora", rank=3)
    disturb(adapter)
    return load_file(dreamtune.export(adapter, tmp_path))


def rewritten(tensors, tmp_path):
    save_file(tensors, tmp_path / "changed.safetensors")
    return tmp_path / "changed.safetensors"


def test_keys_that_match_nothing(exported, tmp_path):
    """Stock loaders log a warning at most, and give the base's images."""
    for change in (
        lambda k: k.replace("unet.", "model."),
        lambda k: k.replace("unet.", "base_model.model.model."),
        lambda k: k.replace("attn1", "attn9"),
    ):
        path = rewritten({change(k): v for k, v in exported.items()}, tmp_path)
        with pytest.raises(ValueError, match="keys match no layer of the network"):
            dreamtune.load(tiny_unet(), path)
    extra = {**exported, "text_encoder.text_model.x.lora_A.weight": torch.zeros(1, 2)}
    with pytest.raises(ValueError, match="1 keys match no layer of the network, `text_encoder"):
        dreamtune.load(tiny_unet(), rewritten(extra, tmp_path))


def test_missing_layers_and_wrong_shapes(exported, tmp_path):
    gone = next(k for k in exported if "to_k.lora_A" in k)
    layer = gone.removesuffix(".lora_A.weight")
    short = {k: v for k, v in exported.items() if not k.startswith(layer)}
    with pytest.raises(ValueError, match="1 layers have no keys, `down_blocks.*to_k` first"):
        dreamtune.load(tiny_unet(), rewritten(short, tmp_path))
    with pytest.raises(ValueError, match="match no layer of the network"):
        dreamtune.load(tiny_unet(), rewritten(
            {k: v for k, v in exported.items() if k != gone}, tmp_path))  # fmt: skip
    wrong = {**exported, gone: torch.zeros(3, 7)}
    with pytest.raises(ValueError, match="to_k` is .* here and .*7.* in the file"):
        dreamtune.load(tiny_unet(), rewritten(wrong, tmp_path))


def test_not_finite(exported, tmp_path):
    exported[next(iter(exported))][0, 0] = float("nan")
    with pytest.raises(ValueError, match="values that are not finite in `unet"):
        dreamtune.load(tiny_unet(), rewritten(exported, tmp_path))


def test_mixed_ranks_alphas_and_some_targets(exported, tmp_path):
    """A file of another trainer: fewer projections, ranks that differ, kohya alphas."""
    some, expected = {}, {}
    for k, v in exported.items():
        if "lora_A" not in k or not ("to_q" in k or "to_v" in k):
            continue
        path = k.removeprefix("unet.").removesuffix(".lora_A.weight")
        rank = 1 if "attn2" in k else 3
        up = exported[k.replace("lora_A", "lora_B")]
        name = f"lora_unet_{path.replace('.', '_')}"
        some[f"{name}.lora_down.weight"], some[f"{name}.lora_up.weight"] = v[:rank], up[:, :rank]
        some[f"{name}.alpha"] = torch.tensor(1.5)
        expected[path] = up[:, :rank] @ v[:rank] * 1.5 / rank
    path = rewritten({k: v.contiguous() for k, v in some.items()}, tmp_path)
    unet = tiny_unet()
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    dreamtune.load(unet, path).merge()
    for name, tensor in unet.state_dict().items():
        change = expected.get(name.removesuffix(".weight"))
        want = before[name] if change is None else before[name] + change
        torch.testing.assert_close(tensor, want, rtol=0, atol=1e-6)


def test_training_goes_on_from_a_file_of_any_format(exported, tmp_path):
    """The LoRA of a method, as a plain LoRA: one more step moves it, and it is saved and loaded."""
    file = rewritten(exported, tmp_path)
    assert not list(dreamtune.load(tiny_unet(), file).parameters())
    unet = tiny_unet()
    adapter = dreamtune.load(unet, file, trainable=True)
    assert adapter.num_parameters == sum(p.numel() for p in adapter.parameters()) > 0
    before = adapter.state_dict()
    optimizer = torch.optim.SGD(adapter.parameter_groups(0.5))
    inputs = unet_inputs(2)
    losses = []
    for _ in range(3):
        loss = unet(*inputs).sample.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    assert any(not torch.equal(before[k], x) for k, x in adapter.state_dict().items())
    again = tiny_unet()
    dreamtune.load(again, adapter.save(tmp_path / "further"))
    with torch.no_grad():
        torch.testing.assert_close(again(*inputs).sample, unet(*inputs).sample)


def test_a_second_adapter_has_another_name(exported, tmp_path):
    pipe = tiny_pipeline(tiny_unet())
    path = rewritten(exported, tmp_path)
    dreamtune.load(pipe, path)
    with pytest.raises(ValueError, match="there is an adapter `default` in this .* give another"):
        dreamtune.load(pipe, path)


def test_package_names_stay_functions():
    import dreamtune.files.export
    import dreamtune.injection.inject  # noqa: F401

    assert callable(dreamtune.inject) and callable(dreamtune.export) and callable(dreamtune.load)
    with pytest.raises(AttributeError, match="has no attribute `injekt`"):
        _ = dreamtune.injekt


@pytest.mark.parametrize("parts", [3, torch.nn.ModuleDict({"transformer": torch.nn.Identity()})])
def test_a_model_with_components_of_its_own_is_no_pipeline(tmp_path, parts):
    model = torch.nn.ModuleDict({"to_q": torch.nn.Linear(4, 4)})
    model.components = parts
    adapter = dreamtune.inject(model, "lora", rank=2, target_modules=["to_q"])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(0.5)
    wanted = model["to_q"](torch.ones(1, 4))
    adapter.save(tmp_path)
    adapter.eject()
    dreamtune.load(model, tmp_path)
    torch.testing.assert_close(model["to_q"](torch.ones(1, 4)), wanted)
