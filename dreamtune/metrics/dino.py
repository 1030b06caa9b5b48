"""DINO, DINOv2, DINOv3: how alike generated images and photos are to a self-supervised vision
transformer.

Pictures are resized with PIL (antialiased; a tensor resize without antialiasing moves pixels by
6/255 on average); features are L2-normalised float32 rows.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from dreamtune.fields import UnreadableFile
from dreamtune.metrics.extractor import Extractor, weights_hash
from dreamtune.metrics.features import normalize
from dreamtune.metrics.files import PREPROCESSOR_FILE, VIT, pixels, transformers_model
from dreamtune.metrics.names import (
    cache_if_unreachable,
    cannot_load,
    check_local,
    place_of,
    public_name,
)
from dreamtune.metrics.preprocess import Preprocess, Resizing
from dreamtune.metrics.similarity import photo_similarity, picture_metrics
from dreamtune.metrics.table import register

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Dino(Extractor):
    """CLS token of the last layer of a ViT, after its final norm (Caron et al. 2021).

    Mean, standard deviation, filter and sizes come from the folder's `preprocessor_config.json`,
    else ImageNet's, bicubic, and the model's own `image_size`. The shorter side is resized and the
    centre cropped, which for square pictures is the plain resize of the published protocols.

    Args:
        name: folder, hub id (`facebook/dino-vits16`), or "embedded".
        resizing: instead of the folder's own.

    Raises:
        ValueError: nothing can be loaded by that name, or the file lacks weights.
    """

    name, default, libraries = "dino", "facebook/dino-vits16", ("transformers",)
    title: ClassVar[str] = "DINO"
    local: ClassVar[bool] = False  # whether a folder on this machine is asked for

    def __init__(
        self,
        name: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        resizing: Resizing | None = None,
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        if self.local:
            check_local(self.title, name, self.name, self.default)
        self.model, settings = _load_vit(place_of(self.name, name), name, self)
        self.model.to(self.device, dtype).eval().requires_grad_(False)
        config = self.model.config
        side = pixels(config.image_size, f"{name}/config.json")
        if resizing is None:
            resize, crop = _sizes(settings, side, f"{name}/{PREPROCESSOR_FILE}")
            resizing = Resizing("shortest", resize, crop)
        patch = pixels(config.patch_size, f"{name}/config.json, patch_size")
        if resizing.crop < patch:
            raise UnreadableFile(
                f"`{name}/{PREPROCESSOR_FILE}` makes pictures of {resizing.crop} px, less than a "
                f"patch of the model, {patch} px."
            )
        mean = tuple(settings.get("image_mean", IMAGENET_MEAN))
        std = tuple(settings.get("image_std", IMAGENET_STD))
        if not settings.get("do_normalize", True):
            mean, std = (0.0,) * 3, (1.0,) * 3
        resample = Image.Resampling(settings.get("resample", Image.Resampling.BICUBIC))
        self.preprocess = Preprocess(resizing, mean, std, resample)
        self.mean_colour = self.preprocess.mean
        # Only the plain ViT refuses other sizes unless told; DINOv2 interpolates by itself.
        other_size = config.model_type == "vit" and resizing.crop != side
        self._forward_options = {"interpolate_pos_encoding": True} if other_size else {}
        self.protocol = {
            "model": public_name(name),
            "architecture": {
                "model_type": config.model_type,
                "width": config.hidden_size,
                "layers": config.num_hidden_layers,
                "patch": patch,
            },
            "weights": weights_hash(self.model),
            "feature": "CLS of the last hidden state",
            **self.preprocess.protocol(),
            "dtype": str(dtype).removeprefix("torch."),
        }

    def encode(self, pixels: Tensor) -> Tensor:
        hidden = self.model(pixel_values=pixels, **self._forward_options).last_hidden_state
        return normalize(hidden[:, 0].float().cpu())


class Dinov2(Dino):
    """Oquab et al. 2023; with registers, Darcet et al. 2023. A folder of transformers."""

    name, default, title, local = "dinov2", "facebook/dinov2-base", "DINOv2", True


class Dinov3(Dino):
    """Siméoni et al. 2025, the ViTs. A folder of transformers."""

    name, default, title, local = (
        "dinov3",
        "facebook/dinov3-vitb16-pretrain-lvd1689m",
        "DINOv3",
        True,
    )


def register_all() -> None:
    for kind in (Dino, Dinov2, Dinov3):
        register(photo_similarity(kind.name, kind.title, kind, while_training=kind is Dino))
        for metric in picture_metrics(kind.name, kind.title, kind):
            register(metric)


def _load_vit(source: str, name: str, kind: Dino) -> tuple[Any, dict[str, Any]]:
    """The model, and its preprocessor settings (empty where there are none)."""
    # A ViT trained as DINO has no pooler; without this one comes up random, with a warning.
    options = lambda c: {"add_pooling_layer": False} if c["model_type"] == "vit" else {}  # noqa: E731
    try:
        with cache_if_unreachable(source):
            return transformers_model(source, VIT, "AutoModel", options)
    except Exception as error:  # hub, HTTP and file errors of three libraries
        raise cannot_load(kind.title, name, f"--{kind.name}", kind.default, error) from error


def _sizes(settings: dict[str, Any], side: int, place: str) -> tuple[int, int]:
    """(length of the shorter side after resizing, side of the centre crop) in pixels."""
    resize = pixels(settings.get("size", side), f"{place}, size")
    crop = settings.get("crop_size") if settings.get("do_center_crop") else resize
    return resize, pixels(crop, f"{place}, crop_size")


register_all()
