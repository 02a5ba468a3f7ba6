"""Calibration: the same tests as the bench's, drawn by the thousand; and what would be noticed if they were wrong."""

import json
from dataclasses import replace

import numpy as np
import pytest
import toy
from scipy import stats

from fairtrial.contract import BadInput, Choice, Metric
from fairtrial.trial import calibration, sequential, statistics
from fairtrial.trial.calibration import (
    BUDGETS,
    COMPARISONS,
    EFFECTS,
    METHODS,
    RUNS,
    SEEDS,
    calibrate,
    calibration_of,
    shapes,
)
from fairtrial.trial.execute import Inline
from fairtrial.trial.figures import AS_MEASURED, Coverage, Detection, FalseVerdicts, Pool, Saving, Share

METRIC = Metric("score", "maximize", "fraction", margin=0.005, worst=0.0)
POOL = np.round(0.9 + 0.02 * np.random.default_rng(0).normal(size=400), 3)
FEW = 120


def pool_of(values):
    return Pool("toy", 3, METRIC, 0, 2_000_000, np.asarray(values).tolist(), 0, 12.0)


@pytest.fixture(scope="module")
def found():
    return calibration_of(pool_of(POOL), 2 * FEW)


def test_the_batched_p_values_are_those_of_the_test_in_use():
    rng = np.random.default_rng(0)
    for n in (*SEEDS, 24):
        series = rng.normal(0.4, 1, (2, 5, n))
        series[0] = np.round(series[0])
        expected = [[statistics.sign_flip_p(d) for d in part] for part in series]
        assert calibration._p_values(series) == pytest.approx(np.array(expected), abs=0)


@pytest.mark.parametrize("n", SEEDS)
def test_the_interval_in_use_holds_zero_just_where_the_test_does_not_reject_it(n):
    series = np.random.default_rng(n).standard_t(2, (60, n)) + 0.7
    inside = [low <= 0 <= high for low, high in (statistics.mean_interval(d) for d in series)]
    assert inside == (calibration._p_values(series) >= 0.05).tolist()
    assert 0 < sum(inside) < 60


def test_a_false_verdict_of_the_sequence_is_one_of_the_procedure_in_use():
    """The calibration looks at boundaries; a comparison goes through p-values and Holm, look by look."""
    rng, agree = np.random.default_rng(1), 0
    for _ in range(30):
        placebos = rng.normal(rng.choice([0, 0.7]), 1, (3, 12))
        crossed = (sequential.crossings(placebos, 0.05 / 3) != 0).any(axis=0)
        for place, look in enumerate(sequential.looks_up_to(12)):
            judged = sequential.differences([0.0] * look, placebos[:, :look].tolist())
            assert any(d.p_holm < 0.05 for d in judged) == crossed[place]
            agree += crossed[place]
    assert agree > 5


def test_a_share_has_the_interval_of_clopper_and_pearson():
    for count, of in [(0, 20), (3, 20), (20, 20), (100, 2000)]:
        share, expected = Share(count, of), stats.binomtest(count, of).proportion_ci(0.95, "exact")
        assert (share.low, share.high) == pytest.approx((expected.low, expected.high))
        told = {"count": count, "of": of, "rate": count / of, "low": share.low, "high": share.high}
        assert share.as_json() == pytest.approx(told, abs=1e-5)


def test_a_share_is_told_in_per_cent():
    assert str(Share(98, 2000)) == "4.9 % [4.0, 5.9]"


def test_the_defaults_are_no_smaller_than_was_promised():
    assert RUNS >= 400
    assert COMPARISONS // 2 >= 2000
    assert Share(COMPARISONS // 20, COMPARISONS).high < 0.06
    assert (1 + max(METHODS)) * max(BUDGETS) <= RUNS
    powers = [statistics.power(effect, 1.0, 20) for effect in EFFECTS]
    assert powers == pytest.approx([0.19, 0.56, 0.89, 0.99], abs=0.01)


def test_a_comparison_takes_every_run_once_and_draws_are_the_same_every_time():
    drawn = calibration._drawn(400, 20)
    assert drawn.shape == (20, 9, 40)
    assert all(np.unique(places).size == 360 for places in drawn)
    assert np.array_equal(drawn, calibration._drawn(400, 20))


def test_the_pool_is_used_as_measured_and_in_four_other_shapes():
    made = shapes(POOL, METRIC)
    measured, heavy, skewed, ties, diverged = made.values()
    assert np.array_equal(measured, POOL)
    order = np.argsort(POOL, kind="stable")
    assert all((np.diff(shape[order]) >= 0).all() for shape in (heavy, skewed, ties))
    for shape in (heavy, skewed):
        assert np.unique(shape).size == np.unique(POOL).size
    assert stats.kurtosis(heavy) > 10
    assert stats.skew(skewed) > 1
    assert np.unique(ties).size < 10
    assert (diverged == METRIC.worst).sum() == 20


def test_every_combination_is_there_once(found):
    cases = [(f.pool, f.design, f.seeds, f.methods) for f in found.false_verdicts]
    assert len(set(cases)) == len(cases) == 5 * 3 * (3 + 3)
    held = [(c.pool, c.design, c.seeds, c.spread) for c in found.coverage]
    assert len(set(held)) == len(held) == 7 * 4
    effects = [(d.pool, d.design, d.seeds, d.methods, d.effect) for d in found.power]
    assert len(set(effects)) == len(effects) == 4 * (5 * 9 + 3)
    assert [(saving.effect, saving.budget) for saving in found.savings] == [(e, n) for e in EFFECTS for n in (20, 40)]
    assert {case.share.of for case in (*found.false_verdicts, *found.coverage)} == {2 * FEW}
    assert {case.share.of for case in (*found.power, *found.savings)} == {FEW}


def test_few_false_verdicts_are_found_and_planted_effects_are(found):
    for case in found.false_verdicts:
        assert case.share.count <= stats.binom.ppf(1 - 1e-4, case.share.of, 0.05), case
    for case in found.coverage:
        if case.spread == 1:
            assert case.share.count >= stats.binom.ppf(1e-4, case.share.of, 0.95), case
    for case in found.power:
        if case.pool == AS_MEASURED and case.design == "fixed":
            low, high = stats.binom.ppf([1e-4, 1 - 1e-4], FEW, case.computed)
            assert low - 3 <= case.share.count <= high + 3, case
        if case.effect == 1.0 and case.design == "until decided":
            assert case.share.rate > 0.9


def test_savings_follow_from_when_comparisons_ended(found):
    by_case = {(saving.effect, saving.budget): saving for saving in found.savings}
    for saving in found.savings:
        assert saving.median_low <= saving.median_seeds <= saving.median_high <= saving.budget
        assert {saving.median_low, saving.median_high} <= set(sequential.LOOKS)
        assert statistics.power(saving.effect, 1.0, saving.fixed_seeds) >= saving.share.low
        assert statistics.power(saving.effect, 1.0, saving.fixed_seeds - 1) < saving.share.low
        assert saving.ratio == saving.median_seeds / saving.fixed_seeds
    assert [case for case, saving in by_case.items() if saving.clear] == [(0.75, 40), (1.0, 40)]
    assert by_case[0.25, 40].ratio > 1
    assert by_case[1.0, 40].ratio <= 0.7  # few comparisons leave it open how many seeds a fixed number would have to be
    found_by_40 = [case for case in found.power if case.design == "until decided" and case.methods == 1]
    assert [case.share for case in found_by_40] == [by_case[effect, 40].share for effect in EFFECTS]


def test_the_interval_of_a_median_holds_it_in_95_cases_of_100():
    rng = np.random.default_rng(0)
    ends = np.array([calibration._median(rng.permutation(1000)[:151]) for _ in range(2000)])
    assert (ends[:, 1] <= ends[:, 0]).all()
    assert (ends[:, 0] <= ends[:, 2]).all()
    inside = ((ends[:, 1] <= 499.5) & (ends[:, 2] >= 499.5)).mean()
    assert 0.95 <= inside < 0.985


def test_with_six_seeds_and_several_methods_nothing_is_ever_found(found):
    for case in (*found.false_verdicts, *found.power):
        if case.design == "fixed" and case.seeds == 6 and case.methods > 1:
            assert case.share.count == 0


def test_the_json_is_plain_and_each_figure_is_a_flat_row(found):
    told = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert told == found.as_json()
    facts = {name: told[name] for name in ("task", "version", "trials", "runs", "first_seed", "failed", "comparisons")}
    assert list(facts.values()) == ["toy", 3, 0, 400, 2_000_000, 0, 2 * FEW]
    assert told["with_effect"] == FEW
    assert told["values"] == POOL.tolist()
    assert told["distinct"] == np.unique(POOL).size
    assert told["mean"] == pytest.approx(POOL.mean(), rel=1e-5)
    assert told["standard_deviation"] == pytest.approx(POOL.std(ddof=1), rel=1e-5)
    share = ["count", "of", "rate", "low", "high"]
    case = ["pool", "design", "seeds"]
    assert list(told["false_verdicts"][0]) == [*case, "methods", *share]
    assert list(told["power"][0]) == [*case, "methods", "effect", "computed", *share]
    assert list(told["coverage"][0]) == [*case, "spread", *share]
    median = ["median_seeds", "median_low", "median_high", "fixed_seeds"]
    assert list(told["savings"][0]) == [
        "effect",
        "budget",
        *median,
        "ratio",
        "ratio_low",
        "ratio_high",
        "clear",
        *share,
    ]


def test_what_is_not_as_it_should_be_is_said(found):
    good = replace(found, false_verdicts=[], power=[], coverage=[], savings=[])
    assert good.misses == []
    assert good.judged == 0
    half, all_of_them = Share(1000, 2000), Share(2000, 2000)
    bad = replace(
        good,
        false_verdicts=[
            FalseVerdicts(AS_MEASURED, "fixed", 10, Share(98, 2000), 3),
            FalseVerdicts(AS_MEASURED, "fixed", 20, Share(115, 2000), 1),
            FalseVerdicts(AS_MEASURED, "fixed", 20, Share(140, 2000), 8),
        ],
        power=[
            Detection(AS_MEASURED, "fixed", 20, half, 1, 0.5, 0.56),
            Detection(AS_MEASURED, "fixed", 20, Share(880, 2000), 1, 0.5, 0.56),
            Detection("other", "fixed", 20, Share(880, 2000), 1, 0.5, 0.56),
            Detection(AS_MEASURED, "until decided", 40, Share(880, 2000), 1, 0.5, None),
        ],
        coverage=[
            Coverage(AS_MEASURED, "fixed", 20, Share(1900, 2000), 1),
            Coverage("other", "fixed", 20, Share(1860, 2000), 1),
            Coverage(AS_MEASURED, "fixed", 20, Share(1940, 2000), 1),
            Coverage("other", "fixed", 20, Share(1940, 2000), 1),
            Coverage(AS_MEASURED, "fixed", 6, Share(1940, 2000), 1),
            Coverage(AS_MEASURED, "fixed", 20, Share(1500, 2000), 2),
            Coverage(AS_MEASURED, "until decided", 40, Share(1980, 2000), 1),
            Coverage(AS_MEASURED, "until decided", 40, Share(1898, 2000), 1),
        ],
        savings=[
            Saving(0.5, 40, 30, 30, 30, 20, half),
            Saving(0.75, 20, 14, 14, 14, 20, half),
            Saving(0.75, 40, 12, 12, 14, 20, all_of_them),
            Saving(1.0, 40, 14, 14, 14, 20, all_of_them),
        ],
    )
    ties = f" ({np.unique(POOL).size} different values)"
    assert bad.misses == [
        "false verdicts in 5.8 % [4.8, 6.9], perhaps too many: pool as measured, 20 seeds, 1 method",
        "false verdicts in 7.0 % [5.9, 8.2], too many: pool as measured, 20 seeds, 8 methods",
        "an effect of 0.5 is found in 44.0 % [41.8, 46.2] and not 56.0 %: pool as measured, 20 seeds, 1 method" + ties,
        "intervals hold the truth in only 93.0 % [91.8, 94.1]: pool other, 20 seeds",
        "intervals are wider than need be, they hold the truth in 97.0 % [96.2, 97.7]: pool as measured, 20 seeds"
        + ties,
        "intervals hold the truth in only 94.9 % [93.8, 95.8]: pool as measured, until decided, up to 40 seeds",
        "an effect of 1 takes 70 % of a fixed number of seeds: until decided, up to 40 seeds",
    ]


def test_how_many_figures_were_judged_is_told(found):
    rates, powers, coverages, savings = 5 * 3 * 6, 4 * 9, 5 * 4, 2
    assert found.judged == rates + powers + coverages + savings


def test_one_false_rate_that_chance_explains_among_many_is_no_miss(found):
    rate = FalseVerdicts(AS_MEASURED, "fixed", 20, Share(545, 10_000), 1)
    assert rate.share.low > 0.05
    others = [FalseVerdicts(AS_MEASURED, "fixed", 20, Share(500, 10_000), 1)] * 20
    assert replace(found, false_verdicts=[rate, *others], power=[], coverage=[], savings=[]).misses == []
    alone = replace(found, false_verdicts=[rate], power=[], coverage=[], savings=[])
    assert alone.misses == ["false verdicts in 5.5 % [5.0, 5.9], too many: pool as measured, 20 seeds, 1 method"]


def test_tests_that_are_wrong_too_often_are_found_out(monkeypatch):
    """p-values a third of what they are, and boundaries of three times the level."""
    right_p, right_crossings = calibration._p_values, sequential.crossings
    monkeypatch.setattr(calibration, "_p_values", lambda d: right_p(d) / 3)
    monkeypatch.setattr(sequential, "crossings", lambda d, level: right_crossings(d, 3 * level))
    monkeypatch.setattr(calibration, "shapes", lambda pool, metric: {AS_MEASURED: pool})
    misses = calibration_of(pool_of(POOL), 300).misses
    assert any(said.startswith("false verdicts") and "too many: pool as measured, 20" in said for said in misses)
    assert any(said.startswith("intervals") and said.endswith("as measured, 20 seeds") for said in misses)
    assert any(" too many: pool as measured, until decided, up to 40" in said for said in misses)
    assert any("truth in only" in said and "until decided, up to 40" in said for said in misses)


def test_a_tasks_baseline_is_run_once_for_each_seed_and_only_once(store, monkeypatch):
    given = []
    monkeypatch.setattr(calibration, "calibration_of", lambda pool, *_: given.append(pool))
    for _ in range(2):
        with Inline(toy.load) as executor:
            calibrate(toy.load, "toy", executor=executor, store=store)
        assert store.count() == 400
    first, second = given
    assert first == second
    assert (first.task, first.version, first.trials, first.failed) == ("toy", 1, 0, 0)
    assert len(set(first.values)) == 400
    runs = store.list()
    assert sorted(run.seed for run in runs) == list(range(2_000_000, 2_000_400))
    assert {run.split for run in runs} == {"test"}
    assert first.seconds == pytest.approx(sum(run.outcome.seconds for run in runs))


def tuned_toy(reference):
    """The toy with a baseline that can be tuned."""
    task = toy.load(reference)
    return replace(task, slots={**task.slots, "optimizer": replace(task.slots["optimizer"], default=Choice("Plain"))})


def test_with_trials_every_run_has_a_tuning_of_its_own(store, monkeypatch):
    given = []
    monkeypatch.setattr(calibration, "calibration_of", lambda pool, *_: given.append(pool))
    for trials in (0, 2):
        with Inline(tuned_toy) as executor:
            calibrate(tuned_toy, "toy", executor=executor, store=store, trials=trials)
    untuned, tuned = given
    assert (tuned.trials, len(tuned.values), store.count()) == (2, 400, 400 + 3 * 400)
    runs = store.list()
    assert {run.seed for run in runs if run.split == "validation"} == set(range(3_000_000, 3_000_400))
    evaluated = [run for run in runs if run.split == "test" and run.choices["optimizer"]["params"]]
    assert {run.seed: run.outcome.value for run in evaluated} == dict(enumerate(tuned.values, 2_000_000))
    assert len({json.dumps(run.choices) for run in evaluated}) > 100
    assert np.mean(tuned.values) > np.mean(untuned.values)
    assert tuned.seconds == pytest.approx(sum(r.outcome.seconds for r in runs) - untuned.seconds)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"runs": 399}, "runs must be a whole number of at least 400, got 399"),
        ({"runs": 2_000_000}, "runs must be at most 1000000, got 2000000"),
        ({"comparisons": 1}, "comparisons must be a whole number of at least 2, got 1"),
        ({"trials": -1}, "trials must be a whole number of at least 0, got -1"),
        ({"trials": 2}, "trials must be 0: the baseline of toy has nothing to tune"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_before_anything_runs(store, asked, said):
    with Inline(toy.load) as executor, pytest.raises(BadInput, match=said):
        calibrate(toy.load, "toy", executor=executor, store=store, **asked)
    assert store.count() == 0


def test_a_baseline_that_always_measures_the_same_cannot_be_calibrated_on():
    with pytest.raises(BadInput, match="all 400 runs of the baseline measured 0.5: there is nothing to calibrate on"):
        calibration_of(pool_of([0.5] * 400))
