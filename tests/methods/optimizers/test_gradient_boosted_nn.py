import math
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from fairtrial.methods.optimizers import GBNNClassifier, GBNNRegressor
from fairtrial.methods.optimizers.gradient_boosted_nn import BinaryDeviance, MultinomialDeviance, SquaredError

LABELS = np.array([1.0, 1, -1, 1])
DIRECTION = np.array([1.0, 0.5, -0.2, 0.3])
ONE_HOT = np.eye(3)[[0, 1, 2, 1]]
DIRECTIONS = np.array([[0.5, -0.2, -0.3], [-0.1, 0.4, -0.3], [0, 0.1, 0.2], [-0.3, 0.3, 0]])


def data(load):
    X, y = load(return_X_y=True)
    return StandardScaler().fit_transform(X), y


BINARY, WINE, DIABETES = data(load_breast_cancer), data(load_wine), data(load_diabetes)
SMALL = {"n_units": 12, "units_per_step": 3, "max_iter": 40, "random_state": 0}


def fitted(kind):
    """A small model of each loss, and the samples it was fitted to."""
    if kind == "regression":
        return GBNNRegressor(**SMALL, learning_rate=0.5).fit(*DIABETES), *DIABETES
    X, y = BINARY if kind == "binary" else WINE
    return GBNNClassifier(**SMALL, learning_rate=0.5).fit(X, y), X, y


each_kind = pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])


@parametrize_with_checks(
    [GBNNClassifier(10, 2, max_iter=50, random_state=0), GBNNRegressor(10, 2, max_iter=50, random_state=0)]
)
def test_scikit_learns_contract(estimator, check, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # arguments are refused by `fit`, not before
    check(estimator)


def test_two_classes_by_hand():
    loss = BinaryDeviance()
    start = loss.start(LABELS)
    assert float(start) == pytest.approx(0.54930614, abs=5e-9)
    F = np.full(4, float(start))
    r = loss.residuals(LABELS, F)
    np.testing.assert_allclose(r, [0.5, 0.5, -1.5, 0.5], rtol=1e-14)
    assert loss.newton_step(r, DIRECTION) == pytest.approx(1.15942029, abs=5e-9)
    assert loss.mean(LABELS, F) == pytest.approx(0.56233514, abs=5e-9)


def test_the_newton_step_for_two_classes_is_exact():
    loss = BinaryDeviance()
    F = np.full(4, float(loss.start(LABELS)))

    def along(rho):
        return 4 * loss.mean(LABELS, F + rho * DIRECTION)

    e = 1e-4
    slope, curvature = (along(e) - along(-e)) / (2 * e), (along(e) - 2 * along(0.0) + along(-e)) / e**2
    assert -slope / curvature == pytest.approx(1.159420, abs=1e-6)


def test_three_classes_by_hand():
    loss = MultinomialDeviance()
    F = np.tile(loss.start(ONE_HOT), (4, 1))
    assert (F == 0).all()
    r = loss.residuals(ONE_HOT, F)
    np.testing.assert_allclose(r, ONE_HOT - 1 / 3, rtol=1e-14)
    rho = loss.newton_step(r, DIRECTIONS)
    assert rho == pytest.approx(6.72413793, abs=5e-9)
    p = 1 / 3
    exact = (r * DIRECTIONS).sum() / ((DIRECTIONS**2 * p).sum() - ((DIRECTIONS * p).sum(1) ** 2).sum())
    assert exact == pytest.approx(4.64286, abs=5e-6)
    assert loss.mean(ONE_HOT, F) == pytest.approx(math.log(3))


def test_losses_and_residuals_are_finite_far_out():
    far = np.array([1e4, -1e4, 1e4, -1e4])
    for loss, y, F in (
        (BinaryDeviance(), LABELS, far),
        (MultinomialDeviance(), ONE_HOT, np.outer(far, [1.0, 0, -1])),
        (SquaredError(), LABELS, far),
    ):
        r = loss.residuals(y, F)
        assert np.isfinite(r).all()
        assert np.isfinite(loss.mean(y, F))
        step = loss.newton_step(0 * r, 0 * r + 1)
        assert step == 1.0 if isinstance(loss, SquaredError) else math.isnan(step)


@each_kind
def test_the_merged_networks_equal_the_sum_of_the_steps(kind):
    model, X, _ = fitted(kind)
    F = model.intercept_ + sum(
        step * h.predict(X) for step, h in zip(model.step_sizes_, model.estimators_, strict=True)
    )
    module = model.to_module()
    assert [type(layer).__name__ for layer in module] == ["Linear", "Sigmoid", "Linear"]
    assert module[0].out_features == 12
    with torch.no_grad():
        output = module(torch.from_numpy(X)).numpy()
    scale = 2 if kind == "binary" else 1
    np.testing.assert_allclose(output.reshape(F.shape), scale * F, rtol=1e-10, atol=1e-10)
    mlp = model.to_mlp()
    if kind == "regression":
        np.testing.assert_allclose(model.predict(X), F, rtol=1e-10)
        np.testing.assert_allclose(mlp.predict(X), F, rtol=1e-10)
        return
    np.testing.assert_allclose(model.decision_function(X), F, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(mlp.predict_proba(X), model.predict_proba(X), rtol=1e-9, atol=1e-12)
    assert (mlp.predict(X) == model.predict(X)).all()


@each_kind
def test_a_prefix_is_a_model(kind):
    model, X, y = fitted(kind)
    stages = list(model.staged_predict(X))
    scores = model.staged_score(X, y)
    assert len(stages) == len(scores) == len(model.estimators_) == 4
    for t, stage in enumerate(stages, 1):
        first = model.truncate(t)
        np.testing.assert_allclose(first.predict(X), stage, rtol=1e-12)
        assert first.score(X, y) == pytest.approx(scores[t - 1], rel=1e-12)
        assert first.to_module()[0].out_features == 3 * t
        assert len(first.train_loss_) == t + 1
    assert len(model.estimators_) == 4
    if kind != "regression":
        for t, stage in enumerate(model.staged_predict_proba(X), 1):
            np.testing.assert_allclose(model.truncate(t).predict_proba(X), stage, rtol=1e-10, atol=1e-12)


@each_kind
def test_the_training_loss_is_that_of_the_stages(kind):
    model, X, y = fitted(kind)
    if kind == "regression":
        expected = [np.square(y - F).mean() / 2 for F in model.staged_predict(X)]
    else:
        expected = [-np.log(P[np.arange(len(y)), y]).mean() for P in model.staged_predict_proba(X)]
    np.testing.assert_allclose(model.train_loss_[1:], expected, rtol=1e-9)
    assert model.train_loss_[-1] < model.train_loss_[0]


def test_without_any_step_the_start_is_predicted():
    model, X, y = fitted("binary")
    np.testing.assert_allclose(model.truncate(0).predict_proba(X)[:, 1], y.mean(), rtol=1e-12)
    with pytest.raises(ValueError, match="at least one step"):
        model.truncate(0).to_module()


def test_the_error_in_training_never_rises_with_all_rows():
    model = GBNNRegressor(40, 2, subsample=1.0, random_state=0).fit(*DIABETES)
    loss = model.train_loss_
    assert (loss[1:] <= loss[:-1] * (1 + 1e-6)).all()
    assert loss[0] == pytest.approx(np.var(DIABETES[1]) / 2)
    assert 1300 < loss[1] < 1800  # 1499 in one run
    assert loss[-1] < 400  # 211 in the same


def test_one_step_is_a_network_fitted_to_what_is_left_of_the_mean():
    X, y = DIABETES
    model = GBNNRegressor(6, 6, subsample=1.0, max_iter=100, random_state=3).fit(X, y)
    (only,) = model.estimators_
    alone = clone(only).set_params(max_iter=100)
    with pytest.warns(Warning, match="lbfgs"):
        alone.fit(X, y - y.mean())
    np.testing.assert_allclose(model.predict(X), y.mean() + alone.predict(X), rtol=1e-10)
    assert only.alpha == 1e-4
    assert model.step_sizes_ == [1.0]


def test_shrinkage_multiplies_the_newton_step():
    X, y = BINARY
    full, half = (
        GBNNClassifier(2, 2, learning_rate=rate, max_iter=30, random_state=1).fit(X, y) for rate in (1.0, 0.5)
    )
    np.testing.assert_allclose(half.step_sizes_, full.step_sizes_ / 2, rtol=1e-12)


def test_units_that_fill_no_step_are_left_out():
    assert len(GBNNRegressor(11, 4, max_iter=5).fit(*DIABETES).estimators_) == 2


def test_a_seed_decides_everything_and_the_global_generator_is_left_alone():
    np.random.seed(5)  # noqa: NPY002 - the one that is to be left alone
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    one, other = (GBNNRegressor(**SMALL).fit(*DIABETES) for _ in range(2))
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    assert (one.predict(DIABETES[0]) == other.predict(DIABETES[0])).all()
    again = pickle.loads(pickle.dumps(one))
    assert (again.predict(DIABETES[0]) == one.predict(DIABETES[0])).all()


def test_boosting_stops_where_no_residuals_are_left():
    X = np.repeat([[-1.0], [1.0]], 10, axis=0)
    y = np.repeat(["a", "b"], 10)
    model = GBNNClassifier(100, 1, random_state=0).fit(X, y)
    assert model.score(X, y) == 1.0
    assert 1 <= len(model.estimators_) < 100
    assert (np.diff(model.train_loss_) < 0).all()
    assert model.train_loss_[-1] < 1e-4
    constant = GBNNRegressor().fit(X, np.full(20, 3.0))
    assert (constant.predict(X) == 3.0).all()


@pytest.mark.parametrize(("activation", "layer"), [("tanh", "Tanh"), ("relu", "ReLU"), ("identity", "Identity")])
def test_other_activations(activation, layer):
    X, y = DIABETES
    model = GBNNRegressor(6, 2, max_iter=20, activation=activation, random_state=0).fit(X, y)
    module = model.to_module()
    assert type(module[1]).__name__ == layer
    with torch.no_grad():
        np.testing.assert_allclose(module(torch.from_numpy(X)).numpy()[:, 0], model.predict(X), rtol=1e-10)
    np.testing.assert_allclose(model.to_mlp().predict(X), model.predict(X), rtol=1e-10)
    assert model.train_loss_[-1] < model.train_loss_[0]


def test_labels_are_the_callers():
    X, y = WINE[0][:, :3], np.array(["low", "mid", "top"])[WINE[1]]
    model = GBNNClassifier(4, 2, max_iter=20, random_state=0).fit(X, y)
    assert set(model.predict(X)) <= {"low", "mid", "top"}
    assert (model.to_mlp().predict(X) == model.predict(X)).all()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"n_units": 0}, "n_units"),
        ({"n_units": 2.5}, "n_units"),
        ({"units_per_step": 0}, "units_per_step"),
        ({"n_units": 3, "units_per_step": 4}, "units_per_step"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"learning_rate": math.inf}, "learning_rate"),
        ({"subsample": 0.0}, "subsample"),
        ({"subsample": 1.1}, "subsample"),
        ({"subsample": math.nan}, "subsample"),
        ({"max_iter": 0}, "max_iter"),
        ({"activation": "sine"}, "activation"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, name, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    for estimator, (X, y) in ((GBNNClassifier, BINARY), (GBNNRegressor, DIABETES)):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            estimator(**arguments).fit(X, y)


def test_other_misuse_is_refused(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    X, y = BINARY
    with pytest.raises(ValueError, match="y must be labels of at least 2 classes, got '1 class'"):
        GBNNClassifier().fit(X, np.ones(len(X)))
    with pytest.raises(ValueError, match="NaN"):
        GBNNClassifier().fit(np.full_like(X, math.nan), y)
    model = GBNNRegressor(2, 1, max_iter=5).fit(*DIABETES)
    for steps in (-1, 3, 1.0):
        with pytest.raises(ValueError, match="n_steps must be a whole number within 0..2"):
            model.truncate(steps)
