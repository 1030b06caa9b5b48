"""Masks of the subject from a folder of SAM (Kirillov et al. 2023), where none are given.

The point that asks for the subject is the middle of the picture, where a photo of a subject has it;
of the three masks that SAM offers for a point the one is taken that it finds the surest. Both are
guesses, and the masks are files to look at and to correct.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from dreamtune.fields import UnreadableFile
from dreamtune.files.whole import whole
from dreamtune.metrics.extractor import weights_hash
from dreamtune.metrics.files import never_asking
from dreamtune.metrics.names import cannot_load, check_local, public_name
from dreamtune.metrics.store import Picture, opened
from dreamtune.models.folder import ModelFolder
from dreamtune.models.quiet import quiet_diffusers
from dreamtune.models.rules import rules

EXAMPLE = "facebook/sam-vit-base"
CONFIG = rules(("model_type",), model_type=Literal["sam"])


class Sam:
    """A SAM model and its processor. `protocol` says what a mask depends on.

    Raises ValueError for a name that is no folder, or one that holds no SAM.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        from transformers import SamModel, SamProcessor

        check_local("SAM", name, "sam", EXAMPLE)
        try:
            with never_asking(), quiet_diffusers():
                folder = ModelFolder.open(name, None, None, [""])
                folder.config("", CONFIG)
                self.model: Any = folder.load("", SamModel, torch.float32, trust_remote_code=False)
                for note in folder.notes:
                    if "layers" in note:
                        raise UnreadableFile(note)
                self.processor: Any = SamProcessor.from_pretrained(name, local_files_only=True)
        except Exception as error:  # file errors of two libraries
            raise cannot_load("SAM", name, "--sam", EXAMPLE, error) from error
        self.device = torch.device(device)
        self.model.to(self.device).eval().requires_grad_(False)
        self.protocol = {
            "model": public_name(name),
            "weights": weights_hash(self.model),
            "asked": "the middle of the picture; the mask of the highest predicted IoU",
        }

    @torch.no_grad()
    def mask(self, image: Image.Image) -> Image.Image:
        """White where the subject is, of the picture's size."""
        middle = [[[image.width / 2, image.height / 2]]]
        inputs = self.processor(image.convert("RGB"), input_points=[middle], return_tensors="pt")
        sizes = (inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes"))
        points = inputs["input_points"].float()  # doubles, which no model of ours is in
        inputs = {k: v.to(self.device) for k, v in {**inputs, "input_points": points}.items()}
        found = self.model(**inputs, multimask_output=True)
        masks = self.processor.image_processor.post_process_masks(found.pred_masks.cpu(), *sizes)
        best = masks[0][0, found.iou_scores[0, 0].argmax().item()]
        return Image.fromarray(best.to(torch.uint8).mul(255).numpy())

    def masked(self, pictures: Sequence[Picture], folder: Path) -> list[Picture]:
        """The pictures, each with a mask; those that are made are files of the folder, named by
        what the picture's file holds."""
        return [p if p.mask else replace(p, mask=self._file(p, folder)) for p in pictures]

    def _file(self, picture: Picture, folder: Path) -> Picture:
        path = folder / f"{picture.digest}.png"
        if not path.is_file():
            with whole(path) as partial:
                self.mask(opened(picture)).save(partial, "PNG")
        return Picture(path, path.name, hashlib.sha256(path.read_bytes()).hexdigest())
