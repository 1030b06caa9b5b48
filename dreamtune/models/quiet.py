"""Without the libraries' warnings of what is meant."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def move(module: Any, device: torch.device, dtype: torch.dtype) -> None:
    """`module.to`, where something changes; diffusers warns of every cast. What a network of
    diffusers keeps in float32 stays so, as where its `from_pretrained` reads it.
    """
    from diffusers import ModelMixin

    now = next(module.parameters())
    if now.device == device and now.dtype == dtype:
        return
    names = getattr(module, "_keep_in_fp32_modules", None) if isinstance(module, ModelMixin) else ()
    kept = set(names or ())
    with quiet_diffusers():
        if not kept:
            module.to(device=device, dtype=dtype)
            return
        module.to(device=device)
        for name, x in (*module.named_parameters(), *module.named_buffers()):
            if x.is_floating_point():
                x.data = x.data.to(torch.float32 if kept & set(name.split(".")) else dtype)


@contextlib.contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Without diffusers' warnings: an AutoencoderTiny in a StableDiffusionPipeline is meant."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    levels = [
        (module, module.get_verbosity()) for module in (diffusers_logging, transformers_logging)
    ]
    bars = transformers_logging.is_progress_bar_enabled()
    for module, _ in levels:
        module.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for module, level in levels:
            module.set_verbosity(level)
        diffusers_logging.enable_progress_bar()
        if bars:
            transformers_logging.enable_progress_bar()
