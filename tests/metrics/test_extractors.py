"""Encoders of seeded random weights, through the folders that real ones come in: the features of
the libraries' own calls; and the contract of an extractor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from galleries import picture
from safetensors.torch import load_file, save_file
from scorer_folders import write_tokenizer
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize, relu
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from dreamtune.metrics import METRICS, Dino, Features
from dreamtune.metrics.dino import Dinov2, Dinov3
from dreamtune.metrics.dreamsim import DreamSim
from dreamtune.metrics.extractor import Extractor
from dreamtune.metrics.lpips import FILE, Lpips, apart, distances
from dreamtune.metrics.preprocess import Resizing
from dreamtune.metrics.siglip import Siglip

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
IMAGES = [picture(i, 48) for i in range(3)]
IMAGENET = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def write_vit(folder: Path, kind: str) -> Any:
    import transformers

    torch.manual_seed(2)
    config, model = (getattr(transformers, f"{kind}{end}") for end in ("Config", "Model"))
    options = {} if kind.startswith("Dinov2") else {"intermediate_size": 64}
    made = model(config(**SIZES, **options)).eval()
    for parameter in made.parameters():  # biases and norms are not random at first
        parameter.data += 0.05 * torch.randn_like(parameter)
    made.save_pretrained(folder)
    return made


@pytest.mark.parametrize(
    ("kind", "extractor"),
    [
        ("ViT", Dino),
        ("Dinov2", Dinov2),
        ("Dinov2WithRegisters", Dinov2),
        ("DINOv3ViT", Dinov3),
    ],
)
@torch.no_grad()
def test_vits_give_the_features_of_transformers(
    tmp_path: Path, kind: str, extractor: type[Dino]
) -> None:
    model = write_vit(tmp_path / "vit", kind)
    own = transforms.Compose(
        [transforms.Resize(32, InterpolationMode.BICUBIC), transforms.ToTensor(), IMAGENET]
    )
    pixels = torch.stack([own(image) for image in IMAGES])
    expected = normalize(model(pixel_values=pixels).last_hidden_state[:, 0], dim=-1)
    found = extractor(str(tmp_path / "vit"))
    torch.testing.assert_close(found.images(IMAGES), expected, rtol=0, atol=1e-5)
    architecture = found.protocol["architecture"]
    assert architecture == {"model_type": model.config.model_type, "width": 32, "layers": 2,
                            "patch": 8}  # fmt: skip
    check_contract(found)


def write_siglip(folder: Path) -> Any:
    from transformers import SiglipConfig, SiglipModel

    words = write_tokenizer(folder, 24)
    torch.manual_seed(3)
    vision = {**SIZES, "intermediate_size": 64}
    text = {k: v for k, v in vision.items() if k not in ("image_size", "patch_size")}
    text |= {"vocab_size": words, "max_position_embeddings": 24}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2,
                    "size": {"height": 32, "width": 32}})
    )  # fmt: skip
    return model


@torch.no_grad()
def test_siglip_gives_the_features_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = write_siglip(tmp_path)
    found = Siglip(str(tmp_path))
    own = transforms.Compose(
        [
            transforms.Resize((32, 32), InterpolationMode.BILINEAR),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    wide = [picture(1, 48).resize((60, 30)), *IMAGES]
    pixels = torch.stack([own(image) for image in wide])
    expected = normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    torch.testing.assert_close(found.images(wide), expected, rtol=0, atol=1e-5)
    texts = ["A dog in the Snow", "a red cat"]
    ids = AutoTokenizer.from_pretrained(tmp_path)(
        ["a dog in the snow", "a red cat"], padding="max_length", max_length=24, truncation=True,
        return_tensors="pt",
    ).input_ids  # fmt: skip
    expected = normalize(model.get_text_features(input_ids=ids).pooler_output, dim=-1)
    torch.testing.assert_close(found.texts(texts), expected, rtol=0, atol=1e-5)
    features = Features(found.images(IMAGES), found.images(wide), torch.tensor([0, 1, 1]),
                        found.texts(texts))  # fmt: skip
    scores = METRICS["siglip2_t"].score(features)
    assert isinstance(scores, Tensor)
    assert scores[2].item() == pytest.approx(
        cosine_similarity(features.images[2], expected[1], dim=0).item(), abs=1e-5
    )
    check_contract(found)


def write_lpips(folder: Path) -> dict[str, Tensor]:
    """As the state of the lpips package is named."""
    torch.manual_seed(4)
    state = {}
    for place, shape in {
        "1.0": (64, 3, 11, 11), "2.3": (192, 64, 5, 5), "3.6": (384, 192, 3, 3),
        "4.8": (256, 384, 3, 3), "5.10": (256, 256, 3, 3),
    }.items():  # fmt: skip
        fan = shape[1] * shape[2] * shape[3]
        state[f"net.slice{place}.weight"] = torch.randn(shape) * (2 / fan) ** 0.5
        state[f"net.slice{place}.bias"] = 0.1 * torch.randn(shape[0])
    for i, channels in enumerate((64, 192, 384, 256, 256)):
        state[f"lin{i}.model.1.weight"] = torch.rand(1, channels, 1, 1)
    folder.mkdir(exist_ok=True)
    save_file(state, folder / FILE)
    return state


@torch.no_grad()
def test_lpips_is_its_formula(tmp_path: Path) -> None:
    """sum_l mean_hw sum_c w_lc (x_lc - y_lc)^2 of channel-normalised features."""
    state = write_lpips(tmp_path)
    found = Lpips(str(tmp_path), resizing=Resizing("squash", 64, 64))

    def features(image: Any) -> list[Tensor]:
        own = transforms.Compose(
            [transforms.Resize((64, 64), InterpolationMode.BICUBIC), transforms.ToTensor()]
        )
        # the published code's scaling layer, of pictures in [-1, 1]
        shift = torch.tensor([-0.030, -0.088, -0.188]).reshape(3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450]).reshape(3, 1, 1)
        x, found = ((2 * own(image) - 1 - shift) / scale)[None], []
        for i, number, stride, padding, pool in (
            (0, 1, 4, 2, False), (3, 2, 1, 2, True), (6, 3, 1, 1, True), (8, 4, 1, 1, False),
            (10, 5, 1, 1, False),
        ):  # fmt: skip
            x = torch.max_pool2d(x, 3, 2) if pool else x
            place = f"net.slice{number}.{i}"
            x = relu(
                torch.conv2d(x, state[f"{place}.weight"], state[f"{place}.bias"], stride, padding)
            )
            found.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return found

    a, b = features(IMAGES[0]), features(IMAGES[1])
    parts = [
        (state[f"lin{i}.model.1.weight"] * (x - y) ** 2).sum(1).mean().item()
        for i, (x, y) in enumerate(zip(a, b))
    ]
    rows = found.images(IMAGES)
    assert distances(rows[:1], rows[1:2]).item() == pytest.approx(sum(parts), rel=1e-5)
    pairs = distances(rows, rows)
    assert pairs.diagonal().tolist() == [0, 0, 0]
    values = apart(Features(rows, rows, torch.tensor([0, 0, 1])))
    assert values is not None
    assert values[:2].tolist() == pytest.approx([pairs[0, 1].item()] * 2)
    assert values[2].isnan()
    check_contract(found)


def check_contract(found: Extractor) -> None:
    """Rows depend on their own picture alone, whatever the batch and the order; plain protocol."""
    rows = found.images(IMAGES)
    assert rows.dtype == torch.float32 and rows.device.type == "cpu"
    back = found.images(IMAGES[::-1])
    torch.testing.assert_close(back.flip(0), rows, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.images(IMAGES[1:2])[0], rows[1], rtol=0, atol=1e-6)
    json.dumps(found.protocol)
    assert {"model", "weights", "architecture", "resize_mode", "dtype"} <= found.protocol.keys()
    assert len(found.mean_colour) == 3


def test_resizing_is_obeyed(tmp_path: Path) -> None:
    write_vit(tmp_path, "Dinov2")
    wide = picture(5, 60).resize((90, 45))
    for mode, size in (("squash", (24, 24)), ("shortest", 40)):
        found = Dinov2(str(tmp_path), resizing=Resizing(mode, 40, 24))  # type: ignore[arg-type]
        steps = [transforms.Resize(size, InterpolationMode.BICUBIC), transforms.CenterCrop(24)]
        own = transforms.Compose([*steps, transforms.ToTensor(), IMAGENET])
        torch.testing.assert_close(found.preprocess([wide])[0], own(wide), rtol=0, atol=1e-6)
        assert (found.protocol["resize_mode"], found.protocol["crop"]) == (mode, 24)


@pytest.mark.parametrize("kind", [Dinov2, Dinov3, Siglip, Lpips, DreamSim])
def test_nothing_is_fetched(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--{kind.name}"):
        kind(str(tmp_path / "nowhere"))


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    state = write_lpips(tmp_path)
    save_file({**state, "lin0.model.1.weight": -state["lin0.model.1.weight"]}, tmp_path / FILE)
    with pytest.raises(ValueError, match="negative weights"):
        Lpips(str(tmp_path))
    del state["net.slice3.6.bias"]
    save_file(state, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"is not of `net='alex'` \('net.slice3.6.bias'\)"):
        Lpips(str(tmp_path))
    write_siglip(tmp_path / "s")
    weights = load_file(tmp_path / "s" / "model.safetensors")
    weights.pop("vision_model.head.attention.in_proj_weight")
    save_file(weights, tmp_path / "s" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="cannot load SigLIP 2"):
        Siglip(str(tmp_path / "s"))


def test_golden_token_ids() -> None:
    """Of OpenAI's CLIP, between the start and the end of a text."""
    import open_clip

    ids = open_clip.get_tokenizer("ViT-B-32")(["a sks dog in the snow"])[0].tolist()
    assert ids[:8] == [49406, 320, 48136, 1929, 530, 518, 2583, 49407]
