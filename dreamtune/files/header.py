"""Strings in the header of a LoRA file that other programs show: modelspec's and kohya's.

Only what is known is written: https://github.com/Stability-AI/ModelSpec, version 1.0.0; `ss_*` as
sd-scripts has them.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from dreamtune.files.formats import UNNAMED, Change
from dreamtune.files.tensors import SPEC

GIVEN = ("author", "date", "description", "license")  # taken from the metadata as they are
WIDTHS = {320, 640, 1280}  # of the UNets of Stable Diffusion 1.x, 2.x and XL


class Architecture(NamedTuple):
    """In modelspec's words, in kohya's, and pixels a side."""

    spec: str
    kohya: str
    resolution: int


# Numbers a token of the prompt, and the UNet's `sample_size` where that tells two bases apart.
KNOWN = {
    (768, None): Architecture("stable-diffusion-v1", "sd_v1", 512),
    (1024, 64): Architecture("stable-diffusion-v2-512", "sd_v2", 512),
    (1024, 96): Architecture("stable-diffusion-v2-768-v", "sd_v2_v", 768),
    (2048, None): Architecture("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", 1024),
}


def architecture(change: Change) -> Architecture | None:
    """None for a network that is none of the known ones, or that its layers do not tell."""
    shapes = change.file.shapes
    told = {shape[-1] for path, shape in shapes.items() if path.endswith("attn2.to_k")}
    widths = {shape[0] for path, shape in shapes.items() if path.endswith("to_q")}
    if len(told) != 1 or not widths or not widths <= WIDTHS:
        return None
    width, size = told.pop(), getattr(change.network, "config", {}).get("sample_size")
    return KNOWN.get((width, None)) or KNOWN.get((width, size))


def is_xl(change: Change) -> bool:
    """Whether the network is of the kind of SDXL, by its config or by what its layers show."""
    if change.network is not None:
        config: Any = getattr(change.network, "config", {})
        return bool(config.get("addition_embed_type") == "text_time")
    shapes = change.file.shapes
    deep = any(re.search(r"transformer_blocks\.[1-9]", path) for path in shapes)
    return deep or any(s[-1] == 2048 for path, s in shapes.items() if path.endswith("attn2.to_k"))


def modelspec(change: Change) -> dict[str, str]:
    metadata, known = change.about["metadata"], architecture(change)
    found = {SPEC: "1.0.0", "modelspec.implementation": "diffusers"}
    named = change.title if change.title != UNNAMED else trigger(metadata) or UNNAMED
    found["modelspec.title"] = _text(metadata.get("title")) or named
    found |= {f"modelspec.{name}": _text(metadata.get(name)) for name in GIVEN}
    if known is not None:
        found["modelspec.architecture"] = f"{known.spec}/lora"
    resolution = change.resolution or (known.resolution if known else None)
    if resolution is not None:
        found["modelspec.resolution"] = f"{resolution}x{resolution}"
    found["modelspec.trigger_phrase"] = trigger(metadata)
    return {name: text for name, text in found.items() if text}


def trigger(metadata: Any) -> str:
    """The words that the adapter answers to: the prompt of training, else the identifier; "" where
    neither is known.
    """
    return _text(metadata.get("prompt")) or _text(metadata.get("identifier"))


def kohya(change: Change) -> dict[str, str]:
    """`ss_*`: what sd-scripts would say of the network that was trained."""
    rank, known = max(down.shape[0] for _, down in change.factors.values()), architecture(change)
    found = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_output_name": change.title,
        "ss_sd_model_name": _text(change.about["metadata"].get("base")),
    }
    if known is not None:
        found["ss_base_model_version"] = known.kohya
        found["ss_v2"] = str(known.kohya.startswith("sd_v2"))
    return {name: text for name, text in found.items() if text}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
