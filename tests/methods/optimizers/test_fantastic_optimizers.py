import math
import subprocess
import sys

import numpy as np
import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import curve_fit

from fairtrial.methods.optimizers import (
    coordinate_descent,
    equal_budget_search,
    equivalent_data,
    fit_hyperparameter_law,
    fit_scaling,
    rank_flips,
    scaling_sensitive,
    speedup,
)
from fairtrial.methods.optimizers.fantastic_optimizers import Flip, ScalingLaw
from fairtrial.methods.registry import Categorical, LogUniform

NAN, INF = math.nan, math.inf
DATA = np.array([1.0, 2.0, 4.0, 8.0])
EXACT = ScalingLaw(0.5, 0.4, 3.0, np.zeros((3, 3)))


def counted(function):
    """The function, and the configurations that it was asked for."""
    asked = []

    def objective(config):
        asked.append(dict(config))
        return function(**config)

    return objective, asked


def separable(x, y):
    return (x - 2) ** 2 + (y - 3) ** 2


def coupled(x, y):
    return (x - y) ** 2 + 0.1 * (x + y - 6) ** 2


GRIDS = {"x": [0, 1, 2, 3, 4], "y": [0, 1, 2, 3, 4]}


def test_descent_on_a_separable_quadratic_is_done_after_one_round():
    objective, asked = counted(separable)
    found = coordinate_descent(objective, GRIDS, {"x": 0, "y": 0}, max_rounds=1)
    assert found.best == ({"x": 2, "y": 3}, 0.0)
    assert len(asked) == len(found.history) == 9
    assert not found.converged
    objective, asked = counted(separable)
    found = coordinate_descent(objective, GRIDS, {"x": 0, "y": 0})
    assert found.best.config == {"x": 2, "y": 3}
    assert found.converged
    assert len(asked) == 9 + 4  # x once more, at the new y; the rest is known


def test_descent_on_a_coupled_quadratic_takes_the_steps_found_by_hand():
    objective, asked = counted(coupled)
    found = coordinate_descent(objective, GRIDS, {"x": 0, "y": 4}, max_rounds=2)
    # x with y = 4 gives 16.4, 9.1, 4, 1.1, 0.4: 4 is taken; y with x = 4 gives 16.4, 9.1, 4, 1.1, 0.4: 4 stays
    assert [config["x"] for config in asked[:5]] == [0, 1, 2, 3, 4]
    assert [config["y"] for config in asked[5:]] == [0, 1, 2, 3]
    assert [round(loss, 12) for _, loss in found.history] == [16.4, 9.1, 4, 1.1, 0.4, 16.4, 9.1, 4, 1.1]
    assert found.best.config == {"x": 4, "y": 4}  # stuck, although (3, 3) is the optimum
    assert found.converged


@pytest.mark.parametrize(("needed", "best"), [(0.9, 1), (1.0, 0), (1.1, 0)])
def test_a_value_is_accepted_only_if_it_gains_more_than_asked_for(needed, best):
    found = coordinate_descent(lambda c: 5.0 - c["x"], {"x": [0, 1]}, {"x": 0}, min_improvement=needed)
    assert found.best.config == {"x": best}


def test_the_paper_s_threshold_is_three_thousandths():
    for gain, best in ((0.0029, 0), (0.0031, 1)):
        found = coordinate_descent(lambda c, gain=gain: 5.0 - gain * c["x"], {"x": [0, 1]}, {"x": 0})
        assert found.best.config == {"x": best}


def test_divergence_counts_as_infinite_and_is_left_at_once():
    losses = {0: NAN, 1: INF, 2: 3.0, 3: NAN}
    found = coordinate_descent(lambda c: losses[c["x"]], {"x": [1, 2, 3]}, {"x": 0})
    assert [loss for _, loss in found.history] == [INF, INF, 3.0, INF]
    assert found.best == ({"x": 2}, 3.0)
    nowhere = coordinate_descent(lambda c: NAN, {"x": [1, 2]}, {"x": 0})
    assert nowhere.best == ({"x": 0}, INF)


@settings(deadline=None, max_examples=30)
@given(
    losses=st.lists(st.floats(0, 1), min_size=24, max_size=24),
    budget=st.integers(1, 24),
    cut=st.integers(0, 24),
)
def test_a_search_that_was_cut_short_ends_as_if_it_had_not_been(losses, budget, cut):
    grids = {"a": [0, 1, 2, 3], "b": ["p", "q", "r"], "c": [None, True]}

    def objective(config):
        return losses[6 * config["a"] + 2 * grids["b"].index(config["b"]) + (config["c"] is True)]

    start = {"a": 1, "b": "q", "c": None}
    whole = coordinate_descent(objective, grids, start, budget=budget)
    again, asked = counted(lambda **config: objective(config))
    resumed = coordinate_descent(again, grids, start, budget=budget, known=whole.history[:cut])
    assert resumed == whole
    assert len(asked) == max(0, len(whole.history) - cut)
    assert len(whole.history) <= budget
    assert len({tuple(config.values()) for config, _ in whole.history}) == len(whole.history)
    assert whole.best.loss <= whole.history[0].loss
    for evaluation in whole.history:
        assert evaluation.loss == objective(evaluation.config)


def test_an_objective_that_changes_its_configuration_changes_no_history():
    def objective(config):
        return float(config.pop("x"))

    assert coordinate_descent(objective, {"x": [1]}, {"x": 2}).history == [({"x": 2}, 2.0), ({"x": 1}, 1.0)]


def test_a_search_without_budget_left_has_not_converged():
    found = coordinate_descent(lambda c: separable(**c), GRIDS, {"x": 2, "y": 3}, budget=8)
    assert (len(found.history), found.converged) == (8, False)
    assert coordinate_descent(lambda c: separable(**c), GRIDS, {"x": 2, "y": 3}, budget=9).converged


REGIMES = {
    "small": [({"lr": 1}, 3.000), ({"lr": 2}, 3.005), ({"lr": 4}, 3.050)],
    "large": [({"lr": 1}, 2.900), ({"lr": 2}, 2.904), ({"lr": 4}, 2.890)],
}


def test_a_hyperparameter_is_sensitive_if_no_value_is_near_optimal_everywhere():
    assert scaling_sensitive(REGIMES) == {"lr": True}
    assert scaling_sensitive(REGIMES, tolerance=2e-2) == {"lr": False}


def test_each_hyperparameter_is_judged_by_its_own_values():
    results = {
        1: [({"lr": 1, "wd": 0.1}, 3.0), ({"lr": 1, "wd": 0.2}, 3.5), ({"lr": 2, "wd": 0.1}, NAN)],
        2: [({"lr": 2, "wd": 0.1}, 2.0), ({"lr": 1, "wd": 0.1}, INF)],
    }
    assert scaling_sensitive(results) == {"lr": True, "wd": False}


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 0.02)), min_size=1, max_size=6), min_size=1, max_size=4)
)
def test_a_larger_tolerance_never_makes_a_hyperparameter_sensitive(found):
    results = {place: [({"lr": lr}, loss) for lr, loss in regime] for place, regime in enumerate(found)}
    sensitive = [scaling_sensitive(results, tolerance)["lr"] for tolerance in (0.0, 0.005, 0.01, 0.02)]
    assert sensitive == sorted(sensitive, reverse=True)


def test_the_law_of_the_loss_is_found_again():
    law = fit_scaling([1, 2, 4, 8], [3.5, 3.378929, 3.287175, 3.217638])
    assert law[:3] == pytest.approx((0.5, 0.4, 3.0), abs=1e-4)
    assert law.loss(4) == pytest.approx(3.287175, abs=1e-6)
    noisy = fit_scaling([1, 2, 4, 8], [3.5021, 3.3767, 3.2895, 3.2163])
    assert noisy[:3] == pytest.approx((0.494992, 0.410278, 3.006490), abs=1e-6)
    assert equivalent_data(noisy, 3.45) == pytest.approx(1.306922, abs=1e-6)


@pytest.mark.parametrize(
    ("data", "loss", "needed", "faster"),
    [
        (1, 3.45, 1.301349, 1.301349),
        (2, 3.36, 2.273363, 1.136681),
        (4, 3.26, 5.128515, 1.282129),
        (8, 3.205, 9.290527, 1.161316),
    ],
)
def test_a_loss_is_worth_the_data_that_the_baseline_would_need_for_it(data, loss, needed, faster):
    assert equivalent_data(EXACT, loss) == pytest.approx(needed, abs=1e-6)
    baseline = np.array([[3.5], [3.378929], [3.287175], [3.217638]])
    found = speedup(DATA, baseline, data, np.array([loss]), generator=np.random.default_rng(0))
    assert found.estimate == pytest.approx(faster, abs=1e-5)
    assert (found.low, found.high) == (0.0, INF), "one seed bounds nothing"
    assert found.extrapolated == (needed > 8)


def test_an_arm_that_is_as_far_as_the_baseline_with_more_data_is_that_much_faster():
    baseline = 2 * DATA[:, None] ** -0.3 + np.full((1, 4), 1.5)
    loss = np.full(4, 2 * 5.2**-0.3 + 1.5)
    found = speedup(DATA, baseline, 4.0, loss, bootstrap=20, generator=np.random.default_rng(0))
    assert found[:3] == pytest.approx((1.3, 1.3, 1.3), abs=1e-6)
    assert not found.extrapolated


@settings(deadline=None, max_examples=50)
@given(
    alpha=st.floats(0.1, 10),
    B=st.floats(0.1, 2),
    beta=st.floats(0, 5),
    unit=st.floats(1e-3, 1e9),
    count=st.integers(3, 6),
)
def test_exact_laws_are_recovered_in_any_unit_of_data(alpha, B, beta, unit, count):
    data = unit * 2.0 ** np.arange(count)
    law = fit_scaling(data, alpha * (data / unit) ** -B + beta)
    found = law.alpha * unit**-law.B, law.B, law.beta
    assert found == pytest.approx((alpha, B, beta), rel=1e-5, abs=1e-5)
    assert np.isinf(law.cov).all() == (count == 3)


def test_fit_and_covariance_are_those_of_scipy():
    generator = np.random.default_rng(0)
    data = 2.0 ** np.arange(8)
    loss = 2 * data**-0.3 + 1.5 + 1e-3 * generator.normal(size=8)
    law = fit_scaling(data, loss)
    start = [loss[0] - loss[-1], 0.5, loss[-1]]
    expected, cov = curve_fit(lambda D, a, B, b: a * D**-B + b, data, loss, p0=start, ftol=1e-14, xtol=1e-14)
    assert law[:3] == pytest.approx(tuple(expected), rel=1e-6)
    np.testing.assert_allclose(law.cov, cov, rtol=1e-4)


def test_the_least_loss_is_never_below_zero():
    law = fit_scaling([1, 2, 4, 8], [4.0, 2.0, 0.9, 0.3])  # the free optimum has β < 0
    assert law.beta == 0.0
    assert law.alpha > 0


def test_what_no_amount_of_data_reaches_is_refused():
    for loss in (3.0, 2.9, NAN):
        with pytest.raises(ValueError, match="loss must be above beta = 3"):
            equivalent_data(EXACT, loss)
    baseline = EXACT.alpha * DATA[:, None] ** -EXACT.B + np.full((1, 3), EXACT.beta)
    with pytest.raises(ValueError, match="above beta"):
        speedup(DATA, baseline, 1.0, np.full(3, 2.5), generator=np.random.default_rng(0))


def test_resamples_that_cannot_reach_the_loss_open_the_interval():
    beta = np.array([2.9, 3.0, 3.1] * 2)
    baseline = EXACT.alpha * DATA[:, None] ** -EXACT.B + beta
    found = speedup(DATA, baseline, 8.0, np.full(6, 3.05), generator=np.random.default_rng(0))
    assert found.estimate == pytest.approx(0.1**-2.5 / 8)
    assert 1 < found.low < found.estimate
    assert found.high == INF
    assert found.extrapolated


def test_the_interval_of_an_optimizer_against_itself_covers_one():
    covered = 0
    for repeat in range(60):
        generator = np.random.default_rng(repeat)
        baseline = 2 * DATA[:, None] ** -0.3 + 1.5 + 0.01 * generator.normal(size=(4, 6))
        loss = 2 * 4**-0.3 + 1.5 + 0.01 * generator.normal(size=6)
        found = speedup(DATA, baseline, 4.0, loss, bootstrap=200, generator=generator)
        assert found.low <= found.estimate <= found.high
        covered += found.low <= 1 <= found.high
    assert covered >= 54


def test_seeds_that_both_share_cancel():
    generator = np.random.default_rng(0)
    shift = 0.05 * generator.normal(size=8)
    baseline = 2 * DATA[:, None] ** -0.3 + 1.5 + shift
    widths = []
    for own in (shift, shift[::-1].copy()):
        found = speedup(DATA, baseline, 4.0, 2 * 4.8**-0.3 + 1.5 + own, generator=np.random.default_rng(1))
        widths.append(found.high - found.low)
    assert widths[0] < 0.1 * widths[1]


@settings(deadline=None, max_examples=20)
@given(A=st.floats(-1, 1), B=st.floats(-1, 1), alpha=st.floats(0.5, 2), beta=st.floats(-1, 1))
def test_the_law_of_a_hyperparameter_passes_through_its_points(A, B, alpha, beta):
    N = np.repeat([134217728, 301989888, 536870912], 4)
    D = np.tile([1, 2, 4, 8], 3)
    values = alpha * (N / 3e8) ** -A * D**-B + beta
    law = fit_hyperparameter_law(N, D, values)
    found = [law.value(n, d) for n, d in zip(N.tolist(), D.tolist(), strict=True)]
    np.testing.assert_allclose(found, values, atol=1e-6)


def test_the_law_of_a_hyperparameter_extrapolates():
    N = np.repeat([134217728, 301989888, 536870912], 4)
    D = np.tile([1, 2, 4, 8], 3)
    law = fit_hyperparameter_law(N, D, 40 * N**-0.45 * D**-0.2 + 1e-3)
    assert tuple(law) == pytest.approx((40, 0.45, 0.2, 1e-3), rel=1e-6)
    assert law.value(1207959552, 8) == pytest.approx(40 * 1207959552**-0.45 * 8**-0.2 + 1e-3, rel=1e-9)
    assert tuple(fit_hyperparameter_law(N, D, np.full(12, 0.1))) == (0.0, 0.0, 0.0, 0.1)


def test_a_noisy_law_of_a_hyperparameter_fits_no_worse_than_scipy_s():
    generator = np.random.default_rng(0)
    N, D = np.repeat([1.0, 2.25, 4.0], 4), np.tile([1.0, 2.0, 4.0, 8.0], 3)
    values = 2.0 ** np.round(np.log2(8e-3 * N**-0.4 * D**-0.3) + 0.3 * generator.normal(size=12))

    def law(x, a, A, B, b):
        return a * x[0] ** -A * x[1] ** -B + b

    ours = fit_hyperparameter_law(N, D, values)
    theirs, _ = curve_fit(law, (N, D), values, p0=[values[0], 0.5, 0.5, 0.0], maxfev=80_000)
    squares = [((law((N, D), *params) - values) ** 2).sum() for params in (ours, theirs)]
    assert squares[0] <= squares[1] * (1 + 1e-9)


def test_pairs_that_change_places_are_found():
    curves = {
        "AdamW": {50: 3.0, 75: 2.8, 100: 2.5},
        "SOAP": {50: 3.2, 75: 2.7, 100: 2.4},
        "MARS": {50: 3.2, 75: 2.9, 100: 2.6},
    }
    assert rank_flips(curves, [50, 75]) == [Flip(50, "AdamW", "SOAP")]
    assert rank_flips(curves, [100]) == []
    assert rank_flips({"AdamW": {1: 1.0, 2: INF}, "Lion": {1: 2.0, 2: 1.0}}, [1]) == [Flip(1, "AdamW", "Lion")]


def bowl(at):
    return lambda config: abs(math.log10(config["lr"] / at)) + (0.0 if config["nesterov"] else 0.1)


SPACE = {"lr": LogUniform(1e-5, 1.0), "nesterov": Categorical((False, True))}


def test_optuna_gives_every_optimizer_as_many_runs_and_the_same_proposals_every_time():
    verbosity = optuna.logging.get_verbosity()
    optimizers = {"AdamW": bowl(1e-3), "Lion": bowl(1e-4)}
    found, again = (equal_budget_search(optimizers, dict.fromkeys(optimizers, SPACE), 20, seed=1) for _ in range(2))
    assert found == again
    for search in found.values():
        assert len(search.history) == 20
        assert search.best.loss == min(loss for _, loss in search.history) < 0.5
    assert optuna.logging.get_verbosity() == verbosity


def test_unequal_numbers_of_runs_have_to_be_asked_for():
    optimizers = {"AdamW": bowl(1e-3), "Lion": lambda config: NAN}
    spaces = dict.fromkeys(optimizers, SPACE)
    with pytest.raises(ValueError, match="n_trials must be equal"):
        equal_budget_search(optimizers, spaces, {"AdamW": 3, "Lion": 2}, seed=0)
    found = equal_budget_search(optimizers, spaces, {"AdamW": 3, "Lion": 2}, seed=0, allow_unequal=True)
    assert [len(search.history) for search in found.values()] == [3, 2]
    assert found["Lion"].best.loss == INF


def test_the_study_s_muon_has_the_singular_values_that_its_iteration_leaves():
    gradient = torch.tensor([[3.0, 1, 0], [0, 2, -1]])
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    weight.grad = gradient.clone()
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0).step()
    step = -weight.detach()
    expected = torch.tensor([[0.979092, 0.323776, 0.001294], [-0.003882, 0.657904, -0.329599]])
    torch.testing.assert_close(step, expected, atol=0.03, rtol=0)  # PyTorch iterates in bfloat16
    values = torch.linalg.svdvals(step)
    torch.testing.assert_close(values, torch.tensor([1.066158, 0.684287]), atol=0.03, rtol=0)
    exact = torch.linalg.svdvals(expected.double())
    torch.testing.assert_close(exact, torch.tensor([1.066158, 0.684287], dtype=torch.float64), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (coordinate_descent, (len, {}, {}), "grids"),
        (coordinate_descent, (len, {"x": []}, {"x": 0}), "grids"),
        (coordinate_descent, (len, {"x": [1]}, {"y": 0}), "start must be a value for each of x"),
        (scaling_sensitive, ({},), "results"),
        (scaling_sensitive, ({"r": [({"lr": 1}, NAN)]},), "at least one with a finite loss"),
        (scaling_sensitive, ({"r": [({"lr": 1}, 1.0), ({"wd": 1}, 1.0)]},), "configurations of lr"),
        (scaling_sensitive, (REGIMES, -1.0), "tolerance"),
        (scaling_sensitive, (REGIMES, NAN), "tolerance"),
        (fit_scaling, ([1, 2], [3.0, 2.0]), "at least 3"),
        (fit_scaling, ([1, 2, 2], [3.0, 2.0, 2.0]), "at least 3"),
        (fit_scaling, ([1, 2, 0], [3.0, 2.0, 2.0]), "D must be numbers above 0"),
        (fit_scaling, ([1, 2, 4], [3.0, 2.0]), "3 rows"),
        (fit_scaling, ([1, 2, 4], [3.0, 2.0, NAN]), "loss must be above 0 and finite"),
        (fit_scaling, ([1, 2, 4], [3.0, 3.1, 3.2]), "falling as the data grow"),
        (fit_scaling, ([1, 2, 4], [3.0, 3.0, 3.0]), "falling as the data grow"),
        (fit_hyperparameter_law, ([1, 2, 3], [1, 2, 3], [1, 2, 3]), "at least 4"),
        (fit_hyperparameter_law, ([1, 2, 3, 4], [1, 1, 1, 1], [1, 2, 3, 4]), "D must be 4 numbers, at least two diff"),
        (fit_hyperparameter_law, ([1, 2, -3, 4], [1, 2, 1, 2], [1, 2, 3, 4]), "N must be numbers above 0"),
        (fit_hyperparameter_law, ([1, 2, 3, 4], [1, 2, 1, 2], [1, 2, 3, NAN]), "values"),
        (rank_flips, ({"a": {1: 1.0, 2: 1.0}, "b": {1: 1.0, 3: 1.0}}, [1]), "of the same last step"),
        (rank_flips, ({"a": {1: 1.0, 3: 1.0}, "b": {2: 1.0, 3: 1.0}}, [1]), r"curves\['b'\]"),
        (rank_flips, ({"a": {1: NAN, 3: 1.0}, "b": {1: 1.0, 3: 1.0}}, [1]), r"curves\['a'\]"),
        (rank_flips, ({}, [1]), "curves"),
    ],
)
def test_misuse_is_refused_with_the_argument_named(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_improvement": -1e-3}, "min_improvement"),
        ({"min_improvement": NAN}, "min_improvement"),
        ({"max_rounds": 0}, "max_rounds"),
        ({"budget": 0}, "budget"),
    ],
)
def test_a_descent_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        coordinate_descent(lambda c: 0.0, {"x": [1]}, {"x": 1}, **arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"at": 0.0}, "at must be above 0"),
        ({"bootstrap": 0}, "bootstrap"),
        ({"loss": np.array([NAN, 1.0])}, "loss"),
        ({"D": DATA[:2], "baseline": np.ones((2, 2))}, "at least 3"),
        ({"baseline": np.ones((4, 2))}, "falling"),
    ],
)
def test_a_speedup_that_cannot_be_is_refused(changed, message):
    given = {"D": DATA, "baseline": np.tile([[4.0], [3.0], [2.5], [2.3]], 2), "at": 4.0, "loss": np.full(2, 2.4)}
    with pytest.raises(ValueError, match=message):
        speedup(**(given | changed), generator=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"n_trials": 0}, "n_trials"), ({"n_trials": {"b": 1}}, "n_trials"), ({"spaces": {}}, "spaces")],
)
def test_a_search_that_cannot_be_is_refused(changed, message):
    given = {"optimizers": {"a": bowl(0.1)}, "spaces": {"a": SPACE}, "n_trials": 1}
    with pytest.raises(ValueError, match=message):
        equal_budget_search(**(given | changed), seed=0)


def test_optuna_is_imported_only_where_it_is_used():
    code = "import sys, fairtrial.methods.optimizers.fantastic_optimizers; print('optuna' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
