"""Tiny scorers of seeded random weights, in the folders that real ones come in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

PROMPTS = ["a photo of a dog", "a dog in the snow", "a red cat on a blue chair"]


def write_tokenizer(folder: Path, length: int = 32) -> int:
    """CLIP tokenizer of single letters (vocab.json, merges.txt); returns its size."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(words)


def write_t5_tokenizer(folder: Path) -> int:
    """T5 tokenizer of single letters (tokenizer.json); returns its size."""
    from transformers import T5TokenizerFast

    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -2.0)]
    letters = [(chr(c), -3.0) for c in range(ord("a"), ord("z") + 1)]
    tokenizer = T5TokenizerFast(vocab=[*marks, *letters], extra_ids=0)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


# Of the template of Qwen-Image, whose first 34 tokens are left out of what the network is told.
QWEN_IMAGE_WORDS = (
    "<|im_start|>", "<|im_end|>", "\n", "system", "user", "assistant", "Describe", ",", ":",
    " the", " image", " by", " detailing", " color", " shape", " size", " texture", " quantity",
    " text", " spatial", " relationships", " of", " objects", " and", " background",
)  # fmt: skip


def write_qwen_tokenizer(folder: Path, more: Sequence[str] = ()) -> int:
    """Qwen's tokenizer of letters and whole words, with a chat template; returns its size."""
    from transformers import Qwen2Tokenizer

    words = [*(chr(c) for c in range(ord("a"), ord("z") + 1)), "\u0120"]
    tokenizer = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    tokenizer.chat_template = "user {{ messages[0]['content'] }} bot"
    tokenizer.add_tokens(list(more))
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_clip(folder: Path, image_size: int = 32, seed: int = 0, quick_gelu: bool = False) -> Path:
    """An open_clip `local-dir:` folder with its own tokenizer."""
    import open_clip
    from safetensors.torch import save_file

    config = {
        "model_cfg": {
            "embed_dim": 16,
            "quick_gelu": quick_gelu,
            "vision_cfg": {
                "image_size": image_size, "layers": 2, "width": 32, "head_width": 16,
                "patch_size": 8,
            },
            "text_cfg": {
                "context_length": 32, "vocab_size": write_tokenizer(folder), "width": 32,
                "heads": 2, "layers": 2, "hf_tokenizer_name": "tokenizer",
            },
        },
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
    }  # fmt: skip
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def write_dino(folder: Path, image_size: int = 32, seed: int = 0, **processor: object) -> Path:
    """A transformers ViT folder."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=image_size, patch_size=8,
    )  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
