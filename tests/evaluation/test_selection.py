"""The best-checkpoint rule on histories made by hand, and its laws on random ones."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamtune.evaluation.selection import MIN_PROMPT_KEPT, choose_best, rate


def record(step, subject, prompt, **other):
    """Subject and prompt as shares: photos are .4 DINO and .2 CLIP-I above the base, and the base
    has a prompt gap of .1."""
    return {
        "step": step, "dino": 0.3 + 0.4 * subject, "clip_i": 0.6 + 0.2 * subject,
        "clip_t": 0.2 + 0.1 * prompt, "clip_t_shuffled": 0.2, "dino_photos": 0.7,
        "clip_i_photos": 0.8, **other,
    }  # fmt: skip


BASE = record(0, 0.0, 1.0)


def test_shares_are_what_they_say():
    rating = rate([BASE, record(10, 0.5, 0.9)])[1]
    assert rating.subject_gained == pytest.approx(0.5)
    assert rating.prompt_kept == pytest.approx(0.9)
    assert rating.product == pytest.approx(0.45)


def test_product_weighs_subject_against_prompt():
    assert choose_best([BASE, record(10, 0.4, 1.0), record(20, 0.5, 0.85)]).index == 2
    assert choose_best([BASE, record(10, 0.4, 1.0), record(20, 0.45, 0.85)]).index == 1


def test_a_checkpoint_that_lost_the_prompt_cannot_win():
    choice = choose_best([BASE, record(10, 0.3, 0.95), record(20, 0.9, 0.7)])
    assert (choice.index, choice.step) == (1, 10)
    assert "Step 20 gained 90% but kept only 70%" in choice.reason


def test_nothing_is_gained_above_the_photos_or_the_base_prompt():
    """Beyond the photos' own similarity there are only copies, which earn nothing."""
    ratings = rate([BASE, record(10, 1.0, 1.0), record(20, 1.5, 1.4)])
    assert ratings[1].product == pytest.approx(ratings[2].product)
    assert choose_best([BASE, record(10, 1.0, 1.0), record(20, 1.5, 1.4)]).index == 1


def test_step_zero_wins_only_if_nothing_gained():
    assert choose_best([BASE]).index == 0
    choice = choose_best([BASE, record(10, -0.1, 1.0), record(20, -0.3, 1.0)])
    assert (choice.index, choice.step) == (0, 0)
    assert "None of 2 checkpoints" in choice.reason
    assert choose_best([BASE, record(10, 0.01, 0.9)]).index == 1


def test_a_method_that_starts_elsewhere_has_no_file_of_step_zero():
    worse = [BASE, record(10, -0.1, 1.0), record(20, -0.3, 1.0)]
    choice = choose_best(worse, identity_at_start=False)
    assert (choice.index, choice.step) == (2, 20)
    assert "so best/ has the last step" in choice.reason
    gained = [*worse, record(30, 0.2, 0.9), record(40, 0.1, 0.9)]
    assert choose_best(gained, identity_at_start=False) == choose_best(gained)
    assert choose_best([BASE], identity_at_start=False).step == 0


def test_without_scores_the_last_step_stays():
    choice = choose_best([{"step": 0}, {"step": 7}])
    assert (choice.index, choice.step, list(choice.ratings)) == (1, 7, [])
    assert choice.reason == "No scorers: the last step."
    with pytest.raises(ValueError, match="the history is empty"):
        choose_best([])


def test_if_all_lost_the_prompt_the_one_that_lost_least_wins():
    choice = choose_best([BASE, record(10, 0.5, 0.7), record(20, 0.9, 0.5)])
    assert choice.index == 1
    assert "below the 80% asked for" in choice.reason


def test_reason_carries_the_numbers():
    reason = choose_best([BASE, record(10, 0.5, 0.9), record(20, 0.6, 0.85)]).reason
    for part in ("Step 20", "60%", "85%", "0.300 to 0.540", "0.700", "0.100 to 0.085", "step 10"):
        assert part in reason


def test_diverged_scores_never_win():
    bad = record(10, math.nan, 1.0)
    assert choose_best([BASE, bad]).index == 0
    assert choose_best([BASE, bad, record(20, 0.2, 1.0)]).index == 2


def test_a_single_photo_or_prompt_still_has_a_best():
    bare = [{k: v for k, v in r.items() if "photos" not in k} for r in (BASE, record(10, 0.5, 0.9))]
    for entry in bare:
        entry["clip_t_shuffled"] = None
    assert choose_best(bare).index == 1
    assert rate(bare)[1].subject_gained == pytest.approx((0.2 / 0.7 + 0.1 / 0.4) / 2)


def test_a_base_that_ignores_prompts_has_nothing_to_lose():
    flat = [record(0, 0, 0), record(10, 0.5, -0.3)]
    assert rate(flat)[1].prompt_kept == 1
    assert choose_best(flat).index == 1


def test_without_step_zero_there_is_no_measure():
    with pytest.raises(ValueError, match="step 0"):
        choose_best([record(10, 0.5, 0.9)])


share = st.floats(-0.5, 1.5).map(lambda x: round(x, 3))


@given(st.lists(st.tuples(share, share), max_size=8))
def test_laws(shares):
    history = [BASE] + [record(10 * (i + 1), *pair) for i, pair in enumerate(shares)]
    choice = choose_best(history)
    best, ratings = choice.index, choice.ratings
    assert ratings == rate(history)
    assert choice.reason.endswith(".")
    # Keeping one checkpoint is enough: a record either takes over or never changes the winner.
    for n in range(1, len(history)):
        before, after = choose_best(history[:n]).index, choose_best(history[: n + 1]).index
        assert after in (before, n)
    good = [r for r in ratings[1:] if r.subject_gained > 0 and r.prompt_kept >= MIN_PROMPT_KEPT]
    if good:
        assert ratings[best].product == max(r.product for r in good)
        assert ratings[best].prompt_kept >= MIN_PROMPT_KEPT
