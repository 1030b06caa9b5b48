"""Whether somebody has touched a model since it was looked at: what a recorded forward, which runs
no Python, would not see.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dreamtune.injection.layer import Adapted
from dreamtune.injection.stacked import offloaded_whole
from dreamtune.models.load import family_with

NESTED = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
OURS = ("changes", "mix", "mixed", "placed", "projection", "index")  # of an adapted layer
# Of the model, around what is recorded; the last is there, and empty, after a `cache_context`.
OUTSIDE = ("_forward_hooks", "_forward_pre_hooks", "forward", "_diffusers_hook")


class Watch:
    """What the modules of a model are and hold, but for values, which a recorded forward reads."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen: list[tuple[str, nn.Module, type, Mapping[str, Any], list[tuple[Any, Any]]]] = []
        for name, module in model.named_modules():
            own = module.__dict__
            skip = OUTSIDE if module is model else ()
            nested = [(own[k], dict(own[k])) for k in NESTED if k in own and k not in skip]
            self.seen.append((name, module, type(module), self._plain(module), nested))
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self.tensors = [(name, x, x.data_ptr()) for name, x in tensors]

    def _plain(self, module: nn.Module) -> Mapping[str, Any]:
        left = OUTSIDE if module is self.model else OURS if isinstance(module, Adapted) else ()
        own = module.__dict__
        return {k: x for k, x in own.items() if k not in left} if left else dict(own)

    def touched(self) -> str | None:
        """What was, in words; None for nothing."""
        for name, module, kind, plain, nested in self.seen:
            if type(module) is not kind:
                return f"`{name}` is a `{type(module).__name__}` now"
            own = module.__dict__
            if module is self.model or isinstance(module, Adapted):
                own = dict(self._plain(module))
            if not _same(own, plain):
                return f"`{name or type(module).__name__}` was changed"
            if not all(_same(now, before) for now, before in nested):
                return f"what `{name or type(module).__name__}` holds was changed"
        for name, x, address in self.tensors:
            if x.data_ptr() != address:
                return f"`{name}` was moved or cast"
        return None


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Of equal keys and, where they are not the very same, equal values."""
    try:
        return len(a) == len(b) and bool(a == b)
    except RuntimeError:  # tensors that are not the same: which they have to be
        return False


def why_not_recorded(model: nn.Module) -> str | None:
    """Why its forwards cannot be recorded, or None."""
    family = family_with(model)
    if family is not None and family.uncaptured:
        return str(family.uncaptured)
    tensors = [*model.parameters(), *model.buffers()]
    devices = {x.device for x in tensors}
    if len(devices) != 1:
        return f"the model is on {', '.join(sorted(map(str, devices)))}: it must be on one device"
    if any(map(offloaded_whole, model.modules())):
        return "the model is offloaded, or has a cache of diffusers: a recorded call does neither"
    for name, module in model.named_modules():
        if module is not model and any(module.__dict__[hooks] for hooks in HOOKS):
            return f"`{name}` has hooks, which a recorded forward would not run"
    if model._compiled_call_impl is not None:
        return "the model is compiled, which calls no recorded forward"
    if not hasattr(torch.cuda, "CUDAGraph"):
        return f"torch {torch.__version__} has no CUDA graphs"
    return None
