"""Steps and learning rate of each method on the embedded base, as its development subjects chose
them: `eval/robustness_choice.py`, from `eval/results/2026-11-29-robustness`, says how.
"""

from __future__ import annotations

from typing import NamedTuple


class Chosen(NamedTuple):
    steps: int
    learning_rate: float


EMBEDDED = {
    "lora": Chosen(90, 6e-4),
    "delora": Chosen(45, 1e-2),
    "ether": Chosen(45, 6e-3),
    "ether+": Chosen(45, 6e-3),
    "dora": Chosen(90, 6e-4),
    "oft": Chosen(120, 2.4e-4),
    "hra": Chosen(45, 1.5e-3),
    "deft": Chosen(90, 6e-4),
    "norm_bounded": Chosen(45, 1e-3),
}

SCORINGS = 3  # after that of step 0
