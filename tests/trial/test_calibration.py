"""Calibration: the same tests as the bench's, drawn by the thousand; and what would be noticed if they were wrong."""

import json
from dataclasses import replace

import numpy as np
import pytest
import toy
from scipy import stats

from fairtrial.contract import BadInput, Metric
from fairtrial.trial import calibration, sequential, statistics
from fairtrial.trial.calibration import (
    BUDGETS,
    COMPARISONS,
    EFFECTS,
    MEASURED,
    METHODS,
    RUNS,
    SEEDS,
    Coverage,
    Detection,
    FalseVerdicts,
    Saving,
    Share,
    calibrate,
    calibration_of,
    shapes,
)
from fairtrial.trial.execute import Inline

METRIC = Metric("score", "maximize", "fraction", margin=0.005, worst=0.0)
POOL = np.round(0.9 + 0.02 * np.random.default_rng(0).normal(size=400), 3)
FEW = 120


@pytest.fixture(scope="module")
def found():
    return calibration_of(POOL.tolist(), METRIC, FEW, task="toy", version=3)


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
        assert share.as_json() == {"count": count, "of": of, "rate": count / of, "low": share.low, "high": share.high}


def test_the_defaults_are_no_smaller_than_was_promised():
    assert RUNS >= 400
    assert COMPARISONS >= 2000
    assert (1 + max(METHODS)) * max(BUDGETS) <= RUNS
    powers = [statistics.power(effect, 1.0, 20) for effect in EFFECTS]
    assert powers == pytest.approx([0.56, 0.88, 0.99], abs=0.01)


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
    assert len(set(cases)) == len(cases) == 5 * 3 * 3 + 3 * (3 + 4 * 2)
    held = [(c.pool, c.design, c.seeds, c.spread) for c in found.coverage]
    assert len(set(held)) == len(held) == 7 * 4
    effects = [(d.pool, d.design, d.seeds, d.methods, d.effect) for d in found.detection]
    assert len(set(effects)) == len(effects) == 5 * 27 + 9
    assert [saving.effect for saving in found.savings] == list(EFFECTS)
    assert {case.share.of for case in (*found.false_verdicts, *found.coverage, *found.detection)} == {FEW}


def test_few_false_verdicts_are_found_and_planted_effects_are(found):
    for case in found.false_verdicts:
        assert case.share.count <= stats.binom.ppf(1 - 1e-4, FEW, 0.05), case
    for case in found.coverage:
        if case.spread == 1:
            assert case.share.count >= stats.binom.ppf(1e-4, FEW, 0.95), case
    for case in found.detection:
        if case.pool == MEASURED and case.design == "fixed":
            low, high = stats.binom.ppf([1e-4, 1 - 1e-4], FEW, case.computed)
            assert low - 3 <= case.share.count <= high + 3, case
        if case.effect == 1.0 and case.design == "until decided":
            assert case.share.rate > 0.9
    assert (
        found.savings[-1].ratio <= 0.7
    )  # few comparisons leave it open how many seeds a fixed number would have to be
    assert found.savings[-1].median_seeds in sequential.LOOKS


def test_with_six_seeds_and_several_methods_nothing_is_ever_found(found):
    for case in (*found.false_verdicts, *found.detection):
        if case.design == "fixed" and case.seeds == 6 and case.methods > 1:
            assert case.share.count == 0


def test_the_json_is_plain_and_holds_every_figure(found):
    told = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert told == found.as_json()
    assert list(told) == [
        "task",
        "version",
        "metric",
        "pool",
        "comparisons",
        "false_verdicts",
        "coverage",
        "detection",
        "savings",
        "misses",
    ]
    assert (told["task"], told["version"], told["metric"], told["comparisons"]) == ("toy", 3, "score", FEW)
    assert told["pool"] == {
        "runs": 400,
        "failed": 0,
        "distinct": np.unique(POOL).size,
        "mean": pytest.approx(POOL.mean()),
        "spread": pytest.approx(np.sqrt(2) * POOL.std(ddof=1)),
    }
    assert list(told["false_verdicts"][0]) == ["pool", "design", "seeds", "methods", "share"]
    assert list(told["false_verdicts"][0]["share"]) == ["count", "of", "rate", "low", "high"]


def test_what_is_not_as_it_should_be_is_said(found):
    good = replace(found, false_verdicts=[], coverage=[], detection=[], savings=[])
    assert good.misses == []
    bad = replace(
        good,
        distinct=400,
        false_verdicts=[
            FalseVerdicts(MEASURED, "fixed", 10, 3, Share(98, 2000)),
            FalseVerdicts(MEASURED, "fixed", 20, 8, Share(140, 2000)),
        ],
        coverage=[
            Coverage(MEASURED, "fixed", 20, 1, Share(1900, 2000)),
            Coverage(MEASURED, "fixed", 20, 1, Share(1860, 2000)),
            Coverage(MEASURED, "fixed", 20, 1, Share(1940, 2000)),
            Coverage(MEASURED, "fixed", 20, 2, Share(1500, 2000)),
            Coverage(MEASURED, "until decided", 40, 1, Share(1980, 2000)),
            Coverage(MEASURED, "until decided", 40, 1, Share(1870, 2000)),
        ],
        detection=[
            Detection(MEASURED, "fixed", 20, 1, 0.5, Share(1000, 2000), 0.56),
            Detection(MEASURED, "fixed", 20, 1, 0.5, Share(880, 2000), 0.56),
            Detection("other", "fixed", 20, 1, 0.5, Share(880, 2000), 0.56),
            Detection(MEASURED, "until decided", 40, 1, 0.5, Share(880, 2000), None),
        ],
        savings=[Saving(0.5, 30, 20, 1.5), Saving(1.0, 14, 20, 0.7)],
    )
    assert bad.misses == [
        "false verdicts in 7.0% of cases: pool as measured, 20 seeds, 8 methods",
        "intervals hold the truth in 93.0% of cases: pool as measured, 20 seeds",
        "intervals hold the truth in 97.0% of cases: pool as measured, 20 seeds",
        "intervals hold the truth in 93.5% of cases: pool as measured, until decided, up to 40 seeds",
        "an effect of 0.5 found in 44.0% of cases and not 56.0%: pool as measured, 20 seeds, 1 methods",
        "an effect of 1 takes 70% of the runs of a fixed number of seeds",
    ]
    assert len(replace(bad, distinct=300).misses) == 5  # with ties intervals may hold the truth more often


def test_a_tasks_baseline_is_run_once_for_each_seed_and_only_once(store, monkeypatch):
    given = []
    monkeypatch.setattr(calibration, "calibration_of", lambda values, *_, **facts: given.append((values, facts)))
    for _ in range(2):
        with Inline(toy.load) as executor:
            calibrate(toy.load, "toy", executor=executor, store=store)
        assert store.count() == 400
    (first, facts), (second, _) = given
    assert first == second
    assert facts == {"task": "toy", "version": 1, "failed": 0}
    assert len(set(first)) == 400
    seeds = [run.seed for run in store.list()]
    assert sorted(seeds) == list(range(2_000_000, 2_000_400))
    assert {run.split for run in store.list()} == {"test"}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"runs": 399}, "runs must be a whole number of at least 400, got 399"),
        ({"comparisons": 0}, "comparisons must be a whole number of at least 1, got 0"),
    ],
)
def test_too_small_a_pool_is_refused_before_anything_runs(store, asked, said):
    with Inline(toy.load) as executor, pytest.raises(BadInput, match=said):
        calibrate(toy.load, "toy", executor=executor, store=store, **asked)
    assert store.count() == 0


def test_a_baseline_that_always_measures_the_same_cannot_be_calibrated_on():
    with pytest.raises(BadInput, match="all 400 runs of the baseline measured 0.5: there is nothing to calibrate on"):
        calibration_of([0.5] * 400, METRIC)
