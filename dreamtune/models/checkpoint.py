"""What kind of model a single file in the original layout is, by its header."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dreamtune.models.weights import listed

NETWORK = "model.diffusion_model."
END, EXCLAMATION = "<|endoftext|>", "!"  # what short prompts are filled up with


class Kind(NamedTuple):
    """A kind of checkpoint, as its names in diffusers and its tensors' names show it.

    Attributes:
        title: as users know it.
        pipeline: in diffusers.
        parts: words for those with weights.
        tokenizers: name -> what short prompts are filled up with.
        text: how the tensors of the text encoders begin.
        text_names: of each text encoder names of which one tells diffusers whose names the rest
            has: those of transformers, of open_clip.
        layer: of the text encoder that the prompt is read from, counted from its end.
    """

    title: str
    pipeline: str
    parts: dict[str, str]
    tokenizers: dict[str, str]
    text: str
    text_names: tuple[tuple[str, ...], ...]
    layer: str = "1"


PARTS = {"unet": "UNet", "vae": "autoencoder", "text_encoder": "text encoder"}
ONE_ENCODER = (
    "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
    "cond_stage_model.model.token_embedding.weight",
)
TWO_ENCODERS = (
    ("conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",),
    ("conditioner.embedders.1.model.positional_embedding",),
)
V1 = Kind(
    "1.x", "StableDiffusionPipeline", PARTS, {"tokenizer": END}, "cond_stage_model.", (ONE_ENCODER,)
)
V2 = V1._replace(title="2.x", tokenizers={"tokenizer": EXCLAMATION})
XL = Kind(
    "XL", "StableDiffusionXLPipeline", {**PARTS, "text_encoder_2": "second text encoder"},
    {"tokenizer": END, "tokenizer_2": EXCLAMATION}, "conditioner.embedders.", TWO_ENCODERS, "2",
)  # fmt: skip
KINDS = {"v1": V1, "v2": V2, "v2-base": V2, "xl": XL}  # by their folders in configs_sd/


def kind_of(path: Path) -> str:
    """The folder of configs for a single file, "v1", "v2" or "xl", by the names and shapes in its
    header.

    Raises ValueError for a file of another kind.
    """
    if path.suffix.lower() != ".safetensors":
        raise ValueError(
            f"`{path}` is not a .safetensors file; convert it (a .ckpt can run code when it is "
            f"read)."
        )
    first = f"{NETWORK}input_blocks.0.0.weight"
    with opened(path) as file:
        names = set(file.keys())
        found = "xl" if any(n.startswith(XL.text) for n in names) else "v1"
        block = 4 if found == "xl" else 1  # the first one with attention
        key = f"{NETWORK}input_blocks.{block}.1.transformer_blocks.0.attn2.to_k.weight"
        text = KINDS[found].text
        if key not in names or not any(n.startswith(text) for n in names):
            raise ValueError(
                f"`{path}` is not a Stable Diffusion 1.x, 2.x or XL checkpoint: it has no "
                f"`{key if key not in names else text.rstrip('.')}`. A LoRA or a lone UNet cannot "
                "be the base, and models of other families are read as folders or hub ids alone."
            )
        width = file.get_slice(key).get_shape()[-1]
        inputs = file.get_slice(first).get_shape()[1:2] if first in names else [4]
    if inputs != [4]:
        raise ValueError(
            f"`{path}`: its UNet takes {inputs[0] if inputs else 0} channels, not 4: an "
            "inpainting, depth or image-conditioned model cannot be the base."
        )
    if found == "xl":
        return xl(path, names)
    kinds = {768: "v1", 1024: "v2"}
    if width not in kinds:
        raise ValueError(
            f"`{path}`: text width {width} is neither Stable Diffusion 1.x (768) nor 2.x (1024)."
        )
    return kinds[width]


def xl(path: Path, names: Collection[str]) -> str:
    """Raises ValueError for what has XL's names and is trained in another way."""
    if any(n.startswith("conditioner.embedders.0.model.") for n in names):
        raise ValueError(f"`{path}` is the refiner of Stable Diffusion XL: use its base model.")
    if marks := sorted(n for n in names if n.startswith("edm_")):
        raise ValueError(
            f"`{path}` was trained with the noise of EDM (`{marks[0]}`), which is none of Stable "
            "Diffusion XL's: it cannot be the base."
        )
    return "xl"


def check_parts(path: Path, names: Collection[str], kind: Kind) -> None:
    """Parts that diffusers misses without a word that helps. Raises ValueError."""
    if not any(n.startswith("first_stage_model.") for n in names):
        raise ValueError(
            f"`{path}` has no autoencoder (no `first_stage_model.` names): it was pruned. Use the "
            "whole checkpoint."
        )
    for known in kind.text_names:
        if not set(known) & set(names):
            said = " nor ".join(f"`{name}`" for name in known)
            raise ValueError(
                f"`{path}` lacks weights of the text encoder: it has "
                f"{'neither' if len(known) > 1 else 'no'} {said}."
            )


def check_told(path: Path, names: Collection[str]) -> None:
    """Of XL: the layers that take pooled text and sizes, which diffusers reads unasked."""
    ends = [f"{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
    told = [f"{NETWORK}label_emb.0.{end}" for end in ends]
    if missing := sorted(set(told) - set(names)):
        raise ValueError(f"`{path}` lacks weights of the {PARTS['unet']}: {listed(missing)}.")


def check_pairs(path: Path, names: Collection[str]) -> None:
    """Of these convolutions diffusers reads the bias wherever it finds the weight."""
    for start, words in ((NETWORK, PARTS["unet"]), ("first_stage_model.", PARTS["vae"])):
        ends = (".op.weight", ".conv.weight")
        weights = [n for n in names if n.startswith(start) and n.endswith(ends)]
        biases = {f"{n.removesuffix('weight')}bias" for n in weights}
        if missing := sorted(biases - set(names)):
            raise ValueError(f"`{path}` lacks weights of the {words}: {listed(missing)}.")


def header(path: Path) -> tuple[set[str], dict[str, str]]:
    """Names of the tensors, and the metadata. Raises ValueError for what is no safetensors file."""
    with opened(path) as file:
        return set(file.keys()), dict(file.metadata() or {})


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"`{path}` is not a regular file.")
    try:
        with safe_open(str(path), "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"`{path}` is damaged or not a safetensors file: {error}") from None
