"""What the files of a scorer must hold, checked before a library reads them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field, Strict
from pydantic_core import PydanticCustomError

from dreamtune.fields import UnreadableFile, from_file, shown
from dreamtune.models.folder import ModelFolder
from dreamtune.models.quiet import quiet_diffusers
from dreamtune.models.rules import (
    NAMED,
    Depth,
    Depths,
    Flag,
    Pair,
    Pixels,
    Positive,
    Rules,
    Text,
    Whole,
    read_config,
    rules,
)

PREPROCESSOR_FILE = "preprocessor_config.json"


def exactly_three(values: list[Any]) -> list[Any]:
    if len(values) != 3:
        raise PydanticCustomError("colour", "it must be a list of three")
    return values


Level = Annotated[float, Strict(), Field(ge=0, le=1)]  # of pixels in [0, 1]
Colour = Annotated[list[Level], AfterValidator(exactly_three)]
Spread = Annotated[list[Annotated[Level, Field(gt=0)]], AfterValidator(exactly_three)]
Sides = dict[str, Any]

# Those whose first token is trained to describe the picture.
VIT = rules(
    ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    model_type=Literal["vit", "deit", "vit_msn", "dinov2", "dinov2_with_registers", "dinov3_vit"],
    hidden_size=Whole, intermediate_size=Whole, num_hidden_layers=Depth,
    num_attention_heads=Depth, image_size=Pixels | Pair, patch_size=Pixels | Pair,
    num_channels=Literal[3], layer_norm_eps=Positive, hidden_act=Text, qkv_bias=Flag,
)  # fmt: skip
SIGLIP = rules(
    ("model_type", "text_config", "vision_config"),
    model_type=Literal["siglip"], text_config=Sides, vision_config=Sides,
)  # fmt: skip
PREPROCESSOR = rules(
    image_mean=Colour, image_std=Spread, size=Pixels | Sides, crop_size=Pixels | Sides,
    resample=Annotated[int, Strict(), Field(ge=0, le=5)], do_center_crop=Flag,
    do_normalize=Flag, do_resize=Literal[True], do_rescale=Literal[True],
    rescale_factor=Annotated[float, Strict(), Field(gt=0.0039, lt=0.00393)],  # 1 / 255
)  # fmt: skip
OPEN_CLIP = rules(("model_cfg",), model_cfg=Sides, preprocess_cfg=Sides)
MODEL = rules(
    ("embed_dim", "vision_cfg", "text_cfg"),
    embed_dim=Whole, vision_cfg=Sides, text_cfg=Sides, quick_gelu=Flag, custom_text=Flag,
)  # fmt: skip
VISION = rules(
    layers=Depth | Depths, width=Whole, head_width=Whole, patch_size=Pixels | None,
    image_size=Pixels | Pair, mlp_ratio=Positive,
)  # fmt: skip
TEXT = rules(
    context_length=Whole, vocab_size=Whole, width=Whole, heads=Depth, layers=Depth,
    mlp_ratio=Positive, hf_tokenizer_name=Text | None, tokenizer_kwargs=Sides | None,
)  # fmt: skip
PREPROCESS = rules(
    mean=Colour, std=Spread, size=Pixels | Pair, mode=Literal["RGB"],
    interpolation=Literal["bicubic", "bilinear"],
    resize_mode=Literal["shortest", "longest", "squash"],
    fill_color=Annotated[int, Strict(), Field(ge=0, le=255)],
)  # fmt: skip


def preprocessor(path: Path, place: str) -> dict[str, Any]:
    """preprocessor_config.json of a vision transformer, {} where there is none."""
    found = read_config(path, PREPROCESSOR, place) if path.exists() else {}
    if ("image_mean" in found) != ("image_std" in found):
        raise UnreadableFile(f"`{place}` must say both `image_mean` and `image_std`, or neither.")
    return found


def transformers_model(
    source: str, kind: Any, auto: str, options: Callable[[dict[str, Any]], dict[str, Any]]
) -> tuple[Any, dict[str, Any]]:
    """A model of transformers in float32, and its preprocessor settings, empty where there are
    none. kind: rules of its config; auto: the class that loads it; options: of loading, by config.

    Raises what the libraries raise, and UnreadableFile where the files lack layers.
    """
    import transformers

    with never_asking(), quiet_diffusers():
        folder = ModelFolder.open(source, None, None, [""])
        given = options(folder.config("", kind))
        loader = getattr(transformers, auto)
        model = folder.load("", loader, torch.float32, trust_remote_code=False, **given)
        place = folder.place("", PREPROCESSOR_FILE)
        settings = preprocessor(folder.path / PREPROCESSOR_FILE, place)
        for note in folder.notes:
            if "layers" in note:
                raise UnreadableFile(note)
    return model, settings


def pixels(value: Any, place: str) -> int:
    """One side of a square picture, in the ways that configs write it."""
    if isinstance(value, dict):
        sides = {v for k, v in value.items() if k in ("height", "width", "shortest_edge")}
    else:
        sides = set(value) if isinstance(value, (list, tuple)) else {value}
    side = next(iter(sides)) if len(sides) == 1 else None
    if not isinstance(side, int) or isinstance(side, bool) or not 1 <= side <= 1 << 14:
        raise UnreadableFile(f"`{place}` must say one side in pixels, got {shown(value)}.")
    return side


def check_open_clip(file: Path, place: str) -> dict[str, Any]:
    """The `model_cfg` of open_clip_config.json. Raises UnreadableFile for what is wrong in it, or
    in the tokenizer's settings beside it.
    """
    config = read_config(file, OPEN_CLIP, place)
    model = from_file(MODEL, config["model_cfg"], f"`{place}`, `model_cfg`")
    named: list[tuple[str, Rules, Any]] = [
        ("vision_cfg", VISION, model["vision_cfg"]),
        ("text_cfg", TEXT, model["text_cfg"]),
        ("preprocess_cfg", PREPROCESS, config.get("preprocess_cfg", {})),
    ]
    for name, schema, value in named:
        from_file(schema, value, f"`{place}`, `{name}`")
    for other in ("tokenizer_config.json", "config.json"):
        if (file.parent / other).exists():
            read_config(file.parent / other, NAMED, str(Path(place).parent / other))
    return model


@contextlib.contextmanager
def never_asking() -> Iterator[None]:
    """transformers asks on the terminal whether code that comes with a model may run, and waits;
    inside the answer is no.
    """
    from transformers import dynamic_module_utils

    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before
