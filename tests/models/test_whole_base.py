"""Every weight of a base comes from its files, in every layout that they have."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from left_out import LAYOUTS, each_left_out, lay_out
from planted import edit
from safetensors.torch import load_file, save_file
from single_file_layout import write_configs, write_single_file

from dreamtune.models import folder as model_folder
from dreamtune.models import single_file
from dreamtune.models.folder import ModelFolder, needed
from dreamtune.models.load import load_base
from dreamtune.models.weights import Weights, choose, kinds_of

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def base(tiny_pipeline_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pipeline_dir, tmp_path / "copy"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weight_that_is_left_out_is_named(base: Path, layout: str) -> None:
    """Before: the module came up with a random one, or with memory that nothing had written."""
    seen = set()
    for part, key in each_left_out(base, layout, every=41):
        with pytest.raises(ValueError) as caught:
            load_base(str(base))
        for word in (part, "lacks weights of the", key.removeprefix("text_model.")):
            assert word in str(caught.value)
        seen.add(part)
    assert {"unet", "vae"} <= seen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_base(base: Path, tiny_pipeline_dir: Path, layout: str) -> None:
    lay_out(base, layout)
    found, wanted = load_base(str(base)), load_base(str(tiny_pipeline_dir))
    for part in ("unet", "vae", "text_encoder"):
        loaded, sound = getattr(found, part).state_dict(), getattr(wanted, part).state_dict()
        assert loaded.keys() == sound.keys()
        for key, value in sound.items():
            half = layout == "fp16" and value.is_floating_point()
            assert torch.equal(loaded[key], value.half().float() if half else value), key
    said = {"fp16": "no other weights than its variant `fp16`", ".bin": "its .bin is read"}
    assert len([n for n in found.notes if said.get(layout, "?") in n]) == 3 * (layout in said)


def test_the_text_encoders_two_namings(base: Path, tiny_pipeline_dir: Path) -> None:
    """transformers 4 put `text_model.` before each name, 5 does not; with it position_ids."""
    file = base / "text_encoder/model.safetensors"
    tensors = {k.removeprefix("text_model."): v for k, v in load_file(file).items()}
    ids = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    wanted = load_base(str(tiny_pipeline_dir)).encode_prompts(["a dog"])["prompt_embeds"]
    for named in (tensors, {f"text_model.{k}": v for k, v in tensors.items()} | ids):
        save_file(named, file, metadata={"format": "pt"})
        assert torch.equal(load_base(str(base)).encode_prompts(["a dog"])["prompt_embeds"], wanted)
    other = {k.replace("layers", "resblocks"): v for k, v in tensors.items()}
    save_file(other, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"text_encoder` lacks weights .*belong to no layer.*resbl"
    ):
        load_base(str(base))


def test_names_of_a_lora_that_was_left_on_are_shown(base: Path) -> None:
    tensors = load_file(base / UNET)
    key = next(k for k in tensors if k.endswith("attn1.to_q.weight"))
    tensors[key.replace("weight", "base_layer.weight")] = tensors.pop(key)
    save_file(tensors, base / UNET, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="belong to no layer, `.*base_layer.weight`"):
        load_base(str(base))


def test_layers_that_the_config_has_not_are_said(base: Path) -> None:
    file = base / "text_encoder/model.safetensors"
    tensors = load_file(file)
    start = "text_model." if "text_model.final_layer_norm.bias" in tensors else ""
    tensors[f"{start}encoder.layers.1.mlp.fc1.bias"] = torch.zeros(32)
    save_file({**tensors, "logit_scale": torch.zeros(1)}, file, metadata={"format": "pt"})
    (note,) = [n for n in load_base(str(base)).notes if "left out" in n]
    assert "encoder.layers.1.mlp.fc1.bias" in note and "logit_scale" not in note


@pytest.mark.parametrize(
    ("part", "named", "message"),
    [
        ("text_encoder", ["transformers", "BertModel"], "names transformers.BertModel as text"),
        ("vae", ["diffusers", "AutoencoderOobleck"], "diffusers.AutoencoderOobleck as vae"),
        ("tokenizer", ["transformers", "BertTokenizer"], "BertTokenizer as tokenizer"),
        ("unet", ["diffusers", "UNet1DModel"], "UNet1DModel as unet"),
        ("scheduler", ["diffusers", "FlowMatchEulerDiscreteScheduler"], "none of Stable Diff"),
    ],
)
def test_a_class_that_is_not_known_is_refused_by_name(
    base: Path, part: str, named: list[str], message: str
) -> None:
    edit(base / "model_index.json", **{part: named})
    with pytest.raises(ValueError, match=message):
        load_base(str(base))


PLAIN, HALF = Weights(None, True), Weights("fp16", True)


def test_which_weights_are_chosen() -> None:
    names = [
        "config.json", "openvino_model.bin", "model.fp16.safetensors", "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin", "model.safetensors.index.json",
        "model.safetensors.index.non_ema.json", "model.non_ema-00001-of-00002.safetensors",
    ]  # fmt: skip
    kinds = {PLAIN, HALF, Weights(None, False), Weights("non_ema", True)}
    assert kinds_of(names) == kinds
    assert choose(names, None, "x") == PLAIN
    assert choose(names, "fp16", "x") == HALF
    assert choose(["pytorch_model.bin"], None, "x") == Weights(None, False)
    assert choose(["model.fp16.safetensors"], None, "x") == HALF
    for given, variant, message in (
        (["model.fp16.safetensors", "model.ema.bin"], None, "--variant ema, --variant fp16"),
        (names, "fp8", "`x` has no variant `fp8` of its weights: it has fp16, non_ema"),
        (["config.json"], None, "`x` has no weights"),
    ):
        with pytest.raises(ValueError, match=message):
            choose(given, variant, "x")


def test_a_variant_that_is_not_there(base: Path) -> None:
    with pytest.raises(ValueError, match="no variant `fp16` of its weights: there are plain"):
        load_base(str(base), variant="fp16")
    with pytest.raises(ValueError, match="must be a part of a file's name"):
        load_base(str(base), variant="x/../../y")
    shutil.copy(base / UNET, (base / UNET).with_suffix(".fp16.safetensors"))
    notes = load_base(str(base), variant="fp16").notes
    assert len([n for n in notes if "has no variant `fp16`; its plain weights: read." in n]) == 2


def test_what_is_fetched_from_the_hub(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    """Settings and one set of weights of each part; nothing else of the repository."""
    import huggingface_hub

    names = [
        "model_index.json", "README.md", "evil.py", "v1-5-pruned.ckpt", "unet/config.json",
        "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors", "unet/x.py", "unet/sub/config.json",
        "vae/config.json", "vae/diffusion_pytorch_model.bin", "tokenizer/merges.txt",
        "safety_checker/model.safetensors",
    ]  # fmt: skip
    parts = ("unet", "vae", "tokenizer")
    first = ["model_index.json", "unet/config.json"]
    rest = ["vae/config.json", "vae/diffusion_pytorch_model.bin", "tokenizer/merges.txt"]
    plain = [*first, "unet/diffusion_pytorch_model.safetensors", *rest]
    assert needed("a/b", names, None, parts) == plain
    half = [*first, "unet/diffusion_pytorch_model.fp16.safetensors", *rest]
    assert needed("a/b", names, "fp16", parts) == half
    asked = {}
    monkeypatch.setattr(model_folder, "hub_answers", lambda: True)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name, revision: names)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **o: asked.update(o) or str(base)
    )
    found = ModelFolder.open("a/b", "main", None, parts)
    assert (found.path, found.name) == (base, "a/b")
    assert asked == {"revision": "main", "allow_patterns": plain}


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (
            "model.diffusion_model.label_emb.0.0.bias",
            "lacks weights of the UNet: .*label_emb.0.0.bi",
        ),
        ("conditioner.embedders.0.transformer.text_model.encoder.layers.1", "text encoder` lacks"),
        ("conditioner.embedders.1.model.transformer.resblocks.1", "second text encoder` lacks"),
        ("conditioner.embedders.1.model.text_proj", "second text encoder` lacks .*text_projection"),
    ],
)
def test_single_files_of_xl_with_gaps(
    single_xl: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gone: str,
    message: str,
) -> None:
    test_single_files_with_gaps(single_xl, tmp_path, monkeypatch, gone, message)


@pytest.fixture(scope="module")
def single_xl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("single_xl")
    write_single_file(folder / "m.safetensors", write_configs(folder / "configs", "xl"), "xl")
    return folder, load_file(folder / "m.safetensors")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("single")
    write_single_file(folder / "m.safetensors", write_configs(folder / "configs"))
    return folder, load_file(folder / "m.safetensors")


FIRST, TEXT = "first_stage_model.", "cond_stage_model.transformer.text_model."


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("model.diffusion_model.out.2.bias", "UNet` lacks .*`conv_out.bias`"),
        ("model.diffusion_model.input_blocks.3.0.op.bias", "lacks weights of the UNet: .*3.0.op.b"),
        (f"{FIRST}decoder", "autoencoder` lacks weights .*`decoder.conv_in.bias`"),
        (f"{FIRST}encoder.down.1.downsample.conv.bias", "lacks weights of the autoencoder"),
        (FIRST, "has no autoencoder"),
        (f"{TEXT}encoder.layers.0.mlp", "text encoder` lacks weights .*mlp.fc1.bias"),
        (f"{TEXT}embeddings.position_embedding", "lacks weights of the text encoder"),
    ],
)
def test_single_files_with_gaps(
    single: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gone: str,
    message: str,
) -> None:
    folder, tensors = single
    monkeypatch.setattr(single_file, "CONFIGS", folder / "configs")
    file = tmp_path / "m.safetensors"
    save_file({k: v for k, v in tensors.items() if not k.startswith(gone)}, file)
    with pytest.raises(ValueError, match=message):
        load_base(str(file))
