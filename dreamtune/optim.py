"""AdamW, gradient clipping and schedules for parameters stacked as (layers, slots, ...).

torch's AdamW takes one learning rate a group and couples slots through clipping; here each slot has
its own rate, its own norm and its own step count, and a slot whose gradient is not finite keeps
everything as it was. No host sync, so a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SLOT_DIM = 1


def per_slot(values: Tensor, like: Tensor) -> Tensor:
    """(S,) shaped to multiply (layers, S, ...)."""
    return values.to(like.dtype).view(1, -1, *[1] * (like.ndim - 2))


def slot_norms(tensors: Sequence[Tensor]) -> Tensor:
    """(S,): the norm over all tensors of each slot, accumulated in at least float32."""
    squares = [
        t.movedim(SLOT_DIM, 0)
        .flatten(1)
        .to(torch.promote_types(t.dtype, torch.float32))
        .square()
        .sum(1)
        for t in tensors
    ]
    return torch.stack(squares).sum(0).sqrt()


def clip_factors(norms: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)) for each slot, as torch's clip_grad_norm_ has it."""
    return (max_norm / (norms + 1e-6)).clamp_max(1.0)


class SlotAdamW:
    """AdamW (arXiv 1711.05101) whose learning rate is a vector over slots.

    groups: for each slot a torch-style list of {"params", "lr", "weight_decay"} over the same
    tensors (layers, S, ...). `schedule` is a 0-dim tensor that multiplies every rate; set it before
    a step.
    """

    def __init__(
        self,
        groups: Sequence[list[dict[str, Any]]],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.betas, self.eps = betas, eps
        first = groups[0]
        self.params: list[Tensor] = [p for group in first for p in group["params"]]
        device = self.params[0].device
        dtype = torch.promote_types(self.params[0].dtype, torch.float32)
        self.slots = self.params[0].shape[SLOT_DIM]
        if len(groups) != self.slots:
            raise ValueError(
                f"`groups` must hold one list a slot ({self.slots}), got {len(groups)}."
            )
        self.rates: list[Tensor] = []
        self.decays: list[float] = []
        by_slot = [{id(p): float(g["lr"]) for g in slot for p in g["params"]} for slot in groups]
        for group in first:
            for p in group["params"]:
                rates = [rate[id(p)] for rate in by_slot]
                self.rates.append(torch.tensor(rates, device=device, dtype=dtype))
                self.decays.append(float(group["weight_decay"]))
        self.exp_avg = [torch.zeros_like(p) for p in self.params]
        self.exp_avg_sq = [torch.zeros_like(p) for p in self.params]
        self.count = torch.zeros(self.slots, device=device, dtype=dtype)
        self.schedule = torch.ones((), device=device, dtype=dtype)

    @torch.no_grad()
    def step(self, scale: Tensor, ok: Tensor) -> None:
        """One step with gradients times `scale` (S,); slots where `ok` (S,) is false keep
        parameters and state.
        """
        b1, b2 = self.betas
        self.count.add_(ok.to(self.count.dtype))
        # a slot that never had a step divides by 1 - 1 = 0 below; its result is not used
        correct1 = 1 - b1**self.count
        correct2 = (1 - b2**self.count).sqrt()
        for p, m, v, rate, decay in zip(
            self.params, self.exp_avg, self.exp_avg_sq, self.rates, self.decays, strict=True
        ):
            assert p.grad is not None
            keep = per_slot(ok, p).bool()
            grad = torch.where(keep, p.grad * per_slot(scale, p), 0.0)
            lr = rate * self.schedule
            new_m = torch.lerp(m, grad, 1 - b1)
            new_v = torch.addcmul(v * b2, grad, grad, value=1 - b2)
            denominator = new_v.sqrt() / per_slot(correct2, p) + self.eps
            new_p = (
                p * (1 - per_slot(lr * decay, p)) - per_slot(lr / correct1, p) * new_m / denominator
            )
            for old, new in ((p, new_p), (m, new_m), (v, new_v)):
                old.copy_(torch.where(keep, new, old))

    def state_dict(self) -> dict[str, Tensor]:
        state = {"count": self.count}
        for i, (m, v) in enumerate(zip(self.exp_avg, self.exp_avg_sq, strict=True)):
            state |= {f"{i}.exp_avg": m, f"{i}.exp_avg_sq": v}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError if the state is of other parameters."""
        mine = self.state_dict()
        if set(mine) != set(state) or any(mine[k].shape != state[k].shape for k in mine):
            raise ValueError("the optimizer state is of an adapter with other parameters.")
        for key, tensor in mine.items():
            tensor.copy_(state[key])


def learning_rate_factor(step: int, kind: str, warmup: int, total: int) -> float:
    """The factor of the learning rate at 0-based `step`: linear warm-up, then constant, half a
    cosine or a line.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    if kind == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * done)
    if kind == "linear":
        return 1 - done
    return 1.0
