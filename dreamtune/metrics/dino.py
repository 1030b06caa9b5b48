"""DINO: how alike generated images and photos are to a self-supervised vision transformer.

Pictures are resized with PIL (antialiased; a tensor resize without antialiasing moves pixels by
6/255 on average); features are L2-normalised float32 rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dreamtune.fields import UnreadableFile
from dreamtune.metrics.extractor import Extractor, weights_hash
from dreamtune.metrics.features import normalize
from dreamtune.metrics.files import VIT, never_asking, pixels, preprocessor
from dreamtune.metrics.names import cache_if_unreachable, cannot_load, place_of, public_name
from dreamtune.metrics.similarity import photo_similarity
from dreamtune.metrics.table import register
from dreamtune.models.folder import ModelFolder
from dreamtune.models.quiet import quiet_diffusers

PREPROCESSOR_FILE = "preprocessor_config.json"
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
        side = pixels(self.model.config.image_size, f"{name}/config.json")
        self.resize, self.crop = _sizes(settings, side, f"{name}/{PREPROCESSOR_FILE}")
        patch = pixels(self.model.config.patch_size, f"{name}/config.json, patch_size")
        if self.crop < patch:
            raise UnreadableFile(
                f"`{name}/{PREPROCESSOR_FILE}` makes pictures of {self.crop} px, less than a patch "
                f"of the model, {patch} px."
            )
        self.mean = tuple(settings.get("image_mean", IMAGENET_MEAN))
        self.std = tuple(settings.get("image_std", IMAGENET_STD))
        if not settings.get("do_normalize", True):
            self.mean, self.std = (0.0,) * 3, (1.0,) * 3
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


def _load_vit(source: str, name: str) -> tuple[Any, dict[str, Any]]:
    """The model, and its preprocessor settings (empty where there are none)."""
    from transformers import AutoModel

    try:
        with cache_if_unreachable(source), never_asking(), quiet_diffusers():
            folder = ModelFolder.open(source, None, None, [""])
            # A ViT trained as DINO has no pooler; without this one comes up random, with a warning.
            config = folder.config("", VIT)
            options = {"add_pooling_layer": False} if config["model_type"] == "vit" else {}
            model = folder.load("", AutoModel, torch.float32, trust_remote_code=False, **options)
            settings = preprocessor(
                folder.path / PREPROCESSOR_FILE, folder.place("", PREPROCESSOR_FILE)
            )
            for note in folder.notes:
                if "layers" in note:
                    raise UnreadableFile(note)
    except Exception as error:  # hub, HTTP and file errors of three libraries
        raise cannot_load("DINO", name, "--dino", Dino.default, error) from error
    return model, settings


def _sizes(settings: dict[str, Any], side: int, place: str) -> tuple[int, int]:
    """(length of the shorter side after resizing, side of the centre crop) in pixels."""
    resize = pixels(settings.get("size", side), f"{place}, size")
    crop = settings.get("crop_size") if settings.get("do_center_crop") else resize
    return resize, pixels(crop, f"{place}, crop_size")
