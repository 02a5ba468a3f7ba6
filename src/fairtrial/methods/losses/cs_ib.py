"""Information bottleneck for regression by the Cauchy-Schwarz divergence (Yu et al., ICLR 2024, arXiv:2404.17951).

A network encodes x as t and predicts ŷ from t. It is trained on

    D_CS(p(y|x); q(ŷ|x)) + β I(x; t),    D_CS(p; q) = log ∫p² + log ∫q² - 2 log ∫p q

without a bound or an assumption of normality: both terms are kernel estimates on the batch. With the Gram matrices of
k(a, b) = exp(-|a - b|² / 2σ²), K of x, L¹ of y, L² of ŷ, L²¹ of ŷ (rows) and y (columns), Q of t, and with the row sums
r_j = Σ_i K_ji, Propositions 1 and 2, as the authors' slides beside their code print them, are

    D = log Σ_ji W_ji L¹_ji + log Σ_ji W_ji L²_ji - 2 log Σ_ji W_ji L²¹_ji,    W_ji = K_ji / r_j²
    I = log Σ_ij K_ij Q_ij / N² + log Σ_ij K_ij Σ_ij Q_ij / N⁴ - 2 log Σ_j (Σ_i K_ji) (Σ_i Q_ji) / N³

`denominator` chooses W:

- 'squared_sum' is the paper's, as above.
- 'sum_of_squares' is the authors' code: W_ji = K_ji / Σ_i K_ji². Its logarithms are to base 2.
- 'symmetric' is neither's: W_ji = K_ji / (r_j r_i).

Where the row sums differ, the first two are not symmetric and the three sums no inner products: D(y, y) is 0, but D may
be negative, and its gradient at ŷ = y is not 0. With wide kernels of x a flexible network finds such predictions far
from y. The third is positive semi-definite, so that D ≥ 0 with a minimum at ŷ = y. For narrow kernels of x (K = 1 up to
a factor) all three are the same.

Training takes the normalised I(x; t) / sqrt(I(x; x) I(t; t)), as the authors' code does, which ignores the base of the
logarithm. In its script for California housing targets and predictions have shape (n,), of which its Gram function
makes a constant matrix: the first term is then the summed squared error over log 2. Here (n,) is read as (n, 1), so
that the term is the divergence.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from fairtrial.methods.arguments import require
from fairtrial.methods.losses.classification import at_least_float32
from fairtrial.methods.registry import LogUniform, method

DENOMINATORS = ("squared_sum", "sum_of_squares", "symmetric")


class Parts(NamedTuple):
    """The two terms of the bottleneck, without β."""

    divergence: Float[Tensor, ""]
    information: Float[Tensor, ""]


def gaussian_gram(a: Float[Tensor, "n ..."], b: Float[Tensor, "m ..."], sigma: float = 1.0) -> Float[Tensor, "n m"]:
    """exp(-|a_i - b_j|² / 2σ²); what has one dimension, or more than two, is one row for each sample."""
    _check_sigma("sigma", sigma)
    return log_gram(_rows(a), _rows(b), sigma).exp().to(a.dtype)


def median_bandwidth(a: Float[Tensor, "n ..."]) -> float:
    """The median distance of two different rows, at least 0.01: a kernel width for `a`. Waits for the device."""
    require(len(a) >= 2, "a", tuple(a.shape), "of at least 2 rows")
    return max(float(torch.nn.functional.pdist(_rows(a)).median()), 1e-2)


def log_gram(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], sigma: float) -> Float[Tensor, "n m"]:
    """-|a_i - b_j|² / 2σ², in O(n m d) memory: products of rows would lose small distances to cancellation."""
    return (a[:, None] - b).square().sum(-1) / (-2.0 * sigma * sigma)


def conditional_divergence(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n k"],
    y_pred: Float[Tensor, "n k"],
    sigma_x: float,
    sigma_y: float,
    denominator: str,
) -> Float[Tensor, ""]:
    """D of the module's equation, by logarithms throughout: predictions may be ever so far from their targets."""
    log_k = log_gram(x, x, sigma_x)
    log_sums = log_k.logsumexp(1, keepdim=True)
    if denominator == "squared_sum":
        log_w = log_k - 2.0 * log_sums
    elif denominator == "sum_of_squares":
        log_w = log_k - (2.0 * log_k).logsumexp(1, keepdim=True)
    else:
        log_w = log_k - log_sums - log_sums.T
    pairs = (y, y), (y_pred, y_pred), (y_pred, y)
    own, predicted, cross = ((log_w + log_gram(*pair, sigma_y)).flatten().logsumexp(0) for pair in pairs)
    return own + predicted - 2.0 * cross


def quadratic_information(log_k: Float[Tensor, "n n"], log_q: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    """I of the module's equation.

    Of 1 - Q the logarithms of the three sums are differences from 0, which small ones keep: I falls with the fourth
    power of the spread of t.
    """
    weights = log_k.exp() / log_k.exp().sum()
    distance = -log_q.expm1()
    joint = (weights * distance).sum()
    apart = distance.mean()
    mixed = (weights.sum(1) * distance.mean(1)).sum()
    return (-joint).log1p() + (-apart).log1p() - 2.0 * (-mixed).log1p()


def normalised_information(log_k: Float[Tensor, "n n"], log_q: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    """I(x; t) / sqrt(I(x; x) I(t; t)), and 0 where x or t is constant."""
    own = quadratic_information(log_k, log_k).clamp(min=0.0) * quadratic_information(log_q, log_q).clamp(min=0.0)
    return quadratic_information(log_k, log_q) / (own + 1e-12).sqrt()


class ConditionalCSDivergence(nn.Module):
    """Conditional Cauchy-Schwarz divergence of inputs x (n, …), targets y and predictions y_pred, (n,) or (n, k).

    It belongs to the batch as a whole. Its noise falls with the batch size; below 32 samples there is much of it.

    Args:
        sigma_x: kernel width of x, above 0; 1 in the authors' script, for standardised x.
        sigma_y: kernel width of y, above 0, likewise. Predictions several widths off have hardly a gradient in
            proportion to that of near ones, so y should be standardised.
        denominator: 'squared_sum' (the paper), 'sum_of_squares' (the authors' code), or 'symmetric'.
        log_base: of the logarithms; above 1.

    Raises:
        ValueError: fewer than two rows, rows that do not match in number or length, values that are not finite, or an
            argument out of its range.
    """

    def __init__(
        self,
        sigma_x: float = 1.0,
        sigma_y: float = 1.0,
        *,
        denominator: str = "squared_sum",
        log_base: float = math.e,
    ) -> None:
        super().__init__()
        _check_sigma("sigma_x", sigma_x)
        _check_sigma("sigma_y", sigma_y)
        _check_denominator(denominator)
        require(1 < log_base < math.inf, "log_base", log_base, "above 1 and finite")
        self.sigma_x, self.sigma_y, self.denominator, self.log_base = sigma_x, sigma_y, denominator, log_base

    def forward(
        self, x: Float[Tensor, "n ..."], y: Float[Tensor, "n ..."], y_pred: Float[Tensor, "n ..."]
    ) -> Float[Tensor, ""]:
        _check_batch(x=x, y=y, y_pred=y_pred)
        rows = _rows(x), _rows(y), _rows(y_pred)
        _check_widths(y, y_pred)
        divergence = conditional_divergence(*rows, self.sigma_x, self.sigma_y, self.denominator)
        return (divergence / math.log(self.log_base)).to(y_pred.dtype)

    def extra_repr(self) -> str:
        return (
            f"sigma_x={self.sigma_x}, sigma_y={self.sigma_y}, denominator={self.denominator!r}, "
            f"log_base={self.log_base}"
        )


class CSQuadraticMI(nn.Module):
    """Cauchy-Schwarz quadratic mutual information of x (n, …) and t (n, …), in nats where it is not normalised.

    It is 0 for independent samples and where t is constant, and symmetric in its arguments.

    Args:
        sigma_x: kernel width of x, above 0; 1 in the authors' script.
        sigma_t: kernel width of t, above 0, likewise.
        normalized: divide by sqrt(I(x; x) I(t; t)): at most about 1, and 1 for t = x.

    Raises:
        ValueError: fewer than two rows, rows that do not match, values that are not finite, or a width out of range.
    """

    def __init__(self, sigma_x: float = 1.0, sigma_t: float = 1.0, *, normalized: bool = True) -> None:
        super().__init__()
        _check_sigma("sigma_x", sigma_x)
        _check_sigma("sigma_t", sigma_t)
        self.sigma_x, self.sigma_t, self.normalized = sigma_x, sigma_t, normalized

    def forward(self, x: Float[Tensor, "n ..."], t: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
        _check_batch(x=x, t=t)
        log_k, log_q = (log_gram(_rows(a), _rows(a), sigma) for a, sigma in ((x, self.sigma_x), (t, self.sigma_t)))
        measured = normalised_information if self.normalized else quadratic_information
        return measured(log_k, log_q).to(t.dtype)

    def extra_repr(self) -> str:
        return f"sigma_x={self.sigma_x}, sigma_t={self.sigma_t}, normalized={self.normalized}"


@method(
    paper="cs_ib",
    slot="bottleneck_loss",
    search={"beta": LogUniform(1e-4, 1.0), "sigma_y": LogUniform(0.3, 10.0)},
)
class CSInformationBottleneckLoss(nn.Module):
    """D_CS(p(y|x); q(ŷ|x)) + β I(x; t) of inputs x (n, …), codes t (n, …), targets y and predictions y_pred (n,).

    y and y_pred may also be (n, k). x and y should be standardised; the authors' batches have 128 samples. Method
    `parts` gives the two terms apart.

    Args:
        beta: weight β ≥ 0 of the compression. The authors choose among 0 and 1e-4 to 1; 0.01 is their script's default.
        sigma_x, sigma_y, sigma_t: kernel widths, above 0; 1 in the authors' script. For ever larger `sigma_y` the first
            term is proportional to squared errors, averaged over neighbours in x.
        denominator: of the first term: 'squared_sum' (the paper), 'sum_of_squares' (the authors' code), or 'symmetric'.
            Logarithms are natural; with the code's, to base 2, β is weaker by log 2.

    Raises:
        ValueError: fewer than two rows, rows that do not match, values that are not finite, or an argument out of its
            range.
    """

    def __init__(
        self,
        beta: float = 0.01,
        *,
        sigma_x: float = 1.0,
        sigma_y: float = 1.0,
        sigma_t: float = 1.0,
        denominator: str = "squared_sum",
    ) -> None:
        super().__init__()
        require(0 <= beta < math.inf, "beta", beta, "at least 0 and finite")
        for name, sigma in (("sigma_x", sigma_x), ("sigma_y", sigma_y), ("sigma_t", sigma_t)):
            _check_sigma(name, sigma)
        _check_denominator(denominator)
        self.beta, self.denominator = beta, denominator
        self.sigma_x, self.sigma_y, self.sigma_t = sigma_x, sigma_y, sigma_t

    def parts(
        self,
        x: Float[Tensor, "n ..."],
        t: Float[Tensor, "n ..."],
        y: Float[Tensor, "n ..."],
        y_pred: Float[Tensor, "n ..."],
    ) -> Parts:
        """Prediction term and normalised compression term, in float32 at least; both have a gradient."""
        _check_batch(x=x, t=t, y=y, y_pred=y_pred)
        _check_widths(y, y_pred)
        inputs, codes = _rows(x), _rows(t)
        log_k, log_q = log_gram(inputs, inputs, self.sigma_x), log_gram(codes, codes, self.sigma_t)
        return Parts(
            conditional_divergence(inputs, _rows(y), _rows(y_pred), self.sigma_x, self.sigma_y, self.denominator),
            normalised_information(log_k, log_q),
        )

    def forward(
        self,
        x: Float[Tensor, "n ..."],
        t: Float[Tensor, "n ..."],
        y: Float[Tensor, "n ..."],
        y_pred: Float[Tensor, "n ..."],
    ) -> Float[Tensor, ""]:
        divergence, information = self.parts(x, t, y, y_pred)
        return (divergence + self.beta * information).to(y_pred.dtype)

    def extra_repr(self) -> str:
        return (
            f"beta={self.beta}, sigma_x={self.sigma_x}, sigma_y={self.sigma_y}, sigma_t={self.sigma_t}, "
            f"denominator={self.denominator!r}"
        )


class CSIBRegressor(RegressorMixin, BaseEstimator):
    """Regression by a network with a bottleneck, trained on `CSInformationBottleneckLoss`; a scikit-learn estimator.

    Encoder n_features-hidden-hidden-bottleneck and decoder bottleneck-hidden-1 with ReLUs, deterministic as in the
    authors' script, in double precision. Features and target are standardised. Adam, the learning rate falling along a
    cosine to 0; the script's falls by 0.6 every 10 epochs, from 1e-4, which is for many batches in an epoch.

    Args:
        hidden: width of the hidden layers.
        bottleneck: numbers in a code t.
        beta: weight of the compression, at least 0.
        sigma: width of all three kernels, on standardised data.
        epochs: passes over the data.
        lr: initial learning rate.
        batch_size: samples in a step; what does not fill a batch at the end of an epoch is left out.
        denominator: as in `CSInformationBottleneckLoss`.
        random_state: seed of the initial weights and of the order of the samples, as in scikit-learn.

    Attributes:
        network_: the trained encoder and decoder, a `torch.nn.Module` on the CPU.
        n_features_in_: number of features.
    """

    def __init__(
        self,
        hidden: int = 128,
        bottleneck: int = 128,
        beta: float = 0.01,
        sigma: float = 1.0,
        epochs: int = 200,
        lr: float = 1e-3,
        *,
        batch_size: int = 128,
        denominator: str = "squared_sum",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.hidden, self.bottleneck, self.beta, self.sigma = hidden, bottleneck, beta, sigma
        self.epochs, self.lr, self.batch_size, self.denominator = epochs, lr, batch_size, denominator
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> "CSIBRegressor":
        for name in ("hidden", "bottleneck", "epochs"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.batch_size >= 2, "batch_size", self.batch_size, "at least 2")
        require(0 < self.lr < math.inf, "lr", self.lr, "above 0 and finite")
        sigmas = dict.fromkeys(("sigma_x", "sigma_y", "sigma_t"), self.sigma)
        loss = CSInformationBottleneckLoss(self.beta, **sigmas, denominator=self.denominator)
        X, y = validate_data(self, X, y, y_numeric=True, ensure_min_samples=2, dtype=np.float64)
        y = y.astype(np.float64)
        self._x_mean, self._x_scale = X.mean(0), _scale(X)
        self._y_mean, self._y_scale = y.mean(), _scale(y)
        inputs = self._standardised(X)
        targets = torch.from_numpy((y - self._y_mean) / self._y_scale)
        seed = check_random_state(self.random_state).randint(2**31 - 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network_ = _Bottleneck(X.shape[1], self.hidden, self.bottleneck).double()
        self._train(inputs, targets, loss, torch.Generator().manual_seed(seed))
        return self

    def _train(
        self, inputs: Float[Tensor, "n d"], targets: Float[Tensor, " n"], loss: nn.Module, generator: torch.Generator
    ) -> None:
        size = min(self.batch_size, len(inputs))
        optimizer = torch.optim.Adam(self.network_.parameters(), lr=self.lr)
        steps = self.epochs * (len(inputs) // size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(self.epochs):
            order = torch.randperm(len(inputs), generator=generator)
            for batch in order[: len(order) // size * size].split(size):
                optimizer.zero_grad()
                codes, predicted = self.network_(inputs[batch])
                loss(inputs[batch], codes, targets[batch], predicted).backward()
                optimizer.step()
                schedule.step()

    def predict(self, X: Any) -> NDArray[np.float64]:
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        with torch.no_grad():
            _, predicted = self.network_(self._standardised(X))
        values: NDArray[np.float64] = predicted.numpy() * self._y_scale + self._y_mean
        return values

    def _standardised(self, X: NDArray[Any]) -> Float[Tensor, "n d"]:
        return torch.from_numpy((X - self._x_mean) / self._x_scale)


class _Bottleneck(nn.Module):
    """Codes (n, bottleneck) and predictions (n,) of inputs (n, inputs)."""

    def __init__(self, inputs: int, hidden: int, bottleneck: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, bottleneck)
        )
        self.decoder = nn.Sequential(nn.Linear(bottleneck, hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Flatten(0))

    def forward(self, x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n t"], Float[Tensor, " n"]]:
        codes = self.encoder(x)
        return codes, self.decoder(codes)


def _scale(values: NDArray[Any]) -> Any:
    """Standard deviations by column, 1 where there is none."""
    deviation = np.std(values, axis=0)
    return np.where(deviation > 0, deviation, 1.0)


def _rows(a: Float[Tensor, "n ..."]) -> Float[Tensor, "n d"]:
    return at_least_float32(a).reshape(len(a), -1)


def _check_sigma(name: str, sigma: float) -> None:
    require(0 < sigma < math.inf, name, sigma, "above 0 and finite")


def _check_denominator(denominator: str) -> None:
    require(denominator in DENOMINATORS, "denominator", denominator, f"one of {', '.join(DENOMINATORS)}")


def _check_batch(**batch: Tensor) -> None:
    """Refuse anything but finite tensors of as many rows, at least two; values are looked at on the CPU only."""
    rows = len(batch["x"]) if batch["x"].ndim else 0
    for name, a in batch.items():
        require(a.ndim >= 1 and len(a) >= 2, name, tuple(a.shape), "of at least 2 rows")
        require(len(a) == rows, name, tuple(a.shape), f"of {rows} rows, as x")
        require(a.is_floating_point(), name, a.dtype, "a floating-point tensor")
        if a.device.type == "cpu" and not torch.compiler.is_compiling():
            require(bool(a.isfinite().all()), name, "NaN or infinite values", "finite")


def _check_widths(y: Tensor, y_pred: Tensor) -> None:
    rows, others = y[0].numel(), y_pred[0].numel()
    require(rows == others, "y_pred", tuple(y_pred.shape), f"of {rows} numbers for each row, as y")
