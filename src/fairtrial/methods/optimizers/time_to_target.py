"""AlgoPerfLite: optimizers with one configuration for all workloads, scored by time to a target (arXiv:2505.24005).

A workload is a model on data, with a target for its metric and a budget of steps. A submission is one frozen
configuration. With t_{s,w} the first step at which s meets the target of w, infinite if it does not within the budget
and the median over seeds if there are several, and with the cut-off c and τ_max both 4 as in AlgoPerf
(arXiv:2306.07179),

    t_{s,w} ← ∞ where t_{s,w} > c min_s' t_{s',w},    r_{s,w} = t_{s,w} / min_s' t_{s',w}
    ρ_s(τ) = share of the workloads with r_{s,w} ≤ τ
    score_s = 1 / (τ_max - 1) ∫_1^τ_max ρ_s(τ) dτ = mean_w max(0, τ_max - r_{s,w}) / (τ_max - 1)

The benchmark's code takes the integral as a trapezoid sum over 100 points; `benchmark_score` has both. A score depends
on who competes: a slower submission changes nobody else's, and a faster one can only lower them.

`calibrate` looks for the configuration that is best on all workloads at once; the best for each would be tuning. The
study's exact search size, search space and schedule horizons are not public knowledge of this library; these arguments
are documented choices, not the published values. Published are NadamW's configurations: `NADAMW`, that of the
benchmark's baseline which is not tuned, and `NADAMW_LIST`, those among which its tuned one chooses. Their dropout and
label smoothing are left out, since here these belong to the workload.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from fairtrial.methods.arguments import require
from fairtrial.methods.optimizers.learning_rate_free import polynomial_average
from fairtrial.methods.registry import Space

POINTS = 100  # of the benchmark's trapezoid sum

NADAMW = {
    "lr": 0.0017486387539278373,
    "betas": (1 - 0.06733926164, 0.9955159689799007),
    "eps": 1e-8,
    "weight_decay": 0.08121616522670176,
    "warmup": 0.02,
}
NADAMW_LIST = (
    {"lr": 0.0013082, "betas": (1 - 0.0268666, 0.9981233), "eps": 1e-8, "weight_decay": 0.1637531, "warmup": 0.10},
    {"lr": 0.0008445, "betas": (1 - 0.1104242, 0.9978505), "eps": 1e-8, "weight_decay": 0.0813540, "warmup": 0.05},
    {"lr": 0.0049585, "betas": (1 - 0.1362558, 0.6291855), "eps": 1e-8, "weight_decay": 0.1147386, "warmup": 0.02},
)

A = TypeVar("A")
R = TypeVar("R")
Shape = Literal["warmup_cosine", "linear", "constant"]


@dataclass(frozen=True)
class Workload:
    """What submissions are timed on.

    Attributes:
        name: what it is called.
        make_data: gives, for a seed, at least `max_steps` batches (x, y).
        make_model: gives, for a seed, a freshly initialised model.
        loss: of outputs and targets, to be trained with.
        metric: of the model, in evaluation mode, and the seed; above 0, and the smaller the better.
        target: for the metric to come down to, above 0.
        max_steps: the budget, at least 1.
        every: steps between two looks at the metric, at least 1. The last step is looked at in any case.
    """

    name: str
    make_data: Callable[[int], Iterable[tuple[Tensor, Tensor]]]
    make_model: Callable[[int], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    metric: Callable[[nn.Module, int], float]
    target: float
    max_steps: int
    every: int = 1

    def __post_init__(self) -> None:
        require(self.target > 0, "target", self.target, "above 0")
        require(self.max_steps >= 1, "max_steps", self.max_steps, "at least 1")
        require(self.every >= 1, "every", self.every, "at least 1")


@dataclass(frozen=True)
class Submission:
    """One frozen configuration.

    Attributes:
        optimizer: makes the optimizer from parameters and options.
        options: its keyword arguments.
        schedule, warmup, horizon: as in `rate_factor`.
        average: look at DoG's average of the iterates, `polynomial_average`, in place of the last one.
    """

    optimizer: Callable[..., Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    schedule: Shape = "warmup_cosine"
    warmup: float = 0.0
    horizon: float = 1.0
    average: bool = False

    def __post_init__(self) -> None:
        rate_factor(0, 1, self.schedule, self.warmup, self.horizon)


def rate_factor(
    step: int, max_steps: int, schedule: Shape = "warmup_cosine", warmup: float = 0.0, horizon: float = 1.0
) -> float:
    """The part of its rate that a submission has in a step, the first being number 0.

    Args:
        step: its number.
        max_steps: the budget, at least 1.
        schedule: after the warm-up 'warmup_cosine' falls to 0 along a cosine, 'linear' along a line, and 'constant'
            stays.
        warmup: part of the horizon in which the rate rises in a line from 0, within [0, 1).
        horizon: part of the budget after which the rate has fallen to 0, within (0, 1].

    Raises:
        ValueError: an argument lies outside its range.
    """
    require(schedule in ("warmup_cosine", "linear", "constant"), "schedule", schedule, "of the three there are")
    require(0 <= warmup < 1, "warmup", warmup, "within [0, 1)")
    require(0 < horizon <= 1, "horizon", horizon, "within (0, 1]")
    end = horizon * max_steps
    start = warmup * end
    if step < start:
        return step / start
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - start) / (end - start))
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


class Timing(NamedTuple):
    """How a run went."""

    steps: float  # the first step at which the target was met; infinite if it was not
    final: float  # the metric at the last look; infinite where training has diverged
    lowest: float  # of all looks


def run_submission(workload: Workload, submission: Submission, seed: int) -> Timing:
    """Train until the target is met, or the budget spent, or the loss no longer finite."""
    model = workload.make_model(seed)
    optimizer = submission.optimizer(model.parameters(), **submission.options)
    shape = submission.schedule, submission.warmup, submission.horizon
    schedule = LambdaLR(optimizer, lambda step: rate_factor(step, workload.max_steps, *shape))
    averaged = AveragedModel(model, avg_fn=polynomial_average(), use_buffers=True) if submission.average else None
    lowest = value = math.inf
    for step, (x, y) in enumerate(islice(workload.make_data(seed), workload.max_steps), 1):
        model.train()
        optimizer.zero_grad()
        loss = workload.loss(model(x), y)
        if not loss.isfinite():
            return Timing(math.inf, math.inf, lowest)
        loss.backward()
        optimizer.step()
        schedule.step()
        if averaged is not None:
            averaged.update_parameters(model)
        if step % workload.every == 0 or step == workload.max_steps:
            judged = model if averaged is None else averaged
            with torch.no_grad():
                value = workload.metric(judged.eval(), seed)
            value = value if math.isfinite(value) else math.inf
            lowest = min(lowest, value)
            if value <= workload.target:
                return Timing(float(step), value, lowest)
    return Timing(math.inf, value, lowest)


class Profile(NamedTuple):
    """Performance profiles."""

    taus: Float[ndarray, " points"]
    shares: Float[ndarray, "submissions points"]  # ρ_s(τ)


def ratios(times: ArrayLike, cutoff: float = 4.0, *, missing: bool = False) -> Float[ndarray, "submissions workloads"]:
    """Times relative to the fastest on the same workload; infinite where nothing counts, as if nobody meets a target.

    Args:
        times: above 0, infinite where a target was not met; one row for each of at least two submissions, one column
            for each workload.
        cutoff: how many times as long as the fastest still counts, at least 1.
        missing: take NaN for a target that was not met; otherwise it is refused.

    Raises:
        ValueError: an argument lies outside its range.
    """
    table = np.array(times, dtype=np.float64)
    require(table.ndim == 2 and len(table) >= 2, "times", table.shape, "a row for each of at least two submissions")
    require(table.shape[1] >= 1, "times", table.shape, "a column for each of at least one workload")
    if missing:
        table[np.isnan(table)] = np.inf
    require(not bool(np.isnan(table).any()), "times", "NaN", "complete, or to be taken with missing=True")
    require(bool((table > 0).all()), "times", table.min(), "above 0")
    require(cutoff >= 1, "cutoff", cutoff, "at least 1")
    fastest = table.min(axis=0)
    counts = np.isfinite(table) & (table <= cutoff * fastest)
    found: Float[ndarray, "submissions workloads"] = np.full_like(table, np.inf)
    np.divide(table, fastest, out=found, where=counts)
    return found


def performance_profile(
    times: ArrayLike, tau_max: float = 4.0, cutoff: float = 4.0, *, missing: bool = False
) -> Profile:
    """ρ_s(τ) at 100 points from 1 to `tau_max`, which is above 1; else as in `ratios`."""
    require(1 < tau_max < math.inf, "tau_max", tau_max, "above 1 and finite")
    taus = np.linspace(1.0, tau_max, POINTS)
    return Profile(taus, (ratios(times, cutoff, missing=missing)[:, :, None] <= taus).mean(axis=1))


def benchmark_score(
    times: ArrayLike, exact: bool = True, tau_max: float = 4.0, cutoff: float = 4.0, *, missing: bool = False
) -> Float[ndarray, " submissions"]:
    """The score of every submission, from 0 to 1.

    Args:
        times, tau_max, cutoff, missing: as in `performance_profile`.
        exact: the integral itself, or else the benchmark's trapezoid sum.

    Raises:
        ValueError: an argument lies outside its range.
    """
    profile = performance_profile(times, tau_max, cutoff, missing=missing)
    area: Float[ndarray, " submissions"] = np.trapezoid(profile.shares, profile.taus, axis=1)
    if exact:
        area = np.maximum(0.0, tau_max - ratios(times, cutoff, missing=missing)).mean(axis=1)
    return area / (tau_max - 1)


class Run(NamedTuple):
    """A submission to be timed on a workload."""

    workload: Workload
    submission: Submission
    seed: int


def timing(run: Run) -> Timing:
    return run_submission(*run)


def draw(search_space: Mapping[str, Space], n_trials: int, seed: int) -> list[dict[str, Any]]:
    """Random points of a search space, independent of one another, by Optuna's random sampler."""
    import optuna

    require(n_trials >= 1, "n_trials", n_trials, "at least 1")
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it announces every study
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
    optuna.logging.set_verbosity(verbosity)
    trials = [study.ask() for _ in range(n_trials)]
    return [{name: space.suggest(trial, name) for name, space in search_space.items()} for trial in trials]


class Calibration(NamedTuple):
    """What a search has found."""

    best: Submission
    candidates: Sequence[Submission]
    times: Float[ndarray, "candidates workloads"]  # medians over the seeds
    distances: Float[ndarray, "candidates workloads"]  # last metric over target, mean over the seeds

    def choice(self, reference: ArrayLike, workloads: Sequence[int], aggregate: str = "score") -> Submission:
        """The best candidate on some of the workloads, given by their places; as in `calibrate`."""
        columns = list(workloads)
        known = np.asarray(reference, dtype=np.float64)[:, columns]
        scores = [float(benchmark_score([times, *known])[0]) for times in self.times[:, columns]]
        losses = self.distances[:, columns].mean(axis=1).tolist()
        keys = [
            (-score, loss) if aggregate == "score" else (loss, -score)
            for score, loss in zip(scores, losses, strict=True)
        ]
        return self.candidates[keys.index(min(keys))]


def calibrate(
    make: Callable[..., Submission],
    search_space: Mapping[str, Space],
    workloads: Sequence[Workload],
    n_trials: int,
    seed: int,
    *,
    reference: ArrayLike,
    run_seeds: Sequence[int] = (0, 1),
    aggregate: Literal["score", "mean_loss"] = "score",
    map: Callable[[Callable[[Run], Timing], Iterable[Run]], Iterable[Timing]] = map,
) -> Calibration:
    """The random configuration that is best on all workloads at once.

    Args:
        make: makes a submission of a point of the search space, given as keyword arguments.
        search_space: the hyperparameters and their ranges.
        workloads: to be good on.
        n_trials: configurations tried, at least 1; how many the study tried is not known here.
        seed: of the configurations.
        reference: times of a fixed set of other submissions, one row for each and one column for each workload, which
            a configuration competes with.
        run_seeds: of the runs; keep them apart from those that the result is judged by.
        aggregate: 'score' takes the highest `benchmark_score`, and among equals the lowest last metric over target,
            mean over workloads and seeds; 'mean_loss' the other way round. A run stops at the target, and one that
            diverges counts as infinitely far from it.
        map: carries the runs out, in order; by default one after the other.

    Raises:
        ValueError: an argument lies outside its range or does not fit the others.
    """
    require(aggregate in ("score", "mean_loss"), "aggregate", aggregate, "'score' or 'mean_loss'")
    require(len(workloads) >= 1, "workloads", workloads, "at least one")
    require(len(run_seeds) >= 1, "run_seeds", run_seeds, "at least one")
    shape = np.shape(reference)
    require(len(shape) == 2 and shape[1] == len(workloads), "reference", shape, "a row of times, or several")
    candidates = [make(**point) for point in draw(search_space, n_trials, seed)]
    runs = [Run(w, candidate, number) for candidate in candidates for w in workloads for number in run_seeds]
    found = np.array([(result.steps, result.final) for result in map(timing, runs)])
    steps, finals = np.moveaxis(found.reshape(n_trials, len(workloads), len(run_seeds), 2), 3, 0)
    distances = finals.mean(axis=2) / [workload.target for workload in workloads]
    calibration = Calibration(candidates[0], candidates, np.median(steps, axis=2), distances)
    return calibration._replace(best=calibration.choice(reference, range(len(workloads)), aggregate))
