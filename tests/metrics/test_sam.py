"""Masks by a SAM of seeded random weights: the library's own, and the scores of masks as files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from galleries import write_images, write_photos
from PIL import Image

import dreamtune
from dreamtune.evaluation.layout import read_images, read_photos
from dreamtune.metrics.sam import Sam


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor

    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "image_size": 64, "patch_size": 16}
    config = SamConfig(
        vision_config={
            **sizes, "num_hidden_layers": 1, "num_attention_heads": 2, "output_channels": 16,
            "mlp_dim": 32, "window_size": 2, "global_attn_indexes": [0], "num_pos_feats": 8,
        },
        prompt_encoder_config={**sizes, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
    )  # fmt: skip
    path = tmp_path_factory.mktemp("sam")
    SamModel(config).save_pretrained(path)
    processor = SamImageProcessor(
        size={"longest_edge": 64}, pad_size={"height": 64, "width": 64},
        mask_size={"longest_edge": 16}, mask_pad_size={"height": 16, "width": 16},
    )  # fmt: skip
    SamProcessor(processor).save_pretrained(path)
    return path


@torch.no_grad()
def test_masks_are_those_of_transformers(folder: Path) -> None:
    from transformers import SamModel, SamProcessor

    pixels = np.random.default_rng(0).integers(0, 256, (30, 44, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    model, processor = SamModel.from_pretrained(folder), SamProcessor.from_pretrained(folder)
    inputs = processor(image, input_points=[[[[22.0, 15.0]]]], return_tensors="pt")
    inputs["input_points"] = inputs["input_points"].float()
    out = model(**{k: v for k, v in inputs.items() if "sizes" not in k})
    masks = processor.image_processor.post_process_masks(
        out.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
    )[0][0]
    found = np.asarray(Sam(str(folder)).mask(image))
    assert found.shape == (30, 44) and set(np.unique(found)) == {0, 255}
    same = [bool((found == mask.numpy() * 255).all()) for mask in masks]
    assert same[int(out.iou_scores[0, 0].argmax())] and sum(same) == 1


def test_scores_are_those_of_the_same_masks_as_files(
    folder: Path, tmp_path: Path, scorer_names: dict[str, str]
) -> None:
    photos, images = write_photos(tmp_path / "photos"), write_images(tmp_path / "images")
    made = dreamtune.score(
        images, photos=photos, weights=scorer_names, sam=str(folder), output_dir=tmp_path / "made"
    )
    assert made.protocol["masks"]["model"] == folder.name
    for found in (
        [image.picture for image in read_images(images).images],
        [photo for own in read_photos(photos)[0].values() for photo in own.photos],
    ):
        for picture in found:
            place = picture.path.parent / "masks" / f"{picture.path.stem}.png"
            place.parent.mkdir(exist_ok=True)
            shutil.copy(tmp_path / "made" / "masks" / f"{picture.digest}.png", place)
    given = dreamtune.score(
        images, photos=photos, weights=scorer_names, output_dir=tmp_path / "given"
    )
    ours, theirs = made.scores(), given.scores()
    assert {"masked_dino", "masked_clip_t"} <= ours.keys() == theirs.keys()
    assert all(ours[key].mean == theirs[key].mean for key in ours)
    assert "masks" not in given.protocol


def test_refusals(folder: Path, tmp_path: Path, scorer_names: dict[str, str]) -> None:
    photos, images = write_photos(tmp_path / "photos"), write_images(tmp_path / "images")
    with pytest.raises(ValueError, match="`paper` has no masked score: leave --sam out"):
        dreamtune.score(
            images, photos=photos, protocol="paper", sam=str(folder), output_dir=tmp_path / "x"
        )
    with pytest.raises(ValueError, match=r"SAM loads from a folder .* --sam FOLDER"):
        Sam(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="cannot load SAM .*model_type"):
        Sam(scorer_names["dino"])
