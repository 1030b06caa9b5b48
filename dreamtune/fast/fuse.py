"""Gives the blocks of a frozen network a forward of fewer kernels, for as long as it is wanted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dreamtune.fast import transformer, unet


class Fused:
    """What `fuse` did, counted; `undo` takes it back."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.left: list[str] = []  # blocks that run as diffusers wrote them

    def patch(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        module.forward = forward
        self.modules.append(module)

    def undo(self) -> None:
        for module in self.modules:
            module.__dict__.pop("forward", None)
        self.modules = []


def fuse(network: nn.Module) -> Fused:
    """Patches the forward of the blocks it knows, for as long as weights stay where they are.

    The convolutions' weights become channels-last. Weights get no gradient through fused blocks:
    call it on a frozen model. Raises ValueError for one that is not.
    """
    if any(p.requires_grad for p in network.parameters()):
        raise ValueError("the network must be frozen: fused blocks give its weights no gradient")
    network.to(memory_format=torch.channels_last)
    return _patch(network)


@contextmanager
def patched(network: nn.Module) -> Iterator[Fused]:
    """The same inside the block, for calls without gradients of a model that is channels-last."""
    done = _patch(network)
    try:
        yield done
    finally:
        done.undo()


def _patch(network: nn.Module) -> Fused:
    done, shared = Fused(), unet.SiLU()
    for name, module in network.named_modules():
        plan = unet.plan(module, shared) or transformer.plan(module)
        if plan is None:
            continue
        known, forward = plan
        if known and "forward" not in module.__dict__:
            done.patch(module, forward)
        else:
            done.left.append(name)
    norm = getattr(network, "conv_norm_out", None)
    if unet.knows_norm(norm):
        done.patch(norm, lambda x: unet.apply_norm(norm, x)[0])  # type: ignore[arg-type]
    return done


def compile_blocks(unet: nn.Module) -> int:
    """torch.compile for each transformer block, by what the model's class says of itself: blocks of
    one shape share what was compiled. Returns how many there are.

    A block's kernels are kept on disk, for the next process.
    """
    names = getattr(unet, "_repeated_blocks", None) or getattr(unet, "_no_split_modules", None)
    blocks = [m for m in unet.modules() if type(m).__name__ in (names or ())]
    if not blocks:
        return 0
    folder = Path(torch.hub.get_dir()).parent / "inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    from torch._dynamo import config

    config.recompile_limit = max(64, config.recompile_limit)  # one for each width and picture size
    for module in blocks:
        module.__dict__.pop("forward", None)
        module.compile(dynamic=False)
    return len(blocks)
