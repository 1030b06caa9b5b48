"""CLIP-I and CLIP-T: generated images against photos and against their prompts, to a CLIP model.

Any model that open_clip loads, through its own transforms and tokenizer; features are L2-normalised
float32 rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dreamtune.metrics.extractor import TextExtractor, weights_hash
from dreamtune.metrics.features import normalize
from dreamtune.metrics.files import check_open_clip, never_asking
from dreamtune.metrics.names import cache_if_unreachable, cannot_load, clip_arguments, public_name
from dreamtune.metrics.preprocess import Preprocess, Resizing, in_parallel, normalized
from dreamtune.metrics.similarity import (
    masked_prompt,
    photo_similarity,
    picture_metrics,
    prompt_similarity,
)
from dreamtune.metrics.table import register
from dreamtune.models.weights import read_by_library

OPEN_CLIP_FILE = "open_clip_config.json"


class Clip(TextExtractor):
    """Image and text features of an open_clip model, through its own transforms and tokenizer.

    Args:
        name: `local-dir:<folder>` (or just the folder), `hf-hub:<id>`, `<architecture>:<tag or
            file>` such as `ViT-B-32:openai`, an architecture alone (tag `openai`), or "embedded".
        resizing: instead of the model's own.

    Raises:
        ValueError: nothing can be loaded by that name.
    """

    name, default, libraries = "clip", "ViT-B-32:openai", ("open_clip_torch",)

    def __init__(
        self,
        name: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        resizing: Resizing | None = None,
    ) -> None:
        import open_clip
        from open_clip.transformer import QuickGELU

        self.device, self.dtype = torch.device(device), dtype
        arguments = clip_arguments(name)
        try:
            with cache_if_unreachable(arguments["model_name"]), never_asking():
                config, options = _checked(arguments["model_name"])
                local = arguments["model_name"].startswith("local-dir:")
                with read_by_library(name) if local else nullcontext():
                    self.model, transform = open_clip.create_model_from_pretrained(
                        **arguments, weights_only=True
                    )
                    self.tokenizer = open_clip.get_tokenizer(arguments["model_name"], **options)
        except Exception as error:  # open_clip wraps what went wrong in several types
            raise cannot_load("CLIP", name, "--clip", self.default, error) from error
        self.model.to(self.device, dtype).eval().requires_grad_(False)
        self._check_vocabulary(name)
        settings = self.model.visual.preprocess_cfg
        self.mean_colour = tuple(settings["mean"])
        seen: dict[str, Any] = {
            "resize": settings["size"],
            "resize_mode": settings["resize_mode"],
            "filter": f"PIL {settings['interpolation']}, antialiased",
            "mean": list(settings["mean"]),
            "std": list(settings["std"]),
        }
        self.preprocess: Preprocess | _Transform = _Transform(transform)
        if resizing is not None:
            filter = Image.Resampling[settings["interpolation"].upper()]
            std = tuple(settings["std"])
            self.preprocess = Preprocess(resizing, self.mean_colour, std, filter)
            seen = self.preprocess.protocol()
        vision = config.get("vision_cfg", {})
        self.protocol = {
            "model": public_name(name),
            "architecture": {
                "width": vision.get("width"),
                "layers": vision.get("layers"),
                "patch": vision.get("patch_size"),
            },
            "weights": weights_hash(self.model),
            # what the model has, whichever of folder, hub, architecture and tag asked for it
            "quick_gelu": any(isinstance(m, QuickGELU) for m in self.model.modules()),
            **seen,
            "dtype": str(dtype).removeprefix("torch."),
        }

    def encode(self, pixels: Tensor) -> Tensor:
        return normalize(self.model.encode_image(pixels).float().cpu())

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        features = self.model.encode_text(self.tokenizer(texts).to(self.device))
        return normalize(features.float().cpu())

    def _check_vocabulary(self, name: str) -> None:
        # Without `hf_tokenizer_name` in its text_cfg, open_clip gives a folder the tokenizer of
        # OpenAI's CLIP and the ids do not fit, or worse, fit.
        inner = getattr(self.tokenizer, "tokenizer", self.tokenizer)
        vocabulary = len(inner) if hasattr(inner, "__len__") else inner.vocab_size
        text = getattr(self.model, "text", self.model)
        rows = getattr(text, "vocab_size", vocabulary)
        if vocabulary > rows:
            raise ValueError(
                f"CLIP `{name}`: the tokenizer has {vocabulary} tokens, the text model {rows}; set "
                "`hf_tokenizer_name` in the `text_cfg` of its open_clip_config.json and put the "
                "tokenizer's files beside it"
            )


@dataclass(frozen=True)
class _Transform:
    """open_clip's own preprocessing: a chain that ends in a tensor and its normalisation, which are
    the same for a batch, where it is wanted."""

    transform: Any

    def __call__(self, images: Sequence[Image.Image], device: torch.device | str) -> Tensor:
        from torchvision.transforms import Compose, Normalize, ToTensor

        *first, to_tensor, last = self.transform.transforms
        plain = isinstance(to_tensor, ToTensor) and isinstance(last, Normalize)
        pictures = [image.convert("RGB") for image in images]
        if not plain:
            return torch.stack([self.transform(picture) for picture in pictures]).to(device)
        small = in_parallel(Compose(first), pictures)
        return normalized(small, last.mean, last.std, device)


def _checked(model_name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's config, and options of `open_clip.get_tokenizer`, after the config of a folder or
    a hub id was checked.

    Raises UnreadableFile for a config that asks for code, which open_clip would grant.
    """
    import open_clip

    scheme, _, place = model_name.rpartition(":")
    config = open_clip.get_model_config(model_name) if not scheme else None
    if scheme:
        file = Path(place) / OPEN_CLIP_FILE
        if scheme == "hf-hub":
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(place, OPEN_CLIP_FILE))
        config = check_open_clip(file, f"{place.rstrip('/')}/{OPEN_CLIP_FILE}")
    named = (config or {}).get("text_cfg", {}).get("hf_tokenizer_name")
    return config or {}, {"trust_remote_code": False} if named else {}


register(photo_similarity("clip_i", "CLIP-I", Clip))
register(prompt_similarity("clip_t", "CLIP-T", Clip))
for metric in picture_metrics("clip_i", "CLIP-I", Clip):
    register(metric)
register(masked_prompt("clip_t", "CLIP-T", Clip))
