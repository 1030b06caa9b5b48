"""DINO: how alike generated images and photos are to a self-supervised vision transformer.

Pictures are resized with PIL (antialiased; a tensor resize without antialiasing moves pixels by
6/255 on average); features are L2-normalised float32 rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dreamtune.metrics.extractor import Extractor, weights_hash
from dreamtune.metrics.features import normalize
from dreamtune.metrics.names import cache_if_unreachable, cannot_load, place_of, public_name
from dreamtune.metrics.similarity import photo_similarity
from dreamtune.metrics.table import register

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Dino(Extractor):
    """CLS token of the last layer of a ViT, after its final norm (Caron et al. 2021).

    Mean, standard deviation, filter and sizes come from the folder's `preprocessor_config.json`,
    else ImageNet's, bicubic, and the model's own `image_size`. The shorter side is resized and the
    centre cropped, which for square pictures is the plain resize of the published protocols.

    Args:
        name: folder, hub id (`facebook/dino-vits16`), or "embedded".

    Raises:
        ValueError: nothing can be loaded by that name, or the file lacks weights.
    """

    name, default, libraries = "dino", "facebook/dino-vits16", ("transformers",)

    def __init__(
        self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.model, settings = _load_vit(place_of(self.name, name), name)
        self.model.to(self.device, dtype).eval().requires_grad_(False)
        side = self.model.config.image_size
        self.resize, self.crop = _sizes(settings, side)
        self.mean = tuple(settings.get("image_mean", IMAGENET_MEAN))
        self.std = tuple(settings.get("image_std", IMAGENET_STD))
        self.resample = Image.Resampling(settings.get("resample", Image.Resampling.BICUBIC))
        # Only the plain ViT refuses other sizes unless told; DINOv2 interpolates by itself.
        other_size = self.model.config.model_type == "vit" and self.crop != side
        self._forward_options = {"interpolate_pos_encoding": True} if other_size else {}
        self.protocol = {
            "model": public_name(name),
            "weights": weights_hash(self.model),
            "feature": "CLS of the last hidden state",
            "resize": self.resize,
            "crop": self.crop,
            "filter": f"PIL {self.resample.name.lower()}, antialiased",
            "mean": list(self.mean),
            "std": list(self.std),
            "dtype": str(dtype).removeprefix("torch."),
        }

    def preprocess(self, image: Image.Image) -> Tensor:
        """(3, crop, crop) float32."""
        from torchvision.transforms import functional as vision

        image = image.convert("RGB")
        width, height = image.size
        scale = self.resize / min(width, height)
        size = (max(self.resize, round(width * scale)), max(self.resize, round(height * scale)))
        image = vision.center_crop(image.resize(size, self.resample), [self.crop, self.crop])
        return vision.normalize(vision.to_tensor(image), self.mean, self.std)

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image], batch_size: int = 32) -> Tensor:
        """Features (N, D) on the CPU."""
        rows = []
        for start in range(0, len(images), batch_size):
            batch = torch.stack([self.preprocess(i) for i in images[start : start + batch_size]])
            batch = batch.to(self.device, self.dtype)
            hidden = self.model(pixel_values=batch, **self._forward_options).last_hidden_state
            rows.append(normalize(hidden[:, 0].float().cpu()))
        return torch.cat(rows)


register(photo_similarity("dino", "DINO", Dino))


def _load_vit(folder: str, name: str) -> tuple[Any, dict[str, Any]]:
    """The model, and its preprocessor settings (empty where there are none)."""
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with cache_if_unreachable(folder):
            config = AutoConfig.from_pretrained(folder)
            # A ViT trained as DINO has no pooler; without this one comes up random, with a warning.
            options = {"add_pooling_layer": False} if config.model_type == "vit" else {}
            model, report = AutoModel.from_pretrained(folder, output_loading_info=True, **options)
            settings = _preprocessor(folder)
    except Exception as error:  # hub, HTTP and file errors of three libraries
        raise cannot_load("DINO", name, "--dino", Dino.default, error) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"DINO `{name}` lacks weights: {', '.join(missing[:3])} ({len(missing)})")
    return model, settings


def _preprocessor(folder: str) -> dict[str, Any]:
    from transformers import ViTImageProcessor

    local = Path(folder) / "preprocessor_config.json"
    if local.is_file():
        return json.loads(local.read_text())
    if not Path(folder).is_dir():
        with suppress(OSError):
            return ViTImageProcessor.get_image_processor_dict(folder)[0]
    return {}


def _sizes(settings: dict[str, Any], side: int) -> tuple[int, int]:
    """(length of the shorter side after resizing, side of the centre crop) in pixels."""

    def pixels(value: Any) -> int:
        if isinstance(value, dict):
            return int(value.get("shortest_edge") or value["height"])
        return int(value)

    resize = pixels(settings.get("size", side))
    crop = pixels(settings["crop_size"]) if settings.get("do_center_crop") else resize
    return resize, crop
