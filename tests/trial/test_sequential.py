"""Looking again and again: the test's exactness, its intervals, and comparisons that stop when all is decided."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import toy
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from fairtrial.contract import BadInput
from fairtrial.trial import sequential, statistics
from fairtrial.trial.comparison import compare
from fairtrial.trial.execute import Inline, Local
from fairtrial.trial.sequential import (
    LEVELS,
    LOOKS,
    crossings,
    differences,
    fewest_seeds,
    least_levels,
    looks_up_to,
    mean_interval,
    seeds_to_decide,
    sign_flip_p,
    spent,
)
from fairtrial.trial.statistics import Difference, verdict
from fairtrial.trial.store import Store

SIZES = {
    "normal": np.random.default_rng(0).normal(0, 1, 12),
    "heavy tails": np.random.default_rng(1).standard_cauchy(12),
    "ties": np.random.default_rng(2).integers(-2, 3, 12).astype(float),
    "every one twice the one before": 2.0 ** np.arange(12),
    "all alike": np.full(12, 0.1),
    "one diverged": np.array([*np.random.default_rng(3).normal(0, 0.01, 11), 0.9]),
}
DRAWS = {
    "normal": lambda rng, shape: rng.normal(0, 1, shape),
    "heavy tails": lambda rng, shape: rng.standard_t(2, shape),
    "ties": lambda rng, shape: rng.integers(-2, 3, shape).astype(float),
    "skewed runs": lambda rng, shape: rng.exponential(1, shape) - rng.exponential(1, shape),
    "one run in twenty diverged": lambda rng, shape: (
        rng.normal(0, 0.01, shape) + 0.9 * ((rng.random(shape) < 0.05) * 1.0 - (rng.random(shape) < 0.05))
    ),
}


@pytest.fixture
def small_group(monkeypatch):
    """A group of 2^9 patterns, so that 12 differences have more patterns than it does."""
    monkeypatch.setattr(sequential, "DIMENSION", 9)
    sequential._signs.cache_clear()
    yield
    sequential._signs.cache_clear()


def every_sign(sizes):
    flips = 1 - 2 * ((np.arange(2**sizes.size)[:, None] >> np.arange(sizes.size)) & 1)
    return flips * np.abs(sizes)


def ever(crossed):
    return (crossed != 0).any(axis=1).mean()


@pytest.mark.parametrize("level", [0.05, 0.05 / 3, 0.3])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_of_all_signs_that_given_sizes_may_have_no_more_cross_up_to_each_look_than_is_spent(sizes, level):
    crossed = crossings(every_sign(sizes), level)
    for place, look in enumerate(looks_up_to(12)):
        assert ever(crossed[:, : place + 1]) <= level * spent(look) + 1e-12


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.usefixtures("small_group")
def test_a_subgroup_of_the_patterns_is_as_exact(sizes):
    crossed = crossings(every_sign(sizes), 0.3)
    for place, look in enumerate(looks_up_to(12)):
        assert ever(crossed[:, : place + 1]) <= 0.3 * spent(look) + 1e-12
    assert ever(crossed) > 0.1 * spent(12)


def test_without_ties_all_that_may_be_spent_is_spent():
    crossed = crossings(every_sign(SIZES["normal"]), 0.05)
    assert 0.05 * spent(12) - ever(crossed) < 2 / 2**12 + 1e-12
    assert (crossed > 0).any(axis=1).mean() == (crossed < 0).any(axis=1).mean()


def test_the_pattern_with_all_signs_turned_is_in_the_group():
    signs = sequential._signs(0, 60, 2**sequential.DIMENSION)
    assert (signs[:, 0] == 1).all()
    assert (signs[:, -1] == -1).all()
    assert (signs.sum(axis=1) == 0).all()
    products = signs @ signs.T / signs.shape[1]
    assert np.array_equal(products, np.eye(60))  # no two signs depend on each other


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_looking_at_every_look_up_to_sixty_finds_something_false_no_more_often_than_is_spent(draw):
    series = draw(np.random.default_rng(0), (500, 60))
    crossed = (crossings(series, 0.05) != 0).any(axis=1).sum()
    assert crossed <= stats.binom.ppf(1 - 1e-3, 500, 0.05 * spent(60))


def test_the_fixed_test_would_find_something_false_far_too_often():
    series = np.random.default_rng(0).normal(0, 1, (300, 18))
    false = sum(any(statistics.sign_flip_p(d[:look]) < 0.05 for look in looks_up_to(18)) for d in series)
    assert false >= stats.binom.ppf(0.999, 300, 0.05)


def test_a_level_below_the_least_is_never_crossed():
    series = np.random.default_rng(0).normal(0.3, 1, (200, 20))
    least = least_levels(series)
    for level in (0.2, 0.05, 0.01):
        crossed = (sequential._crossings(series, level) != 0).any(axis=1)
        assert not (crossed & (least > level)).any()
        assert np.array_equal(crossings(series, level), sequential._crossings(series, level))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.one_of(st.floats(-100, 100), st.integers(-2, 2).map(float)), min_size=12, max_size=12),
    st.sampled_from([0.05, 0.2]),
)
def test_turning_all_signs_or_changing_the_unit_changes_nothing_else(values, level):
    d = np.array([values])
    assume(not (np.abs(d[d != 0]) < 1e-6).any())
    crossed = crossings(d, level)
    assert np.array_equal(crossings(-d, level), -crossed)
    assert np.array_equal(crossings(1024 * d, level), crossed)
    for look in (8, 10):
        assert np.array_equal(crossings(d[:, :look], level), crossed[:, : len(looks_up_to(look))])


def test_looks_are_numbers_that_people_type_and_the_spending_grows():
    assert LOOKS[:7] == (8, 10, 12, 14, 16, 18, 20)
    assert {10, 20, 30, 40, 50, 100, 200, 500, 1000} <= set(LOOKS)
    assert all(a < b and spent(a) < spent(b) < 1 for a, b in pairwise(LOOKS))
    assert looks_up_to(7) == []
    assert looks_up_to(11) == [8, 10]


@pytest.mark.parametrize("comparisons", [1, 2, 3, 8, 20])
def test_the_fewest_seeds_are_the_first_look_at_which_anything_can_be_significant(comparisons):
    n = fewest_seeds(comparisons)
    assert sign_flip_p([1.0 + k / 100 for k in range(n)]) * comparisons < 0.05
    for look in looks_up_to(n - 1):
        assert sign_flip_p([1.0 + k / 100 for k in range(look)]) * comparisons >= 0.05


def test_with_more_than_a_hundred_comparisons_no_look_is_enough():
    assert fewest_seeds(100) in LOOKS
    assert fewest_seeds(101) > LOOKS[-1]


def test_p_values_that_holm_asks_for_are_among_the_levels():
    assert all(any(math.isclose(0.05 / m, level) for level in LEVELS) for m in range(1, 101))
    assert list(LEVELS) == sorted(LEVELS, reverse=True)


@pytest.mark.parametrize("values", [[], [1.0], [1.0] * 7, [0.0] * 10, [1.0, -1.0] * 5])
def test_too_few_differences_and_none_at_all_give_no_evidence(values):
    assert sign_flip_p(values) == 1.0


def test_before_the_first_look_the_interval_is_open_and_between_looks_nothing_is_said():
    assert mean_interval([1.0] * 7) == (-math.inf, math.inf)
    assert mean_interval([0.3] * 8) == (0.3, 0.3)
    with pytest.raises(ValueError, match="must reach a look, that is 8 and not 9 values"):
        sign_flip_p([1.0] * 9)
    with pytest.raises(ValueError, match="must reach a look"):
        mean_interval([1.0] * 9)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_the_interval_is_the_test_turned_around(draw):
    rng = np.random.default_rng(0)
    for n in (8, 10, 12):
        for d in draw(rng, (6, n)) + rng.normal(0, 0.5, (6, 1)):
            low, high = mean_interval(d)
            width = high - low
            assert low <= d.mean() <= high
            centres = [low - 1e-3 * width, low + 1e-3 * width, high - 1e-3 * width, high + 1e-3 * width]
            if width:
                assert [int(crossings(np.array([d - c]), 0.05)[0, -1]) for c in centres] == [1, 0, 0, -1]
            p = sign_flip_p(d)
            if min(abs(low), abs(high)) > 1e-6 * width:
                assert (p < 0.05) == (not low < 0 < high)


def test_the_interval_moves_and_grows_with_the_differences():
    d = np.random.default_rng(4).normal(0, 1, 14)
    low, high = mean_interval(d)
    assert mean_interval(3 * d + 5) == pytest.approx((3 * low + 5, 3 * high + 5), abs=1e-5)
    assert mean_interval(-d) == pytest.approx((-high, -low), abs=1e-5)
    wide = mean_interval(d, 0.01)
    assert wide[0] < low < high < wide[1]


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_the_intervals_of_all_looks_together_hold_the_centre_as_often_as_they_say(draw):
    rng, repeats, outside = np.random.default_rng(1), 100, 0
    for d in draw(rng, (repeats, 12)) + 0.25:
        intervals = [mean_interval(d[:look]) for look in looks_up_to(12)]
        outside += any(not low <= 0.25 <= high for low, high in intervals)
    assert outside <= stats.binom.ppf(1 - 1e-3, repeats, 0.05 * spent(12))


@pytest.mark.parametrize("methods", [1, 3])
def test_placebos_get_any_verdict_in_no_more_than_one_case_in_twenty_however_they_stop(methods):
    rng, repeats, false = np.random.default_rng(2), 80, 0
    for _ in range(repeats):
        runs = rng.standard_t(3, (1 + methods, 12))
        last = [12] * methods
        for look in looks_up_to(12):
            others = [runs[1 + k, : min(look, last[k])].tolist() for k in range(methods)]
            said = [verdict(found, 1, margin=1e-9) for found in differences(runs[0, :look].tolist(), others)]
            last = [min(n, look) if word != "undecided" else n for n, word in zip(last, said, strict=True)]
        false += any(word in ("better", "worse") for word in said)
    assert false <= stats.binom.ppf(1 - 1e-3, repeats, 0.05)


def test_recipes_are_judged_each_at_its_own_look_and_corrected_over_all():
    rng = np.random.default_rng(0)
    baseline = rng.normal(0, 1, 14).tolist()
    up = [value + 2 + k / 100 for k, value in enumerate(baseline[:8])]
    down = [value - 1 + k / 100 for k, value in enumerate(baseline)]
    first, second = differences(baseline, [up, down])
    assert first.mean == pytest.approx(2.035)
    assert (first.p, second.p) == (sign_flip_p([2 + k / 100 for k in range(8)]), sign_flip_p(np.arange(14) / 100 - 1))
    assert [first.p_holm, second.p_holm] == statistics.holm([first.p, second.p])
    assert (first.low, first.high) == pytest.approx((2.0, 2.07), abs=1e-6)


@pytest.mark.parametrize(("effect", "margin"), [(0.6, 1e-3), (0.0, 1.2)])
def test_by_the_look_that_is_told_about_four_in_five_comparisons_are_decided(effect, margin):
    rng, repeats = np.random.default_rng(5), 100
    template = rng.normal(0, 1, 8)
    template = (template - template.mean()) / template.std(ddof=1) + effect
    n = seeds_to_decide(template.tolist(), margin)
    assert n in LOOKS
    assert 8 < n <= 40
    if effect:
        decided = (crossings(rng.normal(effect, 1, (repeats, n)), 0.05) != 0).any(axis=1).mean()
    else:
        sample = rng.normal(0, 1, (repeats, n))
        above, below = crossings(sample - margin, 0.05)[:, -1], crossings(sample + margin, 0.05)[:, -1]
        decided = ((above < 0) & (below > 0)).mean()
    assert 0.65 <= decided <= 0.98


def test_an_undecided_comparison_needs_more_seeds_than_it_had_or_more_than_there_are_looks():
    assert seeds_to_decide([0.1] * 10, 0.01) == 12
    assert seeds_to_decide([1.0, -1.0] * 5, 1e-6) is None
    d = np.random.default_rng(0).normal(0.3, 1, 10).tolist()
    needed = [seeds_to_decide(d, 0.01, comparisons) for comparisons in (1, 3, 8)]
    assert needed == sorted(needed)
    assert all(n > 10 for n in needed)


def test_differences_judged_by_the_sequence_get_verdicts_as_any_others():
    found = differences([0.0] * 8, [[0.3] * 8])[0]
    assert found == Difference(pytest.approx(0.3), 0.3, 0.3, found.p, found.p)
    assert verdict(found, 1, 0.1) == "better"
    assert verdict(found, -1, 0.1) == "worse"


def stopped(store, wanted, executor=None, seeds=30, reference="toy"):
    with executor or Inline(toy.load) as entered:
        return compare(
            toy.load,
            reference,
            {"optimizer": wanted},
            executor=entered,
            store=store,
            trials=1,
            seeds=seeds,
            until_decided=True,
            tune_once=True,
        )


MIXED = "Fixed,Fixed(gain=0.2),Fixed(gain=0.02),Broken"


def test_decided_recipes_get_no_further_seeds_and_the_others_go_on(store):
    found = stopped(store, MIXED)
    baseline, clear, small, broken = found.recipes
    assert (clear.verdict, broken.verdict) == ("better", "worse")
    assert len(clear.outcomes) == len(broken.outcomes) == 10  # 3 methods: nothing can be decided at 8
    assert len(baseline.outcomes) == len(small.outcomes) > 10
    assert broken.failed == 10
    assert list(found.evaluation_seeds) == list(range(len(baseline.outcomes)))
    assert found.decidable
    assert found.fewest_seeds == 10
    told = json.loads(json.dumps(found.as_json(), allow_nan=False))
    runs = sum(len(judged.outcomes) for judged in found.recipes)
    assert told["until_decided"] == {
        "budget": 30,
        "looks": looks_up_to(len(baseline.outcomes)),
        "runs": runs,
        "saved": 4 * 30 - runs,
    }
    for judged, others in zip(told["recipes"], found.recipes, strict=True):
        assert judged["values"] == others.values
    paired = np.array(small.values) - np.array(baseline.values)
    assert small.difference.p == sign_flip_p(paired.tolist())
    assert (small.difference.low, small.difference.high) == mean_interval(paired.tolist())


def test_stopping_depends_neither_on_the_executor_nor_on_what_is_stored(store, tmp_path):
    found = stopped(store, MIXED)
    with Store(tmp_path / "others.db") as others:
        assert stopped(others, MIXED, Local(toy.load, 2)).as_json() == found.as_json()
        with Inline(toy.load) as executor:  # more than is needed is there already
            compare(
                toy.load,
                "toy",
                {"optimizer": MIXED},
                executor=executor,
                store=others,
                trials=1,
                seeds=30,
                tune_once=True,
            )
        assert stopped(others, MIXED).as_json() == found.as_json()


def test_a_comparison_that_ended_undecided_goes_on_with_a_larger_budget(store):
    small = stopped(store, "Fixed,Fixed(gain=0.011)", seeds=11)
    assert small.recipes[1].verdict == "undecided"
    assert small.recipes[1].seeds_to_decide > 10
    assert small.until_decided.budget == 10  # the last look that 11 seeds allow
    before = store.count()
    large = stopped(store, "Fixed,Fixed(gain=0.011)", seeds=100)
    assert large.recipes[1].verdict == "better"
    assert large.recipes[1].values[:10] == small.recipes[1].values
    assert store.count() == before + 2 * (len(large.evaluation_seeds) - 10)


def test_what_is_equivalent_stops_too(store):
    found = stopped(store, "Fixed,FixedTwin", seeds=50, reference="toy margin=0.05")
    assert found.recipes[1].verdict == "equivalent"
    assert len(found.evaluation_seeds) <= 10


def test_progress_ends_with_all_runs_that_were_needed_and_no_more(store):
    told = []
    with Inline(toy.load) as executor:
        found = compare(
            toy.load,
            "toy",
            {"optimizer": "Fixed,Fixed(gain=0.3)"},
            executor=executor,
            store=store,
            trials=1,
            seeds=40,
            until_decided=True,
            tune_once=True,
            progress=lambda **counts: told.append(counts),
        )
    assert found.recipes[1].verdict == "better"
    assert told[0]["total"] == 80
    assert told[-1]["done"] == told[-1]["total"] == found.until_decided.runs == 16


@pytest.mark.parametrize("seeds", [1, 7, 1001])
def test_budgets_without_a_look_or_beyond_the_last_are_refused(store, seeds):
    with pytest.raises(BadInput, match=f"seeds must be from 8 to 1000 when a comparison is to run until .*got {seeds}"):
        stopped(store, "Fixed,FixedTwin", seeds=seeds)
    assert store.count() == 0


def test_a_budget_with_which_nothing_could_be_decided_says_so(store):
    found = stopped(store, "Fixed,FixedTwin,Twin(lr=0.1,momentum=0.5)", seeds=8)
    assert not found.decidable
    assert found.fewest_seeds == 10
