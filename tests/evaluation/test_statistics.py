"""Intervals: against closed forms, and how often they cover the truth on synthetic data."""

from __future__ import annotations

import numpy as np
import pytest

from dreamtune.evaluation.statistics import Estimate, estimate, student_cdf, student_t, weights
from dreamtune.metrics import METRICS


def drawn(random, subjects, images, between=1.0, within=1.0):
    """(values, subjects, prompts) whose subjects have effects of their own; the true mean is 0."""
    labels = np.repeat(np.arange(subjects), images)
    effects = random.normal(0, between, subjects)[labels]
    values = effects + random.normal(0, within, len(labels))
    return values, labels.tolist(), np.tile(np.arange(images), subjects).tolist()


def covers(e: Estimate) -> bool:
    assert e.low is not None and e.high is not None
    return e.low <= 0 <= e.high


def test_student_t_is_that_of_the_tables():
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 29: 2.0452, 200: 1.9719}
    for degrees, expected in table.items():
        assert student_t(degrees) == pytest.approx(expected, abs=1e-4)
    assert student_cdf(0.0, 5) == 0


@pytest.mark.parametrize(("subjects", "images"), [(24, 5), (5, 5)])
def test_intervals_cover_the_truth(subjects, images):
    random = np.random.default_rng(1)
    runs = [drawn(random, subjects, images) for _ in range(400)]
    clustered = np.mean([covers(estimate(*run, replicates=500)) for run in runs])
    assert 0.925 <= clustered <= 0.98
    # the fault that is avoided: images taken as independent
    every = [estimate(v, range(len(v)), p, replicates=200) for v, _, p in runs[:100]]
    assert np.mean([covers(e) for e in every]) < 0.85


def test_differences_of_pairs_are_surer_than_those_of_means():
    """Methods share subjects: what a subject adds to both cancels."""
    random = np.random.default_rng(2)
    a, subjects, prompts = drawn(random, 30, 20, within=0.1)
    b = a + 0.05 + random.normal(0, 0.05, len(a))
    single, paired = estimate(a, subjects, prompts), estimate(b - a, subjects, prompts)
    assert paired.excludes_zero and not single.excludes_zero
    assert paired.high - paired.low < 0.1 * (single.high - single.low)
    assert (paired.n, paired.clusters, paired.unit) == (600, 30, "subjects")


def test_micro_and_macro_means_by_hand():
    """Two images of a subject with 4 photos, one of a subject with 5."""
    subjects, values, photos = ["dog", "dog", "backpack_dog"], [0.2, 0.4, 0.9], [4, 4, 5]
    expected = {
        "pairs": (4 * 0.2 + 4 * 0.4 + 5 * 0.9) / 13,
        "images": (0.2 + 0.4 + 0.9) / 3,
        "subjects": (0.3 + 0.9) / 2,
    }
    for averaging, mean in expected.items():
        found = estimate(values, subjects, ["p"] * 3, weights(averaging, subjects, photos))
        assert found.mean == pytest.approx(mean, abs=1e-12)
        assert found.low <= mean <= found.high


def test_what_is_drawn_without_several_subjects():
    values = [0.1, 0.2, 0.4, 0.5]
    by_prompt = estimate(values, ["dog"] * 4, ["snow", "snow", "beach", "beach"])
    assert (by_prompt.clusters, by_prompt.unit) == (2, "prompts")
    by_image = estimate(values, ["dog"] * 4, ["snow"] * 4)
    assert (by_image.clusters, by_image.unit) == (4, "images")
    alone = estimate([0.3], ["dog"], ["snow"])
    assert (alone.mean, alone.low, alone.high) == (0.3, None, None)
    assert not alone.excludes_zero


def test_values_that_share_pairs_have_no_interval_within_one_prompt():
    """Diversity of two images is one number, twice."""
    values, one, two = [0.4, 0.4, 0.5, 0.5], ["a"] * 4, ["a", "a", "b", "b"]
    alone = estimate(values, ["dog"] * 4, one, tied=True)
    assert (alone.low, alone.high, alone.clusters) == (None, None, 1) and not alone.excludes_zero
    assert estimate(values, ["dog"] * 4, one).low is not None
    assert estimate(values, ["dog"] * 4, two, tied=True).unit == "prompts"
    tied = {key for key, metric in METRICS.items() if metric.tied}
    assert tied == {key for key in METRICS if key.endswith("_diversity")} and len(tied) > 3


def test_order_and_names_change_nothing():
    random = np.random.default_rng(3)
    values, subjects, prompts = drawn(random, 6, 5)
    first = estimate(values, subjects, prompts)
    named = estimate(values, [f"s{9 - s}" for s in subjects], prompts)
    assert first == named
    order = np.argsort(random.random(len(values)))
    mixed = estimate(values[order], [subjects[i] for i in order], [prompts[i] for i in order])
    assert mixed.mean == pytest.approx(first.mean, abs=1e-12)
    # other draws, the same distribution
    assert mixed.low == pytest.approx(first.low, abs=0.05 * (first.high - first.low))


@pytest.mark.parametrize(
    ("values", "message"), [([], "at least 1"), ([0.1, float("nan")], "1 of 2 values are not")]
)
def test_refusals(values, message):
    with pytest.raises(ValueError, match=message):
        estimate(values, ["a"] * len(values), ["p"] * len(values))
