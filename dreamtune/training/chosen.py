"""Steps and learning rate of each method on the embedded base, as its development subjects chose
them: `eval/robustness_choice.py`, from `eval/results/2026-11-29-robustness`, says how.
"""

from __future__ import annotations

from typing import NamedTuple


class Chosen(NamedTuple):
    steps: int
    learning_rate: float


EMBEDDED = {
    "lora": Chosen(120, 6e-4),
    "delora": Chosen(75, 1e-2),
    "ether": Chosen(60, 6e-3),
    "ether+": Chosen(75, 6e-3),
    "dora": Chosen(120, 6e-4),
    "oft": Chosen(180, 2.4e-4),
    "hra": Chosen(120, 3.75e-4),
    "deft": Chosen(120, 6e-4),
    "norm_bounded": Chosen(60, 1e-3),
}

SCORINGS = 3  # after that of step 0
SAMPLING_STEPS = 15
