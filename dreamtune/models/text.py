"""Text encoders and tokenizers by their classes in transformers."""

from __future__ import annotations

from typing import Any

import torch

from dreamtune.fields import UnreadableFile, from_file
from dreamtune.models import clip_text
from dreamtune.models.folder import ModelFolder
from dreamtune.models.rules import LANGUAGE, OTHER_TEXT_ENCODER, VISION, rules
from dreamtune.models.weights import read_by_library

Named = tuple[str, str]  # library and class
CLIP_TOKENIZERS = (("transformers", "CLIPTokenizer"), ("transformers", "CLIPTokenizerFast"))
NAMED = rules(tokenizer_class=str)


def load_text_encoder(folder: ModelFolder, dtype: torch.dtype, part: str, kind_name: str) -> Any:
    """kind_name: of the class in transformers."""
    if kind_name.startswith("CLIP"):
        return clip_text.load_text_encoder(folder, dtype, part, kind_name)
    import transformers

    kind = getattr(transformers, kind_name)
    place, stated = folder.place(part, "config.json"), folder.config(part, OTHER_TEXT_ENCODER)
    if stated["model_type"] != (own := kind.config_class.model_type):
        found = stated["model_type"][:100]
        raise UnreadableFile(
            f"`{place}`: `model_type` must be {own}, as {kind_name} has it, got {found}."
        )
    from_file(LANGUAGE, stated.get("text_config", stated), f"`{place}`")
    from_file(VISION, stated.get("vision_config", {}), f"`{place}`: `vision_config`")
    return folder.load(part, kind, dtype)


def load_tokenizer(folder: ModelFolder, part: str, kind_name: str) -> Any:
    """kind_name: of the class in transformers."""
    if kind_name.startswith("CLIP"):
        return clip_text.load_tokenizer(folder, part)
    import transformers

    place = folder.place(part)
    if "tokenizer_config.json" in folder.names(part):
        stated = folder.config(part, NAMED, "tokenizer_config.json")
        found = stated.get("tokenizer_class", kind_name)
        if found.removesuffix("Fast") != kind_name.removesuffix("Fast"):
            raise UnreadableFile(f"`{place}` is of a {found[:100]}, not of a {kind_name}.")
    with read_by_library(place):
        return getattr(transformers, kind_name).from_pretrained(
            str(folder.path / part), local_files_only=True, trust_remote_code=False
        )


def unseen_in_chat(tokenizer: Any, prompt: str, length: int, thinking: bool) -> str:
    """As `clip_text.unseen`, of a prompt in the chat that Qwen's pipelines make of it."""
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=thinking,
    )
    return clip_text.unseen([tokenizer], chat, length)


def fit(tokenizer: Any, encoder: Any, folder: ModelFolder, part: str) -> None:
    """Raises UnreadableFile for a tokenizer whose ids are not the encoder's."""
    if type(encoder).__name__.startswith("CLIP"):
        return clip_text.fit(tokenizer, encoder, folder, part)
    place, known = folder.place(part), encoder.config.get_text_config().vocab_size
    with read_by_library(place):
        ids = tokenizer(["a"]).input_ids[0]
    if len(tokenizer) > known or max(ids, default=known) >= known:
        raise UnreadableFile(
            f"`{place}` has {len(tokenizer)} tokens, the text encoder knows {known}: they are not "
            "of the same model."
        )
