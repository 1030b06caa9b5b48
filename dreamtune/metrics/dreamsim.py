"""DreamSim: how alike two pictures are to people, by vision transformers that were tuned on their
judgements (Fu et al. 2023, arXiv 2306.09344).

Followed: the `dreamsim` package 0.2.1 with `normalize_embeds` (its default), of its models those
that are plain ViTs: `dino_vitb16`, `clip_vitb32`, `open_clip_vitb32` and `ensemble`, which is its
default. Its distance is 1 less the cosine that is scored here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dreamtune.fields import UnreadableFile, checker, from_file
from dreamtune.metrics.dino import IMAGENET_MEAN, IMAGENET_STD
from dreamtune.metrics.extractor import Extractor, weights_hash
from dreamtune.metrics.features import normalize
from dreamtune.metrics.names import public_name
from dreamtune.metrics.preprocess import Preprocess, Resizing
from dreamtune.metrics.similarity import photo_similarity, picture_metrics
from dreamtune.metrics.table import register
from dreamtune.models.weights import read_by_library
from dreamtune.textfile import read_json

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HEAD = 64  # channels of a head of attention, in every ViT of these families


@dataclass(frozen=True)
class Branch:
    """A base model. files: where its weights may be, by the names of their releases. projected:
    whether the feature is CLIP's embedding, after the last norm and the projection, else the CLS
    token as the last block leaves it, before the norm."""

    files: tuple[str, ...]
    activation: str = "gelu"
    epsilon: float = 1e-5
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    projected: bool = True


# DINO's backbone is not in DreamSim's release: the package has it fetched by torch.hub, into
# checkpoints/ of the same folder.
HUB = "dino_vitbase16_pretrain.pth"
BRANCHES = {
    "dino_vitb16": Branch(
        (f"checkpoints/{HUB}", HUB),
        epsilon=1e-6,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        projected=False,
    ),
    **{
        f"{family}_vitb{patch}": Branch((f"{family}_vitb{patch}_pretrain.pth.tar",), activation)
        for family, activation in (("clip", "quick_gelu"), ("open_clip", "gelu"))
        for patch in (16, 32)
    },
}
# Folder of the LoRA -> its base models, in the order of their features.
MODELS = {
    "ensemble_lora": ("dino_vitb16", "clip_vitb16", "open_clip_vitb16"),
    "dino_vitb16_single_lora": ("dino_vitb16",),
    "clip_vitb32_single_lora": ("clip_vitb32",),
    "open_clip_vitb32_single_lora": ("open_clip_vitb32",),
}
CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
HOW = (
    "let the `dreamsim` package download one of dino_vitb16, clip_vitb32, open_clip_vitb32 or "
    "ensemble once, `dreamsim.dreamsim(dreamsim_type=..., cache_dir=FOLDER)`, and give --dreamsim "
    "FOLDER"
)
KEY = re.compile(r"(?:^|\.)extractor_list\.(\d)\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
OTHER_FORMS = ("use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern")
_LORA = checker(
    {"r": int, "lora_alpha": float | int, "bias": str}, needed=("r", "lora_alpha"), others=True
)


class DreamSim(Extractor):
    """Features whose cosine is 1 less DreamSim's distance: those of the base models end to end,
    less the mean of their own values, of unit length.

    Pictures are squashed to the side of the models, 224 px, bicubic, and normalised as each base
    model wants it. The LoRA, of rank 16 on `qkv` in the release, is merged: W + alpha / r B A.
    Weights are read as tensors alone (`weights_only`); width, depth and patch are those of the
    weights.

    Args:
        name: the folder into which the package put a model, or the LoRA's folder in it where there
            are several.
        resizing: of pictures, to the models' side alone.

    Raises:
        ValueError: it is no such folder, a file is missing, damaged or of another layout, or the
            pictures would have another size than the models take.
    """

    name, default, libraries = "dreamsim", "dreamsim", ("timm",)

    def __init__(
        self,
        name: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        resizing: Resizing | None = None,
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        lora = _lora_folder(Path(name).expanduser())
        changes = _lora(lora)
        self.branches = [BRANCHES[kind] for kind in MODELS[lora.name]]
        if stray := set(changes) - set(range(len(self.branches))):
            raise UnreadableFile(f"`{lora}` changes base model {min(stray)}, which it has not.")
        models, projections, sides = nn.ModuleList(), nn.ParameterList(), set()
        for number, branch in enumerate(self.branches):
            file = _file(lora.parent, branch)
            model, projection, side = _vit(file, branch, changes.get(number, {}))
            models.append(model)
            projections.append(projection)
            sides.add(side)
        self.model: Any = nn.ModuleDict({"models": models, "projections": projections})
        self.model.to(self.device, dtype).eval().requires_grad_(False)
        resizing = resizing or Resizing("squash", min(sides), min(sides))
        if sides != {resizing.crop}:
            raise ValueError(
                f"DreamSim `{name}` takes pictures of {' and '.join(map(str, sorted(sides)))} px, "
                f"not of {resizing.crop}: leave its `resizing` out."
            )
        # Each base model subtracts a mean of its own, in `encode`.
        self.preprocess = Preprocess(resizing, (0.0,) * 3, (1.0,) * 3, Image.Resampling.BICUBIC)
        self.mean_colour = self.branches[0].mean
        self.protocol = {
            "model": public_name(name),
            "architecture": {"kind": lora.name.removesuffix("_lora").removesuffix("_single")},
            "weights": weights_hash(self.model),
            "feature": "LoRA merged; less its mean",
            **self.preprocess.protocol(),
            "normalised": [[list(branch.mean), list(branch.std)] for branch in self.branches],
            "dtype": str(dtype).removeprefix("torch."),
        }

    def encode(self, pixels: Tensor) -> Tensor:
        parts = []
        for branch, model, projection in zip(
            self.branches, self.model["models"], self.model["projections"]
        ):
            mean, std = (
                pixels.new_tensor(value).view(3, 1, 1) for value in (branch.mean, branch.std)
            )
            found = model((pixels - mean) / std)
            parts.append(found @ projection if branch.projected else found)
        found = torch.cat(parts, 1).float().cpu()
        return normalize(found - found.mean(1, keepdim=True))


def _lora_folder(folder: Path) -> Path:
    """Raises ValueError for none and for several."""
    if folder.name in MODELS and folder.is_dir():
        return folder
    found = [folder / name for name in MODELS if (folder / name).is_dir()]
    if not found:
        raise ValueError(
            f"DreamSim: `{folder}` has none of {', '.join(f'`{name}`' for name in MODELS)}: {HOW}."
        )
    if len(found) > 1:
        raise ValueError(
            f"DreamSim: `{folder}` holds several models: name one of "
            f"{', '.join(f'--dreamsim {place}' for place in found)}."
        )
    return found[0]


def _file(folder: Path, branch: Branch) -> Path:
    places = [folder / name for name in branch.files]
    for place in places:
        if place.is_file():
            return place
    raise ValueError(
        f"DreamSim: there is no {' or '.join(f'`{place}`' for place in places)}, a base model of "
        f"it: {HOW}."
    )


def _lora(folder: Path) -> dict[int, dict[str, Tensor]]:
    """Number of a base model -> path of a layer -> what is added to its weight."""
    config = from_file(_LORA, read_json(folder / CONFIG), f"`{folder / CONFIG}`")
    other = [name for name in OTHER_FORMS if config.get(name)]
    if other or config.get("bias", "none") != "none":
        raise UnreadableFile(
            f"`{folder / CONFIG}` sets `{other[0] if other else 'bias'}`, which DreamSim's release "
            "has not: it is not read."
        )
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"DreamSim: `{folder}` has no {' or '.join(WEIGHTS)}: {HOW}.")
    factors: dict[tuple[int, str], dict[str, Tensor]] = {}
    for key, value in _tensors(file).items():
        found = KEY.search(str(key))
        pair = {} if found is None else factors.setdefault((int(found[1]), found[2]), {})
        matrix = isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point()
        if found is None or found.end() != len(key) or found[3] in pair or not matrix:
            raise UnreadableFile(f"`{file}`: `{key}` is no LoRA of a base model of DreamSim.")
        pair[found[3]] = value.float()
    changes: dict[int, dict[str, Tensor]] = {}
    for (number, path), pair in factors.items():
        ranks = {pair["A"].shape[0], pair["B"].shape[1]} if len(pair) == 2 else set()
        if ranks != {config["r"]}:
            raise UnreadableFile(f"`{file}`: the LoRA of `{path}` is not whole, of rank r.")
        change = config["lora_alpha"] / config["r"] * pair["B"] @ pair["A"]
        changes.setdefault(number, {})[path] = change
    if not changes:
        raise UnreadableFile(f"`{file}` holds no LoRA.")
    return changes


def _tensors(file: Path) -> dict[str, Any]:
    """What a file holds, read as tensors alone."""
    from safetensors.torch import load_file

    with read_by_library(str(file)):
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(found, dict):
            raise UnreadableFile(f"`{file}` holds no tensors by name.")
        return found


def _vit(
    file: Path, branch: Branch, changes: Mapping[str, Tensor]
) -> tuple[nn.Module, nn.Parameter, int]:
    """The base model with the changes in it; CLIP's projection, (width, 0) without one; the side of
    its pictures in pixels.

    timm's ViT has the names of DINO's, in which the release keeps CLIP's as well; its `pos_drop` is
    CLIP's norm before the blocks.
    """
    from timm.models.vision_transformer import VisionTransformer

    state = _tensors(file)
    with read_by_library(str(file)):
        state = {
            k: v.float()
            for k, v in dict(state["state_dict"] if branch.projected else state).items()
        }
        width, _, patch, _ = state["patch_embed.proj.weight"].shape
        projection = state.pop("proj") if branch.projected else torch.empty(width, 0)
        grid = round((state["pos_embed"].shape[1] - 1) ** 0.5)
        for path, change in changes.items():
            if (shape := state[f"{path}.weight"].shape) != change.shape:
                raise UnreadableFile(
                    f"`{file}`: `{path}` is {tuple(shape)}, its LoRA {tuple(change.shape)}."
                )
            state[f"{path}.weight"] = state[f"{path}.weight"] + change
        model: Any = VisionTransformer(
            img_size=grid * patch,
            patch_size=patch,
            num_classes=0,
            embed_dim=width,
            depth=sum(key.endswith(".attn.qkv.weight") for key in state),
            num_heads=width // HEAD,
            mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / width,
            norm_layer=partial(nn.LayerNorm, eps=branch.epsilon),
            act_layer=branch.activation,
            weight_init="skip",
        )
        if branch.projected:
            model.pos_drop = nn.LayerNorm(width, eps=branch.epsilon)
        model.load_state_dict(state)
    if not branch.projected:
        model.norm = nn.Identity()
    return model, nn.Parameter(projection), grid * patch


register(photo_similarity("dreamsim", "DreamSim similarity", DreamSim, while_training=False))
for metric in picture_metrics("dreamsim", "DreamSim similarity", DreamSim):
    register(metric)
