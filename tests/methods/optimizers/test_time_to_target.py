import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fairtrial.methods.optimizers import (
    Submission,
    Workload,
    benchmark_score,
    calibrate,
    performance_profile,
    rate_factor,
    run_submission,
)
from fairtrial.methods.optimizers.time_to_target import NADAMW, NADAMW_LIST, ratios
from fairtrial.methods.registry import Categorical, LogUniform

INF = math.inf
TIMES = [[100, 200, INF], [150, 150, 90], [450, 160, 100]]


@pytest.fixture
def unchecked(monkeypatch):
    """Types are left to the code itself: the annotations' checks would come before its own."""
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)


def test_golden_ratios_and_scores():
    expected = [[1, 1.333333, INF], [1.5, 1, 1], [INF, 1.066667, 1.111111]]
    np.testing.assert_allclose(ratios(TIMES), expected, atol=1e-6)
    np.testing.assert_allclose(benchmark_score(TIMES), [0.629630, 0.944444, 0.646914], atol=1e-6)
    np.testing.assert_allclose(benchmark_score(TIMES, exact=False), [0.631313, 0.944444, 0.646465], atol=1e-6)


def test_the_profile_is_the_share_of_workloads_within_a_ratio():
    taus, shares = performance_profile(TIMES)
    assert taus[0] == 1.0
    assert taus[-1] == 4.0
    assert len(taus) == 100
    np.testing.assert_allclose(shares[:, 0], [1 / 3, 2 / 3, 0])
    np.testing.assert_allclose(shares[:, -1], [2 / 3, 1, 2 / 3])
    assert (np.diff(shares, axis=1) >= 0).all()


def test_always_fastest_is_one_and_never_there_is_zero():
    np.testing.assert_array_equal(benchmark_score([[1, 2], [INF, INF]]), [1.0, 0.0])
    np.testing.assert_array_equal(benchmark_score([[INF, 2], [INF, 4]]), [0.5, 1 / 3])


some_times = st.lists(
    st.lists(st.one_of(st.floats(1, 1e4), st.just(INF)), min_size=3, max_size=3), min_size=2, max_size=4
)


@settings(deadline=None, max_examples=50)
@given(times=some_times, factor=st.floats(1, 10))
def test_a_slower_competitor_changes_nothing_and_a_faster_one_can_only_lower(times, factor):
    before = benchmark_score(times)
    fastest = np.min(times, axis=0)
    np.testing.assert_array_equal(benchmark_score([*times, fastest * factor])[:-1], before)
    assert (benchmark_score([*times, fastest / factor])[:-1] <= before + 1e-12).all()
    np.testing.assert_allclose(benchmark_score(times, exact=False), before, atol=1 / 99)


@pytest.mark.parametrize(
    ("times", "options", "name"),
    [
        ([[1.0, 2.0]], {}, "times"),
        ([1.0, 2.0], {}, "times"),
        ([[], []], {}, "times"),
        ([[1.0], [-1.0]], {}, "times"),
        ([[1.0], [0.0]], {}, "times"),
        ([[1.0], [math.nan]], {}, "times"),
        ([[1.0], [2.0]], {"tau_max": 1.0}, "tau_max"),
        ([[1.0], [2.0]], {"tau_max": math.nan}, "tau_max"),
        ([[1.0], [2.0]], {"cutoff": 0.5}, "cutoff"),
    ],
)
def test_impossible_tables_are_refused(times, options, name):
    with pytest.raises(ValueError, match=name):
        benchmark_score(times, **options)


def test_what_is_missing_counts_as_never_there_if_asked_for():
    np.testing.assert_array_equal(benchmark_score([[1.0], [math.nan]], missing=True), [1.0, 0.0])


def test_the_published_schedule():
    for step, factor in {0: 0.0, 10: 0.5, 20: 1.0, 510: 0.5, 1000: 0.0}.items():
        assert rate_factor(step, 1000, warmup=NADAMW["warmup"]) == pytest.approx(factor, abs=1e-12)


def test_other_schedules():
    assert [rate_factor(step, 10, "linear", horizon=0.5) for step in (0, 1, 4, 5, 9)] == pytest.approx(
        [1, 0.8, 0.2, 0, 0]
    )
    assert [rate_factor(step, 10, "constant", warmup=0.2) for step in (0, 1, 2, 10)] == [0.0, 0.5, 1.0, 1.0]
    assert len({configuration["lr"] for configuration in (NADAMW, *NADAMW_LIST)}) == 4


@pytest.mark.parametrize(
    ("argument", "value"), [("schedule", "cosine"), ("warmup", 1.0), ("warmup", math.nan), ("horizon", 0.0)]
)
def test_impossible_submissions_are_refused(argument, value, unchecked):
    with pytest.raises(ValueError, match=argument):
        Submission(torch.optim.SGD, **{argument: value})


def model(seed):
    made = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        made.weight.fill_(1.0)
    return made


def squares(output, target):
    return output.square().mean() / 2


def weight(trained, seed):
    found = next(p for p in trained.parameters()).abs().item()
    assert not trained.training
    return found


def batches(seed, steps=10):
    return [(torch.ones(2, 1).double(), torch.zeros(2, 1).double())] * steps


def workload(**options):
    settings = {"name": "a line", "make_data": batches, "target": 0.2, "max_steps": 10, **options}
    return Workload(make_model=model, loss=squares, metric=weight, **settings)


def descent(lr=0.5, **options):
    return Submission(torch.optim.SGD, {"lr": lr}, schedule="constant", **options)


def test_the_time_is_that_of_the_first_look_that_meets_the_target():
    assert run_submission(workload(), descent(), 0) == (3.0, 0.125, 0.125)  # the weight halves with every step
    assert run_submission(workload(every=2), descent(), 0) == (4.0, 0.0625, 0.0625)
    assert run_submission(workload(every=4, max_steps=3), descent(), 0) == (3.0, 0.125, 0.125)
    assert run_submission(workload(max_steps=2), descent(), 0) == (INF, 0.25, 0.25)


def test_an_average_is_looked_at_where_it_is_asked_for():
    found = run_submission(workload(target=1e-9), descent(average=True), 0)
    average, w = 1.0, 1.0
    for t in range(1, 11):
        w /= 2
        average += 9 / (8 + t) * (w - average)
    assert found == (INF, pytest.approx(average), pytest.approx(average))


def test_a_run_that_diverges_is_infinitely_far_from_the_target():
    steps, final, lowest = run_submission(
        workload(max_steps=100, make_data=partial(batches, steps=100)), descent(1e30), 0
    )
    assert (steps, final) == (INF, INF)
    assert lowest > 1.0


@pytest.mark.parametrize("argument", ["target", "max_steps", "every"])
def test_impossible_workloads_are_refused(argument, unchecked):
    with pytest.raises(ValueError, match=argument):
        workload(**{argument: 0})


SPACE = {"lr": LogUniform(0.01, 1.0), "horizon": Categorical((0.5, 1.0))}


def test_calibration_takes_what_is_best_on_all_workloads_together():
    workloads = [workload(), workload(target=0.4)]
    seen = []

    def noting(function, runs):
        seen.extend(runs := list(runs))
        return [function(run) for run in runs]

    found = calibrate(descent, SPACE, workloads, 8, 0, reference=[[3, 2], [INF, 1]], map=noting)
    assert len(seen) == 8 * 2 * 2
    assert found.times.shape == found.distances.shape == (8, 2)
    scores = [benchmark_score([row, [3, 2], [INF, 1]])[0] for row in found.times]
    assert scores[found.candidates.index(found.best)] == max(scores)
    again = calibrate(descent, SPACE, workloads, 8, 0, reference=[[3, 2], [INF, 1]])
    assert again.best == found.best
    assert again.candidates != calibrate(descent, SPACE, workloads, 8, 1, reference=[[3, 2], [INF, 1]]).candidates


def test_among_equals_the_nearest_to_the_target_is_taken():
    workloads = [workload(target=1e-6, max_steps=4)]
    for aggregate in ("score", "mean_loss"):
        found = calibrate(descent, SPACE, workloads, 6, 0, reference=[[1.0]], aggregate=aggregate)
        assert np.isinf(found.times).all()
        assert found.candidates.index(found.best) == found.distances.argmin()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("n_trials", 0),
        ("workloads", []),
        ("run_seeds", ()),
        ("reference", [[1.0, 2.0]]),
        ("reference", [1.0]),
        ("aggregate", "best"),
    ],
)
def test_an_impossible_calibration_is_refused(argument, value, unchecked):
    arguments = {"workloads": [workload()], "n_trials": 2, "reference": [[1.0]], argument: value}
    with pytest.raises(ValueError, match=argument):
        calibrate(descent, SPACE, seed=0, **arguments)
