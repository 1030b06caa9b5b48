"""Stable Diffusion 1.x/2.x from one .safetensors file in the original layout, without network.

Such a file holds weights only: the configs of the two families ship in configs_sd/, and the
tokenizer is built from the merges that open_clip ships."""

from __future__ import annotations

import gzip
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parent / "configs_sd"


def load_file(path: Path, prediction_type: str | None) -> tuple[Any, ...]:
    """The parts of a single-file checkpoint (original layout), with the configs and tokenizer of
    its family.

    A file does not say what it predicts: 1.x is read as epsilon; 2.x as v-prediction, and as
    epsilon if asked.
    """
    import torch
    from diffusers import StableDiffusionPipeline

    if path.suffix != ".safetensors":
        raise ValueError(
            f"`{path}` is not a .safetensors file; convert it (a .ckpt can run code when it is "
            f"read)."
        )
    family = family_of(path)
    if prediction_type == "epsilon" and family == "v2":
        family = "v2-base"
    tokenizer = clip_tokenizer(pad="!" if family.startswith("v2") else "<|endoftext|>")
    pipe = StableDiffusionPipeline.from_single_file(
        str(path),
        config=str(CONFIGS / family),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        local_files_only=True,
        torch_dtype=torch.float32,
    )
    return pipe.unet, pipe.vae, pipe.text_encoder, tokenizer, pipe.scheduler


def family_of(path: Path) -> str:
    """The folder of configs for a single file, "v1" or "v2", by the shapes in its header."""
    from safetensors import SafetensorError, safe_open

    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    try:
        with safe_open(str(path), "pt") as f:
            names = set(f.keys())
            whole = any(n.startswith("cond_stage_model.") for n in names)
            if key not in names or not whole:
                raise ValueError(
                    f"`{path}` is not a Stable Diffusion 1.x/2.x checkpoint: it has no "
                    f"`{key if key not in names else 'cond_stage_model'}`. A LoRA, SDXL or "
                    "a lone UNet cannot be the base."
                )
            width = f.get_slice(key).get_shape()[1]
    except SafetensorError as error:
        raise ValueError(f"`{path}` is damaged or not a safetensors file: {error}") from None
    families = {768: "v1", 1024: "v2"}
    if width not in families:
        raise ValueError(
            f"`{path}`: text width {width} is neither Stable Diffusion 1.x (768) nor 2.x (1024)."
        )
    return families[width]


@lru_cache(maxsize=2)
def clip_tokenizer(pad: str = "<|endoftext|>") -> Any:
    """CLIP's tokenizer, from the merges that open_clip ships. pad: "!" for 2.x."""
    import tempfile

    import open_clip
    from transformers import CLIPTokenizer

    packed = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = (
        gzip.decompress(packed.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    )
    letters = list(byte_letters().values())
    words = letters + [c + "</w>" for c in letters] + ["".join(m.split()) for m in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocab, merge_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab.write_text(json.dumps({w: i for i, w in enumerate(words)}), encoding="utf-8")
        merge_file.write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
        Path(folder, "tokenizer_config.json").write_text(
            json.dumps(
                {
                    "tokenizer_class": "CLIPTokenizer",
                    "model_max_length": 77,
                    "pad_token": pad,
                    "bos_token": "<|startoftext|>",
                    "eos_token": "<|endoftext|>",
                    "unk_token": "<|endoftext|>",
                }
            )
        )
        return CLIPTokenizer.from_pretrained(folder)


def byte_letters() -> dict[int, str]:
    """byte -> printable letter, as in GPT-2's and CLIP's byte-level vocabularies."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(rest)}}
