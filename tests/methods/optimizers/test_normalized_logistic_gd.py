import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks

from fairtrial.methods.optimizers import BatchPerceptron, NormalizedLogisticGD, margin, worst_case

SMALL = np.array([[1.0, 2.0], [-1.0, 0.5], [0.0, -1.0]]), np.array([1, -1, -1])
OPPOSED = np.array([[1.0, -1.0], [-1.0, -4.0]]), np.array([1, -1])


def separable(seed, n=60, d=5):
    generator = np.random.default_rng(seed)
    X, w = generator.standard_normal((n, d)), generator.standard_normal(d)
    return X, np.sign(X @ w)


def path(model, X, y, steps):
    """θ_1 … θ_steps, past separation too."""
    z, theta, found = y[:, None] * X, np.zeros(X.shape[1]), []
    for step in range(steps):
        theta = theta + model._move(z, z @ theta, step)
        found.append(theta)
    return np.array(found)


def steps_of(model, data):
    fitted = model.fit(*data)
    assert fitted.separated_
    assert (fitted.predict(data[0]) == data[1]).all()
    return fitted.n_iter_


@parametrize_with_checks(
    [NormalizedLogisticGD(), NormalizedLogisticGD(normalize=False, fit_intercept=True), BatchPerceptron(max_iter=1000)]
)
def test_scikit_learns_contract(estimator, check, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # arguments are refused by `fit`, not before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        check(estimator.set_params(max_iter=300))


@pytest.mark.parametrize(
    ("n", "step_size", "normalize", "steps"),
    [
        (1000, 100.0, True, 2),
        (1000, 10.0, True, 2),
        (1000, 1.0, True, 16),
        (1000, 0.1, True, 157),
        (1000, 100.0, False, 308),
        (1000, 10.0, False, 729),
        (1000, 1.0, False, 7313),
        (100, 100.0, True, 2),
        (100, 10.0, True, 2),
        (100, 1.0, True, 11),
        (100, 0.1, True, 110),
        (100, 100.0, False, 31),
        (100, 10.0, False, 55),
        (100, 1.0, False, 561),
        (100, 0.1, False, 5615),
    ],
)
def test_steps_on_the_worst_case(n, step_size, normalize, steps):
    assert steps_of(NormalizedLogisticGD(step_size, normalize=normalize), worst_case(n)) == steps


@pytest.mark.parametrize(
    ("n", "normalize", "steps"), [(1000, False, 301), (100, False, 31), (1000, True, 2), (100, True, 2)]
)
def test_steps_of_the_perceptron_on_the_worst_case(n, normalize, steps):
    assert steps_of(BatchPerceptron(normalize=normalize), worst_case(n)) == steps


def test_the_slowest_case_of_the_table():
    assert steps_of(NormalizedLogisticGD(0.1, normalize=False), worst_case(1000)) == 73133


def test_a_small_example_by_hand():
    X, y = SMALL
    found = path(NormalizedLogisticGD(1.0), X, y, 3)
    golden = [[0.666667, 0.833333], [1.301310, 1.147901], [1.895335, 1.369248]]
    np.testing.assert_allclose(found, golden, atol=5e-7)
    z = y[:, None] * X
    margins = np.vstack([np.zeros(3), found[:2] @ z.T])
    np.testing.assert_allclose(1 / (1 / (1 + np.exp(margins))).mean(1), [2.0, 3.618103, 5.056302], atol=5e-7)
    assert NormalizedLogisticGD(1.0).fit(X, y).n_iter_ == 1


@pytest.mark.parametrize(("gamma", "second"), [(100.0, (1.0, 0.25)), (10.0, (0.962071, 0.287929))])
def test_the_path_and_the_loss_of_theorem_4_1(gamma, second):
    found = path(NormalizedLogisticGD(gamma, normalize=False), *OPPOSED, 2) / gamma
    np.testing.assert_allclose(found, [(0.5, 0.75), second], atol=5e-7)
    losses = NormalizedLogisticGD(gamma, normalize=False).fit(*OPPOSED).loss_curve_
    assert losses[1] == pytest.approx({100.0: 12.5, 10.0: 1.289445}[gamma], abs=5e-7)
    if gamma == 100.0:
        assert losses[2] < 1e-12


@pytest.mark.parametrize(("seed", "steps"), [(0, 4), (1, 30), (2, 9)])
def test_the_path_becomes_the_batch_perceptrons(seed, steps):
    X, y = separable(seed)
    assert steps_of(BatchPerceptron(), (X, y)) == steps
    assert steps_of(NormalizedLogisticGD(1e8, normalize=False), (X, y)) == steps
    ours, limit = (path(m, X, y, steps) for m in (NormalizedLogisticGD(1e8, normalize=False), BatchPerceptron()))
    assert np.abs(ours / 1e8 - limit).max() < 1e-12


def test_the_normalised_path_becomes_the_normalised_perceptrons():
    X, y = separable(1)
    steps = steps_of(BatchPerceptron(normalize=True), (X, y))
    ours, limit = (path(m, X, y, steps) for m in (NormalizedLogisticGD(1e10), BatchPerceptron(normalize=True)))
    assert np.abs(ours / 1e10 - limit).max() < 1e-9


def test_margins():
    assert margin(*worst_case(100)) == pytest.approx((0.5, 1.118034), abs=1e-6)
    assert margin(*separable(1)) == pytest.approx((0.041234, 4.195434), abs=1e-6)


@pytest.mark.parametrize(("gamma", "steps"), [(0.1, 562), (1.0, 56), (100.0, 38)])
def test_steps_on_random_data(gamma, steps):
    assert steps_of(NormalizedLogisticGD(gamma), separable(1)) == steps


def test_the_bound_of_theorem_6_1():
    bounds = []
    for gamma in (0.1, 1.0, 10.0, 100.0):
        for data in (worst_case(100), separable(1)):
            mu, radius = margin(*data)
            bounds.append((radius / mu) ** 2 + 2 * np.log(2 * len(data[0]) - 1) / (gamma * mu**2))
            assert steps_of(NormalizedLogisticGD(gamma), data) <= bounds[-1]
    np.testing.assert_allclose(bounds[::2], [428.5, 47.3, 9.2, 5.4], atol=0.06)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), gamma=st.sampled_from([0.1, 1.0, 100.0, 1e6]), normalize=st.booleans())
def test_no_step_is_longer_than_the_longest_sample_and_duplicates_change_nothing(seed, gamma, normalize):
    X, y = separable(seed, n=12, d=3)
    model = NormalizedLogisticGD(gamma, normalize=normalize)
    found = path(model, X, y, 6)
    moves = np.diff(found, axis=0, prepend=np.zeros((1, 3)))
    assert (np.linalg.norm(moves, axis=1) <= gamma * np.linalg.norm(X, axis=1).max() * (1 + 1e-12)).all()
    doubled = path(model, np.repeat(X, 2, 0), np.repeat(y, 2), 6)
    np.testing.assert_allclose(doubled, found, rtol=1e-12, atol=1e-12 * gamma)


def test_weights_that_underflow_are_no_trouble():
    found = path(NormalizedLogisticGD(1e6), *SMALL, 5)
    assert np.isfinite(found).all()


def test_it_tells_digits_apart():
    X, y = load_digits(return_X_y=True)
    chosen = np.isin(y, (3, 5))
    model = NormalizedLogisticGD(fit_intercept=True).fit(X[chosen] / 16, y[chosen].astype(str))
    assert model.separated_
    assert model.score(X[chosen] / 16, y[chosen].astype(str)) == 1.0
    assert len(model.loss_curve_) == len(model.accuracy_curve_) == model.n_iter_ + 1
    assert model.accuracy_curve_[-1] == 1.0


def test_what_cannot_be_separated_ends_with_a_warning():
    X, y = np.array([[1.0], [1.0]]), np.array([0, 1])
    with pytest.warns(ConvergenceWarning, match="not separated after 5 steps"):
        model = NormalizedLogisticGD(max_iter=5).fit(X, y)
    assert not model.separated_
    with pytest.raises(ValueError, match="separable"):
        margin(X, np.array([-1.0, 1.0]))
    with pytest.raises(ValueError, match="separable"):
        margin(np.array([[1.0, 0], [-1, 1], [-1, -1]]), np.ones(3))


@pytest.mark.parametrize("step_size", [0.0, -1.0, np.nan, np.inf])
def test_step_sizes_out_of_range_are_refused(step_size):
    with pytest.raises(ValueError, match="step_size must be"):
        NormalizedLogisticGD(step_size).fit(*SMALL)


def test_other_misuse_is_refused(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    X, y = SMALL
    with pytest.raises(ValueError, match="max_iter must be"):
        BatchPerceptron(max_iter=0).fit(X, y)
    with pytest.raises(ValueError, match="2 classes, got 3"):
        BatchPerceptron().fit(X, np.arange(3))
    with pytest.raises(ValueError, match="2 classes, got 1 class"):
        BatchPerceptron().fit(X, np.ones(3))
    with pytest.raises(ValueError, match="NaN"):
        BatchPerceptron().fit(X * np.nan, y)
    for name, arguments in (("X", (X[0], y * 1.0)), ("X", (X * np.nan, y * 1.0)), ("y", (X, np.arange(3.0)))):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            margin(*arguments)
    with pytest.raises(ValueError, match="n must be"):
        worst_case(1)
