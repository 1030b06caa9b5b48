"""Adapters that act in parts of the picture: what each layer adds where, and what a text gives."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_several_adapters import KINDS, alone, as_kind, close, draw, said
from tiny import disturb, images, tiny_pipeline, tiny_unet

import dreamtune
from dreamtune import Region
from dreamtune.injection.regions import Regions
from dreamtune.pipeline.adapters import _copies

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
MORE = ["*.ff.net.*", "*.conv*", "proj_in", "conv_in", "conv_out"]
TARGETS = {name: [*ATTENTION, *([] if name in ("fox", "bee") else MORE)] for name in KINDS}
LEFT, RIGHT, ALL = (0, 0, 0.5, 1), (0.5, 0, 1, 1), (0, 0, 1, 1)
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


def saved(unet, folder, name, method, targets, **options):
    seed = sum(map(ord, name))
    adapter = dreamtune.inject(unet, method, seed=seed, target_modules=targets, **options)
    disturb(adapter, seed)
    path = adapter.save(folder / name)
    adapter.eject()
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    unet, folder = tiny_unet(), tmp_path_factory.mktemp("files")
    found = {
        name: saved(unet, folder, name, method, TARGETS[name], **options)
        for name, (method, options) in KINDS.items()
    }
    found["late"] = saved(unet, folder, "late", "delora", ATTENTION, rank=2, timestep_floor=0.3)
    found["picture"] = saved(unet, folder, "picture", "lora", ["attn1.to_q", "attn1.to_v"], rank=2)
    found["time"] = saved(unet, folder, "time", "lora", ["to_q", "*.time_emb_proj"], rank=2)
    for name in ("text", "word"):
        found[name] = saved(unet, folder, name, "lora", ["attn2.to_k", "attn2.to_v"], rank=4)
    return found


def net(files, *names):
    unet = tiny_unet()
    for name in names:
        dreamtune.load(unet, files[name], name=name)
    return unet


@pytest.mark.parametrize("name", [*KINDS, "late"])
def test_a_region_that_is_all_of_the_picture_is_the_plain_route(files, name):
    """Of every kind of change, in linear layers and convolutions; a row without is the base's."""
    unet = net(files, name)
    with dreamtune.route(unet, [name, None, name]):
        want = said(unet, 3)
    whole = torch.ones(16, 16)
    with dreamtune.route(unet, [{name: Region(box=ALL)}, None, {name: Region(mask=whole)}]):
        got = said(unet, 3)
    close(got, want, atol=2e-6 * want.abs().max().item())
    assert torch.equal(got[1], alone(files, None, 3)[1])
    assert (got[0] - alone(files, None, 3)[0]).abs().max() > 0.01
    with dreamtune.route(unet, [{name: Region(box=ALL, strength={"up": 0.5})}, None, None]):
        got = said(unet, 3)
    with dreamtune.route(unet, [{name: {"up": 0.5}}, None, None]):
        close(got, said(unet, 3), atol=2e-6 * want.abs().max().item())


def test_adapters_of_one_region_act_together(files):
    unet = net(files, "dog", "fox", "cow")
    row = {"dog": 0.5, "fox": 1.0, "cow": -0.3}
    with dreamtune.route(unet, [row]):
        want = said(unet, 1)
    for everywhere in ((), ("cow",), ("dog", "cow")):
        placed = {n: s if n in everywhere else Region(box=ALL, strength=s) for n, s in row.items()}
        with dreamtune.route(unet, [placed]):
            close(said(unet, 1), want, atol=5e-6)


PLACES = {  # layer -> input without the batch, and the picture that it gives
    f"{BLOCK}.attn1.to_q": ((64, 32), (8, 8)),
    f"{BLOCK}.attn1.to_v": ((64, 32), (8, 8)),
    f"{BLOCK}.attn1.to_out.0": ((64, 32), (8, 8)),
    f"{BLOCK}.attn2.to_q": ((64, 32), (8, 8)),
    f"{BLOCK}.ff.net.2": ((64, 128), (8, 8)),
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_k": ((16, 48), (4, 4)),
    "down_blocks.0.downsamplers.0.conv": ((32, 8, 8), (4, 4)),
    "down_blocks.1.resnets.0.conv1": ((32, 4, 4), (4, 4)),
}


@pytest.mark.parametrize("name", ["dog", "cow", "owl"])
def test_each_layer_adds_the_change_times_the_mask(files, name):
    mask = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    mask[:, :4] = 0
    base, one, unet = tiny_unet(), net(files, name), net(files, name)
    with torch.no_grad(), dreamtune.route(unet, [{name: Region(mask=mask, strength=0.5)}, name]):
        said(unet, 2)
        for path, (shape, size) in PLACES.items():
            x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
            plain, full, got = (u.get_submodule(path)(x) for u in (base, one, unet))
            here = F.adaptive_avg_pool2d(mask[None], size)[0]
            share = here if len(shape) == 3 else here.reshape(-1, 1)
            close(got[0], plain[0] + 0.5 * share * (full - plain)[0], atol=1e-5)
            close(got[1], full[1], atol=1e-5)
            outside = (share == 0).expand_as(got[0])
            assert outside.any() and torch.equal(got[0][outside], plain[0][outside])


def test_changes_of_regions_that_overlap_add_up(files):
    """Also with one that is everywhere."""
    unet, base = net(files, "dog", "cow", "owl"), tiny_unet()
    own = [net(files, name) for name in ("dog", "cow", "owl")]
    row = {
        "dog": Region(box=(0, 0, 0.75, 1)),
        "cow": Region(box=(0.25, 0, 1, 1), strength=-0.5),
        "owl": 0.5,
    }
    masks = [row["dog"].share(8, 8), -0.5 * row["cow"].share(8, 8), torch.full((8, 8), 0.5)]
    with torch.no_grad(), dreamtune.route(unet, [row]):
        said(unet, 1)
        for path in (f"{BLOCK}.attn1.to_k", "down_blocks.0.resnets.0.conv2"):
            x = torch.randn(1, 64, 32) if "attn" in path else torch.randn(1, 32, 8, 8)
            plain, got = base.get_submodule(path)(x), unet.get_submodule(path)(x)
            shares = [m.reshape(64, 1) if "attn" in path else m for m in masks]
            changes = [one.get_submodule(path)(x) - plain for one in own]
            close(got, plain + sum(m * y for m, y in zip(shares, changes)), atol=2e-5)


@pytest.mark.parametrize("processor", [None, AttnProcessor(), SlicedAttnProcessor(2)])
def test_regions_share_the_attention_to_a_text(files, processor):
    """Two boxes that overlap in the middle columns, and leave the last to the base."""
    unet = net(files, "text", "word")
    if processor is not None:
        unet.set_attn_processor(processor)
    before = list(unet.attn_processors.values())
    boxes = {"text": (0, 0, 0.5, 1), "word": (0.25, 0, 0.875, 1)}
    g = torch.Generator().manual_seed(3)
    x, text = torch.randn(1, 64, 32, generator=g), torch.randn(1, 7, 24, generator=g)

    def attended(model):
        return model.get_submodule(f"{BLOCK}.attn2")(x, encoder_hidden_states=text)

    with torch.no_grad():
        own = [attended(net(files, n) if n else tiny_unet()) for n in (None, *boxes)]
        with dreamtune.route(unet, [{n: Region(box=b) for n, b in boxes.items()}]):
            said(unet, 1)
            got = attended(unet)
    shares = torch.tensor([  # base, text, word; of the columns
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0],
        [1.0, 1.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.0, 0.0],
    ])  # fmt: skip
    shares = shares.repeat(1, 8).view(3, 1, 64, 1)
    close(got, sum(w * y for w, y in zip(shares, own)), atol=1e-5)
    assert (own[1] - own[0]).abs().max() > 1e-3
    assert list(unet.attn_processors.values()) == before
    assert not any(m._forward_hooks for m in unet.modules() if m is not unet)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99)
)
def test_masks_are_averaged_over_areas(height, width, down, across, seed):
    mask = torch.rand(height * down, width * across, generator=torch.Generator().manual_seed(seed))
    region = Region(mask=mask)
    close(region.share(height, width), F.avg_pool2d(mask[None], (down, across))[0], atol=1e-6)
    finer = region.share(5 * height + 1, 7)  # of no whole ratio: the mean stays
    assert finer.mean().item() == pytest.approx(mask.mean().item(), abs=1e-6)
    assert torch.equal(Region(mask=torch.ones(height, width)).share(down, 7), torch.ones(down, 7))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 98), max_size=3, unique=True), st.integers(1, 20))
def test_boxes_side_by_side_leave_nothing(cuts, width):
    """Whatever the cuts: no turn of the base, which would cost and change nothing."""
    edges = [0.0, *(cut / 99 for cut in sorted(cuts)), 1.0]
    boxes = [Region(box=(a, 0, b, 1)) for a, b in zip(edges, edges[1:])]
    regions = Regions([{str(i): box for i, box in enumerate(boxes)}])
    regions.start(torch.zeros(1, 4, 2, width), torch.zeros(1, dtype=torch.long), (True,))
    assert regions.turns == list(range(1, len(boxes) + 1))
    weights = regions.weights(torch.zeros(1, 2 * width, 3))
    assert weights.shape == (len(boxes), 1, 2 * width, 1)
    close(weights.sum(0), torch.ones(1, 2 * width, 1))


def test_a_box_is_its_mask():
    mask = torch.zeros(16, 40)
    mask[4:15, 3:21] = 1
    box = Region(box=(3 / 40, 4 / 16, 21 / 40, 15 / 16))
    for size in ((16, 40), (8, 20), (7, 9), (1, 1)):
        close(box.share(*size), Region(mask=mask).share(*size), atol=1e-6)
    picture = Image.fromarray((mask * 255).byte().numpy())
    for given_ in (picture, mask.bool(), mask.numpy(), (mask * 255).byte(), picture.convert("1")):
        assert torch.equal(Region(mask=given_).mask, mask)


def test_pictures_that_are_no_square(files):
    """Latents of 6 x 11, which are halved to 3 x 6."""
    unet = net(files, "dog", "cat")
    sample, text = torch.randn(1, 4, 6, 11), torch.randn(1, 7, 24)
    mask = torch.zeros(48, 88)
    mask[:, :44] = 1
    with torch.no_grad():
        outs = []
        for left in (Region(box=LEFT), Region(mask=mask)):
            with dreamtune.route(unet, [{"dog": left, "cat": Region(box=RIGHT)}]):
                outs.append(unet(sample, torch.tensor(500), text).sample)
        close(*outs)
        square, told = Region(mask=torch.ones(8, 8)), "mask of `dog` is 8 x 8 .* another aspect"
        with dreamtune.route(unet, [{"dog": square}]), pytest.raises(ValueError, match=told):
            unet(sample, torch.tensor(500), text)
    said(unet, 1)  # the lock is free


@pytest.mark.parametrize(
    ("kind", "guidance"),
    [("StableDiffusionPipeline", 5.0), ("StableDiffusionImg2ImgPipeline", 1.0)],
)
def test_rows_of_a_pipeline_have_regions_of_their_own(files, kind, guidance):
    """Two images a prompt, each as it is with its row alone."""
    rows = [
        {"dog": Region(box=LEFT), "cow": Region(box=RIGHT, strength=0.7)},
        None,
        {"dog": Region(box=(0, 0.25, 1, 0.75)), "fox": 0.5},
    ]
    pipe = tiny_pipeline(net(files, "dog", "cow", "fox"))
    pipe, more = as_kind(pipe, kind)
    with dreamtune.route(pipe, rows):
        got = draw(pipe, more, [0, 1, 2], guidance)
    for number, row in enumerate(rows):
        with dreamtune.route(pipe, [row]):
            want = draw(pipe, more, [number], guidance)
        close(got[2 * number : 2 * number + 2], want, atol=2e-4)
    dreamtune.set_adapters(pipe, {})
    close(got[2:4], draw(pipe, more, [1], guidance), atol=2e-6)


class Telling(StableDiffusionPipeline):
    """Encodes a prompt as what its seed draws."""

    def encode_prompt(
        self, prompt, device, num_images_per_prompt, do_classifier_free_guidance, *args, **kwargs
    ):
        if prompt is None:
            return super().encode_prompt(
                prompt, device, num_images_per_prompt, do_classifier_free_guidance, *args, **kwargs
            )
        return torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(len(prompt))), None


def telling(unet):
    pipe = Telling(**tiny_pipeline(unet).components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_region_s_prompt_is_in_place_of_the_picture_s(files, guidance):
    """Of all of the picture it is the plain call with that prompt; what is without the prompt under
    guidance stays. Also where no adapter changes an attention to text.
    """
    asked = {"guidance_scale": guidance, "num_inference_steps": 2, "height": 8, "width": 8}
    g = torch.Generator().manual_seed(5)
    given_, negative = torch.randn(2, 2, 5, 24, generator=g)

    def drawn(pipe, prompts, negative=negative):
        return pipe(
            prompt_embeds=prompts, negative_prompt_embeds=negative, output_type="pt",
            generator=[torch.Generator().manual_seed(i) for i in range(4)],
            num_images_per_prompt=2, **asked,
        ).images  # fmt: skip

    for name in ("dog", "picture"):
        pipe = telling(net(files, name))
        own = pipe.encode_prompt("abc", "cpu", 1, False)[0]
        with dreamtune.route(pipe, [name, name]):
            want = drawn(pipe, torch.cat([own, given_[1:]]))
            other = drawn(pipe, given_)
        row = {name: Region(box=ALL, prompt="abc")}
        with dreamtune.route(pipe, [row, {name: Region(box=ALL)}]):
            close(drawn(pipe, given_), want, atol=2e-5)
        assert (other[:2] - want[:2]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="a region has a prompt, which a `UNet2DConditionModel`"):
        dreamtune.route(pipe.unet, [row, None]).__enter__()
    with dreamtune.route(pipe, [row, None]):
        told = r"the prompt of a region is \(5, 24\) \(tokens, width\), the batch's \(7, 24\)"
        with pytest.raises(ValueError, match=told):
            drawn(pipe, *torch.randn(2, 2, 7, 24))


def test_each_region_attends_to_its_own_text(files):
    """And what the regions leave to the picture's."""
    pipe = telling(net(files, "picture", "dog"))
    unet, g = pipe.unet, torch.Generator().manual_seed(3)
    x, text = torch.randn(1, 64, 32, generator=g), torch.randn(1, 5, 24, generator=g)
    row = {
        "picture": Region(box=(0, 0, 0.25, 1), prompt="ab"),
        "dog": Region(box=(0.25, 0, 0.5, 1), prompt="abcd", strength=0),
    }

    def attended(model, text):
        return model.get_submodule(f"{BLOCK}.attn2")(x, encoder_hidden_states=text)

    with torch.no_grad():
        texts = [pipe.encode_prompt(p, "cpu", 1, False)[0] for p in ("ab", "abcd")]
        want = [attended(tiny_unet(), t).view(8, 8, 32) for t in (*texts, text)]
        with dreamtune.route(pipe, [row]):
            unet(torch.randn(1, 4, 8, 8), torch.tensor(5), text)
            got = attended(unet, text).view(8, 8, 32)
    for number, columns in enumerate((slice(0, 2), slice(2, 4), slice(4, 8))):
        close(got[:, columns], want[number][:, columns])
    assert (want[0] - want[1]).abs().max() > 1e-3


def test_less_of_a_change_gets_out_of_its_box(files):
    """Of a forward of the network: what the adapter of the left half moves on the right."""
    g = torch.Generator().manual_seed(0)
    given_ = torch.randn(1, 4, 16, 32, generator=g), torch.tensor(500), torch.randn(1, 7, 24)
    unet, moved = net(files, "cat"), {}
    with torch.no_grad():
        base = tiny_unet()(*given_).sample
        for kind, entry in (("plain", 1.0), ("left", Region(box=LEFT))):
            with dreamtune.route(unet, [{"cat": entry}]):
                change = (unet(*given_).sample - base).abs().mean((0, 1, 2))
            moved[kind] = (change[16:].mean() / change[:16].mean()).item()
    assert moved["plain"] == pytest.approx(1, abs=0.3)
    assert moved["left"] < 0.5 * moved["plain"]


def test_what_was_set_comes_back(files):
    unet = net(files, "dog", "cat")
    dreamtune.set_adapters(unet, {"dog": 0.5})
    before, row = said(unet, 1), {"dog": Region(box=LEFT), "cat": Region(box=RIGHT)}
    with dreamtune.route(unet, [row]):
        placed = said(unet, 1)
        with dreamtune.route(unet, [{"dog": Region(box=RIGHT), "cat": Region(box=LEFT)}]):
            swapped = said(unet, 1)
        with dreamtune.route(unet, [{"dog": 0.5}]):
            close(said(unet, 1), before)
        assert torch.equal(said(unet, 1), placed)
        with pytest.raises(ValueError, match="a route that is open gives rows to `dog`"):
            dreamtune.unload(unet, "dog")
        with pytest.raises(ValueError, match="rows of a batch have changes of their own"):
            dreamtune.merge(unet)
        dreamtune.get_adapters(unet)["dog"].name = "puppy"
        assert torch.equal(said(unet, 1), placed)
        dreamtune.get_adapters(unet)["puppy"].name = "dog"
        other = copy.deepcopy(unet)
    assert (swapped - placed).abs().max() > 1e-3
    with pytest.raises(ZeroDivisionError), dreamtune.route(unet, [row]):
        raise ZeroDivisionError
    assert torch.equal(said(unet, 1), before) and torch.equal(said(other, 1), before)
    assert not any(m._forward_hooks for m in unet.modules() if m is not unet)
    with dreamtune.route(unet, [row]):
        assert torch.equal(said(unet, 1), placed)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({}, "has a `box` or a `mask`, got none"),
        ({"box": ALL, "mask": torch.ones(2, 2)}, "has a `box` or a `mask`, got both"),
        ({"box": (0, 0, 1)}, "must be four numbers"),
        ({"box": (0, 0, 1, float("nan"))}, "must be four numbers"),
        ({"box": (0, 0, 1, True)}, "must be four numbers"),
        ({"box": (0, 0, 256, 512)}, "divide pixels by width and height"),
        ({"box": (0.5, 0, 0.5, 1)}, "0 <= left < right <= 1"),
        ({"box": (-0.1, 0, 0.5, 1)}, "0 <= left < right <= 1"),
        ({"mask": torch.zeros(4, 4)}, "`mask` is empty"),
        ({"mask": torch.ones(1, 4, 4)}, r"must be \(height, width\), got \(1, 4, 4\)"),
        ({"mask": torch.ones(0, 4)}, r"must be \(height, width\), got \(0, 4\)"),
        ({"mask": torch.full((4, 4), float("nan"))}, "values 0 to 1, or whole ones to 255"),
        ({"mask": torch.full((4, 4), 2.0)}, "values 0 to 1, .* got 2 to 2"),
        ({"mask": torch.full((4, 4), -1)}, "values 0 to 1"),
        ({"mask": torch.ones(4, 4, dtype=torch.complex64)}, "must be real"),
        ({"mask": "left"}, "must be a PIL image, an array or a tensor, got str"),
        ({"mask": Image.new("RGBA", (4, 4))}, "with transparency"),
        ({"box": ALL, "prompt": 3}, "`prompt` of a `Region` must be a text, got 3"),
    ],
)
def test_what_is_no_region(given_, message):
    with pytest.raises(ValueError, match=message):
        Region(**given_)


def test_refusals(files):
    unet = net(files, "dog", "time")
    left = Region(box=LEFT)
    with pytest.raises(ValueError, match="`dog` has a region, which is for the rows"):
        dreamtune.set_adapters(unet, {"dog": left})
    with pytest.raises(ValueError, match="strength of `dog` must be a finite number, got nan"):
        dreamtune.route(unet, [{"dog": Region(box=LEFT, strength=float("nan"))}]).__enter__()
    told = "`time` has a region, but changes `down_blocks.0.resnets.0.time_emb_proj`"
    with dreamtune.route(unet, [{"time": left}]), pytest.raises(ValueError, match=told):
        said(unet, 1)
    dreamtune.unload(unet, "time")
    with dreamtune.route(unet, [{"dog": left}]), pytest.raises(ValueError, match="of the whole"):
        unet.get_submodule(f"{BLOCK}.attn1.to_q")(torch.zeros(1, 64, 32))

    class Own(AttnProcessor):
        pass

    attention = unet.get_submodule(f"{BLOCK}.attn2")
    kept = attention.processor
    attention.processor = Own()
    told = f"`{BLOCK}.attn2` is a `Attention` with `Own`, not known"
    with pytest.raises(ValueError, match=told), dreamtune.route(unet, [{"dog": left}]):
        pass
    attention.processor = kept
    with dreamtune.route(unet, [{"dog": left}]):
        attention.processor = Own()
        with pytest.raises(ValueError, match=told):
            said(unet, 1)
    attention.processor = kept
    assert not any(m._forward_hooks for m in unet.modules() if m is not unet)


def test_networks_of_others(tmp_path):
    """Any network of pictures will do; a compiled one runs as it was, as in any route."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(4, 4, 3, padding="same"), torch.nn.Linear(8, 8)]
    model, x = torch.nn.Sequential(*layers).eval(), torch.randn(1, 4, 6, 8)
    adapter = dreamtune.inject(model, "lora", target_modules=["0"])
    disturb(adapter)
    adapter.save(tmp_path / "dog")
    with torch.no_grad():
        full = model(x)
        adapter.eject()
        plain = model(x)
        dreamtune.load(model, tmp_path / "dog", name="dog")
        with dreamtune.route(model, [{"dog": Region(box=(0, 0, 1, 0.5))}]):
            got = model(x)
            close(torch.compile(model, backend="aot_eager")(x), got)
            with pytest.raises(ValueError, match="need a network of pictures"):
                model(x[:, 0])
    close(got[:, :, :3], full[:, :, :3])
    assert torch.equal(got[:, :, 3:], plain[:, :, 3:])


def test_which_rows_have_the_prompt():
    """As the pipelines lay out a batch under each guidance: without the prompt first, but for
    InstructPix2Pix; a perturbed copy has the prompt.
    """

    def told(**given_):
        kinds = {n: property(lambda _, v=v: v) for n, v in given_.items()}
        held = type("Pipeline", (), kinds)()
        return _copies(held)(1)  # which holds it weakly

    guided = {"do_classifier_free_guidance": True}
    assert told(do_classifier_free_guidance=False) == (True,)
    assert told(**guided) == (False, True)
    assert told(**guided, do_perturbed_attention_guidance=True) == (False, True, True)
    assert told(**guided, image_guidance_scale=1.5) == (True, False, False)


def test_a_route_without_regions_hooks_nothing(files):
    pipe = tiny_pipeline(net(files, "dog", "cat"))
    with dreamtune.route(pipe, ["dog", {"cat": 0.5}]):
        assert not any(m._forward_hooks for m in pipe.unet.modules() if m is not pipe.unet)
        images(pipe)
