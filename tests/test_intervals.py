"""Intervals: they hold the mean, narrow with rows, cover what they promise, and judge by zero."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from halfbyte.eval.intervals import (
    GAIN,
    LOSS,
    Estimate,
    evidence,
    holm,
    judge,
    mean_interval,
    p_value,
    paired_difference,
    ratio_interval,
    rows_needed,
    smallest_shown,
)

Z2 = float(stats.norm.ppf(0.975)) ** 2


def scores_of(num_rows: int, seed: int = 0) -> list[float]:
    return [float(x) for x in np.random.default_rng(seed).beta(2, 5, num_rows)]


# --- one variant ---


@pytest.mark.parametrize("n", [1, 10, 300])
def test_mean_interval_is_wilsons_at_none_and_all_right(n: int) -> None:
    none = mean_interval([0.0] * n, 0.95, 200, 0)
    every = mean_interval([1.0] * n, 0.95, 200, 0)
    assert (none.value, none.ci_low, none.n) == (0, 0, n)
    assert none.ci_high == pytest.approx(Z2 / (n + Z2))
    assert (every.value, every.ci_high, every.n) == (1, 1, n)
    assert every.ci_low == pytest.approx(n / (n + Z2))


def test_mean_interval_is_wilsons_for_scores_of_0_and_1() -> None:
    found = mean_interval([1.0] * 30 + [0.0] * 70, 0.95, 200, 0)
    middle = (0.3 + Z2 / 200) / (1 + Z2 / 100)
    half = math.sqrt(Z2) / (1 + Z2 / 100) * math.sqrt(0.3 * 0.7 / 100 + Z2 / 40_000)
    assert found.value == pytest.approx(0.3)
    assert found.ci_low == pytest.approx(middle - half)
    assert found.ci_high == pytest.approx(middle + half)


@pytest.mark.parametrize("seed", range(5))
def test_bootstrap_interval_holds_the_mean_and_narrows_with_rows(seed: int) -> None:
    widths = []
    for n in (10, 100, 1000):
        scores = scores_of(n, seed)
        found = mean_interval(scores, 0.95, 500, 0)
        assert found.value == pytest.approx(float(np.mean(scores)))
        assert found.ci_low < found.value < found.ci_high
        assert found.n == n
        widths.append(found.ci_high - found.ci_low)
    assert widths[0] > widths[1] > widths[2]
    assert widths[1] / widths[2] == pytest.approx(math.sqrt(10), rel=0.3)


def test_bootstrap_interval_leans_towards_the_long_tail() -> None:
    """BCa: about 2.4 times as far above the mean as below; the percentile method: 1.3 times."""
    scores = [0.05] * 40 + [0.9, 0.95, 0.99]
    found = mean_interval(scores, 0.95, 2000, 0)
    assert found.ci_high - found.value > 2 * (found.value - found.ci_low)


def test_bootstrap_interval_widens_with_confidence() -> None:
    narrow, wide = (mean_interval(scores_of(50), level, 1000, 0) for level in (0.8, 0.99))
    assert wide.ci_low < narrow.ci_low < narrow.ci_high < wide.ci_high


def test_intervals_are_the_same_for_the_same_seed() -> None:
    ours, theirs = scores_of(40, 1), scores_of(40, 2)
    assert mean_interval(ours, 0.95, 300, 7) == mean_interval(ours, 0.95, 300, 7)
    assert mean_interval(ours, 0.95, 300, 7) != mean_interval(ours, 0.95, 300, 8)
    one = paired_difference(ours, theirs, 0.95, 300, 7)
    assert one == paired_difference(ours, theirs, 0.95, 300, 7)
    assert one != paired_difference(ours, theirs, 0.95, 300, 8)


def test_interval_is_finite_where_bca_gives_none() -> None:
    """With one resample no share of resamples lies on one side, and BCa is not defined."""
    found = mean_interval([0.0, 0.5], 0.95, 1, 0)
    assert 0 <= found.ci_low <= found.ci_high <= 0.5


@pytest.mark.parametrize("n", [1, 10])
def test_mean_interval_of_equal_scores_stays_within_scores(n: int) -> None:
    """Wilson's lower bound of n of n is n/(n + z²)."""
    found = mean_interval([0.5] * n, 0.95, 200, 0)
    room = 0.5 * n / (n + Z2)
    assert (found.value, found.n) == (0.5, n)
    assert found.ci_low == pytest.approx(room)
    assert found.ci_high == pytest.approx(1 - room)


def test_ratio_interval_is_the_weighted_mean_with_rows_resampled() -> None:
    counts = [1, 5, 10, 2, 7] * 8
    losses = [count * value for count, value in zip(counts, scores_of(40, 3), strict=True)]
    found = ratio_interval(losses, counts, 0.95, 500, 0)
    assert found.value == pytest.approx(sum(losses) / sum(counts))
    assert found.ci_low < found.value < found.ci_high
    assert found == ratio_interval(losses, counts, 0.95, 500, 0)
    assert ratio_interval([2.0] * 9, [1] * 9, 0.95, 500, 0).ci_high == pytest.approx(2.0)


# --- two variants ---


def test_paired_difference_is_tighter_than_unpaired_on_correlated_scores() -> None:
    source = np.random.default_rng(0)
    difficulty = source.uniform(0.1, 0.9, 200)
    theirs = [float(x) for x in difficulty]
    ours = [float(x) for x in difficulty + source.normal(0.03, 0.02, 200)]
    found = paired_difference(ours, theirs, 0.95, 1000, 0)
    assert found.value == pytest.approx(float(np.mean(ours) - np.mean(theirs)))
    assert found.ci_low < found.value < found.ci_high
    separate = [mean_interval(scores, 0.95, 1000, 0) for scores in (ours, theirs)]
    unpaired = math.hypot(*(e.ci_high - e.ci_low for e in separate))
    assert found.ci_high - found.ci_low < unpaired / 5
    assert judge(found, ours, theirs, 0.95) == "gain"
    assert separate[0].ci_low < separate[1].ci_high  # the two alone would not tell


def test_paired_difference_turns_its_sign_with_its_sides() -> None:
    ours, theirs = scores_of(80, 1), scores_of(80, 2)
    one = paired_difference(ours, theirs, 0.95, 1000, 0)
    other = paired_difference(theirs, ours, 0.95, 1000, 0)
    assert one.value == pytest.approx(-other.value)
    assert one.ci_low == pytest.approx(-other.ci_high, abs=0.02)


@pytest.mark.parametrize("shift", [0.25, 0.0, -0.25])
@pytest.mark.parametrize(("n", "is_sure"), [(1, False), (2, False), (10, True)])
def test_paired_difference_of_a_constant_narrows_with_rows(
    shift: float, n: int, is_sure: bool
) -> None:
    """There is no spread to resample; Wilson's lower bound for n of n is n / (n + Z2)."""
    theirs = [row / 64 for row in range(n)]
    found = paired_difference([x + shift for x in theirs], theirs, 0.95, 200, 0)
    low, high = sorted([shift, shift * (n - Z2) / (n + Z2)])
    assert (found.value, found.n) == (shift, n)
    assert found.ci_low == pytest.approx(low)
    assert found.ci_high == pytest.approx(high)
    sure = {0.25: "gain", -0.25: "loss"}.get(shift, "no gain")
    ours = [x + shift for x in theirs]
    assert judge(found, ours, theirs, 0.95) == (sure if is_sure else "no gain")


def test_paired_difference_refuses_scores_of_different_rows() -> None:
    with pytest.raises(AssertionError):
        paired_difference([0.5, 0.6], [0.1, 0.2, 0.3], 0.95, 200, 0)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.01, 0.2, "gain"),
        (-0.2, -0.01, "loss"),
        (-0.1, 0.1, "no gain"),
        (0.0, 0.2, "no gain"),
        (-0.2, 0.0, "no gain"),
        (0.0, 0.0, "no gain"),
    ],
)
def test_judge_goes_by_whether_the_interval_leaves_out_zero(
    low: float, high: float, verdict: str
) -> None:
    assert judge(Estimate((low + high) / 2, low, high, 10), [], [], 0.95) == verdict


@pytest.mark.parametrize(
    ("wins", "losses", "verdict"),
    [(3, 0, "no gain"), (5, 0, "no gain"), (6, 0, "gain"), (0, 6, "loss"), (20, 5, "gain")],
)
def test_judge_asks_the_sign_test_where_few_rows_differ(
    wins: int, losses: int, verdict: str
) -> None:
    """Three wins of 300 rows leave out zero in a bootstrap interval, and prove nothing."""
    ours = [1.0] * wins + [0.0] * losses + [1.0] * (300 - wins - losses)
    theirs = [0.0] * wins + [1.0] * losses + [1.0] * (300 - wins - losses)
    found = paired_difference(ours, theirs, 0.95, 1000, 0)
    assert found.ci_low > 0 or found.ci_high < 0
    assert judge(found, ours, theirs, 0.95) == verdict


def test_estimate_is_written_with_its_names() -> None:
    assert Estimate(0.5, 0.4, 0.6, 10).as_json() == {
        "value": 0.5,
        "ci_low": 0.4,
        "ci_high": 0.6,
        "n": 10,
    }


# --- coverage ---


def share_covered(found: list[Estimate], truth: float) -> float:
    return float(np.mean([e.ci_low <= truth <= e.ci_high for e in found]))


def test_bootstrap_intervals_cover_the_true_mean_as_often_as_they_say() -> None:
    found = [mean_interval(scores_of(60, seed), 0.95, 400, 0) for seed in range(200)]
    assert 0.90 <= share_covered(found, 2 / 7) <= 0.985


@pytest.mark.parametrize("truth", [0.02, 0.3, 0.95])
def test_wilson_intervals_cover_the_true_share_as_often_as_they_say(truth: float) -> None:
    source = np.random.default_rng(0)
    found = [
        mean_interval([float(x) for x in source.random(60) < truth], 0.95, 200, 0)
        for _ in range(300)
    ]
    assert 0.91 <= share_covered(found, truth) <= 0.995


def test_paired_intervals_cover_the_true_difference_of_right_and_wrong_answers() -> None:
    """Differences of -1, 0 and 1, as exact_match gives them."""
    source = np.random.default_rng(0)
    found = []
    for _ in range(200):
        hard = source.random(80)
        ours, theirs = hard + source.normal(0, 0.1, 80) < 0.6, hard < 0.5
        found.append(
            paired_difference([float(x) for x in ours], [float(x) for x in theirs], 0.95, 400, 0)
        )
    truth = 0.1  # of uniform hard rows, 60 % and 50 % are right; noise of 0.1 cancels out
    assert 0.90 <= share_covered(found, truth) <= 0.985


def verdicts(skills: tuple[float, float], repetitions: int = 400, n: int = 400) -> list[str]:
    """Verdicts on two models of known skill, whose rows share a part of their hardness."""
    found = []
    for seed in range(repetitions):
        draw = np.random.default_rng(seed)
        hardness = draw.random(n)
        # On 30 % of the rows both meet the same luck, on the others each its own.
        luck = np.where(draw.random(n) < 0.3, hardness, draw.random((2, n)))
        ours, theirs = (
            (row < skill).astype(float).tolist() for row, skill in zip(luck, skills, strict=True)
        )
        difference = paired_difference(ours, theirs, 0.95, 400, seed)
        found.append(judge(difference, ours, theirs, 0.95))
    return found


def test_equal_models_are_rarely_told_apart() -> None:
    found = verdicts((0.6, 0.6))
    assert found.count(GAIN) <= 0.05 * len(found)
    assert 0 < found.count(GAIN) + found.count(LOSS) <= 0.07 * len(found)


def test_ten_points_are_found_with_400_rows() -> None:
    found = verdicts((0.6, 0.5))
    assert found.count(GAIN) >= 0.8 * len(found)
    assert found.count(LOSS) == 0


def test_rows_needed_are_those_that_find_the_difference_in_four_of_five_studies() -> None:
    draw = np.random.default_rng(1)
    ours, theirs = ((draw.random(200_000) < skill).astype(float).tolist() for skill in (0.6, 0.5))
    n = rows_needed(ours, theirs, 0.95)
    assert n is not None
    found = [judge_many((0.6, 0.5), n, seed) for seed in range(400)]
    assert 0.75 <= found.count(True) / len(found) <= 0.88
    assert rows_needed([1.0, 0.0], [1.0, 0.0], 0.95) is None


def judge_many(skills: tuple[float, float], n: int, seed: int) -> bool:
    """Whether a z-test finds ours better."""
    draw = np.random.default_rng(seed)
    ours, theirs = ((draw.random(n) < skill).astype(float) for skill in skills)
    values = ours - theirs
    return bool(abs(values.mean()) > 1.96 * values.std(ddof=1) / np.sqrt(n))


def test_the_smallest_difference_shown_is_the_one_whose_rows_these_are() -> None:
    draw = np.random.default_rng(2)
    ours, theirs = ((draw.random(500) < skill).astype(float).tolist() for skill in (0.6, 0.5))
    smallest = smallest_shown(ours, theirs, 0.95)
    needed = rows_needed(ours, theirs, 0.95)
    assert smallest is not None
    assert needed is not None
    mean = float(np.mean(ours) - np.mean(theirs))
    assert smallest * np.sqrt(500) == pytest.approx(mean * np.sqrt(needed), rel=0.01)
    assert smallest_shown([1.0, 1.0], [1.0, 1.0], 0.95) is None


def test_p_values_are_those_of_the_exact_tests() -> None:
    ours, theirs = [1.0] * 9 + [0.0] * 3, [0.0] * 8 + [1.0] * 4
    # 8 rows won, 3 lost: 2·(C(11,0) + … + C(11,3)) / 2^11
    assert p_value(ours, theirs, 1000, 0) == pytest.approx(2 * (1 + 11 + 55 + 165) / 2**11)
    assert p_value([0.5], [0.5], 1000, 0) == 1
    assert p_value([0.5, 0.0, 1.0], [0.0, 0.0, 1.0], 1000, 0) == 1  # one row alone differs
    # Four fractions, all better: 2 of the 2^4 sign patterns are as large.
    assert p_value([0.9, 0.8, 0.7, 0.6], [0.1, 0.1, 0.2, 0.1], 1000, 0) == pytest.approx(2 / 16)
    draw = np.random.default_rng(0)
    same = []
    for seed in range(200):
        ours, theirs = draw.random((2, 30)).tolist()
        same.append(p_value(ours, theirs, 400, seed))
    assert 0.01 <= np.mean(np.array(same) < 0.05) <= 0.1


def test_holm_corrects_as_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_equal_scores_beyond_one_keep_their_mean_in_the_interval() -> None:
    found = mean_interval([35.0] * 20, 0.95, 200, 0)
    assert found.ci_low < found.value == 35 == found.ci_high


SCORES = st.sampled_from([0.0, 1 / 3, 0.5, 1.0])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.integers(1, 4).flatmap(lambda n: st.lists(st.tuples(SCORES, SCORES), min_size=n, max_size=n))
)
def test_few_rows_have_an_interval_and_evidence(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = map(list, zip(*pairs, strict=True))
    for estimate in (
        mean_interval(ours, 0.95, 200, 0),
        paired_difference(ours, theirs, 0.95, 200, 0),
    ):
        assert estimate.ci_low <= estimate.value + 1e-12
        assert estimate.value <= estimate.ci_high + 1e-12
    found = evidence(ours, theirs, 0.95, 200, 0)
    assert 0 < found["p_value"] <= 1
    if sum(a != b for a, b in pairs) < 2:
        assert found["p_value"] == 1
