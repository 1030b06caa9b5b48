"""DreamSim from folders as the package fills them, of small seeded random weights: the features of
a forward written out, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from galleries import picture
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import (
    conv2d,
    cosine_similarity,
    gelu,
    layer_norm,
    linear,
    scaled_dot_product_attention,
)
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from dreamtune.metrics import METRICS, Features
from dreamtune.metrics.dreamsim import BRANCHES, MODELS, DreamSim
from dreamtune.metrics.preprocess import Resizing

WIDTH, DEPTH, PATCH, SIDE, RANK, ALPHA = 128, 2, 8, 32, 4, 0.5
IMAGES = [picture(i, 48).resize((48, 36)) for i in range(3)]
State = dict[str, Tensor]


def vit(seed: int, clip: bool) -> State:
    """By the names of DINO's ViT, which the release gives CLIP's too."""
    random = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, 1 + (SIDE // PATCH) ** 2, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,), "norm.bias": (WIDTH,),
    }  # fmt: skip
    if clip:
        shapes |= {"pos_drop.weight": (WIDTH,), "pos_drop.bias": (WIDTH,), "proj": (WIDTH, 24)}
    for i in range(DEPTH):
        for name, (out, inner) in {
            "attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH),
            "mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH),
        }.items():  # fmt: skip
            shapes |= {f"blocks.{i}.{name}.weight": (out, inner), f"blocks.{i}.{name}.bias": (out,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.{end}": (WIDTH,) for end in ("weight", "bias")}
    return {k: torch.randn(shape, generator=random) * 0.08 for k, shape in shapes.items()}


def lora(count: int) -> State:
    random = torch.Generator().manual_seed(9)
    found = {}
    for number in range(count):
        for i in range(DEPTH):
            key = f"base_model.model.extractor_list.{number}.model.blocks.{i}.attn.qkv.lora_"
            found[f"{key}A.weight"] = torch.randn(RANK, WIDTH, generator=random)
            found[f"{key}B.weight"] = torch.randn(3 * WIDTH, RANK, generator=random)
    return found


def write(folder: Path, kind: str, pickled: bool = False) -> tuple[list[State], State]:
    """The folder of a model; (the base models' weights, the LoRA)."""
    (folder / "checkpoints").mkdir(parents=True)
    states = []
    for number, base in enumerate(MODELS[kind]):
        states.append(vit(number, BRANCHES[base].projected))
        held = {"state_dict": states[-1]} if BRANCHES[base].projected else states[-1]
        torch.save(held, folder / BRANCHES[base].files[0])
    (folder / kind).mkdir()
    config = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.3, "bias": "none",
              "target_modules": ["qkv"], "peft_type": "LORA"}  # fmt: skip
    (folder / kind / "adapter_config.json").write_text(json.dumps(config))
    change = lora(len(states))
    if pickled:
        torch.save(change, folder / kind / "adapter_model.bin")
    else:
        save_file(change, folder / kind / "adapter_model.safetensors")
    return states, change


def feature(x: Tensor, s: State, change: State, number: int, base: str) -> Tensor:
    """Of normalised pixels (N, 3, H, W): the package's forward, the LoRA beside its layer."""
    clip, quick = BRANCHES[base].projected, base.startswith("clip")
    eps = 1e-5 if clip else 1e-6

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, (WIDTH,), s[f"{name}.weight"], s[f"{name}.bias"], eps)

    def layer(x: Tensor, name: str) -> Tensor:
        return linear(x, s[f"{name}.weight"], s[f"{name}.bias"])

    x = conv2d(x, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], PATCH)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([s["cls_token"].expand(len(x), -1, -1), x], 1) + s["pos_embed"]
    x = norm(x, "pos_drop") if clip else x
    for i in range(DEPTH):
        place, y = f"blocks.{i}", norm(x, f"blocks.{i}.norm1")
        a, b = (
            change[
                f"base_model.model.extractor_list.{number}.model.{place}.attn.qkv.lora_{n}.weight"
            ]
            for n in "AB"
        )
        qkv = layer(y, f"{place}.attn.qkv") + ALPHA / RANK * (y @ a.T @ b.T)
        q, k, v = qkv.unflatten(2, (3, WIDTH // 64, 64)).permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + layer(y, f"{place}.attn.proj")
        y = layer(norm(x, f"{place}.norm2"), f"{place}.mlp.fc1")
        x = x + layer(y * (1.702 * y).sigmoid() if quick else gelu(y), f"{place}.mlp.fc2")
    return norm(x, "norm")[:, 0] @ s["proj"] if clip else x[:, 0]


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_the_features_are_those_of_the_forward_written_out(kind: str, tmp_path: Path) -> None:
    states, change = write(tmp_path, kind, pickled=kind.startswith("clip"))
    found = DreamSim(str(tmp_path))
    rows = found.images(IMAGES)
    steps = [transforms.Resize((SIDE, SIDE), InterpolationMode.BICUBIC), transforms.ToTensor()]
    pixels = torch.stack([transforms.Compose(steps)(image) for image in IMAGES])
    parts = []
    for number, (base, state) in enumerate(zip(MODELS[kind], states)):
        own = (
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
            if base.startswith("dino")
            else transforms.Normalize(
                (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
            )
        )
        parts.append(feature(own(pixels), state, change, number, base))
    embed = torch.cat(parts, 1)
    embed = embed - embed.mean(1, keepdim=True)
    torch.testing.assert_close(rows, embed / embed.norm(dim=1, keepdim=True), atol=2e-6, rtol=0)
    value = METRICS["dreamsim"].score(Features(rows, rows[1:], torch.zeros(3, dtype=torch.long)))
    near = [cosine_similarity(embed[0], embed[i], dim=0).item() for i in (1, 2)]
    assert isinstance(value, Tensor)
    assert value[0].item() == pytest.approx(sum(near) / 2, abs=1e-5)
    assert near[0] < 0.999  # the pictures are told apart
    torch.testing.assert_close(found.images(IMAGES[1:2])[0], rows[1], rtol=0, atol=1e-6)
    assert found.protocol["architecture"] == {"kind": kind.split("_lora")[0].split("_single")[0]}
    assert (found.protocol["resize_mode"], found.protocol["crop"]) == ("squash", SIDE)
    json.dumps(found.protocol)


def test_what_is_missing_or_another_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has none of `ensemble_lora`.*give --dreamsim FOLDER"):
        DreamSim(str(tmp_path / "nowhere"))
    kind = "dino_vitb16_single_lora"
    states, change = write(tmp_path, kind)
    (tmp_path / "ensemble_lora").mkdir()
    with pytest.raises(ValueError, match=f"several models: name one of .*--dreamsim .*{kind}"):
        DreamSim(str(tmp_path))
    DreamSim(str(tmp_path / kind))
    with pytest.raises(ValueError, match="takes pictures of 32 px, not of 64"):
        DreamSim(str(tmp_path / kind), resizing=Resizing("squash", 64, 64))

    def broken(message: str, file: Path, write: Any) -> None:
        before = file.read_bytes()
        write(file)
        with pytest.raises(ValueError, match=message):
            DreamSim(str(tmp_path / kind))
        file.write_bytes(before)

    weights = tmp_path / kind / "adapter_model.safetensors"
    first = next(iter(change))
    rest = {k: v for k, v in change.items() if k != first}
    broken("is not whole, of rank r", weights, lambda f: save_file(rest, f))
    broken(
        "`other` is no LoRA of a base", weights, lambda f: save_file({"other": torch.ones(1)}, f)
    )
    for what, other in {
        "is not whole, of rank r": lambda k, v: v[:, :3] if ".lora_B" in k else v,
        r"is \(384, 128\), its LoRA \(1, 128\)": lambda k, v: v[:1] if ".lora_B" in k else v,
        r"is \(384, 128\), its LoRA \(384, 1\)": lambda k, v: v[:, :1] if ".lora_A" in k else v,
        "is no LoRA of a base": lambda k, v: v.int() if k == first else v,
        "is no LoRA of a base model": lambda k, v: v[0] if k == first else v,
    }.items():
        odd = {k: other(k, v).contiguous() for k, v in change.items()}
        broken(what, weights, lambda f, odd=odd: save_file(odd, f))
    twice = {**change, first.replace(".weight", ".default.weight"): change[first] + 1}
    broken("is no LoRA of a base", weights, lambda f: save_file(twice, f))
    swapped = {k.replace("list.0", "list.1"): v for k, v in change.items()}
    broken("changes base model 1, which it", weights, lambda f: save_file(swapped, f))
    config = tmp_path / kind / "adapter_config.json"
    said = json.loads(config.read_text())
    for more, name in (({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias")):
        broken(f"sets `{name}`", config, lambda f, m=more: f.write_text(json.dumps(said | m)))
    base = tmp_path / BRANCHES["dino_vitb16"].files[0]
    part = {k: v for k, v in states[0].items() if k != "norm.bias"}
    broken(f"`{base}` could not be loaded.*norm.bias", base, lambda f: torch.save(part, f))
    broken("holds more than tensors", base, lambda f: torch.save({"a": Evil()}, f))
    whole = weights.read_bytes()
    weights.unlink()
    for held, what in (([1], "no tensors by name"), ({1: 2}, "`1` is no"), ({first: "x"}, "is no")):
        torch.save(held, weights.with_suffix(".bin"))
        with pytest.raises(ValueError, match=what):
            DreamSim(str(tmp_path / kind))
    weights.with_suffix(".bin").unlink()
    weights.write_bytes(whole)
    base.unlink()
    with pytest.raises(ValueError, match=f"there is no `{base}` or .*a base model of it"):
        DreamSim(str(tmp_path / kind))


class Evil:
    def __reduce__(self) -> Any:
        return print, ("run",)
