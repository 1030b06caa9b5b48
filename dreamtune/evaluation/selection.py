"""Which checkpoint is the best: the rule, the choice, and its reason in numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dreamtune.evaluation.rating import (
    MIN_ERRORS,
    MIN_PROMPT_GAP,
    MIN_PROMPT_KEPT,
    NEEDED,
    Baseline,
    Rating,
    Way,
    baseline_of,
    prompt_gap,
    rate,
)
from dreamtune.metrics import METRICS

__all__ = ["MIN_PROMPT_KEPT", "NEEDED", "RULE", "Choice", "Rating", "choose_best", "rate", "stale"]

RULE = (
    "The best checkpoint has the highest product of two shares, subject gained and prompt kept. "
    "Both are measured from step 0.",
    "Subject gained: how much of the way from the base's images to the photos' own similarity to "
    "each other is covered, at most 100%, by DINO and by CLIP-I. The surer a scorer's way is, the "
    "more it weighs: (way / standard error of the way) squared. A scorer whose way is below "
    f"{MIN_ERRORS} standard errors does not count. Without standard errors, as in older runs, both "
    "weigh the same.",
    "Prompt kept: CLIP-T with an image's own prompt minus CLIP-T with the other prompts, divided "
    "by the same at step 0, at most 100%. If at step 0 that is not above "
    f"{MIN_ERRORS} standard errors, there is no prompt following to lose and all counts as kept.",
    f"A checkpoint that keeps less than {MIN_PROMPT_KEPT:.0%} of the prompt cannot win against one "
    "that keeps more, and step 0 wins only if no checkpoint gained anything. If no scorer counts, "
    f"the last checkpoint that keeps {MIN_PROMPT_KEPT:.0%} wins. The line of {MIN_PROMPT_KEPT:.0%} "
    "is drawn through the measured share, whatever its standard error; a checkpoint near it may be "
    "on the wrong side.",
)
"""The rule in words, a paragraph each."""


@dataclass(frozen=True)
class Choice:
    """The best record of a history: its index there, its step, and why, in a few sentences.

    `ratings` has one entry a record; it is empty where nothing was scored.
    """

    index: int
    step: int
    reason: str
    ratings: Sequence[Rating] = ()


def choose_best(history: Sequence[Mapping[str, Any]], identity_at_start: bool = True) -> Choice:
    """The best record by `RULE`; of records without scores the last.

    The earlier of equals wins, so the winner of a growing history is always the previous winner or
    the newest record: it is enough to keep one checkpoint.

    Args:
        identity_at_start: of the method. Without it no file holds the base that step 0 shows, so
            where step 0 would win the last record does.

    Raises:
        ValueError: there are no records, or scored ones without step 0.
    """
    if not history:
        raise ValueError("nothing to choose from: the history is empty")
    last = len(history) - 1
    if any(history[last].get(key) is None for key in NEEDED):
        return Choice(last, history[last]["step"], "No scorers: the last step.")
    baseline, ratings = baseline_of(history), rate(history)
    zero = next(i for i, rating in enumerate(ratings) if rating.step == 0)
    best = zero
    for i, rating in enumerate(ratings):
        if rating.rank > ratings[best].rank:
            best = i
    reason = _Reason(history, ratings, baseline, best, identity_at_start).text()
    if best == zero and not identity_at_start:
        best = last
    return Choice(best, history[best]["step"], reason, ratings)


def stale(history: Sequence[Mapping[str, Any]], best_step: int, patience: int | None) -> bool:
    """Whether the best of the records has `patience` scorings after it; None never has."""
    return patience is not None and sum(r["step"] > best_step for r in history) >= patience


@dataclass(frozen=True)
class _Reason:
    """The sentences on a choice. Each says only what the numbers say."""

    history: Sequence[Mapping[str, Any]]
    ratings: Sequence[Rating]
    baseline: Baseline
    best: int
    identity_at_start: bool

    @property
    def start(self) -> Mapping[str, Any]:
        return next(record for record in self.history if record["step"] == 0)

    @property
    def trained(self) -> list[Rating]:
        return [rating for rating in self.ratings if rating.step > 0]

    def text(self) -> str:
        rating = self.ratings[self.best]
        if not self.trained:
            return "Only the base (step 0) has been scored."
        if not self.baseline.counting:
            return f"No scorer counts. {self.scorers(self.best)}. {self.last_that_kept(rating)}"
        if rating.step == 0:
            return self.none_gained()
        text = (
            f"Step {rating.step} gained {_percent(rating.subject_gained)} of the subject: "
            f"{self.scorers(self.best)}. {self.prompt(self.best)}"
        )
        if not rating.kept_enough:
            return (
                f"{text} That is below the {MIN_PROMPT_KEPT:.0%} asked for, but no checkpoint that "
                "gained anything kept more: a lower learning rate or fewer steps should do better."
            )
        return f"{text} {self.comparison(rating)}"

    @property
    def stays(self) -> str:
        if self.identity_at_start:
            return ", so step 0 stays"
        return ". No file of this method holds the base, so best/ has the last step"

    def none_gained(self) -> str:
        measured = [i for i, r in enumerate(self.ratings) if r.step and r.finite]
        if not measured:
            return f"No checkpoint has finite scores{self.stays}."
        text = (
            f"None of {_count(len(self.trained))} gained on the subject and kept any of the "
            f"prompt{self.stays}."
        )
        most = max(measured, key=lambda i: self.ratings[i].subject_gained or 0.0)
        return (
            f"{text} The largest gain was {_percent(self.ratings[most].subject_gained)}, at step "
            f"{self.ratings[most].step}: {self.scorers(most)}. {self.prompt(most)}"
        )

    def last_that_kept(self, rating: Rating) -> str:
        if rating.step == 0:
            finite = any(r.finite for r in self.trained)
            none = "kept any of the prompt" if finite else "has finite scores"
            return f"No checkpoint {none}{self.stays}."
        if not self.baseline.prompt_counts:
            return (
                f"{self.prompt(self.best)} So the last checkpoint with finite "
                f"scores is taken: step {rating.step}."
            )
        if rating.kept_enough:
            return (
                f"So the last checkpoint that kept at least {MIN_PROMPT_KEPT:.0%} of the prompt is "
                f"taken: step {rating.step}. {self.prompt(self.best)}"
            )
        return (
            f"So the checkpoint that kept most of the prompt is taken: step {rating.step}. "
            f"{self.prompt(self.best)} That is below the {MIN_PROMPT_KEPT:.0%} asked for: a lower "
            "learning rate or fewer steps should do better."
        )

    def comparison(self, rating: Rating) -> str:
        """The winner among the others."""
        product = rating.product or 0.0
        kept = [r for r in self.trained if r.kept_enough]
        least = f"kept at least {MIN_PROMPT_KEPT:.0%} of it"
        which = least if self.baseline.prompt_counts else "have finite scores"
        text = f"Its product is {product:.2f}"
        if len(kept) > 1:
            text += f", the highest of the {len(kept)} checkpoints that {which}"
        elif len(self.trained) > 1:
            which = which.replace("have", "has")
            text += f"; of {len(self.trained)} checkpoints it alone {which}"
        rest = [r for r in self.trained if r is not rating and r.finite]
        others = [r for r in rest if r.rank[0] == 2]
        if others:
            second = max(others, key=lambda r: r.rank)
            text += f" (next is step {second.step} with {second.product:.2f})"
        lost = [r for r in rest if not r.kept_enough and (r.product or 0.0) > product]
        if lost:
            worst = max(lost, key=lambda r: r.product or 0.0)
            text += (
                f". Step {worst.step} gained {_percent(worst.subject_gained)} but kept only "
                f"{_kept(worst)} of the prompt, less than the {MIN_PROMPT_KEPT:.0%} asked for"
            )
        return f"{text}."

    def scorers(self, index: int) -> str:
        """What each scorer says of that record, and how much it weighs."""
        return "; ".join(
            f"{METRICS[way.key].title} "
            + (self.went(way, index) if way.weight > 0 else f"does not count, {_why_not(way)}")
            for way in self.baseline.ways
        )

    def went(self, way: Way, index: int) -> str:
        alone = self.start.get(METRICS[way.key].comparison_key) is None
        whose = "a possible" if alone else "the photos'"
        taken = f", taken as {way.span:.3f}" if way.span > way.length else ""
        return (
            f"went from {way.start:.3f} to {self.history[index][way.key]:.3f} of {whose} "
            f"{way.end:.3f} (way {_measured(way)}{taken}, weight {way.weight:.0%})"
        )

    def prompt(self, index: int) -> str:
        title = METRICS[NEEDED[-1]].title
        gap = title if self.baseline.one_prompt else f"own minus other prompts' {title}"
        start, error = self.baseline.gap, self.baseline.gap_error
        if self.baseline.prompt_counts:
            end = prompt_gap(self.history[index])
            return (
                f"It kept {_kept(self.ratings[index])} of the prompt ({gap} {start:.3f} to "
                f"{end:.3f})."
            )
        if not math.isfinite(start):
            why = "has no finite value at step 0"
        elif start <= MIN_PROMPT_GAP:
            why = f"is {start:.4f} at step 0, not above {MIN_PROMPT_GAP}"
        else:
            why = f"is {start:.3f} ± {error:.3f} at step 0, not above {MIN_ERRORS} standard errors"
        return f"The prompt does not count, {gap} {why}."


def _why_not(way: Way) -> str:
    if not math.isfinite(way.length):
        return "it has no finite way at step 0"
    if way.length <= 0:
        return f"the base's {way.start:.3f} is not below the photos' {way.end:.3f}"
    return (
        f"its way from {way.start:.3f} to the photos' {way.end:.3f}, {_measured(way)}, is below "
        f"{MIN_ERRORS} standard errors"
    )


def _measured(way: Way) -> str:
    return f"{way.length:.3f}" + ("" if way.error is None else f" ± {way.error:.3f}")


def _count(n: int) -> str:
    return f"{n} checkpoint{'' if n == 1 else 's'}"


def _percent(share: float | None) -> str:
    return f"{share or 0.0:.0%}"


def _kept(rating: Rating) -> str:
    """Rounded, but never across the line that decides."""
    share, error = rating.prompt_kept, rating.prompt_error
    for digits in range(8):
        text = f"{share:.{digits}%}"
        if (float(text[:-1]) >= 100 * MIN_PROMPT_KEPT) == rating.kept_enough:
            break
    return text + ("" if error is None else f" ± {error:.0%}")
