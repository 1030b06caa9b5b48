"""Sampling by slots: each run's images are those that its slot alone gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import disturb

import dreamtune
from dreamtune.evaluation.validation import Evaluator, sample_slots
from dreamtune.models.load import load_base
from dreamtune.models.sample import Sampling


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_slots_are_sampled_as_alone(
    tiny_v_pipeline_dir: Path, tmp_path: Path, guidance: float
) -> None:
    base = load_base(str(tiny_v_pipeline_dir))
    sampling = Sampling("base", 2, guidance, 0.0, 16, 3)
    evaluators = [
        Evaluator(
            base, [f"a {noun}", f"a red {noun}"], ["", ""], [7, 8 + i], sampling=sampling,
            folder=tmp_path, scorers=None, photos=[],
        )
        for i, noun in enumerate(("dog", "cat", "fox"))
    ]  # fmt: skip
    adapter = dreamtune.inject(base.network, "lora", slots=3, rank=2)
    disturb(adapter, size=0.5)
    together = sample_slots(base, adapter, [2, 0, 1], evaluators)
    states = [adapter.state_dict(slot) for slot in range(3)]
    adapter.eject()
    single = dreamtune.inject(base.network, "lora", rank=2)
    moved = 0
    for slot, evaluator, images in zip([2, 0, 1], evaluators, together, strict=True):
        single.load_state_dict(states[slot])
        alone = evaluator.sample()
        single.scale = 0.0
        plain = evaluator.sample()
        single.scale = 1.0
        for ours, one, bare in zip(images, alone, plain, strict=True):
            a, b, c = (np.asarray(x, dtype=int) for x in (ours, one, bare))
            assert abs(a - b).max() <= 1
            moved = max(moved, abs(b - c).max())
    assert moved > 5
