"""Real architectures with seeded random weights, in the names of their published files: our
features are those of timm and of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from galleries import picture
from safetensors.torch import save_file
from timm.data import create_transform
from torch import Tensor, nn
from torch.nn.functional import normalize

from dreamtune.metrics import Dino
from dreamtune.metrics.dino import IMAGENET_MEAN, IMAGENET_STD, Dinov2

SMALL = {"hidden_size": 384, "num_attention_heads": 6, "layer_norm_eps": 1e-6}
IMAGES = [picture(i, side) for i, side in enumerate((300, 224, 90))]
BOTH = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("blocks.", "encoder.layer."),
    ("attn.proj", "attention.output.dense"),
)
NAMES = {
    "vit": (
        *BOTH, ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
        ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"),
    ),
    "dinov2": (*BOTH, ("ls1.gamma", "layer_scale1.lambda1"), ("ls2.gamma", "layer_scale2.lambda1")),
}  # fmt: skip


def made(name: str, **options: Any) -> nn.Module:
    """A model of timm whose biases, norms and tokens are random too."""
    torch.manual_seed(5)
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **options)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def published(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """timm's state in the names that facebook's folders for transformers have."""
    found = {}
    for name, value in state.items():
        for old, new in NAMES[kind]:
            name = name.replace(old, new)
        if name.startswith("norm."):
            name = f"layer{name}"
        if "attn.qkv" not in name:
            found[name] = value
            continue
        for part, one in zip(("query", "key", "value"), value.chunk(3)):
            found[name.replace("attn.qkv", f"attention.attention.{part}")] = one.contiguous()
    return found


@pytest.mark.parametrize(
    ("kind", "extractor", "name", "patch", "side", "layers"),
    [
        ("ViT", Dino, "vit_small_patch16_224", 16, 224, 2),
        ("ViT", Dino, "vit_small_patch16_224", 16, 64, 12),  # all blocks; few patches are quick
        ("Dinov2", Dinov2, "vit_small_patch14_dinov2", 14, 224, 2),
    ],
)
@torch.no_grad()
def test_features_are_those_of_timm_and_of_transformers(
    tmp_path: Path, kind: str, extractor: type[Dino], name: str, patch: int, side: int, layers: int
) -> None:
    import transformers

    model = made(name, depth=layers, img_size=side)
    sizes = {**SMALL, "num_hidden_layers": layers, "patch_size": patch, "image_size": side}
    width, bare = {}, {}
    if kind == "ViT":
        width, bare = {"intermediate_size": 1536}, {"add_pooling_layer": False}
    getattr(transformers, f"{kind}Config")(**sizes, **width).save_pretrained(tmp_path)
    state = published(model.state_dict(), kind.lower())
    if kind == "Dinov2":
        state["embeddings.mask_token"] = torch.zeros(1, 384)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    own = create_transform(
        (3, side, side), interpolation="bicubic", mean=IMAGENET_MEAN, std=IMAGENET_STD, crop_pct=1.0
    )
    pixels = torch.stack([own(image) for image in IMAGES])
    found = extractor(str(tmp_path)).images(IMAGES)
    assert found.shape == (3, 384)
    torch.testing.assert_close(found, normalize(model(pixels), dim=-1), rtol=0, atol=1e-5)
    theirs = getattr(transformers, f"{kind}Model").from_pretrained(tmp_path, **bare).eval()
    expected = normalize(theirs(pixel_values=pixels).last_hidden_state[:, 0], dim=-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    # and they are features of the pictures
    assert (found[0] - found[1]).abs().max() > 1e-2
