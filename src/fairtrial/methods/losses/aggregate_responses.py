"""Learning from aggregate responses: only the mean response of each bag is known (Javanmard et al., ICLR 2024,
arXiv:2401.11081).

n samples lie in m bags B_a; known are ybar_a, the mean of y in each. With predictions f_i, and fbar_a their bag mean,

    L_bag = (1/m) sum_a l(ybar_a, fbar_a)
    L_ins = (1/m) sum_a (1/|B_a|) sum_{i in B_a} l(ybar_a, f_i)
    L_int = L_bag + rho R,    R = (1/m) sum_a (1/|B_a|) sum_{i in B_a} (f_i - fbar_a)²

For squared error L_ins = L_bag + R, so that rho = 0 is the bag loss and rho = 1 the instance loss. For a convex l,
L_bag ≤ L_ins; with |l''| ≤ C, L_ins ≤ L_bag + (C/2) R. Bags need not be of equal size: every bag counts the same.

Of linear predictions f = X θ, L_int is least at

    θ = (Xᵀ P X + rho Xᵀ (I - P) X)⁻¹ Xᵀ P y,    P = block averaging over bags,

and for x ~ N(0, I_d), y = xᵀθ0 + N(0, σ²), random bags of size k and n / d → psi its excess risk is known exactly:
`asymptotic_risk`. The formula there was derived anew from the resolvent of a sum of two Wishart matrices; the paper
states a fixed-point system for the same limit, whose text was not at hand. The tests hold it against simulation.

`laplace_bag_means` releases bag means with label differential privacy. Changing one response within [-c, c] moves the
mean of its bag of size k by up to 2c/k, so that ε-privacy takes Laplace noise of scale 2c/(kε). The paper's algorithm
has c/(kε), which gives 2ε only, as its public reviews say; that is `sensitivity_factor=1`.

There is no code of the authors.
"""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.model_selection import KFold
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.losses.classification import at_least_float32, check_reduction, reduce
from fairtrial.methods.registry import Uniform, method

Elementwise = Callable[[Tensor, Tensor], Tensor]
WEIGHTS = tuple(tenth / 10 for tenth in range(11))  # what rho is chosen among


def check_bags(
    predictions: Float[Tensor, "..."], bag_targets: Float[Tensor, "..."], bag_index: Int[Tensor, "..."]
) -> None:
    """Refuse anything but predictions (n,), targets (m,) and the bag of each prediction (n,), every bag having one.

    The values of `bag_index` are looked at on the CPU only: elsewhere that would wait for the device, and under
    `torch.compile` it would break the graph.
    """
    require(predictions.ndim == 1, "predictions", tuple(predictions.shape), "of shape (n,)")
    require(len(predictions) > 0, "predictions", tuple(predictions.shape), "of at least one sample")
    require(predictions.is_floating_point(), "predictions", predictions.dtype, "a floating-point tensor")
    require(bag_targets.ndim == 1, "bag_targets", tuple(bag_targets.shape), "of shape (m,)")
    require(bag_targets.is_floating_point(), "bag_targets", bag_targets.dtype, "a floating-point tensor")
    integer = not bag_index.is_floating_point() and not bag_index.is_complex() and bag_index.dtype != torch.bool
    require(integer, "bag_index", bag_index.dtype, "integer numbers of bags")
    shape = tuple(predictions.shape)
    require(bag_index.shape == predictions.shape, "bag_index", tuple(bag_index.shape), f"of shape {shape}, one each")
    if bag_index.device.type == "cpu" and not torch.compiler.is_compiling():
        present, bags = torch.unique(bag_index), len(bag_targets)
        every = len(present) == bags and int(present[0]) == 0 and int(present[-1]) == bags - 1
        require(every, "bag_index", present.tolist(), f"0..{bags - 1}, each at least once, as there are {bags} bags")


def bag_means(values: Float[Tensor, " n"], bag_index: Int[Tensor, " n"], bags: int) -> Float[Tensor, " m"]:
    """Mean of the values in each bag."""
    index = bag_index.long()
    zero = values.new_zeros(bags)
    return zero.index_add(0, index, values) / zero.index_add(0, index, torch.ones_like(values))


def bag_log_mean_exp(values: Float[Tensor, " n"], bag_index: Int[Tensor, " n"], bags: int) -> Float[Tensor, " m"]:
    """log of the mean of exp(values) in each bag."""
    index = bag_index.long()
    largest = values.detach().new_full((bags,), -math.inf).scatter_reduce(0, index, values.detach(), "amax")
    return largest + bag_means((values - largest[index]).exp(), index, bags).log()


def check_loss(loss: str | Elementwise) -> None:
    require(callable(loss) or loss in ("mse", "bce"), "loss", loss, "'mse', 'bce' or a function")


@method(paper="aggregate_responses", slot="bag_loss")
class BagLoss(nn.Module):
    """L_bag: compares each bag's mean prediction with its target.

    Takes predictions (n,), bag targets (m,) and the number of the bag of each prediction (n,), 0 to m - 1.

    Args:
        loss: 'mse', squared error; 'bce', cross entropy of predictions that are logits, the bag's prediction being the
            mean probability and its target a share within 0..1; or a function of predictions and targets, both (m,),
            that gives a value for each.
        reduction: 'none' (a value for each bag), 'mean' or 'sum'.

    Raises:
        ValueError: shapes that do not fit, a bag number out of range or a bag without predictions.
    """

    def __init__(self, loss: str | Elementwise = "mse", *, reduction: str = "mean") -> None:
        super().__init__()
        check_loss(loss)
        check_reduction(reduction)
        self.loss, self.reduction = loss, reduction

    def forward(
        self, predictions: Float[Tensor, " n"], bag_targets: Float[Tensor, " m"], bag_index: Int[Tensor, " n"]
    ) -> Float[Tensor, "..."]:
        check_bags(predictions, bag_targets, bag_index)
        f, bags = at_least_float32(predictions), len(bag_targets)
        targets = bag_targets.to(f.dtype)
        if self.loss == "bce":
            log_p, log_q = (bag_log_mean_exp(F.logsigmoid(logits), bag_index, bags) for logits in (f, -f))
            loss = -(targets * log_p + (1 - targets) * log_q)
        else:
            loss = _elementwise(self.loss)(bag_means(f, bag_index, bags), targets)
        return reduce(loss, self.reduction).to(predictions.dtype)

    def extra_repr(self) -> str:
        return f"loss={self.loss!r}, reduction={self.reduction!r}"


@method(paper="aggregate_responses", slot="bag_loss")
class InstanceLoss(nn.Module):
    """L_ins: compares every single prediction with its bag's target. Arguments are those of `BagLoss`.

    It draws the predictions of a bag together, and is biased therefore, but far less at the mercy of noise.
    """

    def __init__(self, loss: str | Elementwise = "mse", *, reduction: str = "mean") -> None:
        super().__init__()
        check_loss(loss)
        check_reduction(reduction)
        self.loss, self.reduction = loss, reduction

    def forward(
        self, predictions: Float[Tensor, " n"], bag_targets: Float[Tensor, " m"], bag_index: Int[Tensor, " n"]
    ) -> Float[Tensor, "..."]:
        check_bags(predictions, bag_targets, bag_index)
        f = at_least_float32(predictions)
        targets = bag_targets.to(f.dtype)[bag_index.long()]
        if self.loss == "bce":
            single = F.binary_cross_entropy_with_logits(f, targets, reduction="none")
        else:
            single = _elementwise(self.loss)(f, targets)
        return reduce(bag_means(single, bag_index, len(bag_targets)), self.reduction).to(predictions.dtype)

    def extra_repr(self) -> str:
        return f"loss={self.loss!r}, reduction={self.reduction!r}"


@method(paper="aggregate_responses", slot="bag_loss", search={"rho": Uniform(0.0, 1.0)})
class InterpolatedBagLoss(nn.Module):
    """L_int = L_bag + rho R for squared error: predictions in a bag are drawn together with a weight of one's choice.

    Arguments are those of `BagLoss`.

    Args:
        rho: weight of the spread within bags: 0 is the bag loss, 1 the instance loss. To be chosen by the bag loss on
            held-out bags; the default is neutral, as the paper has none. Above 1 warns: the paper stops there.
        reduction: 'none' (a value for each bag), 'mean' or 'sum'.
    """

    def __init__(self, rho: float = 0.5, *, reduction: str = "mean") -> None:
        super().__init__()
        check_rho(rho)
        check_reduction(reduction)
        self.rho, self.reduction = rho, reduction

    def forward(
        self, predictions: Float[Tensor, " n"], bag_targets: Float[Tensor, " m"], bag_index: Int[Tensor, " n"]
    ) -> Float[Tensor, "..."]:
        check_bags(predictions, bag_targets, bag_index)
        f, bags = at_least_float32(predictions), len(bag_targets)
        means = bag_means(f, bag_index, bags)
        spread = bag_means((f - means[bag_index.long()]).square(), bag_index, bags)
        loss = (means - bag_targets.to(f.dtype)).square() + self.rho * spread
        return reduce(loss, self.reduction).to(predictions.dtype)

    def extra_repr(self) -> str:
        return f"rho={self.rho}, reduction={self.reduction!r}"


def check_rho(rho: float) -> None:
    require(bool(0 <= rho < math.inf), "rho", rho, "at least 0 and finite")  # NumPy's numbers compare to its own bool
    if rho > 1:
        warnings.warn(f"rho = {rho} penalises the spread within bags more than the instance loss does", stacklevel=3)


def _elementwise(loss: str | Elementwise) -> Elementwise:
    return loss if callable(loss) else lambda prediction, target: (prediction - target).square()


class AggregateLinearRegressor(RegressorMixin, BaseEstimator):
    """Linear regression of bag means, by the weights at which L_int is least.

    Args:
        rho: weight of the spread within bags; by default that of 0, 0.1, ..., 1 with the least bag loss on held-out
            bags, in cross-validation over consecutive bags.
        cv: folds of it.
        alpha: weight of |θ|² in addition to L_int, as in ridge regression.
        fit_intercept: whether there is a constant; it is not penalised.

    Attributes:
        coef_: θ, of shape (d,).
        intercept_: the constant.
        rho_: the weight of the spread that was used.
        cv_losses_: mean bag loss on held-out bags of each weight tried, if `rho` was not given.

    Where several θ do equally well, as with rho = 0 and fewer bags than features, it is the one of least length.
    """

    def __init__(
        self, rho: float | None = None, cv: int = 5, *, alpha: float = 0.0, fit_intercept: bool = True
    ) -> None:
        self.rho, self.cv, self.alpha, self.fit_intercept = rho, cv, alpha, fit_intercept

    def fit(self, X: ArrayLike, bag_means: ArrayLike, bag_index: ArrayLike) -> "AggregateLinearRegressor":
        """Fit to samples (n, d), the mean response of each bag (m,) and the number of each sample's bag (n,).

        Raises:
            ValueError: shapes that do not fit, values that are not finite, a bag without samples, rho or alpha below 0,
                or fewer bags than folds.
        """
        x, means, bag = _checked_bags(X, bag_means, bag_index)
        require(bool(0 <= self.alpha < math.inf), "alpha", self.alpha, "at least 0 and finite")
        self.n_features_in_ = x.shape[1]
        if self.rho is None:
            require(2 <= self.cv <= len(means), "cv", self.cv, f"within 2..{len(means)}, the number of bags")
            folds = [self._fold(x, means, bag, held_out) for _, held_out in KFold(self.cv).split(means)]
            self.cv_losses_ = np.mean(folds, axis=0)
            self.rho_ = WEIGHTS[int(self.cv_losses_.argmin())]
        else:
            check_rho(self.rho)
            self.rho_ = self.rho
        self.coef_, self.intercept_ = self._solve(x, means, bag, self.rho_)
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.float64]:
        """Predictions (n,) for samples (n, d)."""
        x = np.asarray(X, dtype=np.float64)
        shape = f"of shape (n, {self.n_features_in_})"
        require(x.ndim == 2 and x.shape[1] == self.n_features_in_, "X", x.shape, shape)
        predictions: NDArray[np.float64] = x @ self.coef_ + self.intercept_
        return predictions

    def _fold(
        self, x: NDArray[np.float64], means: NDArray[np.float64], bag: NDArray[np.int64], held_out: NDArray[np.int64]
    ) -> list[float]:
        """Bag loss of the held-out bags for each weight, fitted to the others."""
        out = np.isin(bag, held_out)
        kept = np.delete(means, held_out)
        _, renumbered = np.unique(bag[~out], return_inverse=True)
        x_held = _means_of_bags(x[out], np.unique(bag[out], return_inverse=True)[1], len(held_out))
        losses = []
        for rho in WEIGHTS:
            coef, intercept = self._solve(x[~out], kept, renumbered, rho)
            losses.append(float(np.square(x_held @ coef + intercept - means[held_out]).mean()))
        return losses

    def _solve(
        self, x: NDArray[np.float64], means: NDArray[np.float64], bag: NDArray[np.int64], rho: float
    ) -> tuple[NDArray[np.float64], float]:
        """Least squares over rows for bags, rows for spreads and, with `alpha`, rows for θ itself."""
        bags = len(means)
        x_bag = _means_of_bags(x, bag, bags)
        x_mean, y_mean = x_bag.mean(0) * self.fit_intercept, means.mean() * self.fit_intercept
        of_row = np.sqrt(rho / (bags * np.bincount(bag)))[bag]
        rows = [(x_bag - x_mean) / math.sqrt(bags)]
        if rho > 0:
            rows.append(of_row[:, None] * (x - x_bag[bag]))
        if self.alpha > 0:
            rows.append(math.sqrt(self.alpha) * np.eye(x.shape[1]))
        design = np.concatenate(rows)
        wanted = np.zeros(len(design))
        wanted[:bags] = (means - y_mean) / math.sqrt(bags)
        coef = np.linalg.lstsq(design, wanted, rcond=None)[0]
        return coef, float(y_mean - x_mean @ coef)


def _checked_bags(
    X: ArrayLike, bag_means: ArrayLike, bag_index: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    x, means, bag = np.asarray(X, dtype=np.float64), np.asarray(bag_means, dtype=np.float64), np.asarray(bag_index)
    require(x.ndim == 2 and min(x.shape) > 0, "X", x.shape, "of shape (n ≥ 1, d ≥ 1)")
    require(bool(np.isfinite(x).all()), "X", "NaN or infinite values", "finite")
    require(means.ndim == 1 and bool(np.isfinite(means).all()), "bag_means", means, "finite numbers of shape (m,)")
    require(np.issubdtype(bag.dtype, np.integer), "bag_index", bag.dtype, "integer numbers of bags")
    require(bag.shape == x.shape[:1], "bag_index", bag.shape, f"of shape {x.shape[:1]}, one for each row of X")
    present = np.unique(bag)
    every = np.array_equal(present, np.arange(len(means)))
    require(every, "bag_index", present.tolist(), f"0..{len(means) - 1}, each at least once")
    return x, means, bag.astype(np.int64)


def _means_of_bags(x: NDArray[np.float64], bag: NDArray[np.int64], bags: int) -> NDArray[np.float64]:
    total = np.zeros((bags, x.shape[1]))
    np.add.at(total, bag, x)
    return total / np.bincount(bag, minlength=bags)[:, None]


class AsymptoticRisk(NamedTuple):
    """Excess risk of the linear estimator in the limit; prediction error is σ² more."""

    bias2: float
    variance: float

    @property
    def total(self) -> float:
        return self.bias2 + self.variance


def asymptotic_risk(psi: float, k: int, rho: float, sigma2: float, theta_norm2: float = 1.0) -> AsymptoticRisk:
    """Excess risk of the linear estimator for d → ∞ with n / d → psi, Gaussian inputs and random bags.

    With a1 = psi / k, a2 = psi (1 - 1/k) let q > 0 solve

        a1 q / (1 + q) + rho a2 q / (1 + rho q) = 1

    and D = 1/q² - a1/(1+q)² - rho² a2/(1+rho q)². Then variance = σ² a1 / ((1+q)² D), and with A1 = a1/(1+q),
    A2 = rho a2/(1+rho q), A1' = a1/((1+q)² D), A2' = rho² a2/((1+rho q)² D),
    bias² = |θ0|² (A2' A1 q + A2 (A1' + 1) q - A2 A1 / D).

    Args:
        psi: samples for each feature.
        k: bag size.
        rho: weight of the spread within bags.
        sigma2: σ², variance of the responses' noise.
        theta_norm2: |θ0|².

    Raises:
        ValueError: an argument out of its range, or too few samples for a unique estimator: psi ≤ 1, or with rho = 0
            or k = 1 fewer bags than features, psi ≤ k.
    """
    require(k >= 1, "k", k, "at least 1")
    require(0 <= rho < math.inf, "rho", rho, "at least 0 and finite")
    require(0 <= sigma2 < math.inf, "sigma2", sigma2, "at least 0 and finite")
    require(0 <= theta_norm2 < math.inf, "theta_norm2", theta_norm2, "at least 0 and finite")
    fewest = 1 if rho > 0 else k
    require(fewest < psi < math.inf, "psi", psi, f"above {fewest} and finite, or the estimator is not unique")
    a1, a2 = psi / k, psi * (1 - 1 / k)

    def excess(log_q: float) -> float:
        q = math.exp(log_q)
        return a1 * q / (1 + q) + rho * a2 * q / (1 + rho * q) - 1

    q = math.exp(brentq(excess, -50.0, 50.0, xtol=1e-14, rtol=1e-14))
    p1, p2 = 1 / (1 + q), rho / (1 + rho * q)
    A1, A2 = a1 * p1, a2 * p2
    D = 1 / q**2 - a1 * p1**2 - a2 * p2**2
    A1_slope, A2_slope = a1 * p1**2 / D, a2 * p2**2 / D
    bias2 = A2_slope * A1 * q + A2 * (A1_slope + 1) * q - A2 * A1 / D
    return AsymptoticRisk(theta_norm2 * bias2, sigma2 * A1_slope)


def make_bags(n: int, k: int, generator: torch.Generator) -> Int[Tensor, " n"]:
    """Lay n samples at random into n // k disjoint bags: the number of each one's bag.

    All bags are of size k if k divides n; else sizes differ by one at most, and none is below k.
    """
    require(k >= 1, "k", k, "at least 1")
    require(n >= k, "n", n, f"at least {k}, the bag size")
    return (torch.arange(n) % (n // k))[torch.randperm(n, generator=generator)]


def laplace_bag_means(
    y: Float[Tensor, " n"],
    bag_index: Int[Tensor, " n"],
    epsilon: float,
    clip: float,
    *,
    generator: torch.Generator,
    sensitivity_factor: float = 2.0,
) -> Float[Tensor, " m"]:
    """Means of bags of responses, with ε-differential privacy of the single response.

    Responses are clipped to [-clip, clip], and each bag's mean gets Laplace noise of scale
    b = sensitivity_factor · clip / (size · ε). In `asymptotic_risk` that is noise of variance σ² + 2 k b².

    Args:
        y: responses.
        bag_index: the number of each one's bag, 0 to m - 1.
        epsilon: ε, above 0.
        clip: above 0. The paper takes C sqrt(log n) with C² > 2 (1 + σ²).
        generator: what the noise is drawn from, on the CPU.
        sensitivity_factor: 2 gives ε; the paper's algorithm has 1, which gives 2ε.
    """
    require(0 < epsilon < math.inf, "epsilon", epsilon, "above 0 and finite")
    require(0 < clip < math.inf, "clip", clip, "above 0 and finite")
    require(0 < sensitivity_factor < math.inf, "sensitivity_factor", sensitivity_factor, "above 0 and finite")
    require(bag_index.numel() > 0, "bag_index", tuple(bag_index.shape), "of at least one sample")
    bags = int(bag_index.max()) + 1
    check_bags(y, y.new_empty(bags), bag_index)
    size = torch.bincount(bag_index.long(), minlength=bags)
    up, down = torch.empty(2, bags, dtype=torch.float64).exponential_(generator=generator).to(y.device)
    noise = (up - down) * (sensitivity_factor * clip / epsilon) / size
    released: Tensor = bag_means(y.clamp(-clip, clip).double(), bag_index, bags) + noise
    return released.to(y.dtype)
