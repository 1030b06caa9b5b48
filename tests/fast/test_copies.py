"""What a training step copies: never a frozen weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from steps import make
from torch.utils._python_dispatch import TorchDispatchMode

from dreamtune import METHODS

COPIES = {"clone", "copy_", "copy", "_to_copy", "contiguous", "cat", "stack", "_reshape_copy"}
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addmm_", "baddbmm_"}


class Watch(TorchDispatchMode):
    """Counts bytes of frozen weights that are copied, and the products that read them where they
    are.
    """

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.places = {w.untyped_storage().data_ptr() for w in weights}
        self.copied, self.products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").partition(".")[0]
        given = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
        read = [x for x in given if x.untyped_storage().data_ptr() in self.places]
        if name in COPIES:
            self.copied += sum(x.nbytes for x in read)
        if name in PRODUCTS:
            self.products += len(read)
        return out


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("slots", [[0], [0, 1, 2]])
def test_a_step_copies_no_weight(method: str, slots: list[int]) -> None:
    """The joint projections' products read the stack itself, forward and backward."""
    adapter, step = make(method, slots)
    step(0, 1.0)
    step.prepare(1, 1.0)
    stacks = [group.stack for group in adapter.groups]
    with Watch([stack.weight for stack in stacks]) as watch:
        step.body()
    assert watch.copied == 0
    parts = [part for stack in stacks for part in stack.parts]
    # forward and backward; the text, and what comes before the first layers, ask for no gradient
    texts = sum(len(part.layers) == 2 for part in parts)
    assert watch.products >= 2 * len(parts) - texts - 1
    for stack in stacks:
        assert stack.stack.nbytes == stack.weight.nbytes, "no room between the weights"
        for part in stack.parts:
            flat = part.weight.flatten(0, 1)
            assert flat.data_ptr() == part.weight.data_ptr() == part.layers[0].weight.data_ptr()
