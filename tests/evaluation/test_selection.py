"""The best-checkpoint rule on histories made by hand, and its laws on random ones."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
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


def cosines(*rows, **errors):
    """Records of step, DINO, CLIP-I, CLIP-T, CLIP-T shuffled, and the photos' DINO and CLIP-I."""
    keys = ("step", "dino", "clip_i", "clip_t", "clip_t_shuffled", "dino_photos", "clip_i_photos")
    return [{**dict(zip(keys, row)), **errors} for row in rows]


# What 8 images and 5 photos give.
ERRORS = {
    "dino_se": 0.02, "dino_photos_se": 0.03, "clip_i_se": 0.012, "clip_i_photos_se": 0.01,
    "clip_t_se": 0.006, "clip_t_minus_shuffled_se": 0.004,
}  # fmt: skip
VARIED = (
    (0, 0.30, 0.78, 0.28, 0.20, 0.65, 0.79),
    (100, 0.45, 0.77, 0.28, 0.20, 0.65, 0.79),
    (200, 0.58, 0.75, 0.28, 0.20, 0.65, 0.79),
)
CLOSER_THAN_PHOTOS = (
    (0, 0.70, 0.85, 0.28, 0.20, 0.65, 0.80),
    (100, 0.69, 0.86, 0.28, 0.20, 0.65, 0.80),
    (200, 0.72, 0.84, 0.28, 0.20, 0.65, 0.80),
)


def test_a_scorer_inside_its_noise_does_not_decide():
    """CLIP-I of the base is at the photos' own level; DINO has most of its way behind it."""
    choice = choose_best(cosines(*VARIED, **ERRORS))
    assert choice.step == 200
    assert [r.subject_gained for r in choice.ratings] == pytest.approx([0, 0.15 / 0.35, 0.8])
    assert choice.reason == (
        "Step 200 gained 80% of the subject: DINO went from 0.300 to 0.580 of the photos' 0.650 "
        "(way 0.350 ± 0.036, weight 100%); CLIP-I does not count, its way from 0.780 to the "
        "photos' 0.790, 0.010 ± 0.016, is below 2 standard errors. It kept 100% ± 7% of the prompt "
        "(own minus other prompts' CLIP-T 0.080 to 0.080). Its product is 0.80, the highest of the "
        "2 checkpoints that kept at least 80% of it (next is step 100 with 0.43)."
    )


def test_without_errors_both_scorers_weigh_the_same():
    """An old history keeps its choice; what is said of it is true."""
    choice = choose_best(cosines(*VARIED))
    assert choice.step == 0
    gained = [r.subject_gained for r in choice.ratings]
    assert gained == pytest.approx([0, (0.15 / 0.35 - 0.5) / 2, (0.8 - 1.5) / 2])
    assert "None of 2 checkpoints gained on the subject" in choice.reason
    assert "came closer" not in choice.reason
    assert "The largest gain was -4%, at step 100: DINO went from 0.300 to 0.450" in choice.reason
    assert "(way 0.010, taken as 0.020, weight 50%)" in choice.reason


def test_only_the_errors_of_step_zero_weigh():
    """A history that was begun without errors, and one that lost them, keep one measure."""
    old, new = cosines(*VARIED), cosines(*VARIED, **ERRORS)
    assert choose_best([old[0], *new[1:]]).step == choose_best(old).step == 0
    assert choose_best([new[0], *old[1:]]).step == choose_best(new).step == 200
    half = [{k: v for k, v in r.items() if k != "dino_se"} for r in new]
    ratings = choose_best(half).ratings  # CLIP-I is known to be noise, DINO is all that is left
    assert [r.subject_gained for r in ratings] == pytest.approx([0, 0.15 / 0.35, 0.8])


def test_weights_are_the_squares_of_the_ways_in_errors():
    start = record(0, 0, 1, dino_se=0.03, dino_photos_se=0.04, clip_i_se=0.04)
    assert start["dino_photos"] - start["dino"] == pytest.approx(8 * 0.05)
    assert start["clip_i_photos"] - start["clip_i"] == pytest.approx(5 * 0.04)
    later = record(10, 0, 1, dino=0.5, clip_i=0.62)  # half of one way, a tenth of the other
    expected = (64 * 0.5 + 25 * 0.1) / (64 + 25)
    assert rate([start, later])[1].subject_gained == pytest.approx(expected)
    equal = rate([{**start, "clip_i_se": None}, later])[1]
    assert equal.subject_gained == pytest.approx(0.3)
    # 2 standard errors count, less does not.
    assert rate([{**start, "clip_i_se": 0.0999}, later])[1].subject_gained < 0.49
    assert rate([{**start, "clip_i_se": 0.1001}, later])[1].subject_gained == pytest.approx(0.5)


@pytest.mark.parametrize("errors", [{}, ERRORS])
def test_photos_less_alike_than_the_base_is_to_them_measure_nothing(errors):
    """Negative ways: no scorer counts, so the last step that keeps the prompt."""
    history = cosines(*CLOSER_THAN_PHOTOS, **errors)
    choice = choose_best(history)
    assert choice.step == 200
    assert [r.subject_gained for r in choice.ratings] == [None] * 3
    assert "No scorer counts. DINO does not count, the base's 0.700 is not below" in choice.reason
    assert "So the last checkpoint that kept at least 80% of the prompt is taken" in choice.reason
    history[2]["clip_t"] = 0.26
    assert choose_best(history).step == 100
    history[1]["clip_t"] = 0.262
    choice = choose_best(history)
    assert choice.step == 100 and "kept most of the prompt" in choice.reason
    assert "below the 80% asked for" in choice.reason
    for r in history[1:]:
        r["clip_t"] = 0.1
    assert choose_best(history).step == 0
    assert choose_best(history, identity_at_start=False).step == 200


@pytest.mark.parametrize("errors", [{}, ERRORS])
@pytest.mark.parametrize("photos", [None, 1.0])
def test_one_photo_and_identical_photos(errors, photos):
    """With one photo nothing is known of the photos' noise, only of the base's images."""
    if photos is None:
        errors = {k: None if "photos" in k else v for k, v in errors.items()}
    history = cosines(
        (0, 0.3, 0.7, 0.28, 0.2, photos, photos), (100, 0.9, 0.95, 0.27, 0.2, photos, photos),
        **errors,
    )  # fmt: skip
    choice = choose_best(history)
    dino, clip = 0.6 / 0.7, 0.25 / 0.3
    weights = [1.0, 1.0]
    if errors:
        spread = (0.03, 0.01) if photos else (0.0, 0.0)
        weights = [
            0.7**2 / (0.02**2 + spread[0] ** 2), 0.3**2 / (0.012**2 + spread[1] ** 2)
        ]  # fmt: skip
    expected = (weights[0] * dino + weights[1] * clip) / sum(weights)
    assert choice.step == 100
    assert choice.ratings[1].subject_gained == pytest.approx(expected)
    assert choice.ratings[1].prompt_kept == pytest.approx(0.07 / 0.08)
    assert ("of a possible 1.000" in choice.reason) == (photos is None)


@pytest.mark.parametrize("errors", [{}, ERRORS])
def test_one_prompt(errors):
    """Nothing to compare CLIP-T with: it counts as it is, with its own standard error."""
    history = cosines(
        (0, 0.3, 0.7, 0.28, None, 0.65, 0.8), (100, 0.6, 0.79, 0.24, None, 0.65, 0.8), **errors
    )
    choice = choose_best(history)
    rating = choice.ratings[1]
    assert choice.step == 100
    assert rating.prompt_kept == pytest.approx(6 / 7)
    assert "(CLIP-T 0.280 to 0.240)" in choice.reason
    if errors:
        expected = math.hypot(0.006, 6 / 7 * 0.006) / 0.28
        assert rating.prompt_error == pytest.approx(expected)
        assert "It kept 86% ± 3% of the prompt" in choice.reason


def test_a_prompt_gap_inside_its_noise_cannot_be_lost():
    """Images that ignore their prompt: their gap is noise, and no share of it means anything."""
    rows = (0, 0.3, 0.7, 0.2, 0.193, 0.65, 0.8), (100, 0.6, 0.79, 0.2, 0.202, 0.65, 0.8)
    old, new = choose_best(cosines(*rows)), choose_best(cosines(*rows, **ERRORS))
    assert old.ratings[1].prompt_kept == pytest.approx(-2 / 7) and old.step == 0
    assert new.ratings[1].prompt_kept == 1 and new.step == 100
    assert "The prompt does not count, own minus other prompts' CLIP-T is 0.007 ± 0.004" in (
        new.reason
    )


def test_the_line_is_drawn_at_the_share_and_its_error_is_said():
    start, least, less = record(0, 0, 1), record(10, 0.5, 0.8), record(20, 0.9, 0.7999)
    for r in (start, least, less):
        r["clip_t_minus_shuffled_se"] = 0.005
    choice = choose_best([start, least, less])
    assert choice.step == 10 and choice.ratings[1].kept_enough and not choice.ratings[2].kept_enough
    assert choice.ratings[1].prompt_error == pytest.approx(math.hypot(0.005, 0.004) / 0.1)
    assert "It kept 80% ± 6% of the prompt" in choice.reason
    assert "kept only 79.99% ± 6% of the prompt, less than the 80% asked for" in choice.reason


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("key", ["dino", "clip_i", "clip_t"])
def test_no_checkpoint_wins_by_a_score_that_is_no_number(key, value):
    history = [BASE, record(10, 0.9, 1.0, **{key: value}), record(20, 0.2, 1.0)]
    choice = choose_best(history)
    assert choice.step == 20
    assert not choice.ratings[1].finite and choice.ratings[1].prompt_kept == 0
    assert choose_best([{**BASE, "dino": value}, *history[1:]]).step == 20


def thousandths(low, high):
    return st.integers(low, high).map(lambda x: x / 1000)


number = thousandths(-100, 1000)
odd = st.sampled_from([math.nan, math.inf, -math.inf, 0.0])
maybe_odd = st.integers(0, 9).flatmap(lambda i: odd if i == 9 else number)
error = st.integers(0, 9).flatmap(lambda i: [thousandths(0, 60), st.none(), odd][max(i - 7, 0)])
sane = {"dino": (200, 500), "clip_i": (600, 800), "clip_t": (210, 300)}


@st.composite
def histories(draw):
    """Runs of one or more photos and prompts, sane and odd, with errors, without and with some."""
    one_photo, one_prompt, wild = (draw(st.integers(0, 3)) == 0 for _ in range(3))
    known = draw(st.sampled_from(["all", "all", "some", "none"]))
    history = []
    for i in range(draw(st.integers(1, 6))):
        r = {"step": 10 * i}
        for key, (low, high) in sane.items():
            r[key] = draw(maybe_odd if wild else thousandths(low, high))
        r["clip_t_shuffled"] = None if one_prompt else draw(thousandths(150, 220))
        for key in ERRORS:
            if known == "all" or (known == "some" and draw(st.booleans())):
                r[key] = draw(error)
        history.append(r)
    for key in ("dino", "clip_i"):
        way = draw(odd if wild and draw(st.booleans()) else thousandths(-50, 250))
        end = None if one_photo else history[0][key] + way
        for r in history:
            r[f"{key}_photos"] = end
    return history


def expected(history):
    """Weights and lengths by scorer, and by step (gained, kept, its error); straight from the rule,
    None for what cannot be told."""
    start = history[0]

    def known(r, key):
        value = r.get(f"{key}_se")
        return None if value is None or not 0 <= value < math.inf else max(value, 1e-4)

    ways, counted = {}, {}
    for key in ("dino", "clip_i"):
        end = 1.0 if start[f"{key}_photos"] is None else start[f"{key}_photos"]
        way, error = end - start[key], known(start, key)
        if error is not None:
            error = math.hypot(error, known(start, f"{key}_photos") or 0)
        ways[key] = way, error, way if error is not None else max(way, 0.02)
        if math.isfinite(way) and way > 0 and way >= 2 * (error or 0):
            counted[key] = way / error if error else None
    squares = {k: 1 if None in counted.values() else v**2 for k, v in counted.items()}
    weights = {k: v / sum(squares.values()) for k, v in squares.items()}

    def gap(r):
        one = r["clip_t_shuffled"] is None
        return (
            r["clip_t"] - (0 if one else r["clip_t_shuffled"]),
            known(r, "clip_t" if one else "clip_t_minus_shuffled"),
        )

    whole, noise = gap(start)
    prompt = math.isfinite(whole) and whole > 0.005 and whole > 2 * (noise or 0)
    shares = {}
    for r in history[1:]:
        if not all(math.isfinite(r[k]) for k in ("dino", "clip_i", "clip_t")):
            continue
        gained = None
        if weights:
            gained = sum(
                w * min((r[k] - start[k]) / ways[k][2], 1) for k, w in weights.items()
            )  # fmt: skip
        kept, own = (gap(r)[0] / whole, gap(r)[1]) if prompt else (1.0, None)
        spread = None
        if own and noise:
            spread = math.sqrt(own**2 + (kept * noise) ** 2) / whole
        shares[r["step"]] = gained, min(round(kept, 9), 1), spread
    return ways, weights, prompt, gap(start), shares


N, PERCENT = r"(-?\d+\.\d+)", r"(-?[\d.]+)%"
SCORER = (
    rf"(DINO|CLIP-I) (?:went from {N} to {N} of (a possible|the photos') {N} "
    rf"\(way {N}(?: ± {N})?(?:, taken as (0\.020))?, weight (\d+)%\)|does not count, (?:"
    rf"(it has no finite way at step 0)|the base's {N} is (not below) the photos' {N}|"
    rf"its way from {N} to the photos' {N}, {N} ± {N}, is (below 2 standard errors)))[;.]"
)
GAP = r"(own minus other prompts' )?CLIP-T"


@given(histories(), st.booleans())
@settings(max_examples=400)
def test_the_reason_says_what_the_numbers_say(history, identity):
    """Every clause is read back and held against the history; nothing is left unread."""
    choice = choose_best(history, identity_at_start=identity)
    ways, weights, prompt, (whole, noise), shares = expected(history)
    records = {r["step"]: r for r in history}
    left = choice.reason

    def said(pattern):
        nonlocal left
        if found := re.search(pattern, left):
            left = left[: found.start()] + left[found.end() :]
        return found and (found.groups() or ("",))

    def near(text, value, digits):
        assert float(text) == pytest.approx(value, abs=0.5000001 * 10**-digits)

    products = {s: g * k for s, (g, k, _) in shares.items() if g is not None}
    enough = {s for s, (_, k, _) in shares.items() if k >= 0.8}
    winners = {s for s, (g, k, _) in shares.items() if k > 0 and (g is None or g > 0)}
    spoken = choice.step

    if said("Only the base"):
        assert len(history) == 1 and said(r" \(step 0\) has been scored\.")
        assert not left
        return
    if found := said(r"No checkpoint (has finite scores|kept any of the prompt)"):
        assert not winners and (found[0] == "has finite scores") == (not shares)
    if found := said(
        r"None of (\d+) checkpoints? gained on the subject and kept any of the prompt"
    ):
        assert weights and shares and not winners and int(found[0]) == len(history) - 1
    if found := said(rf"The largest gain was {PERCENT}, at step (\d+): "):
        spoken = int(found[1])
        near(found[0], 100 * shares[spoken][0], 0)
        assert shares[spoken][0] == max(g for g, _, _ in shares.values())
    stays = said(", so step 0 stays")
    fallen = said(r"\. No file of this method holds the base, so best/ has the last step")
    assert (stays is not None) == (not winners and identity)
    assert (fallen is not None) == (not winners and not identity)
    if not winners:
        assert choice.step == (0 if identity else history[-1]["step"])

    if found := said(rf"^Step (\d+) gained {PERCENT} of the subject: "):
        assert int(found[0]) == choice.step in winners and weights
        near(found[1], 100 * shares[choice.step][0], 0)
    if said("No scorer counts. "):
        assert not weights
    titles = {"DINO": "dino", "CLIP-I": "clip_i"}
    for _ in range(2):
        if not (found := said(SCORER)):
            assert not winners and not shares and weights  # nothing to speak of
            break
        key = titles.pop(found[0]) if found[0] in titles else pytest.fail("said twice")
        way, error, span = ways[key]
        _, start, value, whose, end, length, spread, taken, weight = found[:9]
        infinite, above, not_below, level, low, high, short, noisy, below = found[9:]
        assert (start is not None) == (key in weights)
        if start is not None:
            near(start, records[0][key], 3), near(value, records[spoken][key], 3)
            near(length, way, 3), near(end, records[0][key] + way, 3)
            near(weight, 100 * weights[key], 0)
            assert (whose == "a possible") == (records[0][f"{key}_photos"] is None)
            assert (taken is not None) == (span > way)
            assert (spread is not None) == (error is not None)
            near(spread or 0, error or 0, 3)
        elif infinite:
            assert not math.isfinite(way)
        elif not_below:
            assert way <= 0
            near(above, records[0][key], 3), near(level, records[0][key] + way, 3)
        else:
            assert below and 0 < way < 2 * error
            near(low, records[0][key], 3), near(high, records[0][key] + way, 3)
            near(short, way, 3), near(noisy, error, 3)

    def kept(text, step, spread):
        near(text, 100 * shares[step][1], len(text.partition(".")[2]))
        assert (float(text) >= 80) == (step in enough)
        assert (spread is not None) == (shares[step][2] is not None)
        near(spread or 0, 100 * (shares[step][2] or 0), 0)

    if found := said(rf"It kept {PERCENT}(?: ± {PERCENT})? of the prompt \({GAP} {N} to {N}\)\."):
        assert prompt and bool(found[2]) == (records[0]["clip_t_shuffled"] is not None)
        kept(found[0], spoken, found[1])
        near(found[3], whole, 3)
        near(found[4], records[spoken]["clip_t"] - (records[spoken]["clip_t_shuffled"] or 0), 3)
    if found := said(
        rf"The prompt does not count, {GAP} (?:(has no finite value) at step 0|is {N}(?: ± {N})? "
        r"at step 0, not above (0\.005|2 standard errors))\."
    ):
        assert not prompt
        assert (found[1] is not None) == (not math.isfinite(whole))
        if found[4] == "0.005":
            assert whole <= 0.005
        elif found[4]:
            near(found[2], whole, 3), near(found[3], noise, 3)
            assert whole <= 2 * noise

    if found := said(r"So the last checkpoint that kept at least 80% of the prompt is taken: "):
        assert prompt and not weights and choice.step == max(enough & winners)
    elif said("So the last checkpoint with finite scores is taken: "):
        assert not prompt and not weights and choice.step == max(shares)
    elif said("So the checkpoint that kept most of the prompt is taken: "):
        assert not weights and not enough
        assert shares[choice.step][1] == max(k for _, k, _ in shares.values())
    if found := said(r"step (\d+)\. ?"):
        assert int(found[0]) == choice.step
    if said("That is below the 80% asked for"):
        assert choice.step in winners and not enough & winners
        if said(", but no checkpoint that gained anything kept more"):
            assert shares[choice.step][1] == max(shares[s][1] for s in winners)
        assert said(": a lower learning rate or fewer steps should do better.")

    if found := said(r"Its product is (-?\d+\.\d\d)"):
        near(found[0], products[choice.step], 2)
        assert choice.step in enough & winners
        assert products[choice.step] >= max(products[s] for s in enough)
    if found := said(r", the highest of the (\d+) checkpoints that (kept at least 80% of it|have)"):
        assert int(found[0]) == len(enough) > 1 and (found[1] != "have") == prompt
    if found := said(r"; of (\d+) checkpoints it alone (kept at least 80% of it|has)"):
        assert int(found[0]) == len(history) - 1 and enough == {choice.step}
        assert (found[1] != "has") == prompt
        if found[1] == "has":
            assert shares.keys() == {choice.step}
    if found := said(r" \(next is step (\d+) with (\d+\.\d\d)\)"):
        near(found[1], products[int(found[0])], 2)
        rest = (enough & winners) - {choice.step}
        assert int(found[0]) in rest
        assert products[int(found[0])] == max(products[s] for s in rest)
    if found := said(
        rf"\. Step (\d+) gained {PERCENT} but kept only {PERCENT}(?: ± {PERCENT})? of the prompt, "
        "less than the 80% asked for"
    ):
        step = int(found[0])
        near(found[1], 100 * shares[step][0], 0)
        kept(found[2], step, found[3])
        assert step not in enough and products[step] > products[choice.step]
    left = left.replace(" finite scores", "")
    assert not re.search(r"\w", left), left


@given(histories(), st.booleans())
@settings(max_examples=200)
def test_the_winner_of_a_growing_history(history, identity):
    """Odd values, missing errors and all: one checkpoint is enough to keep."""
    before = choose_best(history[:1], identity).index
    for n in range(1, len(history)):
        after = choose_best(history[: n + 1], identity).index
        assert after in (before, n)
        before = after
