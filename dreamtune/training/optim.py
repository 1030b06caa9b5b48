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


def slot_norms(flats: Sequence[Tensor]) -> Tensor:
    """(S,): the norm over all tensors (S, values) of each slot, accumulated in at least float32."""
    norms = [
        torch.linalg.vector_norm(x, dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
        for x in flats
    ]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), dim=0)


def clip_factors(norms: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)) for each slot, as torch's clip_grad_norm_ has it."""
    return (max_norm / (norms + 1e-6)).clamp_max(1.0)


class Bundle:
    """Parameters (layers, S, ...) of one rate (S, 1) and decay, and their state as (S, values)."""

    def __init__(self, params: list[Tensor], rate: Tensor, decay: float) -> None:
        self.params, self.rate, self.decay = params, rate, decay
        self.shapes = [p.movedim(SLOT_DIM, 0).shape for p in params]
        self.sizes = [p.numel() // p.shape[SLOT_DIM] for p in params]
        self.m = params[0].new_zeros(params[0].shape[SLOT_DIM], sum(self.sizes)).detach()
        self.v = torch.zeros_like(self.m)
        self.m_of, self.v_of = self.pieces(self.m), self.pieces(self.v)

    def pieces(self, flat: Tensor) -> list[Tensor]:
        """Views of (S, values), each shaped as its parameter."""
        return [
            part.unflatten(1, shape[1:]).movedim(0, SLOT_DIM)
            for part, shape in zip(flat.split(self.sizes, 1), self.shapes)
        ]

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """A new (S, values)."""
        return torch.cat([t.detach().movedim(SLOT_DIM, 0).flatten(1) for t in tensors], 1)


class SlotAdamW:
    """AdamW (arXiv 1711.05101) whose learning rate is a vector over slots.

    Parameters of one rate and decay are worked on as one tensor (S, values), gathered before and
    scattered after: a dozen kernels, however many parameters there are.

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
        by_slot = [{id(p): float(g["lr"]) for g in slot for p in g["params"]} for slot in groups]
        bundles: dict[tuple[Any, ...], list[Tensor]] = {}
        for group in first:
            for p in group["params"]:
                rates = tuple(rate[id(p)] for rate in by_slot)
                bundles.setdefault((rates, float(group["weight_decay"])), []).append(p)
        self.bundles = [
            Bundle(params, torch.tensor(rates, device=device, dtype=dtype)[:, None], decay)
            for (rates, decay), params in bundles.items()
        ]
        places = {id(p): pair for b in self.bundles for p, *pair in zip(b.params, b.m_of, b.v_of)}
        self.exp_avg = [places[id(p)][0] for p in self.params]
        self.exp_avg_sq = [places[id(p)][1] for p in self.params]
        place = {id(p): i for i, p in enumerate(self.params)}
        # a rate that equals a method's own rate joins two groups: the order is each slot's own
        self.order = [[place[id(p)] for g in slot for p in g["params"]] for slot in groups]
        self.count = torch.zeros(self.slots, device=device, dtype=dtype)
        self.schedule = torch.ones((), device=device, dtype=dtype)

    @torch.no_grad()
    def gather(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Gradients in the order of `params` -> one tensor (S, values) a bundle."""
        by_id = {id(p): g for p, g in zip(self.params, gradients, strict=True)}
        return [b.gather([by_id[id(p)] for p in b.params]) for b in self.bundles]

    @torch.no_grad()
    def step(self, flats: Sequence[Tensor], scale: Tensor, ok: Tensor) -> None:
        """One step with gradients as `gather` gives them, written over, times `scale` (S,); slots
        where `ok` (S,) is false keep parameters and state.
        """
        b1, b2 = self.betas
        go = ok[:, None]
        self.count.add_(ok)
        # a slot that never had a step would divide by 1 - 1 = 0
        correct1 = (1 - b1**self.count)[:, None].masked_fill(~go, 1.0)
        correct2 = (1 - b2**self.count)[:, None].masked_fill(~go, 1.0).sqrt()
        moved = go.to(self.count.dtype)
        for bundle, grad in zip(self.bundles, flats, strict=True):
            grad.mul_(scale[:, None]).masked_fill_(~go, 0.0)
            lr = bundle.rate * self.schedule * moved
            bundle.m.lerp_(grad, moved * (1 - b1))
            bundle.v.lerp_(grad.square_(), moved * (1 - b2))
            update = bundle.v.sqrt().div_(correct2).add_(self.eps)
            update = torch.div(bundle.m, update, out=update)
            values = bundle.gather(bundle.params)
            values.mul_(1 - lr * bundle.decay).addcmul_(update, -lr / correct1)
            torch._foreach_copy_(bundle.params, bundle.pieces(values))

    def state_dict(self, slot: int | None = None) -> dict[str, Tensor]:
        """Views of the state of all slots; of one slot as that slot alone would have them."""
        first, length = (0, self.slots) if slot is None else (slot, 1)
        state = {"count": self.count.narrow(0, first, length)}
        for i, place in enumerate(self.order[first]):
            for name, tensors in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
                state[f"{i}.{name}"] = tensors[place].narrow(SLOT_DIM, first, length)
        return state

    def load_state_dict(self, state: dict[str, Tensor], slot: int | None = None) -> None:
        """Raises ValueError if the state is of other parameters."""
        mine = self.state_dict(slot)
        if set(mine) != set(state) or any(mine[k].shape != state[k].shape for k in mine):
            raise ValueError("the optimizer state is of an adapter with other parameters.")
        for key, tensor in mine.items():
            tensor.copy_(state[key])


def learning_rate_multiplier(step: int, kind: str, warmup: int, total: int) -> float:
    """What multiplies the learning rate at 0-based `step`: linear warm-up, then constant, half a
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
