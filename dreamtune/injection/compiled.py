"""Compiled networks: what is set for the adapters is in places before each call, where Python runs,
so that another strength or route is no other graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dreamtune.injection.bank import Bank
from dreamtune.injection.injected import InjectedAdapter
from dreamtune.injection.placing import Placing

Call = Callable[..., Any]


class Outside:
    """Around the calls of a compiled network. With gradients, and where a strength depends on the
    timestep, the graph computes the factors itself.

    Attributes:
        around: (holder, name of what it calls, what that was).
    """

    def __init__(self, bank: Bank) -> None:
        self.bank, self.model = bank, bank.model
        self.placing: Placing | None = None
        self.around: list[tuple[nn.Module, str, Call]] = []

    def follow(self, given: nn.Module) -> None:
        """given: the network as its owner has it, maybe what `torch.compile` gave."""
        if hasattr(given, "dynamo_ctx") and "_orig_mod" in given._modules:
            self._wrap(given, "forward")
        if self.model._compiled_call_impl is not None:
            self._wrap(self.model, "_compiled_call_impl")

    def remove(self) -> None:
        for holder, name, original in self.around:
            if isinstance(getattr(holder, name), Around):
                setattr(holder, name, original)
        self.around.clear()

    def _wrap(self, holder: nn.Module, name: str) -> None:
        original = getattr(holder, name)
        if not isinstance(original, Around):
            setattr(holder, name, Around(self, original))
            self.around.append((holder, name, original))

    def call(self, original: Call, args: Any, kwargs: dict[str, Any]) -> Any:
        bank, adapters = self.bank, InjectedAdapter.of(self.model)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return original(*args, **kwargs)
        with bank.lock:
            bank.before(kwargs)
            for adapter in adapters:
                adapter.before_call(args, kwargs)
            bank.spread(args, kwargs)
            if self.placing is None:
                self.placing = Placing(self.model, bank)
            elif not self.placing.is_current():
                self.placing.look()
            tables = self.placing.tables()
            if tables is None:
                out = original(*args, **kwargs)
            else:
                bank.placed = True
                try:
                    with tables.placed():
                        out = original(*args, **kwargs)
                finally:
                    bank.placed = False
            for adapter in adapters:
                again = adapter.after_call()
                out = out if again is None else again
            return out


class Around:
    """What a compiled network is called by."""

    def __init__(self, outside: Outside, original: Call) -> None:
        self.outside, self.original = outside, original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.outside.call(self.original, args, kwargs)


def follow_compiled(bank: Bank, given: nn.Module) -> None:
    """See `Outside.follow`."""
    if bank.outside is None:
        bank.outside = Outside(bank)
    outside = bank.outside
    assert isinstance(outside, Outside)
    outside.follow(given)
