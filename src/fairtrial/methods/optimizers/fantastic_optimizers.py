"""How to compare optimizers for pre-training fairly (Wen, Hall, Ma, Liang 2025, arXiv:2509.02046).

The study has no optimizer of its own; those that it compares are in `packages`. What it gives is a protocol, whose
steps are functions here:

1. `coordinate_descent` tunes every optimizer at small sizes: one hyperparameter after the other is swept over its grid
   with the others at their best, and a new value is accepted only if the loss falls by more than Δ₁ = 3e-3.
   `equal_budget_search` has Optuna look instead, with as many runs for each optimizer.
2. `scaling_sensitive` tells which hyperparameters have to be tuned at larger sizes too. With L*_r the least loss of a
   regime r (a model size and an amount of data) and C_r the configurations of loss at most L*_r + Δ₂, Δ₂ = 6.4e-3, a
   hyperparameter is insensitive if some value of it occurs in every C_r.
3. `fit_hyperparameter_law` carries the others further: h(N, D) = α N^-A D^-B + β of the parameters N and the data D.
4. `fit_scaling` fits the baseline's loss at the end of training, L(D) = α D^-B + β, for one model size. The loss ℓ of
   another optimizer at D is worth the data that the baseline would need for it (`equivalent_data`),

       D_eq = ((ℓ - β) / α)^(-1/B),    speed-up = D_eq / D

   and `speedup` adds an interval by resampling seeds. Data count, not seconds: the time of a step is another question.
5. `rank_flips` finds the pairs whose order before the end of training is not that at its end. A loss in mid-decay says
   little: give every amount of data a run with a decay of its own.

The authors' analysis fits both laws by `scipy.optimize.curve_fit` from a single starting point, which may end in a
local minimum or at β < 0. The laws are linear in α and β, so here these are eliminated and the exponents searched, the
law of the loss with α ≥ 0 and β ≥ 0; where the authors' fit finds the least squares, it is the same. Their fit of h
leaves out the first and the last point, and starts where α = 0; here all points count. One version of their search for
insensitive hyperparameters goes through a regime's name in place of its values and so calls nearly all of them
sensitive, and Δ₂ is 6e-3 there; this follows the paper.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Num
from numpy import ndarray
from scipy import stats
from scipy.optimize import least_squares

from fairtrial.methods.arguments import require
from fairtrial.methods.registry import Space

Config = Mapping[str, Any]
Objective = Callable[[dict[str, Any]], float]
Number = int | float

LEAST_EXPONENT, LARGEST_EXPONENT = 1e-3, 10.0  # of the data in the law of the loss
STEEPEST = 3.0  # |A| and |B| in the law of a hyperparameter
GOLDEN = (math.sqrt(5) - 1) / 2


class Evaluation(NamedTuple):
    """A configuration and its loss, infinite where training diverged."""

    config: dict[str, Any]
    loss: float


class Search(NamedTuple):
    """What a search has tried, in that order, its choice, and whether it ended by itself."""

    history: list[Evaluation]
    best: Evaluation
    converged: bool


def coordinate_descent(
    objective: Objective,
    grids: Mapping[str, Sequence[Hashable]],
    start: Config,
    *,
    min_improvement: float = 3e-3,
    max_rounds: int = 3,
    budget: int | None = None,
    known: Iterable[tuple[Config, float]] = (),
) -> Search:
    """Sweep one hyperparameter at a time, round after round until no new value is accepted (the paper's phase I).

    Of a sweep the value of least loss is accepted, the first of equal ones, if it improves on the best so far by more
    than `min_improvement`. No configuration is evaluated twice. The search has converged if a whole round changes
    nothing.

    Args:
        objective: the loss of a configuration, at the end of a run of its own; NaN counts as infinite.
        grids: the values of each hyperparameter, in the order in which they are swept.
        start: a value for each, of the grid or not; the paper starts from the setting of an optimizer's own paper.
        min_improvement: Δ₁, at least 0; 3e-3 nats in the paper.
        max_rounds: most rounds, at least 1.
        budget: most evaluations, at least 1; unlimited by default.
        known: the history of a search that was cut short. Its losses are taken as they are, and count in the budget, so
            that the search ends as if it had not been cut.

    Raises:
        ValueError: an argument is out of its range, or `start` has other hyperparameters than `grids`.
    """
    require(len(grids) > 0 and all(len(grid) > 0 for grid in grids.values()), "grids", grids, "values by name")
    require(start.keys() == grids.keys(), "start", dict(start), f"a value for each of {', '.join(grids)}")
    require(0 <= min_improvement < math.inf, "min_improvement", min_improvement, "at least 0 and finite")
    require(max_rounds >= 1, "max_rounds", max_rounds, "at least 1")
    require(budget is None or budget >= 1, "budget", budget, "at least 1, or None")
    remembered = {_key(config, grids): loss for config, loss in known}
    tried: dict[tuple[Hashable, ...], Evaluation] = {}
    exhausted = False

    def loss_of(config: dict[str, Any]) -> float:
        nonlocal exhausted
        key = _key(config, grids)
        if key not in tried:
            if len(tried) == budget:
                exhausted = True
                return math.inf
            loss = remembered[key] if key in remembered else objective(dict(config))
            tried[key] = Evaluation(config, _or_infinite(loss))
        return tried[key].loss

    best = dict(start)
    least = loss_of(best)
    converged = False
    for _ in range(max_rounds):
        before = best
        for name, grid in grids.items():
            sweep = [best | {name: value} for value in grid]
            losses = [loss_of(config) for config in sweep]
            place = losses.index(min(losses))
            if least - losses[place] > min_improvement:
                best, least = sweep[place], losses[place]
        if best is before:
            converged = not exhausted
            break
    return Search(list(tried.values()), Evaluation(best, least), converged)


def _key(config: Config, names: Iterable[str]) -> tuple[Hashable, ...]:
    return tuple(config[name] for name in names)


def _or_infinite(loss: Any) -> float:
    return math.inf if math.isnan(loss) else float(loss)  # a loss may be a whole number, or a tensor


def equal_budget_search(
    optimizers: Mapping[str, Objective],
    spaces: Mapping[str, Mapping[str, Space]],
    n_trials: int | Mapping[str, int],
    *,
    seed: int,
    allow_unequal: bool = False,
) -> dict[str, Search]:
    """Tune every optimizer with as many runs, by Optuna's TPE, where there are too many values for grids.

    Args:
        optimizers: the loss of a configuration, for each optimizer; NaN counts as infinite.
        spaces: the ranges of its hyperparameters, for each.
        n_trials: how many runs each gets, at least 1; or how many of them by name.
        seed: of the proposals; the same for each optimizer.
        allow_unequal: take numbers of runs that differ.

    Raises:
        ValueError: the numbers of runs differ, one is below 1, or an optimizer has no space.
    """
    import optuna

    require(spaces.keys() == optimizers.keys(), "spaces", list(spaces), f"one for each of {', '.join(optimizers)}")
    counts = dict.fromkeys(optimizers, n_trials) if isinstance(n_trials, int) else dict(n_trials)
    named = counts.keys() == optimizers.keys() and all(count >= 1 for count in counts.values())
    require(named, "n_trials", n_trials, f"at least 1 for each of {', '.join(optimizers)}")
    equal = allow_unequal or len(set(counts.values())) <= 1
    require(equal, "n_trials", n_trials, "equal for all optimizers, unless allow_unequal=True")
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        found = {}
        for name, objective in optimizers.items():
            study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
            history = []
            for _ in range(counts[name]):
                trial = study.ask()
                config = {key: space.suggest(trial, key) for key, space in spaces[name].items()}
                loss = _or_infinite(objective(dict(config)))
                study.tell(trial, loss)
                history.append(Evaluation(config, loss))
            found[name] = Search(history, min(history, key=lambda evaluation: evaluation.loss), True)
    finally:
        optuna.logging.set_verbosity(verbosity)
    return found


def scaling_sensitive(
    results: Mapping[Hashable, Sequence[tuple[Config, float]]], tolerance: float = 6.4e-3
) -> dict[str, bool]:
    """Whether each hyperparameter has to be tuned anew when model or data grow.

    Args:
        results: for each regime, configurations of the same hyperparameters with their losses, NaN where diverged.
        tolerance: Δ₂, at least 0: how much above its regime's least a loss may lie; 6.4e-3 nats in the paper.

    Raises:
        ValueError: a regime has no finite loss, or configurations have different hyperparameters.
    """
    require(0 <= tolerance < math.inf, "tolerance", tolerance, "at least 0 and finite")
    require(len(results) > 0, "results", results, "at least one regime")
    near = []
    for regime, found in results.items():
        finite = [(config, loss) for config, loss in found if math.isfinite(loss)]
        require(len(finite) > 0, f"results[{regime!r}]", found, "configurations, at least one with a finite loss")
        least = min(loss for _, loss in finite)
        near.append([config for config, loss in finite if loss <= least + tolerance])
    names = list(near[0][0])
    for config in (config for regime in near for config in regime):
        require(config.keys() == set(names), "results", dict(config), f"configurations of {', '.join(names)}")
    return {name: not set.intersection(*({config[name] for config in regime} for regime in near)) for name in names}


class HyperparameterLaw(NamedTuple):
    """h(N, D) = alpha N^-A D^-B + beta."""

    alpha: float
    A: float
    B: float
    beta: float

    def value(self, N: Number, D: Number) -> float:
        """The hyperparameter for a model of N parameters and the data D; an extrapolation may leave its range."""
        return float(self.alpha * float(N) ** -self.A * float(D) ** -self.B + self.beta)


def fit_hyperparameter_law(
    N: Num[ndarray, " n"] | Sequence[Number],
    D: Num[ndarray, " n"] | Sequence[Number],
    values: Num[ndarray, " n"] | Sequence[Number],
) -> HyperparameterLaw:
    """Least squares of h(N, D) = α N^-A D^-B + β, with A and B within ±3, from several starting points.

    A hyperparameter whose best value is the same everywhere has α = A = B = 0.

    Args:
        N: parameters of the models, above 0, at least two different numbers.
        D: data, above 0, in tokens or relative to what the model size asks for; at least two different numbers.
        values: the best value in each of these regimes, at least 4.

    Raises:
        ValueError: there are fewer than 4 points or different numbers of them, or one is out of its range.
    """
    n, d = _positive(N, "N"), _positive(D, "D")
    h = np.asarray(values, dtype=np.float64)
    require(h.ndim == 1 and h.size >= 4 and bool(np.isfinite(h).all()), "values", values, "at least 4 finite numbers")
    for x, name in ((n, "N"), (d, "D")):
        require(x.size == h.size and len(set(x.tolist())) > 1, name, x, f"{h.size} numbers, at least two different")
    if np.ptp(h) == 0:
        return HyperparameterLaw(0.0, 0.0, 0.0, float(h[0]))
    log_n, log_d = np.log(n), np.log(d)
    middle_n, middle_d = log_n.mean(), log_d.mean()

    def linear_part(exponents: ndarray) -> tuple[float, float, ndarray]:
        A, B = exponents
        x = np.exp(-A * (log_n - middle_n) - B * (log_d - middle_d))
        apart = x - x.mean()
        alpha = apart @ h / (apart @ apart)
        return alpha, h.mean() - alpha * x.mean(), alpha * apart - (h - h.mean())

    def residuals(exponents: ndarray) -> ndarray:
        return linear_part(exponents)[2]

    ticks = np.arange(-2.875, 3, 0.25)  # without 0, where the law no longer depends on α
    starts = sorted(np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2), key=lambda at: (residuals(at) ** 2).sum())
    fits = [
        least_squares(residuals, at, bounds=(-STEEPEST, STEEPEST), xtol=1e-15, ftol=1e-15, gtol=1e-15)
        for at in starts[:4]
    ]
    A, B = min(fits, key=lambda fit: fit.cost).x
    alpha, beta, _ = linear_part(np.array([A, B]))
    return HyperparameterLaw(float(alpha * math.exp(A * middle_n + B * middle_d)), float(A), float(B), float(beta))


class ScalingLaw(NamedTuple):
    """L(D) = alpha D^-B + beta, and the covariance of (alpha, B, beta), infinite where three points are all."""

    alpha: float
    B: float
    beta: float
    cov: Float[ndarray, "3 3"]

    def loss(self, D: Number) -> float:
        """The loss at the end of training on the data D."""
        return float(self.alpha * float(D) ** -self.B + self.beta)


def fit_scaling(D: Num[ndarray, " n"] | Sequence[Number], loss: Num[ndarray, " n"] | Sequence[Number]) -> ScalingLaw:
    """Least squares of L(D) = α D^-B + β for one model size, with α > 0, β ≥ 0 and B within [0.001, 10].

    Args:
        D: data, above 0, at least 3 different amounts.
        loss: the loss at the end of a run on each, with a decay of its own; above 0.

    Raises:
        ValueError: there are fewer than 3 points, one is out of its range, or the loss does not fall with the data.
    """
    d, losses = _check_scaling(D, loss)
    require(losses.ndim == 1, "loss", losses.shape, "one for each amount of data")
    alpha, B, beta = (float(part[0]) for part in _fits(d, losses[None]))
    shrink = d**-B
    require(bool(alpha * np.ptp(shrink) > 1e-12 * losses.max()), "loss", loss, "falling as the data grow")
    jacobian = np.stack([shrink, -alpha * np.log(d) * shrink, np.ones_like(d)], 1)
    cov = np.full((3, 3), np.inf)
    if d.size > 3:
        _, R = np.linalg.qr(jacobian)
        inverse = np.linalg.pinv(R)
        cov = inverse @ inverse.T * ((alpha * shrink + beta - losses) ** 2).sum() / (d.size - 3)
    return ScalingLaw(alpha, B, beta, cov)


def equivalent_data(law: ScalingLaw, loss: Number) -> float:
    """The data with which the law's optimizer would come to a loss: ((loss - β) / α)^(-1/B).

    Raises:
        ValueError: the loss is not above β, which no amount of data reaches.
    """
    require(law.beta < loss < math.inf, "loss", loss, f"above beta = {law.beta:.6g}, the least that data can reach")
    return float(((loss - law.beta) / law.alpha) ** (-1 / law.B))


class Speedup(NamedTuple):
    """How many times as much data the baseline needs, its 95 % interval, and whether that is beyond what it was given.

    Attributes:
        estimate: D_eq / D, of mean losses.
        low, high: ends of the interval; `high` is infinite where the baseline may never come to such a loss.
        extrapolated: D_eq lies outside the amounts of data that the baseline's law was fitted to.
    """

    estimate: float
    low: float
    high: float
    extrapolated: bool


def speedup(
    D: Num[ndarray, " n"] | Sequence[Number],
    baseline: Float[ndarray, "n seeds"],
    at: Number,
    loss: Float[ndarray, " seeds"],
    *,
    bootstrap: int = 1000,
    generator: np.random.Generator,
) -> Speedup:
    """The data that a baseline would need for the mean loss of another optimizer, relative to what that one was given.

    The interval is for the variation of seeds alone. It resamples seeds, the same for both optimizers, and fits the
    baseline's law each time; percentiles are expanded as Student's t asks for with so few (Hesterberg 2015). A single
    seed bounds nothing.

    Args:
        D: the baseline's data, above 0, at least 3 different amounts.
        baseline: its losses at the end of training, a row for each amount and a column for each seed.
        at: the other optimizer's data, above 0.
        loss: its losses at the end of training, with the same seeds as the columns.
        bootstrap: how many resamples, at least 1.
        generator: what they are drawn from.

    Raises:
        ValueError: shapes do not fit, a value is out of its range, the baseline's loss does not fall with the data, or
            the mean loss is not above the baseline's β.
    """
    require(0 < at < math.inf, "at", at, "above 0 and finite")
    require(bootstrap >= 1, "bootstrap", bootstrap, "at least 1")
    d, reference = _check_scaling(D, baseline)
    require(loss.shape == reference.shape[1:], "loss", loss.shape, f"of shape {reference.shape[1:]}, a value each seed")
    require(bool((np.isfinite(loss) & (loss > 0)).all()), "loss", loss, "above 0 and finite")
    needed = equivalent_data(fit_scaling(d, reference.mean(1)), float(loss.mean()))
    seeds = loss.size
    low, high = 0.0, math.inf
    if seeds > 1:
        drawn = generator.integers(seeds, size=(bootstrap, seeds))
        alpha, B, beta = _fits(d, reference[:, drawn].mean(-1).T)
        above = loss[drawn].mean(-1) - beta
        with np.errstate(divide="ignore", over="ignore"):
            ratios = np.where(above > 0, (alpha / np.where(above > 0, above, 1.0)) ** (1 / B), np.inf) / at
        tail = stats.norm.cdf(math.sqrt(seeds / (seeds - 1)) * stats.t.ppf(0.025, seeds - 1))
        low = float(np.quantile(ratios, tail, method="lower"))
        high = float(np.quantile(ratios, 1 - tail, method="higher"))
    return Speedup(needed / at, low, high, not d.min() <= needed <= d.max())


def _positive(values: Any, name: str) -> Float[ndarray, " n"]:
    x = np.asarray(values, dtype=np.float64)
    require(x.ndim == 1 and bool((np.isfinite(x) & (x > 0)).all()), name, values, "numbers above 0 and finite")
    return x


def _check_scaling(D: Any, loss: Any) -> tuple[Float[ndarray, " n"], Float[ndarray, "n ..."]]:
    d, losses = _positive(D, "D"), np.asarray(loss, dtype=np.float64)
    require(len(set(d.tolist())) >= 3, "D", D, "at least 3 different amounts of data")
    require(len(losses) == d.size, "loss", losses.shape, f"{d.size} rows, one for each amount of data")
    require(bool((np.isfinite(losses) & (losses > 0)).all()), "loss", loss, "above 0 and finite")
    return d, losses


def _fits(
    D: Float[ndarray, " n"], loss: Float[ndarray, "rows n"]
) -> tuple[Float[ndarray, " rows"], Float[ndarray, " rows"], Float[ndarray, " rows"]]:
    """α, B and β of least squares for each row of losses; α = 0 where they do not fall."""
    middle = np.exp(np.log(D).mean())  # powers of numbers around 1 keep the sums well conditioned
    d = D / middle

    def linear_part(B: ndarray, y: ndarray) -> tuple[ndarray, ndarray, ndarray]:
        """α and β, at least 0, and the sum of squares, for each exponent and its losses."""
        x = d ** -B[..., None]
        apart = x - x.mean(-1, keepdims=True)
        alpha = np.maximum((apart * y).sum(-1) / (apart * apart).sum(-1), 0.0)
        beta = y.mean(-1) - alpha * x.mean(-1)
        alpha = np.where(beta < 0, (x * y).sum(-1) / (x * x).sum(-1), alpha)
        beta = np.maximum(beta, 0.0)
        return alpha, beta, ((alpha[..., None] * x + beta[..., None] - y) ** 2).sum(-1)

    grid = np.geomspace(LEAST_EXPONENT, LARGEST_EXPONENT, 64)
    place = linear_part(grid, loss[:, None])[2].argmin(-1)
    low, high = grid[np.maximum(place - 1, 0)], grid[np.minimum(place + 1, grid.size - 1)]
    for _ in range(50):  # golden section, all rows at once; it shrinks the bracket to 4e-11 of its width
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        nearer = linear_part(left, loss)[2] < linear_part(right, loss)[2]
        low, high = np.where(nearer, low, left), np.where(nearer, right, high)
    B = (low + high) / 2
    alpha, beta, _ = linear_part(B, loss)
    return alpha * middle**B, B, beta


class Flip(NamedTuple):
    """A pair in another order than at the end: `ahead` has the lower loss at this step, `winner` at the last."""

    step: int
    ahead: str
    winner: str


def rank_flips(curves: Mapping[str, Mapping[int, float]], at_steps: Iterable[int]) -> list[Flip]:
    """The pairs whose order at a step differs from that at the end; equal losses have no order.

    Args:
        curves: for each optimizer its loss after so many steps; infinite where it diverged.
        at_steps: the steps to look at, those of every curve.

    Raises:
        ValueError: curves end at different steps, a step is missing, or a loss is NaN.
    """
    ends = {name: max(curve, default=0) for name, curve in curves.items()}
    require(len(set(ends.values())) == 1, "curves", ends, "of the same last step")
    (end,) = set(ends.values())
    flips = []
    for step in at_steps:
        for name, curve in curves.items():
            known = not math.isnan(curve.get(step, math.nan)) and not math.isnan(curve[end])
            require(known, f"curves[{name!r}]", dict(curve), f"losses, also after steps {step} and {end}")
        for pair in combinations(curves, 2):
            ahead, behind = sorted(pair, key=lambda name: curves[name][step])
            if curves[ahead][step] < curves[behind][step] and curves[ahead][end] > curves[behind][end]:
                flips.append(Flip(step, ahead, behind))
    return flips
