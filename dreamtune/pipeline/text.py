"""The text of a prompt as a diffusers pipeline encodes it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

GUIDED = "do_classifier_free_guidance"
ARGUMENTS = ("prompt", "device", "num_images_per_prompt", GUIDED)


@torch.no_grad()
def encoded(pipe: Any, prompt: str) -> Tensor:
    """(tokens, width). Raises ValueError where the pipeline does not encode as those of Stable
    Diffusion do, or does not tell which rows of a batch have the prompt.
    """
    encode = getattr(pipe, "encode_prompt", None)
    takes = () if encode is None else inspect.signature(encode).parameters
    if not all(name in takes for name in ARGUMENTS) or not hasattr(type(pipe), GUIDED):
        raise ValueError(
            f"a region has a prompt, which a `{type(pipe).__name__}` cannot encode: route by a"
            " pipeline such as `StableDiffusionPipeline`, or give regions without prompts"
        )
    assert encode is not None
    values = (prompt, pipe._execution_device, 1, False)
    text: Tensor = encode(**dict(zip(ARGUMENTS, values)))[0]
    return text[0]
