"""SigLIP 2: images against photos and against prompts, to a model of transformers (Tschannen et al.
2025, arXiv 2502.14786; the fixed-resolution checkpoints, which transformers calls `siglip`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from dreamtune.metrics.extractor import TextExtractor, weights_hash
from dreamtune.metrics.features import normalize
from dreamtune.metrics.files import (
    PREPROCESSOR_FILE,
    SIGLIP,
    never_asking,
    pixels,
    transformers_model,
)
from dreamtune.metrics.names import cannot_load, check_local, public_name
from dreamtune.metrics.preprocess import Preprocess, Resizing
from dreamtune.metrics.similarity import (
    masked_prompt,
    photo_similarity,
    picture_metrics,
    prompt_similarity,
)
from dreamtune.metrics.table import register
from dreamtune.models.quiet import quiet_diffusers

HALF = (0.5, 0.5, 0.5)  # its mean and its standard deviation


class Siglip(TextExtractor):
    """Image and text features of a SigLIP or SigLIP 2 folder.

    Pictures are squashed to the model's size, texts lower-cased and padded to its length, as the
    model was trained.

    Args:
        name: a folder of transformers with its tokenizer.
        resizing: instead of the folder's own.

    Raises:
        ValueError: it is no folder, lacks weights, or has another tokenizer.
    """

    name, default, libraries = "siglip2", "google/siglip2-base-patch16-224", ("transformers",)
    title = "SigLIP 2"

    def __init__(
        self,
        name: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        resizing: Resizing | None = None,
    ) -> None:
        from transformers import AutoTokenizer

        self.device, self.dtype = torch.device(device), dtype
        check_local(self.title, name, self.name, self.default)
        try:
            self.model, settings = transformers_model(name, SIGLIP, "SiglipModel", lambda c: {})
            with never_asking(), quiet_diffusers():
                self.tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
        except Exception as error:  # file errors of three libraries
            raise cannot_load(self.title, name, f"--{self.name}", self.default, error) from error
        config = self.model.config
        if len(self.tokenizer) > config.text_config.vocab_size:
            raise ValueError(
                f"{self.title} `{name}`: the tokenizer has {len(self.tokenizer)} tokens, the text "
                f"model {config.text_config.vocab_size}; put the model's own tokenizer beside it"
            )
        self.model.to(self.device, dtype).eval().requires_grad_(False)
        if resizing is None:
            own = settings.get("size", config.vision_config.image_size)
            side = pixels(own, f"{name}/{PREPROCESSOR_FILE}, size")
            resizing = Resizing("squash", side, side)
        resample = Image.Resampling(settings.get("resample", Image.Resampling.BILINEAR))
        mean, std = (tuple(settings.get(k, HALF)) for k in ("image_mean", "image_std"))
        self.preprocess = Preprocess(resizing, mean, std, resample)
        self.mean_colour = mean
        self._length = config.text_config.max_position_embeddings
        # Positions are interpolated only where the size asks for it.
        other_size = resizing.crop != config.vision_config.image_size
        self._options = {"interpolate_pos_encoding": True} if other_size else {}
        self.protocol = {
            "model": public_name(name),
            "architecture": {
                "width": config.vision_config.hidden_size,
                "layers": config.vision_config.num_hidden_layers,
                "patch": config.vision_config.patch_size,
            },
            "weights": weights_hash(self.model),
            "text": f"lower case, padded to {self._length} tokens",
            **self.preprocess.protocol(),
            "dtype": str(dtype).removeprefix("torch."),
        }

    def encode(self, pixels: Tensor) -> Tensor:
        found = self.model.vision_model(pixel_values=pixels, **self._options).pooler_output
        return normalize(found.float().cpu())

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        ids = self.tokenizer(
            [text.lower() for text in texts],
            padding="max_length",
            truncation=True,
            max_length=self._length,
            return_tensors="pt",
        ).input_ids
        found = self.model.text_model(input_ids=ids.to(self.device)).pooler_output
        return normalize(found.float().cpu())


register(photo_similarity("siglip2_i", "SigLIP 2 image", Siglip, while_training=False))
register(prompt_similarity("siglip2_t", "SigLIP 2 text", Siglip, while_training=False))
for metric in picture_metrics("siglip2_i", "SigLIP 2 image", Siglip):
    register(metric)
register(masked_prompt("siglip2_t", "SigLIP 2 text", Siglip))
