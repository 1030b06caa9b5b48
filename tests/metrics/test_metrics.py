"""Scores against naive loops, and features against direct calls of the libraries."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scorer_folders import PROMPTS, write_clip, write_dino
from torch.nn.functional import cosine_similarity

from dreamtune.evaluation.validation import load_scorers
from dreamtune.metrics import Clip, Dino, Scorers, without_identifier
from dreamtune.metrics.features import matched, mean_among, mean_to_set, normalize, shuffled
from dreamtune.metrics.names import clip_arguments, public_name


def picture(seed: int, size: tuple[int, int] = (48, 48)) -> Image.Image:
    """Smooth colours: random pixels would make every resize alike."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("scorers")
    processor = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.3, 0.2], "resample": 2}
    return write_dino(root / "dino", **processor), write_clip(root / "clip")


@pytest.fixture(scope="module")
def scorers(folders):
    dino, clip = folders
    return Scorers.load({"dino": str(dino), "clip": f"local-dir:{clip}"})


def test_pure_functions_equal_naive_loops():
    torch.manual_seed(0)
    a, b, texts = torch.randn(4, 7), torch.randn(3, 7), torch.randn(3, 7)
    index = torch.tensor([2, 0, 1, 0])

    def cos(x, y):
        return cosine_similarity(x, y, dim=0).item()

    na, nb, nt = normalize(a), normalize(b), normalize(texts)
    pairs = [[cos(x, y) for y in b] for x in a]
    assert mean_to_set(na, nb).tolist() == pytest.approx([sum(r) / 3 for r in pairs], abs=1e-6)
    own = [cos(a[i], a[j]) for i in range(4) for j in range(4) if i != j]
    assert mean_among(na) == pytest.approx(sum(own) / len(own), abs=1e-6)
    expected = [cos(x, texts[k]) for x, k in zip(a, index)]
    assert matched(na, nt[index]).tolist() == pytest.approx(expected, abs=1e-6)
    expected = [
        sum(cos(x, texts[j]) for j in range(3) if j != k) / 2 for x, k in zip(a, index.tolist())
    ]
    assert shuffled(na, nt, index).tolist() == pytest.approx(expected, abs=1e-6)


def test_one_photo_or_one_prompt_has_no_pairs():
    one = normalize(torch.randn(1, 4))
    assert mean_among(one) is None
    assert shuffled(one, one, torch.tensor([0])) is None


@pytest.mark.parametrize("row", [[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_unusable_features_raise(row):
    with pytest.raises(ValueError, match="zero or not finite"):
        normalize(torch.tensor([row]))


def test_scores_equal_naive_loops_over_the_libraries(scorers, folders):
    photos, images = [picture(i) for i in range(3)], [picture(10 + i) for i in range(4)]
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[0]]
    scores = scorers.score(images, prompts, scorers.references(photos))
    dino, clip, text = [direct(folders, kind) for kind in ("dino", "clip", "text")]
    for name, encode, found in (
        ("dino", dino, scores.per_image["dino"]),
        ("clip_i", clip, scores.per_image["clip_i"]),
    ):
        expected = [
            sum(cosine_similarity(encode(i), encode(p), dim=0).item() for p in photos) / 3
            for i in images
        ]
        assert found == pytest.approx(expected, abs=1e-5)
        assert scores.means[name] == pytest.approx(sum(expected) / 4, abs=1e-5)
        among = [
            cosine_similarity(encode(p), encode(q), dim=0).item()
            for p in photos for q in photos if p is not q
        ]  # fmt: skip
        assert scores.means[f"{name}_photos"] == pytest.approx(sum(among) / 6, abs=1e-5)
    own = [cosine_similarity(clip(i), text(p), dim=0).item() for i, p in zip(images, prompts)]
    assert scores.per_image["clip_t"] == pytest.approx(own, abs=1e-5)
    others = [
        cosine_similarity(clip(i), text(q), dim=0).item()
        for i, p in zip(images, prompts) for q in PROMPTS if q != p
    ]  # fmt: skip
    assert scores.means["clip_t_shuffled"] == pytest.approx(sum(others) / 8, abs=1e-5)


def direct(folders, kind):
    """The features by the libraries' documented calls, one image or text at a time."""
    import open_clip
    from torchvision import transforms
    from transformers import CLIPTokenizer, ViTModel

    if kind == "dino":
        model = ViTModel.from_pretrained(folders[0], add_pooling_layer=False).eval()
        mean, std = [0.4, 0.5, 0.6], [0.3, 0.3, 0.2]
        size = transforms.Resize(32, transforms.InterpolationMode.BILINEAR)
    else:
        model = open_clip.create_model(f"local-dir:{folders[1]}").eval()
        mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
        size = transforms.Resize(32, transforms.InterpolationMode.BICUBIC)
    steps = [size, transforms.CenterCrop(32), transforms.ToTensor()]
    transform = transforms.Compose([*steps, transforms.Normalize(mean, std)])
    tokenizer = CLIPTokenizer.from_pretrained(folders[1])

    @torch.no_grad()
    def encode(item):
        if kind == "text":
            options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
            return model.encode_text(tokenizer(item, **options).input_ids)[0]
        batch = transform(item)[None]
        if kind == "dino":
            return model(pixel_values=batch).last_hidden_state[0, 0]
        return model.encode_image(batch)[0]

    return encode


def test_square_pictures_are_only_resized(folders):
    """On a square picture the preprocessing is that of transformers' own ViT processor, whose
    resize to (height, width) is what OFT, ETHER and DeLoRA scored with."""
    from transformers import ViTImageProcessor

    dino = Dino(str(folders[0]))
    processor = {"size": {"height": 32, "width": 32}, "resample": 2}
    options = {"image_mean": dino.preprocess.mean, "image_std": dino.preprocess.std, **processor}
    expected = ViTImageProcessor(**options)(picture(3), return_tensors="pt")["pixel_values"][0]
    # transformers 5 resizes tensors of bytes, which rounds differently: one level of 255.
    assert (dino.preprocess([picture(3)])[0] - expected).abs().max() <= 1.01 / 255 / min(
        dino.preprocess.std
    )


def test_defaults_are_the_published_protocol(tmp_path):
    dino = Dino(str(write_dino(tmp_path / "dino")))
    assert dino.preprocess.resizing[1:] == (32, 32)
    assert dino.preprocess.resample == Image.Resampling.BICUBIC
    assert dino.preprocess.mean == (0.485, 0.456, 0.406)
    assert dino.preprocess.std == (0.229, 0.224, 0.225)


def test_sizes_of_the_preprocessor_are_honoured(tmp_path):
    options = {"size": {"shortest_edge": 40}, "crop_size": {"height": 24}, "do_center_crop": True}
    dino = Dino(str(write_dino(tmp_path / "dino", **options)))
    assert dino.preprocess([picture(0, (90, 60))]).shape == (1, 3, 24, 24)
    assert dino.images([picture(0)]).shape == (1, 32)


def test_features_do_not_depend_on_the_batch(scorers):
    images = [picture(i) for i in range(5)]
    for extractor in scorers.extractors.values():
        one, all_ = extractor.images(images, batch_size=1), extractor.images(images)
        assert torch.allclose(one, all_, atol=1e-6)
        assert torch.allclose(all_.norm(dim=1), torch.ones(5), atol=1e-6)


def test_every_mode_of_picture_is_taken(scorers):
    gray = picture(1).convert("L")
    for extractor in scorers.extractors.values():
        rgb = extractor.images([gray.convert("RGB")])
        assert torch.equal(extractor.images([gray]), rgb)
        assert extractor.images([picture(1, (70, 41)).convert("RGBA")]).shape == rgb.shape


def test_each_image_and_text_is_encoded_once(scorers, monkeypatch):
    seen = []
    for extractor in scorers.extractors.values():
        original = extractor.images
        monkeypatch.setattr(
            extractor, "images", lambda i, f=original: seen.append(len(i)) or f(i), raising=True
        )
    references = scorers.references([picture(0), picture(1)])
    scorers.score([picture(2)] * 3, PROMPTS, references)
    scorers.score([picture(2)] * 3, PROMPTS, references)
    assert seen == [2, 2, 3, 3, 3, 3]


def test_bf16_encoders_give_float32_features_close_by(scorers, folders):
    low = Scorers.load({"dino": str(folders[0]), "clip": str(folders[1])}, dtype=torch.bfloat16)
    for kind in ("dino", "clip"):
        exact = scorers.extractors[kind].images([picture(0)])
        rough = low.extractors[kind].images([picture(0)])
        assert rough.dtype == torch.float32
        assert (exact * rough).sum() > 0.999


def test_the_protocol_is_plain_data_without_paths(scorers, folders):
    text = json.dumps(scorers.protocol)
    assert str(folders[0].parent) not in text
    assert scorers.protocol["dino"]["model"] == "dino"
    assert scorers.protocol["clip"]["model"] == "local-dir:clip"
    assert scorers.protocol["clip"]["resize"] in (32, [32, 32], (32, 32))
    assert public_name("facebook/dino-vits16") == "facebook/dino-vits16"


def test_other_weights_have_another_hash(folders, tmp_path):
    same, other = Dino(str(folders[0])), Dino(str(write_dino(tmp_path / "dino", seed=1)))
    assert Dino(str(folders[0])).protocol["weights"] == same.protocol["weights"]
    assert other.protocol["weights"] != same.protocol["weights"]


def test_long_prompts_fit_the_context(scorers):
    assert scorers.extractors["clip"].tokenizer(["a dog " * 40]).shape == (1, 32)
    assert scorers.extractors["clip"].texts(["a dog " * 40]).shape == (1, 16)


def test_weights_trained_with_quick_gelu_get_it():
    """open_clip 3 warns and computes other features for the very name the papers use."""
    arguments = clip_arguments("ViT-B-32:openai")
    assert arguments["force_quick_gelu"]
    assert clip_arguments("ViT-B-32") == arguments
    assert "force_quick_gelu" not in clip_arguments("ViT-B-32:laion2b_s34b_b79k")


@pytest.mark.parametrize("quick", [False, True])
def test_the_protocol_says_which_gelu_the_model_has(tmp_path, monkeypatch, quick):
    """Of a folder, and of an architecture whose name does not tell."""
    import open_clip

    folder = write_clip(tmp_path / "clip", quick_gelu=quick)
    settings = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    settings["text_cfg"]["hf_tokenizer_name"] = str(folder)
    known = {**open_clip.factory._MODEL_CONFIGS, "tiny": settings}
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", known)
    for name in (str(folder), f"local-dir:{folder}", f"tiny:{folder}/open_clip_model.safetensors"):
        clip = Clip(name)
        gelu = clip.model.visual.transformer.resblocks[0].mlp.gelu(torch.tensor([1.0])).item()
        assert gelu == pytest.approx(0.845795 if quick else 0.841345, abs=1e-6)
        assert clip.protocol["quick_gelu"] is quick


def test_a_folder_without_its_tokenizer_is_refused(tmp_path):
    folder = write_clip(tmp_path / "clip")
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    del config["model_cfg"]["text_cfg"]["hf_tokenizer_name"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="hf_tokenizer_name"):
        Clip(f"local-dir:{folder}")


def test_a_file_that_lacks_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_dino(tmp_path / "dino")
    state = load_file(folder / "model.safetensors")
    dropped = next(key for key in state if key.endswith("layernorm.weight"))
    del state[dropped]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights"):
        Dino(str(folder))


@pytest.mark.parametrize(
    ("name", "message"),
    [("ViT-B-33", "Did you mean .*ViT-B-32"), ("ViT-B-32:opena", "it has .*openai")],
)
def test_misspelt_clip_names_the_right_ones(name, message):
    with pytest.raises(ValueError, match=message):
        Clip(name)


def test_a_hub_id_without_network_says_what_to_do(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for kind, name, flag in (
        (Dino, "nobody/no-such-vit", "--dino <folder>"),
        (Clip, "hf-hub:nobody/no-such-clip", "--clip <folder>"),
    ):
        with pytest.raises(ValueError) as caught:
            kind(name)
        for part in (name, flag, "HF_HOME", "Cause: "):
            assert part in str(caught.value)


def test_score_refuses_what_does_not_pair(scorers):
    references = scorers.references([picture(0)])
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        scorers.score([picture(0)] * 2, ["a dog"], references)
    with pytest.raises(ValueError, match="no photos"):
        scorers.references([])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a photo of sks dog", "a photo of dog"),
        ("a sks, red dog", "a, red dog"),
        ("asks sks", "asks"),
        ("sks dog in the snow", "dog in the snow"),
    ],
)
def test_without_identifier(prompt, expected):
    assert without_identifier(prompt, "sks") == expected
    assert without_identifier(prompt, "") == prompt


def test_the_packages_scorers_have_one_name():
    """By their name, by their folders, and in a run: result files say "embedded"."""
    from dreamtune import embedded

    cpu = torch.device("cpu")
    named = {"dino": "embedded", "clip": "embedded"}
    folders = {"dino": str(embedded.DINO), "clip": f"local-dir:{embedded.CLIP}"}
    found = [
        Scorers.load(named),
        Scorers.load(folders),
        Scorers.load({**folders, "clip": str(embedded.CLIP)}),
        load_scorers(named, cpu),
        load_scorers(folders, cpu),
    ]
    for scorers in found:
        assert {k: scorers.protocol[k]["model"] for k in named} == named
        # a run watches more than what chooses, so it pairs more
        assert {**scorers.protocol, "pairing": None} == {**found[0].protocol, "pairing": None}
