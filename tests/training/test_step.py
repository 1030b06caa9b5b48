"""A step: the same alone and stacked, a function of (seed, k), safe against NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from steps import DTYPE, cache, make, process

from dreamtune import METHODS
from dreamtune.training.step import Step, draw, mix

STEPS = 3


@pytest.mark.parametrize("method", list(METHODS))
def test_stacked_equals_alone(method: str) -> None:
    """Three slots with their own photos, seeds and rates, with prior preservation and clipping."""
    together, step = make(method, [0, 1, 2], gradient_accumulation_steps=2)
    start = [together.state_dict(s) for s in range(3)]
    for k in range(STEPS):
        step(k, 1.0)
    for slot in range(3):
        alone, single = make(method, [slot], gradient_accumulation_steps=2)
        for k in range(STEPS):
            single(k, 1.0)
        assert single.loss[0].item() == pytest.approx(step.loss[slot].item(), rel=1e-9)
        mine, ours = alone.state_dict(0), together.state_dict(slot)
        assert max((mine[n] - ours[n]).abs().max().item() for n in mine) < 1e-9
        moved = max((start[slot][n] - ours[n]).abs().max().item() for n in mine)
        assert moved > 1e-4  # equal because both trained, not because neither did


def test_a_slot_with_nan_does_not_disturb_the_others() -> None:
    clean, step = make("delora", [0, 1])
    sick, other = make("delora", [0, 1])
    with torch.no_grad():
        next(iter(sick.parameters()))[:, 1] = float("nan")
    before = sick.state_dict(1)
    for k in range(3):
        step(k, 1.0)
        other(k, 1.0)
    mine, ours = sick.state_dict(0), clean.state_dict(0)
    assert all(torch.equal(mine[n], ours[n]) for n in mine)
    after = sick.state_dict(1)
    assert all(torch.equal(before[n].nan_to_num(7), after[n].nan_to_num(7)) for n in before)
    assert other.skipped.tolist() == other.skipped_now.tolist() == [0.0, 3.0]
    assert other.mean_loss()[0] == pytest.approx(step.mean_loss()[0])


def test_draws_are_a_function_of_seed_and_step() -> None:
    def drawn(seed: int, k: int) -> Any:
        generator = torch.Generator().manual_seed(mix(seed, k))
        return draw(cache(), [[torch.arange(6)]], [generator], 4, process(1000))

    first, again, other = drawn(0, 7), drawn(0, 7), drawn(0, 8)
    assert torch.equal(first.noise, again.noise)
    assert torch.equal(first.timestep, again.timestep)
    assert not torch.equal(first.noise, other.noise)


def test_seeds_of_neighbours_have_half_their_bits_in_common() -> None:
    made = np.array([[mix(s, k) for k in range(1000)] for s in range(1000)], dtype=np.uint64)
    assert made.max() < 2**63 and len(np.unique(made)) == 10**6
    for apart in (made[1:] ^ made[:-1], made[:, 1:] ^ made[:, :-1]):
        flipped = [((apart >> np.uint64(bit)) & np.uint64(1)).mean() for bit in range(63)]
        assert max(abs(share - 0.5) for share in flipped) < 0.005
    low = made & np.uint64(2**32 - 1)  # what a CPU generator takes
    assert 10**6 - len(np.unique(low)) == pytest.approx(10**12 / 2**33, rel=0.3)
    one, same = (torch.Generator().manual_seed(n) for n in (7, 7 + 2**32))
    assert torch.equal(torch.rand(4, generator=one), torch.rand(4, generator=same))


def test_a_batch_has_different_photos_and_spread_timesteps() -> None:
    counts, quarters = torch.zeros(5), torch.zeros(4)
    for k in range(400):
        generator = torch.Generator().manual_seed(mix(0, k))
        d = draw(cache(), [[torch.arange(5)]], [generator], 4, process(1000))
        assert len(set(d.entry.tolist())) == 4
        assert sorted((d.timestep // 250).tolist()) == [0, 1, 2, 3]
        counts += torch.bincount(d.entry, minlength=5)
        quarters += torch.bincount(d.timestep[:1] // 250, minlength=4)
    assert (counts / 400 - 0.8).abs().max() < 0.06
    assert (quarters / 400 - 0.25).abs().max() < 0.08  # each row alone is uniform


def test_repeats_are_drawn_as_often_and_small_pools_wrap() -> None:
    tickets = torch.tensor([0, 0, 0, 1])
    hits = torch.zeros(2)
    for k in range(400):
        generator = torch.Generator().manual_seed(mix(0, k))
        hits += torch.bincount(
            draw(cache(), [[tickets]], [generator], 1, process(10)).entry, minlength=2
        )
    assert hits[0] / hits.sum() == pytest.approx(0.75, abs=0.06)
    hits, twice = torch.zeros(2), 0
    for k in range(400):
        generator = torch.Generator().manual_seed(mix(0, k))
        entry = draw(cache(), [[tickets]], [generator], 2, process(10)).entry
        hits, twice = hits + torch.bincount(entry, minlength=2), twice + (entry == 0).all().item()
    assert hits[0] / hits.sum() == pytest.approx(0.75, abs=0.04)
    assert twice / 400 == pytest.approx(0.5, abs=0.08)  # 3/4 * 2/3
    wrapped = draw(cache(), [[torch.tensor([3])]], [torch.Generator()], 4, process(10))
    assert wrapped.entry.tolist() == [3] * 4


def test_latents_get_their_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    assert draw(cache(False), [[torch.arange(6)]], [generator], 2, process(10)).latent_noise is None
    seen = draw(cache(), [[torch.arange(6)]], [generator], 2, process(10)).latent_noise
    assert seen is not None and 0.5 < seen.std() < 1.5


def test_loss_scale_halves_on_overflow_and_changes_nothing_else() -> None:
    plain, step = make("lora", [0], max_grad_norm=1.0)
    scaled, other = make("lora", [0], max_grad_norm=1.0, loss_scale=1024.0)
    for k in range(3):
        step(k, 1.0)
        other(k, 1.0)
    a, b = plain.state_dict(), scaled.state_dict()
    assert max((a[n] - b[n]).abs().max().item() for n in a) < 1e-12
    other.loss_scale.fill_(float("inf"))
    other(3, 1.0)
    assert other.skipped.tolist() == [1.0]


def test_loss_scale_grows_back_after_2000_good_steps() -> None:
    """Each slot's own, and as well in a run that is resumed between."""
    _, step = make("lora", [0, 1], loss_scale=1024.0)
    yes, loss = torch.tensor([True, True]), torch.zeros(2, dtype=DTYPE)
    first_fails = torch.tensor([False, True])

    def go(step: Step, steps: int, ok: torch.Tensor = yes) -> list[float]:
        for _ in range(steps):
            step.account(loss, ok)
        return step.loss_scale.tolist()

    assert go(step, 2, first_fails) == [256.0, 1024.0]
    assert go(step, 1500) == [256.0, 1024.0]
    assert go(step, 1, first_fails) == [128.0, 1024.0]  # it counts anew
    assert go(step, 1999) == [128.0, 1024.0]
    _, resumed = make("lora", [1, 0], loss_scale=1024.0)
    for slot in (0, 1):
        resumed.load_state_dict({k: v.clone() for k, v in step.state_dict(slot).items()}, 1 - slot)
    assert go(step, 1) == [256.0, 1024.0]
    assert go(resumed, 1) == [1024.0, 256.0]
    assert go(step, 3999) == [512.0, 1024.0]
    assert go(step, 1) == [1024.0, 1024.0]
    assert go(step, 2000) == [1024.0, 1024.0]  # never above the start
    assert go(step, 12, first_fails) == [1.0, 1024.0]  # nor below 1


def test_the_backward_runs_on_the_thread_of_the_forward() -> None:
    """A GPU's thread would have a workspace of its own for products."""
    _, step = make("delora", [0], gradient_accumulation_steps=2)
    predict, allowed = step.predict, []

    def seen(*given: Any) -> torch.Tensor:
        y = predict(*given)
        y.register_hook(lambda _: allowed.append(torch._C._is_multithreading_enabled()))
        return y

    step.predict = seen
    step(0, 1.0)
    assert allowed == [False, False]
    assert torch._C._is_multithreading_enabled()
