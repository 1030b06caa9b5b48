"""The loss against its formulas written out by hand."""

from __future__ import annotations

import pytest
import torch

from dreamtune.models.diffusion import add_noise, min_snr_weight, target
from dreamtune.training.loss import slot_losses


def test_noise_and_targets() -> None:
    x, noise = torch.tensor([[[[2.0]]]]), torch.tensor([[[[-1.0]]]])
    a = torch.tensor([0.36])
    assert add_noise(x, noise, a).item() == pytest.approx(0.6 * 2 - 0.8)
    assert target(x, noise, a, "epsilon").item() == -1.0
    assert target(x, noise, a, "v_prediction").item() == pytest.approx(-0.6 - 0.8 * 2)


def test_v_prediction_recovers_the_image() -> None:
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 4, 3, 3, 3, generator=g, dtype=torch.float64)
    a = torch.tensor([0.9, 0.5, 0.1, 0.0], dtype=torch.float64)
    v, noisy = target(x, noise, a, "v_prediction"), add_noise(x, noise, a)
    r = a.view(-1, 1, 1, 1)
    assert (r.sqrt() * noisy - (1 - r).sqrt() * v - x).abs().max() < 1e-12


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr(prediction: str) -> None:
    a = torch.tensor([0.99, 0.8, 0.3, 1e-4], dtype=torch.float64)
    snr = a / (1 - a)
    expected = snr.clamp(max=5.0) / (snr if prediction == "epsilon" else snr + 1)
    assert (min_snr_weight(a, 5.0, prediction) - expected).abs().max() < 1e-12


def test_min_snr_at_zero_terminal_snr() -> None:
    zero = torch.zeros(1)
    assert min_snr_weight(zero, 5.0, "epsilon").item() == 1.0
    assert min_snr_weight(zero, 5.0, "v_prediction").item() == 0.0


def test_slot_losses_by_hand() -> None:
    g = torch.Generator().manual_seed(0)
    said, goal = torch.randn(2, 8, 4, 2, 2, generator=g)
    weight = torch.rand(8, generator=g)
    got = slot_losses(said, goal, weight, slots=2, batch=3, prior_weight=0.5)
    for slot in range(2):
        row = [weight[i] * ((said[i] - goal[i]) ** 2).mean() for i in range(4 * slot, 4 * slot + 4)]
        assert got[slot].item() == pytest.approx(
            ((sum(row[:3]) / 3) + 0.5 * row[3]).item(), rel=1e-6
        )
    assert slot_losses(said.bfloat16(), goal, None, 2, 4, 1.0).dtype == torch.float32
