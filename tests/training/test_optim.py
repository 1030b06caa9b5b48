"""SlotAdamW against torch's, clipping against torch's, schedules."""

from __future__ import annotations

import math

import pytest
import torch

from dreamtune.training.optim import SlotAdamW, clip_factors, learning_rate_multiplier, slot_norms


def stacked(slots: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((3, slots, 4, 5), (2, slots, 6), (3, slots, 1))
    return [torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in shapes]


def groups(params: list[torch.Tensor], rate: float) -> list[dict[str, object]]:
    own = {"params": params[2:], "lr": 1e-3, "weight_decay": 0.0}
    return [{"params": params[:2], "lr": rate, "weight_decay": 0.1}, own]


@pytest.mark.parametrize("rates", [[1e-2], [1e-2, 3e-3, 1e-3]])
def test_equals_torch_adamw_slot_by_slot(rates: list[float]) -> None:
    """Clipping, decay, own rates, a schedule: each slot as torch.optim.AdamW has it alone."""
    params = stacked(len(rates))
    ours = SlotAdamW([groups(params, r) for r in rates], (0.8, 0.95), 1e-6)
    alone = [[p.detach()[:, s].clone().requires_grad_() for p in params] for s in range(len(rates))]
    theirs = [
        torch.optim.AdamW(groups(a, r), betas=(0.8, 0.95), eps=1e-6) for a, r in zip(alone, rates)
    ]
    peaks = [[g["lr"] for g in o.param_groups] for o in theirs]
    generator = torch.Generator().manual_seed(1)
    for k in range(12):
        factor = learning_rate_multiplier(k, "cosine", 3, 12)
        grads = [
            torch.randn(p.shape, generator=generator, dtype=p.dtype) * 10 ** (k % 3 - 1)
            for p in params
        ]
        norms = slot_norms(ours.gather(grads))
        for s, (copies, optimizer) in enumerate(zip(alone, theirs)):
            for mine, grad in zip(copies, grads):
                mine.grad = grad[:, s].clone()
            norm = torch.nn.utils.clip_grad_norm_(copies, 1.0)
            assert norms[s].item() == pytest.approx(norm.item(), rel=1e-12)
            for group, peak in zip(optimizer.param_groups, peaks[s]):
                group["lr"] = peak * factor
            optimizer.step()
        ours.schedule.fill_(factor)
        ours.step(ours.gather(grads), clip_factors(norms, 1.0), torch.isfinite(norms))
        for s, copies in enumerate(alone):
            for mine, p in zip(copies, params):
                assert (p.detach()[:, s] - mine).abs().max().item() < 1e-13


def test_clipping_leaves_small_gradients() -> None:
    assert clip_factors(torch.tensor([0.5, 2.0]), 1.0).tolist() == pytest.approx(
        [1.0, 0.5], rel=1e-5
    )


def test_a_bad_slot_keeps_parameters_and_state_and_others_go_on() -> None:
    params = stacked(2)
    optimizer = SlotAdamW([groups(params, 1e-2)] * 2)
    before = [p.detach().clone() for p in params]
    grads = [torch.ones_like(p) for p in params]
    for grad in grads:
        grad[:, 0] = float("nan")
    norms = slot_norms(optimizer.gather(grads))
    optimizer.step(optimizer.gather(grads), clip_factors(norms, 1.0), norms.isfinite())
    for p, old, m in zip(params, before, optimizer.exp_avg):
        assert torch.equal(p.detach()[:, 0], old[:, 0])
        assert not m[:, 0].any()
        assert not torch.equal(p.detach()[:, 1], old[:, 1])
    assert optimizer.count.tolist() == [0.0, 1.0]


def test_state_round_trip_and_refusal() -> None:
    params = stacked(1, torch.float32)
    optimizer = SlotAdamW([groups(params, 1e-2)])
    grads = [torch.randn_like(p) for p in params]
    optimizer.step(optimizer.gather(grads), torch.ones(1), torch.ones(1, dtype=torch.bool))
    other = SlotAdamW([groups(stacked(1, torch.float32), 1e-2)])
    other.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.exp_avg_sq, optimizer.exp_avg_sq))
    with pytest.raises(ValueError, match="other parameters"):
        other.load_state_dict({"count": torch.ones(1)})
    with pytest.raises(ValueError, match=r"one list a slot \(2\), got 1"):
        SlotAdamW([groups(stacked(2), 1e-2)])


def test_schedules() -> None:
    assert [learning_rate_multiplier(k, "constant", 3, 9) for k in (0, 2, 3, 8)] == [
        0.25,
        0.75,
        1,
        1,
    ]
    assert learning_rate_multiplier(5, "cosine", 0, 10) == pytest.approx(0.5)
    assert learning_rate_multiplier(9, "cosine", 0, 10) == pytest.approx(
        0.5 + 0.5 * math.cos(0.9 * math.pi)
    )
    assert learning_rate_multiplier(5, "linear", 0, 10) == pytest.approx(0.5)
