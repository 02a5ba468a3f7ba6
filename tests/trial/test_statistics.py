import math
from contextlib import contextmanager
from fractions import Fraction
from itertools import product
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fairtrial.trial import statistics
from fairtrial.trial.statistics import (
    EXACT_UP_TO,
    Difference,
    differences,
    fewest_seeds,
    holm,
    mean_interval,
    power,
    seeds_to_decide,
    sign_flip_p,
    verdict,
)

reals = st.floats(-100, 100, allow_subnormal=False).map(lambda x: round(x, 6))
coarse = st.integers(-4, 4).map(lambda k: k / 10)  # accuracies: many ties, and sums that round


@contextmanager
def fewer_drawn():
    """What holds of a draw holds of a smaller one, sooner; nobody else is to be given it."""
    statistics._balanced_subsets.cache_clear()
    try:
        with patch.object(statistics, "DRAWN", 2**11):
            yield
    finally:
        statistics._balanced_subsets.cache_clear()


def by_brute_force(d):
    """The test from its definition, in exact arithmetic."""
    exact = [Fraction(x).limit_denominator(10**6) for x in d]
    observed = abs(sum(exact))
    patterns = [abs(sum(s * x for s, x in zip(signs, exact, strict=True))) for signs in product((1, -1), repeat=len(d))]
    return sum(value >= observed for value in patterns) / len(patterns)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.one_of(coarse, reals), min_size=1, max_size=8))
def test_the_p_value_is_that_of_all_sign_patterns_enumerated(d):
    assert sign_flip_p(d) == by_brute_force(d)


@pytest.mark.parametrize("n", [2, 6, 9])
def test_the_p_value_is_that_of_scipys_permutation_test(n):
    d = np.random.default_rng(n).normal(0.4, 1, n)
    found = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=2**n)
    assert sign_flip_p(d) == pytest.approx(found.pvalue, abs=1e-12)


def test_nothing_but_zeros_is_no_evidence():
    assert sign_flip_p([0.0] * 10) == 1.0
    assert sign_flip_p([0.0]) == 1.0
    assert mean_interval([0.0] * 10) == (0.0, 0.0)


def test_zeros_among_the_differences_neither_help_nor_hurt():
    assert sign_flip_p([1.0, 2.0, 0.0, 0.5]) == sign_flip_p([1.0, 2.0, 0.5])


def test_no_values_are_refused():
    with pytest.raises(ValueError, match="differences must hold at least one value"):
        sign_flip_p([])


@pytest.mark.parametrize("n", [EXACT_UP_TO - 1, EXACT_UP_TO])
def test_all_of_one_sign_gives_the_smallest_p_value_as_long_as_all_patterns_are_enumerated(n):
    assert sign_flip_p([1.0 + k / 7 for k in range(n)]) == 2 / 2**n


@pytest.mark.parametrize("n", [EXACT_UP_TO + 1, 24])
def test_a_draw_of_patterns_is_near_the_enumeration_and_never_gives_zero(n, monkeypatch):
    assert 0 < sign_flip_p([1.0] * n) < 1e-3
    if n > 20:
        return
    d = np.random.default_rng(1).normal(0.4, 1, n)
    drawn = sign_flip_p(d)
    monkeypatch.setattr(statistics, "EXACT_UP_TO", n)
    assert drawn == pytest.approx(sign_flip_p(d), abs=4 * math.sqrt(0.25 / 2**16))


@settings(deadline=None, max_examples=30)
@given(st.lists(coarse, min_size=19, max_size=21))
def test_drawn_patterns_give_the_same_p_value_whichever_sign_the_differences_have(d):
    with fewer_drawn():
        assert sign_flip_p(d) == sign_flip_p([-x for x in d])


@settings(deadline=None, max_examples=300)
@given(st.lists(st.one_of(coarse, reals, st.just(0.0)), min_size=1, max_size=12))
def test_the_interval_leaves_out_zero_exactly_when_the_test_rejects_it(d):
    low, high = mean_interval(d)
    assert (low > 0 or high < 0) == (sign_flip_p(d) < 0.05)


@settings(deadline=None, max_examples=40)
@given(st.integers(EXACT_UP_TO, EXACT_UP_TO + 4), st.floats(-1, 1), st.integers(0, 10**6), st.booleans())
def test_the_interval_and_the_test_also_agree_about_larger_samples(n, shift, seed, rounded):
    d = np.random.default_rng(seed).normal(shift, 1, n)
    d = np.round(d, 1) if rounded else d
    with fewer_drawn():
        low, high = mean_interval(d)
        assert (low > 0 or high < 0) == (sign_flip_p(d) < 0.05)


def test_the_interval_and_the_test_agree_at_the_very_border_of_significance():
    rng = np.random.default_rng(3)
    for n in (EXACT_UP_TO, EXACT_UP_TO + 1):
        d = rng.normal(0, 1, n)
        low, _ = mean_interval(d)
        for nudge in (-1e-6, 1e-6):
            shifted = d - low - nudge
            assert (mean_interval(shifted)[0] > 0) == (sign_flip_p(shifted) < 0.05)


@settings(deadline=None, max_examples=60)
@given(st.lists(reals, min_size=6, max_size=10), st.floats(-10, 10), st.sampled_from([0.5, 2.0, 8.0]))
def test_the_interval_moves_and_stretches_with_the_values_and_holds_their_mean(d, shift, scale):
    low, high = mean_interval(d)
    moved = mean_interval([scale * x + shift for x in d])
    assert moved == pytest.approx((scale * low + shift, scale * high + shift), abs=1e-6)
    flipped = mean_interval([-x for x in d])
    assert flipped == pytest.approx((-high, -low), abs=1e-9)
    assert low - 1e-9 <= np.mean(d) <= high + 1e-9


def test_fewer_than_six_values_bound_nothing():
    for n in range(1, 6):
        assert mean_interval(list(range(n))) == (-math.inf, math.inf)
    assert mean_interval([1.0, 2, 3, 4, 5, 6]) == (1.0, 6.0)


@pytest.mark.parametrize(
    ("draw", "centre", "continuous"),
    [
        (lambda rng, n: rng.normal(0.3, 1, n), 0.3, True),
        (lambda rng, n: rng.standard_t(2, n) - 1, -1.0, True),
        (lambda rng, n: rng.integers(-1, 2, n).astype(float), 0.0, False),
        (lambda rng, n: rng.normal(0, 1, n) * 3.0 ** np.arange(n), 0.0, True),
    ],
    ids=["normal", "t2", "discrete", "unequal variances"],
)
@pytest.mark.parametrize("n", [6, 10])
def test_the_interval_holds_the_centre_of_symmetric_data_as_often_as_it_says(draw, centre, continuous, n):
    rng, repeats = np.random.default_rng(n), 1500
    held = 0
    for _ in range(repeats):
        low, high = mean_interval(draw(rng, n))
        held += low <= centre <= high
    nominal = 1 - 2 * math.floor(0.025 * 2**n) / 2**n  # Hartigan: exact for continuous data, at least that with ties
    assert nominal >= 0.95
    assert held >= stats.binom.ppf(1e-3, repeats, nominal)
    if continuous:
        assert held <= stats.binom.ppf(1 - 1e-3, repeats, nominal)


def test_the_interval_of_a_larger_sample_holds_the_centre_as_often_as_it_says():
    rng, repeats = np.random.default_rng(0), 1000
    with fewer_drawn():
        held = sum(low <= 0 <= high for low, high in (mean_interval(rng.normal(0, 1, 20)) for _ in range(repeats)))
    assert stats.binom.ppf(1e-3, repeats, 0.95) <= held <= stats.binom.ppf(1 - 1e-3, repeats, 0.95)


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        ([0.03], [0.03]),
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # statsmodels.stats.multitest, method 'holm'
        ([0.02, 0.02, 0.02], [0.06, 0.06, 0.06]),
        ([0.9, 0.6], [1.0, 1.0]),
        ([0.04, 0.01], [0.04, 0.02]),
        ([], []),
    ],
)
def test_holm_gives_the_corrected_p_values_worked_out_by_hand(p, expected):
    assert holm(p) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_holm_keeps_the_order_and_lies_between_the_raw_and_bonferronis_values(p, random):
    corrected = holm(p)
    for raw, value in zip(p, corrected, strict=True):
        assert raw <= value <= min(1.0, raw * len(p)) + 1e-12
    order = list(range(len(p)))
    random.shuffle(order)
    assert holm([p[k] for k in order]) == pytest.approx([corrected[k] for k in order])
    assert all(corrected[a] <= corrected[b] for a in order for b in order if p[a] < p[b])


def test_differences_are_paired_by_place_and_corrected_over_all_recipes():
    baseline = [1.0, 2, 3, 4, 5, 6, 7, 8]
    up = [value + 1 + k / 10 for k, value in enumerate(baseline)]
    first, second = differences(baseline, [up, baseline])
    assert first.mean == pytest.approx(1.35)
    assert (first.p, first.p_holm) == (2 / 256, 4 / 256)
    assert (second.mean, second.p, second.p_holm) == (0.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("mean", "low", "high", "p", "sign", "expected"),
    [
        (0.3, 0.1, 0.5, 0.01, 1, "better"),
        (0.3, 0.1, 0.5, 0.01, -1, "worse"),
        (-0.3, -0.5, -0.1, 0.01, 1, "worse"),
        (-0.3, -0.5, -0.1, 0.01, -1, "better"),
        (0.001, 0.0005, 0.0015, 0.04, 1, "better"),  # significant comes before too small to matter
        (0.3, 0.1, 0.5, 0.05, 1, "undecided"),
        (0.0, -0.09, 0.09, 0.5, 1, "equivalent"),
        (0.0, -0.09, 0.09, 0.5, -1, "equivalent"),
        (0.0, -0.1, 0.09, 0.5, 1, "undecided"),
        (0.0, -0.09, 0.1, 0.5, 1, "undecided"),
        (0.0, -math.inf, math.inf, 1.0, 1, "undecided"),
    ],
)
def test_verdicts_say_what_the_corrected_p_value_and_the_interval_allow(mean, low, high, p, sign, expected):
    assert verdict(Difference(mean, low, high, 0.001, p), sign, margin=0.1) == expected


@pytest.mark.parametrize("comparisons", [1, 2, 3, 5, 20])
def test_the_fewest_seeds_are_the_first_with_which_anything_can_be_significant(comparisons):
    n = fewest_seeds(comparisons)
    assert sign_flip_p([1.0] * n) * comparisons < 0.05
    assert sign_flip_p([1.0] * (n - 1)) * comparisons >= 0.05
    assert fewest_seeds(1) == 6


@pytest.mark.parametrize(("effect", "n"), [(0.0, 10), (0.5, 10), (1.0, 10), (1.0, 16), (2.0, 8)])
def test_power_is_near_how_often_the_test_rejects_in_simulation(effect, n):
    rng, repeats = np.random.default_rng(n), 1000
    found = sum(sign_flip_p(rng.normal(effect, 1, n)) < 0.05 for _ in range(repeats))
    noise = 4 * math.sqrt(0.25 / repeats)
    assert power(effect, 1.0, n) == pytest.approx(found / repeats, abs=0.03 + noise)


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(0, 1e3), st.integers(1, 5000))
def test_power_is_a_probability_and_does_not_care_about_the_effects_sign(effect, spread, n):
    value = power(effect, spread, n)
    assert 0 <= value <= 1 + 1e-12
    assert value == power(-effect, spread, n)


def test_power_has_its_limits():
    assert power(1.0, 1.0, 5) == 0.0
    assert power(1.0, 0.0, 6) == 1.0
    assert power(0.0, 0.0, 6) == 0.0
    assert power(1e9, 1.0, 6) == 1.0
    assert power(0.0, 1.0, 20) == pytest.approx(0.05)
    assert all(power(0.5, 1.0, n) < power(0.5, 1.0, n + 1) for n in range(6, 60))


def test_more_spread_needs_more_seeds():
    d = np.random.default_rng(0).normal(0.2, 1, 10)
    needed = [seeds_to_decide(d.mean() + spread * (d - d.mean()), margin=0.01) for spread in (0.1, 0.5, 1, 2, 3)]
    assert needed == sorted(needed)
    assert needed[0] < needed[-1]


def test_more_comparisons_and_surer_decisions_need_more_seeds():
    d = np.random.default_rng(0).normal(0.4, 1, 10)
    assert seeds_to_decide(d, 0.01, 1) <= seeds_to_decide(d, 0.01, 4)
    assert seeds_to_decide(d, 0.01, chance=0.5) <= seeds_to_decide(d, 0.01, chance=0.9)


def test_seeds_to_decide_has_its_limits():
    assert seeds_to_decide([0.1, 0.1, 0.1], 0.01) == 6
    assert seeds_to_decide([0.1, 0.1, 0.1], 0.01, comparisons=3) == 7
    assert seeds_to_decide([0.1], 0.01) == 6
    assert seeds_to_decide([1.0, -1.0, 1.0, -1.0], 1e-6) is None


def test_an_undecided_comparison_always_needs_more_seeds_than_it_had():
    rng = np.random.default_rng(0)
    for _ in range(1500):
        d = rng.normal(rng.uniform(0, 1.5), 1, rng.integers(6, 9))
        comparisons = int(rng.integers(1, 4))
        p = min(1.0, comparisons * sign_flip_p(d))
        if verdict(Difference(float(d.mean()), *mean_interval(d), p, p), 1, margin=0.01) == "undecided":
            needed = seeds_to_decide(d, 0.01, comparisons)
            assert needed is None or needed > d.size


@pytest.mark.parametrize(("effect", "margin"), [(0.9, 0.01), (0.8, 0.01), (0.0, 0.9)])
def test_with_so_many_seeds_about_four_in_five_comparisons_are_decided(effect, margin):
    rng, repeats = np.random.default_rng(5), 300
    template = rng.normal(0, 1, 8)
    template = (template - template.mean()) / template.std(ddof=1) + effect
    n = seeds_to_decide(template, margin)
    assert n is not None
    assert 8 < n <= EXACT_UP_TO
    decided = 0
    for _ in range(repeats):
        d = rng.normal(effect, 1, n)
        (found,) = differences([0.0] * n, [d])
        decided += verdict(found, 1, margin) != "undecided"
    assert decided / repeats == pytest.approx(0.8, abs=0.12)
