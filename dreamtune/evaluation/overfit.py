"""A sign of overfitting in a run's own scores: images come nearer to single training photos while
they follow their prompts less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dreamtune.evaluation.rating import MIN_PROMPT_GAP, MIN_WAY, PROMPT
from dreamtune.metrics import METRICS
from dreamtune.metrics.table import error_key

MEMORY = "dino_nearest"


def overfitting(history: Sequence[Mapping[str, Any]]) -> str | None:
    """What the last scoring says of overfitting in a sentence, None for nothing.

    It is compared with the trained scoring before it that followed its prompts best. Both numbers
    must have moved by more than the larger of their standard errors, which are those of new prompts
    and seeds: all scorings share theirs, so their differences are surer than that.
    """
    known = [r for r in history if r.get(MEMORY) is not None and r.get(PROMPT) is not None]
    if not known or known[-1] is not history[-1]:
        return None
    *before, last = [r for r in known if r["step"] > 0] or [known[-1]]
    if not before:
        return None
    best = max(before, key=lambda r: float(r[PROMPT]))
    if not (moved(MEMORY, best, last, MIN_WAY) and moved(PROMPT, last, best, MIN_PROMPT_GAP)):
        return None
    level = METRICS[MEMORY].comparison_text(last)
    return (
        f"from step {best['step']} to {last['step']} the images came nearer to single training "
        f"photos ({METRICS[MEMORY].text(best)} to {METRICS[MEMORY].text(last)}"
        f"{f', {level}' if level else ''}) while {METRICS[PROMPT].title} fell "
        f"({METRICS[PROMPT].text(best)} to {METRICS[PROMPT].text(last)}): the adapter begins to "
        "copy its photos. Fewer steps, a lower learning rate or more photos help."
    )


def last_overfitting(history: Sequence[Mapping[str, Any]]) -> str | None:
    """The same of the last scoring that has something to say, for a run that is over."""
    ends = range(len(history), 0, -1)
    return next((text for end in ends if (text := overfitting(history[:end]))), None)


def moved(key: str, low: Mapping[str, Any], high: Mapping[str, Any], least: float) -> bool:
    """Whether `key` rose beyond noise; `least` is that where no error is known."""
    errors = [e for r in (low, high) if (e := r.get(error_key(key))) is not None]
    return float(high[key]) - float(low[key]) > (max(errors) if errors else least)
