"""Loading a base from a folder, a single file, the hub; encoding."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted import edit
from safetensors.torch import save_file
from tiny_transformers import tiny

from dreamtune.models import folder as model_folder
from dreamtune.models import load as load_module
from dreamtune.models import room
from dreamtune.models.base import Frame, SamplingDefaults
from dreamtune.models.checkpoint import NETWORK, kind_of
from dreamtune.models.conditioning import take, together
from dreamtune.models.load import load_base
from dreamtune.models.quiet import move
from dreamtune.models.single_file import CONFIGS, clip_tokenizer
from dreamtune.models.stable_diffusion_xl import StableDiffusionXL

KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
TEXT = "cond_stage_model.transformer.text_model.final_layer_norm.bias"


def test_tokenizer_has_clips_ids() -> None:
    """Golden ids of CLIP's tokenizer."""
    text = "a sks dog in the snow"
    ids = clip_tokenizer()(text, padding="max_length", max_length=77).input_ids
    assert ids == [49406, 320, 48136, 1929, 530, 518, 2583] + [49407] * 70
    padded = clip_tokenizer("!")(text, padding="max_length", max_length=10).input_ids
    assert padded == [49406, 320, 48136, 1929, 530, 518, 2583, 49407, 0, 0]


@pytest.mark.parametrize(("width", "family"), [(768, "v1"), (1024, "v2")])
def test_family_of_a_single_file(tmp_path: Path, width: int, family: str) -> None:
    save_file({KEY: torch.zeros(2, width), TEXT: torch.zeros(1)}, tmp_path / "m.safetensors")
    assert kind_of(tmp_path / "m.safetensors") == family
    assert (CONFIGS / family / "unet" / "config.json").is_file()


def test_files_that_are_no_base(tmp_path: Path) -> None:
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    save_file({KEY: torch.zeros(2, 512), TEXT: torch.zeros(1)}, tmp_path / "odd.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"12")
    (tmp_path / "m.ckpt").write_bytes(b"12")
    for name, message in (
        ("lora", "is not a Stable Diffusion 1.x, 2.x or XL checkpoint"),
        ("odd", "text width 512 is neither"),
        ("cut", "is damaged or not a safetensors file"),
    ):
        with pytest.raises(ValueError, match=message):
            load_base(str(tmp_path / f"{name}.safetensors"))
    with pytest.raises(ValueError, match="is not a .safetensors file; convert it"):
        load_base(str(tmp_path / "m.ckpt"))


@pytest.mark.parametrize(
    ("family", "parameters", "texts"),
    [
        ("v1", 859_520_964, [123_060_480]),
        ("v2", 865_910_724, [340_387_840]),
        ("v2-base", 865_910_724, [340_387_840]),
        ("xl", 2_567_463_684, [123_060_480, 694_659_840]),
    ],
)
def test_shipped_configs_build_the_real_models(
    family: str, parameters: int, texts: list[int]
) -> None:
    """Parameter counts of the published UNets, autoencoder and text encoders."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    folder, found = CONFIGS / family, []
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
        kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        for part, kind in kinds.items():
            if (folder / part).is_dir():
                found.append(count(kind(CLIPTextConfig.from_pretrained(folder / part))))
    assert count(unet) == parameters
    assert count(vae) == 83_653_863
    assert found == texts


def test_folder(tiny_pipeline_dir: Path, tiny_v_pipeline_dir: Path) -> None:
    eps, v = load_base(str(tiny_pipeline_dir)), load_base(str(tiny_v_pipeline_dir))
    assert (eps.resolution, eps.prediction_type, eps.zero_snr) == (16, "epsilon", False)
    assert (v.resolution, v.prediction_type, v.zero_snr) == (16, "v_prediction", True)
    assert v.process().alpha_bar[-1].item() == pytest.approx(0, abs=1e-6)
    assert eps.id == tiny_pipeline_dir.name
    assert not any(p.requires_grad for p in eps.unet.parameters())
    changed = load_base(str(tiny_pipeline_dir), prediction_type="v_prediction")
    assert changed.prediction_type == "v_prediction"


def test_encode_images_of_both_autoencoders(
    tiny_pipeline_dir: Path, tiny_v_pipeline_dir: Path
) -> None:
    pixels = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    kl = load_base(str(tiny_pipeline_dir))
    mean, std = kl.encode_images(pixels, batch=2)
    with torch.no_grad():
        spread = kl.vae.encode(pixels).latent_dist
    assert (mean - 0.5 * spread.mean).abs().max() < 1e-5
    assert std is not None and (std - 0.5 * spread.std).abs().max() < 1e-5
    tiny = load_base(str(tiny_v_pipeline_dir))
    mean, none = tiny.encode_images(pixels)
    assert none is None and mean.shape == (5, 4, 8, 8)


@pytest.mark.parametrize("family", ["tiny_pipeline_dir", "tiny_xl_pipeline_dir"])
def test_prompts_are_encoded_as_the_pipeline_does(
    family: str, request: pytest.FixtureRequest
) -> None:
    """To the last bit: those trained on, those of the pictures, and after reading the text encoders
    once more.
    """
    from diffusers import DiffusionPipeline

    folder = request.getfixturevalue(family)
    base, prompts = load_base(str(folder)), ["a dog", "a red cat"]
    stock = DiffusionPipeline.from_pretrained(folder)
    theirs = stock.encode_prompt(
        prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    named = dict(zip(base.told, theirs, strict=True))
    told = {name: x for name, x in named.items() if not name.startswith("negative")}
    gone = weakref.ref(base.text_encoder)
    for _ in range(2):
        ours, of_call = base.encode_prompts(prompts), base.call_arguments(prompts)
        assert ours.keys() == told.keys() and of_call.keys() == named.keys()
        assert all(torch.equal(ours[name], told[name]) for name in told)
        assert all(torch.equal(of_call[name], named[name]) for name in named)
        base.let_encoders_go()
        gc.collect()
        assert gone() is None
        assert [base.parts[name] for name in base.encoder_names] == [None] * len(base.encoder_names)


def test_xl_whose_empty_prompt_is_encoded(tiny_xl_pipeline_dir: Path, tmp_path: Path) -> None:
    """As its model_index.json says: by default the negative prompt is zeros."""
    usual = load_base(str(tiny_xl_pipeline_dir))
    zeros = usual.sampling_arguments(["a dog"] * 2)
    assert all(not x.any() for name, x in zeros.items() if name.startswith("negative"))
    base = Path(shutil.copytree(tiny_xl_pipeline_dir, tmp_path / "base"))
    index = json.loads((base / "model_index.json").read_text())
    changed = {**index, "force_zeros_for_empty_prompt": False}
    (base / "model_index.json").write_text(json.dumps(changed))
    found = load_base(str(base))
    assert (usual.empty_is_none, found.empty_is_none) == (False, True)
    told = found.sampling_arguments(["a dog"] * 2)
    empty = found.encode_prompts([""])
    for name, x in empty.items():
        torch.testing.assert_close(told[f"negative_{name}"], x.expand(2, *x.shape[1:]))


def test_xl_is_told_sizes(tiny_xl_pipeline_dir: Path) -> None:
    """In float32 beside a network in half precision: 1365 is none of bf16's numbers."""
    base = load_base(str(tiny_xl_pipeline_dir), dtype=torch.bfloat16)
    assert (base.resolution, base.prediction_type) == (16, "epsilon")
    assert base.sampling_defaults(1024) == SamplingDefaults("base", 5.0, 0.0)
    told = base.encode_frames([Frame((1024, 1365), (0, 170), (1024, 1024))])
    assert told["time_ids"].tolist() == [[1024, 1365, 0, 170, 1024, 1024]]
    seen: list[torch.Tensor] = []
    base.unet.add_time_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    conditioning = {**base.encode_prompts(["a dog"]), **told}
    out = base.predict(torch.zeros(1, 4, 8, 8), torch.tensor([3]), conditioning)
    assert out.dtype == torch.bfloat16 and out.shape == (1, 4, 8, 8)
    assert seen[0].tolist() == [1024, 1365, 0, 170, 1024, 1024]


def test_a_prompt_that_is_too_long_is_said(
    tiny_pipeline_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_base(str(tiny_pipeline_dir)).encode_prompts(["a very very very very long prompt"])
    assert "its end is not seen" in caplog.text


def test_sampling_gives_the_modules_back(tiny_pipeline_dir: Path) -> None:
    base = load_base(str(tiny_pipeline_dir), dtype=torch.bfloat16)
    with base.sampling("dpm++") as pipe:
        assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
        assert pipe.vae.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert base.vae.dtype == base.text_encoder.dtype == torch.float32


def test_refusals(tmp_path: Path, tiny_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="there is no base model at `./nowhere`"):
        load_base("./nowhere")
    with pytest.raises(ValueError, match="has no model_index.json"):
        load_base(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "SanaPipeline"}))
    families = r"1.x, 2.x \(StableDiffusionPipeline\); .* XL \(StableDiffusionXLPipeline\)"
    with pytest.raises(ValueError, match=f"is a SanaPipeline, which is none .*: .*{families}"):
        load_base(str(tmp_path))
    monkeypatch.setattr(model_folder, "hub_answers", lambda: False)
    with pytest.raises(ValueError, match="hf download nobody/nothing --local-dir FOLDER"):
        load_base("nobody/nothing")


@pytest.mark.parametrize(
    ("kind", "resolution", "told"),
    [
        ("v1", 512, {"prompt_embeds": (1, 77, 768)}),
        ("xl", 1024, {"prompt_embeds": (1, 77, 40), "pooled_prompt_embeds": (1, 16)}),
    ],
)
def test_single_file_loads_offline_as_the_same_models(
    kind: str,
    resolution: int,
    told: dict[str, tuple[int, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every tensor of a checkpoint in the original layout arrives where it belongs."""
    from single_file_layout import write_configs, write_single_file

    from dreamtune.models import single_file

    monkeypatch.setattr(single_file, "CONFIGS", write_configs(tmp_path / "configs", kind))
    file = tmp_path / "model.safetensors"
    parts = write_single_file(file, tmp_path / "configs", kind)
    base = load_base(str(file))
    assert (base.id, base.prediction_type, base.resolution) == ("model", "epsilon", resolution)
    for name, original in parts.items():
        loaded, wanted = getattr(base, name).state_dict(), original.state_dict()
        assert loaded.keys() == wanted.keys()
        assert all(torch.equal(loaded[k], wanted[k]) for k in wanted), name
    first = base.encode_prompts(["a sks dog"])
    assert {name: tuple(x.shape) for name, x in first.items()} == told
    base.let_encoders_go()
    assert all(torch.equal(x, first[n]) for n, x in base.encode_prompts(["a sks dog"]).items())
    half = load_base(str(file), dtype=torch.bfloat16)
    assert torch.equal(half.unet.conv_in.weight, base.unet.conv_in.weight.bfloat16())
    assert half.vae.dtype == half.text_encoder.dtype == torch.float32


def test_what_has_xls_names_and_is_trained_otherwise(tmp_path: Path) -> None:
    key = KEY.replace("input_blocks.1.1", "input_blocks.4.1")
    tensors = {key: torch.zeros(2, 2048), "conditioner.embedders.1.model.x": torch.zeros(1)}
    file = tmp_path / "m.safetensors"
    save_file(tensors, file)
    assert kind_of(file) == "xl"
    with pytest.raises(ValueError, match="has no autoencoder"):
        load_base(str(file))
    save_file({**tensors, "first_stage_model.x": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="it has no `conditioner.embedders.0.transformer.text_mo"):
        load_base(str(file))
    for name, message in (
        ("edm_mean", "trained with the noise of EDM"),
        ("conditioner.embedders.0.model.y", "is the refiner"),
    ):
        save_file({**tensors, name: torch.zeros(1)}, file)
        with pytest.raises(ValueError, match=message):
            load_base(str(file))
    save_file({**tensors, f"{NETWORK}input_blocks.0.0.weight": torch.zeros(2, 9, 3, 3)}, file)
    with pytest.raises(ValueError, match="takes 9 channels, not 4"):
        load_base(str(file))


def test_a_family_that_the_installed_diffusers_lacks(
    tiny_xl_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    xl = load_module.FAMILIES[1]
    newest = xl._replace(since="99.1", pipelines=("NewestPipeline", *xl.pipelines))
    monkeypatch.setattr(load_module, "FAMILIES", (load_module.FAMILIES[0], newest))
    with pytest.raises(
        ValueError, match="XL needs diffusers 99.1 or newer, .* Newest.*; installed"
    ):
        load_base(str(tiny_xl_pipeline_dir))


def test_parts_of_xl_that_do_not_belong_together(tiny_xl_pipeline_dir: Path) -> None:
    from tiny import tiny_unet, tiny_xl_unet

    base = load_base(str(tiny_xl_pipeline_dir))
    about = {"id": "x", "embedded": False, "device": base.device, "dtype": base.dtype}
    refiner = tiny_xl_unet(projection_class_embeddings_input_dim=5 * 8 + 10)
    for unet, message in (
        (tiny_unet(), "`addition_embed_type` text_time .*got None"),
        (refiner, "takes 50 numbers of pooled text and sizes and would be given 58"),
        (
            tiny_xl_unet(cross_attention_dim=48),
            "told 48 numbers a token, .* give 40",
        ),
        (tiny_xl_unet(in_channels=9), "takes 9 channels and gives 4"),
    ):
        with pytest.raises(ValueError, match=message):
            StableDiffusionXL({**base.parts, "unet": unet}, **about)


def test_the_second_text_encoder_and_its_tokenizer(
    tiny_xl_pipeline_dir: Path, tmp_path: Path
) -> None:
    """Read as carefully as the first: messages name the second."""
    base = Path(shutil.copytree(tiny_xl_pipeline_dir, tmp_path / "base"))
    edit(base / "tokenizer_2" / "tokenizer_config.json", model_max_length=99)
    said = " ".join(load_base(str(base)).notes)
    assert "tokenizer_2` says a length of 99: the text encoder's 16 tokens are used" in said
    edit(base / "text_encoder_2" / "config.json", projection_dim=12)
    with pytest.raises(ValueError, match="text_encoder_2` (lacks weights|could not be loaded)"):
        load_base(str(base))
    edit(base / "text_encoder_2" / "config.json", projection_dim=10, model_type="t5")
    with pytest.raises(ValueError, match="text_encoder_2/config.json.*`model_type` .*; got 't5'"):
        load_base(str(base))
    edit(base / "text_encoder_2" / "config.json", model_type="clip_text_model")
    edit(base / "model_index.json", text_encoder_2=["transformers", "CLIPTextModel"])
    with pytest.raises(ValueError, match="as text_encoder_2; it must be .*WithProjection"):
        load_base(str(base))
    edit(base / "model_index.json", text_encoder_2=[None, None])
    with pytest.raises(ValueError, match="model_index.json.*`text_encoder_2"):
        load_base(str(base))


@pytest.mark.parametrize("layout", ["shards", "fp16", ".bin"])
def test_a_network_larger_than_the_card(
    layout: str, tiny_xl_pipeline_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before a weight is read, in its own dtype; nothing is known of a pickle."""
    from left_out import lay_out

    base = Path(shutil.copytree(tiny_xl_pipeline_dir, tmp_path / "base"))
    lay_out(base, layout)
    count = sum(p.numel() for p in load_base(str(base)).unet.parameters())
    folder = load_module.open_folder(str(base), None, None)
    assert room.weights_of_folder(folder, "unet") == (None if layout == ".bin" else count)
    memory = SimpleNamespace(total_memory=2 * count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    if layout == ".bin":
        return
    with pytest.raises(ValueError, match="weights, 0.0 GiB in bfloat16, and cuda has 0.0 GiB: use"):
        load_base(str(base), dtype=torch.bfloat16, device="cuda")
    memory.total_memory += 1
    many = partial(room.weights_of_folder, folder, "unet")
    room.check_room("x", many, torch.bfloat16, torch.device("cuda"))


def test_numbers_of_a_network_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total_memory=15 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    said = (
        r"network of `flux` has 11.9 billion weights, 22.2 GiB in bfloat16, and cuda has 15.0 GiB"
    )
    with pytest.raises(ValueError, match=said):
        room.check_room("flux", lambda: 11_900_000_000, torch.bfloat16, torch.device("cuda"))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_rows_of_several_prompts_are_put_together(lengths: list[int], data: st.DataObject) -> None:
    """Tokens are filled up with zeros, pooled text and lists are not."""
    parts = []
    for i, length in enumerate(lengths):
        x = torch.full((2, length, 3), float(i + 1))
        parts.append({"tokens": x, "pooled": x[:, 0], "ragged": [x[0], x[1]]})
    whole = together(parts)
    rows = data.draw(st.lists(st.integers(0, 2 * len(lengths) - 1), min_size=1, max_size=5))
    found = take(whole, rows)
    assert found["tokens"].shape == (len(rows), max(lengths), 3)
    for k, row in enumerate(rows):
        own, length = float(row // 2 + 1), lengths[row // 2]
        assert (found["tokens"][k, :length] == own).all() and not found["tokens"][k, length:].any()
        assert (found["pooled"][k] == own).all()
        assert torch.equal(found["ragged"][k], torch.full((length, 3), own))


def test_what_a_network_keeps_in_float32_stays_so(tmp_path: Path) -> None:
    """As where it is read in that dtype."""
    from diffusers import Krea2Transformer2DModel

    network = tiny("Krea2Transformer2DModel")
    network.save_pretrained(tmp_path)  # type: ignore[operator]
    read: Any = Krea2Transformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    move(network, torch.device("cpu"), torch.bfloat16)
    dtypes = {name: x.dtype for name, x in network.named_parameters()}
    assert dtypes == {name: x.dtype for name, x in read.named_parameters()}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    assert dtypes["transformer_blocks.0.norm1.weight"] == torch.float32
