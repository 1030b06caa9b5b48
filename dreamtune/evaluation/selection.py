"""Which checkpoint is the best: the rule, its reason in numbers, and every checkpoint's rating."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SUBJECT, PROMPT = ("dino", "clip_i"), "clip_t"
NEEDED = (*SUBJECT, PROMPT)
"""The metrics that the rule reads, by key, with what they are compared with."""

MIN_PROMPT_KEPT = 0.8
"""Share of the base's prompt following that a winner keeps."""

RULE = (
    "The best checkpoint has the highest product of two shares, both measured from step 0. Subject "
    "gained: how much of the way from the base's images to the photos' own similarity to each "
    "other is covered, the mean of DINO and CLIP-I, at most 100%. Prompt kept: CLIP-T with an "
    "image's own prompt minus CLIP-T with the other prompts, divided by the same at step 0, at "
    f"most 100%. A checkpoint that keeps less than {MIN_PROMPT_KEPT:.0%} of it cannot win against "
    "one that keeps more, and step 0 wins only if no checkpoint gained anything."
)

# Below these the denominators are noise of a few images: similarity and prompt gap, as cosines.
_MIN_GAP, _MIN_PROMPT_GAP = 0.02, 0.005


@dataclass(frozen=True)
class Rating:
    """`subject_gained` and `prompt_kept` as shares (1 is all of it), `product` of the two."""

    step: int
    subject_gained: float
    prompt_kept: float
    kept_enough: bool

    @property
    def product(self) -> float:
        return self.subject_gained * self.prompt_kept

    @property
    def rank(self) -> tuple[int, float]:
        """What the best checkpoint has the largest of; step 0 is (0, 0)."""
        if not self.subject_gained > 0 or not self.prompt_kept > 0:
            return (0, 0.0)
        # Among those that lost too much of the prompt, the one that lost least is the most use.
        return (2, self.product) if self.kept_enough else (1, self.prompt_kept)


@dataclass(frozen=True)
class Choice:
    """The best record of a history: its index there, its step, and why, in a sentence or two.

    `ratings` has one entry a record; it is empty where nothing was scored.
    """

    index: int
    step: int
    reason: str
    ratings: Sequence[Rating] = ()


def rate(history: Sequence[Mapping[str, Any]]) -> list[Rating]:
    """A rating for every scoring, by `RULE`.

    Args:
        history: records with step, dino, clip_i, clip_t, and where known clip_t_shuffled,
            dino_photos and clip_i_photos. Without the photos' own similarity (a single photo) the
            way goes to a cosine of 1; without shuffled prompts (a single prompt) CLIP-T counts as
            it is.

    Raises:
        ValueError: there is no record of step 0.
    """
    start = next((record for record in history if record["step"] == 0), None)
    if start is None:
        raise ValueError("the base (step 0) is not in the history; every share is measured from it")
    return [_rating(record, start) for record in history]


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
    ratings = rate(history)
    zero = next(i for i, rating in enumerate(ratings) if rating.step == 0)
    best = zero
    for i, rating in enumerate(ratings):
        if rating.rank > ratings[best].rank:
            best = i
    reason = _reason(history, ratings, best, zero)
    if best == zero != last and not identity_at_start:
        best = last
        reason += " No file of this method holds the base, so best/ has the last step."
    return Choice(best, history[best]["step"], reason, ratings)


def _rating(record: Mapping[str, Any], start: Mapping[str, Any]) -> Rating:
    gained = []
    for name in SUBJECT:
        photos = start.get(f"{name}_photos")
        way = max((1.0 if photos is None else photos) - start[name], _MIN_GAP)
        gained.append(min((record[name] - start[name]) / way, 1.0))
    subject = sum(gained) / len(gained)
    # Where the base itself does not follow prompts there is nothing to lose.
    base = prompt_gap(start)
    prompt = min(prompt_gap(record) / base, 1.0) if base > _MIN_PROMPT_GAP else 1.0
    if record is start:
        subject, prompt = 0.0, 1.0
    if not (math.isfinite(subject) and math.isfinite(prompt)):
        subject, prompt = -math.inf, 0.0
    return Rating(record["step"], subject, prompt, prompt >= MIN_PROMPT_KEPT)


def prompt_gap(record: Mapping[str, Any]) -> float:
    """CLIP-T with the own prompt minus with the others (or minus nothing, for one prompt)."""
    return record[PROMPT] - (record.get(f"{PROMPT}_shuffled") or 0.0)


def _reason(
    history: Sequence[Mapping[str, Any]], ratings: Sequence[Rating], best: int, zero: int
) -> str:
    start, won, rating = history[zero], history[best], ratings[best]
    others = len(ratings) - 1
    if best == zero:
        if not others:
            return "Only the base (step 0) has been scored."
        return (
            f"None of {others} checkpoints came closer to the photos than the base (DINO "
            f"{start['dino']:.3f}, CLIP-I {start['clip_i']:.3f} at step 0) with any prompt "
            "following left, so step 0 stays."
        )
    photos = ""
    if start.get("dino_photos") is not None:
        photos = f"; the photos among themselves {start['dino_photos']:.3f} and "
        photos += f"{start['clip_i_photos']:.3f}"
    gap = "CLIP-T" if start.get("clip_t_shuffled") is None else "own minus other prompts' CLIP-T"
    text = (
        f"Step {rating.step} gained {rating.subject_gained:.0%} of the subject (DINO "
        f"{start['dino']:.3f} to {won['dino']:.3f}, CLIP-I {start['clip_i']:.3f} to "
        f"{won['clip_i']:.3f}{photos}) and kept {rating.prompt_kept:.0%} of the prompt ({gap} "
        f"{prompt_gap(start):.3f} to {prompt_gap(won):.3f})"
    )
    if not rating.kept_enough:
        return (
            f"{text}. That is below the {MIN_PROMPT_KEPT:.0%} asked for, but no checkpoint that "
            "gained anything kept more: a lower learning rate or fewer steps should do better."
        )
    rest = [r for i, r in enumerate(ratings) if i not in (best, zero)]
    text += f": the highest product, {rating.product:.2f}, of {others} checkpoints"
    second = max((r for r in rest if r.rank[0] == 2), key=lambda r: r.product, default=None)
    if second is not None:
        text += f" (next is step {second.step} with {second.product:.2f})"
    lost = [r for r in rest if not r.kept_enough and r.product > rating.product]
    if lost:
        worst = max(lost, key=lambda r: r.product)
        text += (
            f". Step {worst.step} gained {worst.subject_gained:.0%} but kept only "
            f"{worst.prompt_kept:.0%} of the prompt, less than the {MIN_PROMPT_KEPT:.0%} asked for"
        )
    return text + "."
