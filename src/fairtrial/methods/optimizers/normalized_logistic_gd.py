"""Gradient descent with large steps for separable logistic regression (Tyurin 2024, arXiv:2412.08424).

With z_i = y_i a_i for rows a_i and labels y_i of ±1, no intercept, and θ_0 = 0,

    f(θ) = 1/n Σ_i log(1 + exp(-z_iᵀθ)),    ∇f(θ) = -1/n Σ_i s_i z_i,    s_i = 1 / (1 + exp(z_iᵀθ))
    LR+GD:             θ ← θ - γ ∇f(θ)
    Normalized LR+GD:  θ ← θ - γ β ∇f(θ) = θ + γ Σ_i s_i z_i / Σ_j s_j,    β = 1 / (1/n Σ_i s_i)

What counts is the first θ that separates the data, z_iᵀθ > 0 for all i, and not the loss: that rises with γ while the
number of steps falls. For γ → ∞ the path θ/γ becomes that of a batch perceptron (Theorem 3.2), the normalised one with
1/|S| in place of 1/n:

    θ ← θ + 1/n Σ_{i in S} z_i,    S = {i : z_iᵀθ ≤ 0},    the first step being half of that

With R = max ‖a_i‖ and the margin μ = max_{‖θ‖=1} min_i z_iᵀθ > 0, at most n R²/μ² steps are needed by the batch
perceptron, R²/μ² by the normalised one, and by Normalized LR+GD R²/μ² + 2 log(2n - 1) / (γ μ²) (Theorem 6.1).
Both depend on how the features are scaled.

There is no code by the author. His text once has β tend to |S|; by the formula it tends to n/|S|, which is followed.
The weights s_i / Σ s_j are a softmax of log s_i, so that they exist where every s_i underflows.
"""

import warnings
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.optimize import nnls
from scipy.special import expit, log_expit, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from fairtrial.methods.arguments import require

NNLS_WEIGHT = 1e3  # of the constraint that the coefficients of the margin's dual sum to 1


class _LinearSeparator(ClassifierMixin, BaseEstimator):
    """Two classes, told apart by a hyperplane that starts at 0 and moves until the training data are separated."""

    max_iter: int
    fit_intercept: bool

    def fit(self, X: Any, y: Any) -> Any:
        """Move the hyperplane until it separates the data.

        Args:
            X: samples (n, d), finite.
            y: labels (n,) of two classes; the second in sorted order is the positive one.

        Warns:
            ConvergenceWarning: the data are not separated after max_iter steps.
        """
        self._check()
        require(self.max_iter >= 1, "max_iter", self.max_iter, "at least 1")
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_ = np.unique(y)
        if len(self.classes_) != 2:
            only = "1 class" if len(self.classes_) == 1 else f"{len(self.classes_)} classes"
            raise ValueError(f"Only binary classification is supported: y must have 2 classes, got {only}")
        signs = np.where(y == self.classes_[1], 1.0, -1.0)
        z = signs[:, None] * (np.column_stack([X, np.ones(len(X))]) if self.fit_intercept else X)
        theta, margins = np.zeros(z.shape[1]), np.zeros(len(z))
        losses, accuracies = [np.log(2.0)], [0.0]
        steps = 0
        while not (margins > 0).all() and steps < self.max_iter:
            theta += self._move(z, margins, steps)
            margins = z @ theta
            steps += 1
            losses.append(-log_expit(margins).mean())
            accuracies.append((margins > 0).mean())
        self.n_iter_, self.separated_ = steps, bool((margins > 0).all())
        self.loss_curve_, self.accuracy_curve_ = np.array(losses), np.array(accuracies)
        self.coef_ = theta[None, : X.shape[1]]
        self.intercept_ = theta[X.shape[1] :] if self.fit_intercept else np.zeros(1)
        if not self.separated_:
            warnings.warn(
                f"the data are not separated after {steps} steps: they may not be separable, or max_iter is too small",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def decision_function(self, X: Any) -> Float[ndarray, " n"]:
        """Scores (n,) of samples (n, d): above 0 for the second class."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        scores: Float[ndarray, " n"] = X @ self.coef_[0] + self.intercept_[0]
        return scores

    def predict(self, X: Any) -> Any:
        """Labels (n,) of samples (n, d)."""
        positive = self.decision_function(X) > 0
        return self.classes_[positive.astype(int)]

    def _check(self) -> None:
        """Refuse arguments that are out of range."""

    def _move(self, z: ndarray, margins: ndarray, step: int) -> ndarray:
        """What a step adds to θ (d,), for z (n, d) and margins zθ (n,)."""
        raise NotImplementedError

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


class NormalizedLogisticGD(_LinearSeparator):
    """Normalized LR+GD, or with `normalize=False` LR+GD, until the training data are separated.

    Args:
        step_size: γ, above 0; 100 is the largest of the paper's tables. It is in units of θ, so feature scales count.
        max_iter: most steps to take.
        normalize: divide the gradient by the mean of s_i.
        fit_intercept: append a feature of ones; the paper has none.

    Attributes:
        coef_ (1, d), intercept_ (1,): the hyperplane θ.
        classes_ (2,): the labels.
        n_iter_: steps taken.
        separated_: whether the training data are separated.
        loss_curve_, accuracy_curve_ (n_iter_ + 1,): f(θ_t), and the part of the samples with a margin above 0.

    Raises:
        ValueError: an argument lies outside its range, X is not finite, or y has not two classes.
    """

    def __init__(
        self,
        step_size: float = 100.0,
        max_iter: int = 100_000,
        normalize: bool = True,
        fit_intercept: bool = False,
    ) -> None:
        self.step_size, self.max_iter = step_size, max_iter
        self.normalize, self.fit_intercept = normalize, fit_intercept

    def _check(self) -> None:
        require(0 < self.step_size < np.inf, "step_size", self.step_size, "above 0 and finite")

    def _move(self, z: ndarray, margins: ndarray, step: int) -> ndarray:
        weights = softmax(log_expit(-margins)) if self.normalize else expit(-margins) / len(z)
        move: ndarray = self.step_size * (weights @ z)
        return move


class BatchPerceptron(_LinearSeparator):
    """The limit of large steps: the mean over what is not yet right is added. `coef_` is in units of the step size.

    Args:
        max_iter: most steps to take.
        normalize: divide by the number of samples that are not yet right, instead of by the number of all.
        fit_intercept: append a feature of ones; the paper has none.

    Attributes and errors are those of `NormalizedLogisticGD`. The half step that the plain one begins with counts.
    """

    def __init__(self, max_iter: int = 100_000, normalize: bool = False, fit_intercept: bool = False) -> None:
        self.max_iter, self.normalize, self.fit_intercept = max_iter, normalize, fit_intercept

    def _move(self, z: ndarray, margins: ndarray, step: int) -> ndarray:
        wrong = margins <= 0
        count = wrong.sum() if self.normalize else len(z) * (1 if step else 2)
        move: ndarray = wrong @ z / count
        return move


class Margin(NamedTuple):
    """The margin μ of the best hyperplane through 0, and the length R of the longest sample."""

    mu: float
    radius: float


def margin(X: Float[ndarray, "n d"], y: Float[ndarray, " n"]) -> Margin:
    """μ = max_{‖θ‖=1} min_i y_i a_iᵀθ and R = max ‖a_i‖ of samples (n, d) and labels (n,) of ±1.

    μ is the distance of 0 from the convex hull of the y_i a_i, found as a non-negative least-squares problem.

    Raises:
        ValueError: shapes, labels or values do not fit, or no hyperplane through 0 separates the data.
    """
    X, y = np.asarray(X, dtype=np.float64), np.asarray(y, dtype=np.float64)
    require(X.ndim == 2 and len(X) > 0, "X", X.shape, "of shape (n, d), with n at least 1")
    require(bool(np.isfinite(X).all()), "X", "NaN or infinity", "finite")
    require(y.shape == X.shape[:1], "y", y.shape, f"of shape {X.shape[:1]}")
    require(bool((np.abs(y) == 1).all()), "y", np.unique(y), "labels of -1 and 1")
    z, radius = y[:, None] * X, float(np.linalg.norm(X, axis=1).max())
    require(radius > 0, "X", "only zeros", "separable by a hyperplane through 0")
    unit = z / radius
    system = np.vstack([unit.T, np.full(len(z), NNLS_WEIGHT)])
    weights, _ = nnls(system, np.append(np.zeros(z.shape[1]), NNLS_WEIGHT))
    nearest = (weights / weights.sum()) @ unit
    distance = float(np.linalg.norm(nearest))
    separable = distance > 1e-9 and float((unit @ nearest).min()) > 0
    require(separable, "X and y", f"a hull within {distance:.1e} R of 0", "separable by a hyperplane through 0")
    return Margin(distance * radius, radius)


def worst_case(n: int) -> tuple[Float[ndarray, "n 2"], Float[ndarray, " n"]]:
    """Samples (n, 2) and labels (n,) on which LR+GD takes some n steps (Theorem 5.1); one of them is positive."""
    require(n >= 2, "n", n, "at least 2")
    X = np.tile([-0.5, -1.0], (n, 1))
    X[0, 0] = 0.5
    y = -np.ones(n)
    y[0] = 1.0
    return X, y
