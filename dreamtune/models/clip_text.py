"""The CLIP text encoder of a base and its tokenizer, which must fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dreamtune.fields import UnreadableFile
from dreamtune.models.folder import ModelFolder
from dreamtune.models.rules import TEXT_ENCODER, TOKENIZER, assumed
from dreamtune.models.weights import read_by_library

# Names as transformers 5.6 and later write them -> as earlier ones have them.
WRAPPED = {r"^(embeddings|encoder|final_layer_norm)\.": r"text_model.\1."}


def load_text_encoder(
    folder: ModelFolder,
    dtype: torch.dtype,
    part: str = "text_encoder",
    kind_name: str = "CLIPTextModel",
) -> Any:
    """kind_name: of the class in transformers, one with CLIP's text config."""
    import transformers

    kind: Any = getattr(transformers, kind_name)
    stated = folder.config(part, TEXT_ENCODER)
    with read_by_library(folder.place(part)), torch.device("meta"):
        config: Any = transformers.CLIPTextConfig.from_pretrained(str(folder.path / part))
        wrapped = hasattr(kind(config), "text_model")
    options = {"key_mapping": WRAPPED} if wrapped else {}  # the other way is transformers' own
    encoder = folder.load(part, kind, dtype, **options)
    if unsaid := assumed("text_encoder", stated, encoder.config):
        place = folder.place(part, "config.json")
        folder.notes.append(f"`{place}` does not say, and it is assumed: {', '.join(unsaid)}.")
    return encoder


def load_tokenizer(folder: ModelFolder, part: str = "tokenizer") -> Any:
    from transformers import CLIPTokenizer

    if "tokenizer_config.json" in folder.names(part):
        folder.config(part, TOKENIZER, "tokenizer_config.json")
    with read_by_library(folder.place(part)):
        return CLIPTokenizer.from_pretrained(
            str(folder.path / part), local_files_only=True, trust_remote_code=False
        )


def unseen(tokenizers: Sequence[Any], prompt: str, length: int | None = None) -> str:
    """A sentence on what of a prompt the shortest of the lengths cuts off, or `length`; "" for
    nothing.
    """
    tokenizer = min(tokenizers, key=lambda t: t.model_max_length)
    length = tokenizer.model_max_length if length is None else length
    count = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
    if count <= length:
        return ""
    return f"The prompt has {count} tokens, the text encoder takes {length}; its end is not seen"


def fit(tokenizer: Any, encoder: Any, folder: ModelFolder, part: str = "tokenizer") -> None:
    """The tokenizer's length is that of the encoder's positions where it has none or a longer one.

    Raises UnreadableFile for a tokenizer whose ids are not the encoder's.
    """
    positions, length = encoder.config.max_position_embeddings, tokenizer.model_max_length
    place = folder.place(part)
    if len(tokenizer) > encoder.config.vocab_size:
        raise UnreadableFile(
            f"`{place}` has {len(tokenizer)} tokens, the text encoder knows "
            f"{encoder.config.vocab_size}: they are not of the same model."
        )
    if length > positions:
        said = "says no length" if length > 1e9 else f"says a length of {length}"
        folder.notes.append(f"`{place}` {said}: the text encoder's {positions} tokens are used.")
        tokenizer.model_max_length = positions
    tokenizer.model_max_length = int(tokenizer.model_max_length)
    with read_by_library(place):  # a damaged vocabulary loads, and fails at the first word
        ids = tokenizer("a", padding="max_length", max_length=tokenizer.model_max_length).input_ids
    if len(ids) != tokenizer.model_max_length or not all(isinstance(i, int) for i in ids):
        raise UnreadableFile(f"`{place}` does not make tokens of words.")
