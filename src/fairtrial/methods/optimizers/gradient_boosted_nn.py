"""A network with one hidden layer, built by gradient boosting (Emami & Martínez-Muñoz 2019, arXiv:1909.12098).

Instead of training all hidden units together, each of T steps fits a network of J units, with weights ω, w, c and b of
its own and σ the logistic function, to the pseudo-residuals of the sum so far:

    h_t(x) = b_t + Σ_j ω_tj σ(w_tjᵀx + c_tj),    fitted to r_t = -∂L/∂F at F_{t-1} on a subset of the rows
    F_t = F_{t-1} + ν ρ_t h_t,                   ρ_t a Newton step of ρ ↦ Σ L(F_{t-1} + ρ h_t) on all rows

    regression    L = ½ (y - F)²               F_0 = mean y                   r = y - F                 ρ = 1
    two classes   L = log(1 + exp(-2 y F))     F_0 = ½ log (1 + ȳ)/(1 - ȳ)    r = 2y / (1 + exp(2yF))   y = ±1
                                               ρ = Σ r h / Σ |r| (2 - |r|) h²
    K classes     L = -log softmax(F)_class    F_0 = 0                        r = Y - softmax(F)        Y one-hot
                                               ρ = Σ r h / Σ p (1 - p) h²,    p = softmax(F), sums over rows and classes

F_T is a network with T·J hidden units: the layers stand side by side, and output weights ν ρ_t ω_t follow. For two
classes the output is doubled, so that a logistic unit after it gives P(y = 1) = 1 / (1 + exp(-2F)). The first steps
alone are a network, too: units trained last can be left out, without training anew.

With K classes there is one ρ for all of them, from the diagonal of softmax's Hessian; this is the paper's, and no exact
Newton step. The authors' code draws the subsets of rows from NumPy's global generator; here they come from
`random_state`. With all rows used, they keep their order. Boosting ends early where half the mean square of r is below
2.2e-9, or the denominator of ρ vanishes. L-BFGS ends where an iteration gains no more than that, so that h would be
noise, and ρ would divide by it; the authors' code goes on. Targets of a regression should not be as small, either.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from scipy.special import expit, log_expit, logsumexp, softmax
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import accuracy_score, r2_score
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import nn

from fairtrial.methods.arguments import require

RESOLUTION = 1e7 * np.finfo(float).eps  # SciPy's L-BFGS ends where an iteration gains less

ACTIVATIONS: dict[str, tuple[Callable[[ndarray], ndarray], type[nn.Module]]] = {
    "logistic": (expit, nn.Sigmoid),
    "tanh": (np.tanh, nn.Tanh),
    "relu": (lambda z: np.maximum(z, 0.0), nn.ReLU),
    "identity": (lambda z: z, nn.Identity),
}


class Loss(Protocol):
    """What boosting needs of a loss L(y, F). For one output y, F, r and h are (n,), for K classes (n, K)."""

    output_scale: float  # of the network's output relative to F

    def start(self, y: ndarray) -> ndarray:
        """F_0: a number, or one for each class (K,)."""

    def residuals(self, y: ndarray, F: ndarray) -> ndarray:
        """r = -∂L/∂F."""

    def newton_step(self, r: ndarray, h: ndarray) -> float:
        """ρ; NaN where its denominator vanishes."""

    def mean(self, y: ndarray, F: ndarray) -> float:
        """L, averaged over rows."""


class SquaredError:
    """½ (y - F)²."""

    output_scale = 1.0

    def start(self, y: Float[ndarray, " n"]) -> Float[ndarray, ""]:
        mean: ndarray = np.asarray(y.mean())
        return mean

    def residuals(self, y: Float[ndarray, " n"], F: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
        found: ndarray = y - F
        return found

    def newton_step(self, r: Float[ndarray, " n"], h: Float[ndarray, " n"]) -> float:
        return 1.0

    def mean(self, y: Float[ndarray, " n"], F: Float[ndarray, " n"]) -> float:
        return float(np.square(y - F).mean() / 2)


class BinaryDeviance:
    """log(1 + exp(-2yF)) for labels y of ±1, both of which have to be there."""

    output_scale = 2.0

    def start(self, y: Float[ndarray, " n"]) -> Float[ndarray, ""]:
        return np.asarray(0.5 * np.log((1 + y.mean()) / (1 - y.mean())))

    def residuals(self, y: Float[ndarray, " n"], F: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
        found: ndarray = 2 * y * expit(-2 * y * F)
        return found

    def newton_step(self, r: Float[ndarray, " n"], h: Float[ndarray, " n"]) -> float:
        size = np.abs(r)
        return _quotient(r * h, size * (2 - size) * h * h)

    def mean(self, y: Float[ndarray, " n"], F: Float[ndarray, " n"]) -> float:
        return float(-log_expit(2 * y * F).mean())


class MultinomialDeviance:
    """-log softmax(F) of the class, for one-hot labels."""

    output_scale = 1.0

    def start(self, y: Float[ndarray, "n k"]) -> Float[ndarray, " k"]:
        return np.zeros(y.shape[1])

    def residuals(self, y: Float[ndarray, "n k"], F: Float[ndarray, "n k"]) -> Float[ndarray, "n k"]:
        found: ndarray = y - softmax(F, axis=1)
        return found

    def newton_step(self, r: Float[ndarray, "n k"], h: Float[ndarray, "n k"]) -> float:
        size = np.abs(r)  # 1 - p for the class, p for the others
        return _quotient(r * h, size * (1 - size) * h * h)

    def mean(self, y: Float[ndarray, "n k"], F: Float[ndarray, "n k"]) -> float:
        return float((logsumexp(F, axis=1) - (y * F).sum(1)).mean())


def _quotient(slopes: ndarray, curvatures: ndarray) -> float:
    curvature = curvatures.sum()
    return float(slopes.sum() / curvature) if curvature > 0 else math.nan


class _BoostedNetwork(BaseEstimator):
    """The sum of small networks, whatever it is for; subclasses encode y and say what F means."""

    _loss: Loss

    def __init__(
        self,
        n_units: int = 200,
        units_per_step: int = 1,
        learning_rate: float = 1.0,
        subsample: float = 0.5,
        max_iter: int = 200,
        activation: str = "logistic",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_units, self.units_per_step = n_units, units_per_step
        self.learning_rate, self.subsample, self.max_iter = learning_rate, subsample, max_iter
        self.activation, self.random_state = activation, random_state

    def _check(self) -> None:
        for name in ("n_units", "units_per_step", "max_iter"):
            value = getattr(self, name)
            require(isinstance(value, int | np.integer) and int(value) >= 1, name, value, "a whole number, at least 1")
        require(self.units_per_step <= self.n_units, "units_per_step", self.units_per_step, "at most n_units")
        require(0 < self.learning_rate < math.inf, "learning_rate", self.learning_rate, "above 0 and finite")
        require(0 < self.subsample <= 1, "subsample", self.subsample, "within (0, 1]")
        require(self.activation in ACTIVATIONS, "activation", self.activation, f"one of {sorted(ACTIVATIONS)}")

    def _boost(self, X: Float[ndarray, "n d"], y: ndarray) -> None:
        """Take the steps, for y as the loss has it."""
        random, n = check_random_state(self.random_state), len(X)
        drawn = max(1, int(self.subsample * n))
        self.intercept_ = self._loss.start(y)
        F = np.broadcast_to(self.intercept_, y.shape)
        self.estimators_: list[MLPRegressor] = []
        steps, losses = [], [self._loss.mean(y, F)]
        for _ in range(self.n_units // self.units_per_step):
            r = self._loss.residuals(y, F)
            if np.square(r).mean() / 2 < RESOLUTION:
                break
            learner = self._learner(int(random.randint(2**31 - 1)))
            rows = slice(None) if self.subsample == 1 else random.permutation(n)[:drawn]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # with tol = 0 it ends at max_iter
                h = learner.fit(X[rows], r[rows]).predict(X)
            rho = self._loss.newton_step(r, h)
            if not math.isfinite(rho):
                break
            self.estimators_.append(learner)
            steps.append(self.learning_rate * rho)
            F = F + steps[-1] * h
            losses.append(self._loss.mean(y, F))
        self.step_sizes_, self.train_loss_ = np.array(steps), np.array(losses)
        self.n_iter_ = np.array([learner.n_iter_ for learner in self.estimators_], dtype=int)

    def _learner(self, seed: int) -> MLPRegressor:
        return MLPRegressor(
            hidden_layer_sizes=(self.units_per_step,),
            activation=self.activation,
            solver="lbfgs",
            alpha=1e-4,
            max_iter=self.max_iter,
            tol=0.0,
            random_state=seed,
        )

    def _hidden(self) -> tuple[Float[ndarray, "d m"], Float[ndarray, " m"]]:
        """Weights and biases of all m = T·J hidden units."""
        weights = [learner.coefs_[0] for learner in self.estimators_]
        biases = [learner.intercepts_[0] for learner in self.estimators_]
        return np.hstack([np.empty((self.n_features_in_, 0)), *weights]), np.concatenate([np.empty(0), *biases])

    def _staged(self, X: Any) -> Iterator[ndarray]:
        """F_1, F_2, … of samples (n, d)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        weights, biases = self._hidden()
        hidden = ACTIVATIONS[self.activation][0](X @ weights + biases)
        F = np.tile(np.atleast_1d(self.intercept_), (len(X), 1))
        J = self.units_per_step
        for t, (learner, step) in enumerate(zip(self.estimators_, self.step_sizes_, strict=True)):
            F = F + step * (hidden[:, t * J : (t + 1) * J] @ learner.coefs_[1] + learner.intercepts_[1])
            yield F.reshape(len(X), *self.intercept_.shape)

    def _raw(self, X: Any) -> ndarray:
        """F of samples (n, d)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        weights, biases = self._hidden()
        outer, bias = self._output()
        F: ndarray = ACTIVATIONS[self.activation][0](X @ weights + biases) @ outer + bias
        return F.reshape(len(X), *self.intercept_.shape)

    def _output(self) -> tuple[Float[ndarray, "m k"], Float[ndarray, " k"]]:
        """Weights and bias of the output layer that gives F."""
        start = np.atleast_1d(self.intercept_)
        pieces = list(zip(self.estimators_, self.step_sizes_, strict=True))
        weights = [step * learner.coefs_[1] for learner, step in pieces]
        biases = [step * learner.intercepts_[1] for learner, step in pieces]
        return np.vstack([np.empty((0, len(start))), *weights]), np.sum([start, *biases], axis=0)

    def _layers(self) -> tuple[tuple[ndarray, ndarray], tuple[ndarray, ndarray]]:
        """Weights and biases of both layers of the network, scaled as its output is."""
        check_is_fitted(self)
        require(len(self.estimators_) > 0, "the model", "no hidden units", "of at least one step to be a network")
        weights, bias = self._output()
        return self._hidden(), (self._loss.output_scale * weights, self._loss.output_scale * bias)

    def to_module(self) -> nn.Sequential:
        """The whole model as Linear, activation, Linear in float64.

        Its output is (n, 1) for regression; (n, 1) for two classes, the logit 2F of the second; else (n, K), scores for
        a softmax.
        """
        hidden, output = self._layers()
        first, last = (nn.Linear(weight.shape[0], weight.shape[1], device="meta") for weight, _ in (hidden, output))
        for layer, (weight, bias) in ((first, hidden), (last, output)):
            layer.weight, layer.bias = nn.Parameter(torch.tensor(weight.T)), nn.Parameter(torch.tensor(bias))
        return nn.Sequential(first, ACTIVATIONS[self.activation][1](), last)

    def _as_mlp(self, mlp: Any, y: ndarray) -> Any:
        """An MLP of scikit-learn with this model's weights; y is what it has to be shown to know its outputs."""
        hidden, output = self._layers()
        mlp.set_params(hidden_layer_sizes=hidden[1].shape, activation=self.activation, solver="lbfgs", max_iter=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            mlp.fit(np.zeros((len(y), self.n_features_in_)), y)
        mlp.coefs_, mlp.intercepts_ = [hidden[0], output[0]], [hidden[1], output[1]]
        return mlp

    def truncate(self, n_steps: int) -> Any:
        """The fitted model after its first `n_steps` steps, a copy that shares their networks with this one."""
        check_is_fitted(self)
        steps = len(self.estimators_)
        within = isinstance(n_steps, int | np.integer) and 0 <= n_steps <= steps
        require(within, "n_steps", n_steps, f"a whole number within 0..{steps}, the steps taken")
        model = copy.copy(self)
        model.estimators_, model.step_sizes_ = self.estimators_[:n_steps], self.step_sizes_[:n_steps]
        model.train_loss_, model.n_iter_ = self.train_loss_[: n_steps + 1], self.n_iter_[:n_steps]
        return model


class GBNNClassifier(ClassifierMixin, _BoostedNetwork):
    """Classification by a network with one hidden layer that is boosted a few units at a time.

    Args:
        n_units: hidden units of the whole network; T = ⌊n_units / units_per_step⌋ steps are taken.
        units_per_step: J, at least 1; the paper chooses among 1 to 4.
        learning_rate: ν, the shrinkage of every step, above 0; the paper chooses among 0.025, 0.05, 0.1, 0.5 and 1.
        subsample: part of the rows that a step is fitted to, drawn without replacement, within (0, 1]; the paper
            chooses among 0.25, 0.5, 0.75 and 1.
        max_iter: most iterations of L-BFGS in a step; nearly all are used.
        activation: 'logistic', 'tanh', 'relu' or 'identity'.
        random_state: seed of the initial weights and of the rows drawn, as in scikit-learn.

    Attributes:
        estimators_: the steps' networks h_t, scikit-learn's `MLPRegressor`s, for K > 2 classes with K outputs.
        step_sizes_ (T,): ν ρ_t.
        intercept_: F_0, () for two classes, else (K,).
        train_loss_ (T + 1,): mean loss in nats on the training data, before the first step and after each.
        classes_ (K,): the labels.
        n_iter_ (T,): iterations of L-BFGS in each step.
        n_features_in_: d.

    The defaults are those of the authors' code. Features should be standardised, as in the paper.

    Raises:
        ValueError: an argument lies outside its range, X is not finite, or y has only one class.
    """

    def fit(self, X: Any, y: Any) -> "GBNNClassifier":
        """Boost a network on samples X (n, d), finite, and labels y (n,)."""
        self._check()
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, place = np.unique(y, return_inverse=True)
        require(len(self.classes_) >= 2, "y", f"{len(self.classes_)} class", "labels of at least 2 classes")
        if len(self.classes_) == 2:
            self._loss = BinaryDeviance()
            self._boost(X, 2.0 * place - 1.0)
        else:
            self._loss = MultinomialDeviance()
            self._boost(X, np.eye(len(self.classes_))[place])
        return self

    def decision_function(self, X: Any) -> ndarray:
        """F of samples (n, d): (n,) for two classes, half the logit of the second; else (n, K)."""
        return self._raw(X)

    def predict_proba(self, X: Any) -> Float[ndarray, "n k"]:
        """Probabilities of the classes for samples (n, d)."""
        return _probabilities(self._raw(X))

    def predict(self, X: Any) -> Any:
        """Labels (n,) of samples (n, d)."""
        return self._labels(self._raw(X))

    def staged_predict_proba(self, X: Any) -> Iterator[Float[ndarray, "n k"]]:
        """`predict_proba` after each step."""
        return (_probabilities(F) for F in self._staged(X))

    def staged_predict(self, X: Any) -> Iterator[Any]:
        """`predict` after each step."""
        return (self._labels(F) for F in self._staged(X))

    def staged_score(self, X: Any, y: Any) -> Float[ndarray, " t"]:
        """Accuracy after each step."""
        return np.array([accuracy_score(y, labels) for labels in self.staged_predict(X)])

    def to_mlp(self) -> MLPClassifier:
        """The whole model as scikit-learn's network; what that says of its training (`loss_`, …) is meaningless."""
        check_is_fitted(self)
        return self._as_mlp(MLPClassifier(), self.classes_)

    def _labels(self, F: ndarray) -> Any:
        return self.classes_[(F > 0).astype(int) if F.ndim == 1 else F.argmax(1)]


class GBNNRegressor(RegressorMixin, _BoostedNetwork):
    """Regression by a network with one hidden layer that is boosted a few units at a time.

    Arguments, defaults and errors are those of `GBNNClassifier`; the target is a number for each sample.

    Attributes:
        estimators_: the steps' networks h_t, scikit-learn's `MLPRegressor`s.
        step_sizes_ (T,): ν.
        intercept_ (): F_0, the mean of the target.
        train_loss_ (T + 1,): half the mean squared error on the training data, before the first step and after each.
        n_iter_ (T,): iterations of L-BFGS in each step.
        n_features_in_: d.
    """

    _loss = SquaredError()

    def fit(self, X: Any, y: Any) -> "GBNNRegressor":
        """Boost a network on samples X (n, d) and targets y (n,), finite."""
        self._check()
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        self._boost(X, y.astype(np.float64))
        return self

    def predict(self, X: Any) -> Float[ndarray, " n"]:
        """Predictions (n,) for samples (n, d)."""
        return self._raw(X)

    def staged_predict(self, X: Any) -> Iterator[Float[ndarray, " n"]]:
        """`predict` after each step."""
        return self._staged(X)

    def staged_score(self, X: Any, y: Any) -> Float[ndarray, " t"]:
        """The coefficient of determination R² after each step."""
        return np.array([r2_score(y, predictions) for predictions in self.staged_predict(X)])

    def to_mlp(self) -> MLPRegressor:
        """The whole model as scikit-learn's network; what that says of its training (`loss_`, …) is meaningless."""
        return self._as_mlp(MLPRegressor(), np.zeros(2))


def _probabilities(F: ndarray) -> Float[ndarray, "n k"]:
    if F.ndim == 1:
        return np.column_stack([expit(-2 * F), expit(2 * F)])
    found: ndarray = softmax(F, axis=1)
    return found
