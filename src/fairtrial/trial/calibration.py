"""The bench measured on itself: how often its verdicts are wrong, how often they find what is there.

A pool of real runs of a task's baseline, each with a seed of its own: everything that a seed decides is drawn anew in
each, initial weights, the method's own random stream, order and split of the data, and its tuning if it has one.
Comparisons are drawn from it, all runs of one without replacement: n runs stand for the baseline and n for each of the
methods, which are placebos, since they are the baseline. Whatever the distribution of the pool, exchanging two of its
runs changes nothing, so that the differences are symmetric around 0: a verdict of `better` or `worse` is false, and an
interval should hold 0. Runs that shared their seed's split and order, as a comparison's do, would be exchangeable just
as well; they would only differ by less, and that the figures here do not depend on, as everything is measured in
standard deviations of the differences.

Real pools are tame or not as they happen to be. Each is therefore also used in other shapes: with the ranks of its
values, ties included, on a heavy-tailed and on a skewed distribution, with values rounded to whole standard deviations
until most are tied, and with one run in twenty diverged.

**What the intervals cover.** Every comparison is a random order of the pool, drawn independently of all others. Given
the pool the number of false verdicts, of intervals that hold the truth, of effects found is therefore binomial, though
two comparisons share many runs, and its interval is right for the share among all comparisons that these runs allow.
The level of the tests, and with placebos the coverage, is promised for every pool, so these figures speak of the bench.
Power, savings and coverage with skewed differences depend on the shape of the pool: another 400 runs would have come to
slightly other figures, and that the intervals do not cover. Nor are figures independent of each other: all come from
the same draws, those with 6 seeds from the first 6 of those with 20.

**Known limits.** Tests and intervals rest on differences being symmetric around their mean. A method that changes
nothing but the spread of skewed values makes differences skewed, and intervals then hold the true difference of means
in fewer than 95 % of cases; `coverage` with a spread of 2 says in how many. Where a metric takes few values, as does
accuracy on a small test set, many differences are tied. Tests are then cautious: fewer false verdicts than 5 %, and
intervals that are wider than they need be. The power that is computed knows nothing of ties, and with up to 10 seeds it
may be 10 points off, up or down, as a planted effect lies between values that the metric can take.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fairtrial.contract import BadInput, Metric, Task
from fairtrial.trial import sequential, statistics
from fairtrial.trial.comparison import FIRST_TUNING_SEED, Progress, evaluate, unwatched
from fairtrial.trial.execute import Executor
from fairtrial.trial.figures import (
    AMPLE,
    AS_MEASURED,
    Calibration,
    Coverage,
    Detection,
    FalseVerdicts,
    Pool,
    Saving,
    Share,
)
from fairtrial.trial.recipe import Recipe, check_budget
from fairtrial.trial.statistics import LEVEL, holm
from fairtrial.trial.store import Store
from fairtrial.trial.tuning import search_space

FIRST_POOL_SEED = (
    2_000_000  # evaluation seeds count from 0, tuning seeds from 1 000 000; those of a pool from 3 000 000
)
RUNS = 400
COMPARISONS = 10_000  # so that a rate of just 5 % has an interval that ends well below 6.5 %
SEEDS = (6, 10, 20)
METHODS = (1, 3, 8)
BUDGETS = (10, 20, AMPLE)  # seeds, of comparisons that run until decided
EFFECTS = (0.25, 0.5, 0.75, 1.0)  # standard deviations of the paired difference: 20 seeds find 19, 56, 89 and 99 %
DIVERGED = 0.05
SKEWED = "skewed (exponential)"

Array = NDArray[np.float64]


def untold(pool: str) -> None:
    """For those who only want the result."""


def calibrate(
    load: Callable[[str], Task],
    reference: str,
    *,
    executor: Executor,
    store: Store,
    runs: int = RUNS,
    comparisons: int = COMPARISONS,
    trials: int = 0,
    progress: Progress = unwatched,
    drawing: Callable[[str], None] = untold,
) -> Calibration:
    """Run a task's baseline, every slot at its default, `runs` times, and draw comparisons from these runs.

    Args:
        load: gives the task for a reference; a module-level function, since workers call it too.
        reference: the task's name, or what else `load` takes.
        executor: carries the runs out; entered by the caller.
        store: what is recorded there is not run again.
        runs: size of the pool; 8 methods, a baseline and 40 seeds take 360 of them.
        comparisons: how many are drawn for every figure; half as many with planted effects.
        trials: tuning runs before each run of the pool, on a seed of their own; without, it runs with the defaults.
        progress: told after every run.
        drawing: told the shape of the pool that comparisons are about to be drawn from; all take some minutes.

    Raises:
        BadInput: something asked for does not exist or is out of range, or all runs measure the same.
        StoreError: the store cannot be used.
    """
    check_budget("runs", runs, RUNS)
    check_budget("comparisons", comparisons, 2)
    check_budget("trials", trials, 0)
    if runs > FIRST_TUNING_SEED:
        raise BadInput(f"runs must be at most {FIRST_TUNING_SEED}, got {runs}")
    task = load(reference)
    baseline = Recipe(reference, {name: slot.default for name, slot in task.slots.items()})
    if trials and not search_space(task, baseline):
        raise BadInput(f"trials must be 0: the baseline of {task.name} has nothing to tune")
    seeds = range(FIRST_POOL_SEED, FIRST_POOL_SEED + runs)
    found = evaluate(task, baseline, seeds, trials, executor=executor, store=store, progress=progress)
    pool = Pool(
        task.name,
        task.version,
        task.metric,
        trials,
        FIRST_POOL_SEED,
        [outcome.value for _, outcome in found],
        sum(outcome.failed for _, outcome in found),
        math.fsum(run.seconds for tuned, outcome in found for run in (*(run for _, run in tuned.history), outcome)),
    )
    return calibration_of(pool, comparisons, drawing)


def calibration_of(pool: Pool, comparisons: int = COMPARISONS, drawing: Callable[[str], None] = untold) -> Calibration:
    """What comparisons drawn from these runs come to. The draws are fixed."""
    values = np.asarray(pool.values, dtype=np.float64)
    if np.ptp(values) == 0:
        raise BadInput(
            f"all {values.size} runs of the baseline measured {values[0]:g}: there is nothing to calibrate on"
        )
    started = time.perf_counter()
    drawn = _drawn(values.size, comparisons)
    with_effect = comparisons // 2
    false_verdicts: list[FalseVerdicts] = []
    power: list[Detection] = []
    coverage: list[Coverage] = []
    savings: list[Saving] = []
    for name, shape in shapes(values, pool.metric).items():
        drawing(name)
        baseline, methods = shape[drawn[:, 0]], shape[drawn[:, 1:]]
        placebos = methods - baseline[:, None]
        spread = _spread(shape)
        for n in SEEDS:
            p = _p_values(placebos[..., :n])
            false_verdicts += [FalseVerdicts(name, "fixed", n, _any_significant(p[:, :m]), m) for m in METHODS]
            power += _found_with_fixed_seeds(name, placebos[:with_effect, 0, :n], p[:with_effect], spread)
        false_verdicts += _false_until_decided(name, placebos)
        coverage += _covered(name, placebos[:, 0], 1)
        if name in (AS_MEASURED, SKEWED):
            coverage += _covered(name, 2 * methods[:, 0] - shape.mean() - baseline, 2)
        if name == AS_MEASURED:
            found, saved = _found_until_decided(name, placebos[:with_effect, 0], spread)
            power += found
            savings += saved
    took = time.perf_counter() - started
    return Calibration(pool, comparisons, with_effect, took, false_verdicts, power, coverage, savings)


def shapes(pool: Array, metric: Metric) -> dict[str, Array]:
    """The pool as measured, and in other shapes."""
    share = (stats.rankdata(pool) - 0.5) / pool.size  # ties share a rank
    rng = np.random.default_rng(pool.size)
    diverged = np.where(rng.permutation(pool.size) < DIVERGED * pool.size, metric.worst, pool)
    spread = pool.std()
    return {
        AS_MEASURED: pool,
        "heavy tails (t with 2 df)": stats.t.ppf(share, 2),
        SKEWED: stats.expon.ppf(share),
        "many ties (rounded)": np.round((pool - pool.mean()) / spread),
        "one in 20 diverged": diverged,
    }


def _drawn(runs: int, comparisons: int) -> NDArray[np.int64]:
    """Places in the pool, none twice in a comparison: (comparisons, 1 + methods, seeds)."""
    recipes = 1 + max(METHODS)
    rng = np.random.default_rng(0)
    places = np.stack([rng.permutation(runs)[: recipes * BUDGETS[-1]] for _ in range(comparisons)])
    return places.reshape(comparisons, recipes, BUDGETS[-1])


def _p_values(differences: Array) -> Array:
    """What `statistics.sign_flip_p` says of each series along the last axis."""
    *shape, n = differences.shape
    series = differences.reshape(-1, n)
    dimension = n if n <= statistics.EXACT_UP_TO else statistics.DRAWN.bit_length() - 1
    half = np.arange(2 ** (dimension - 1))  # the patterns of the other half are these with all signs turned
    turned = np.bitwise_count(half[:, None] & statistics.characters(n, dimension)) % 2
    flips = np.where(turned, -1.0, 1.0)
    roundoff = 8 * n * np.finfo(np.float64).eps * np.abs(series).sum(axis=1)
    observed = np.abs(series.sum(axis=1)) - roundoff
    step = max(1, 2**18 // len(flips))
    extreme = np.empty(len(series))
    for first in range(0, len(series), step):
        part = slice(first, first + step)
        extreme[part] = (np.abs(series[part] @ flips.T) >= observed[part, None]).sum(axis=1)
    p: Array = (extreme / half.size).reshape(shape)
    return p


def _spread(pool: Array) -> float:
    """Standard deviation of the difference of two runs."""
    return math.sqrt(2) * float(pool.std(ddof=1))


def _count(cases: Any) -> Share:
    return Share(int(np.count_nonzero(cases)), int(np.size(cases)))


def _any_significant(p: Array) -> Share:
    return _count([min(holm(row)) < LEVEL for row in p])


def _found_with_fixed_seeds(name: str, placebo: Array, p: Array, spread: float) -> Iterator[Detection]:
    """The first method gets better, the others stay placebos, with p-values as they are."""
    n = placebo.shape[1]
    for effect in EFFECTS:
        better = placebo + effect * spread
        with_effect = np.concatenate([_p_values(better)[:, None], p[:, 1:]], axis=1)
        for m in METHODS:
            corrected = np.array([holm(row)[0] for row in with_effect[:, :m]])
            share = _count((corrected < LEVEL) & (better.sum(axis=1) > 0))
            computed = round(statistics.power(effect, 1.0, n, LEVEL / m), 5)
            yield Detection(name, "fixed", n, share, m, effect, computed)


def _false_until_decided(name: str, placebos: Array) -> Iterator[FalseVerdicts]:
    """The first verdict of all is a rejection at the level divided by the number of methods."""
    least = sequential.least_levels(placebos.reshape(-1, BUDGETS[-1])).reshape(placebos.shape[:2])
    for m in METHODS:
        near = least[:, :m] <= LEVEL / m
        crossed = np.zeros((*near.shape, len(sequential.looks_up_to(BUDGETS[-1]))), dtype=bool)
        crossed[near] = sequential.crossings(placebos[:, :m][near], LEVEL / m) != 0
        for budget in BUDGETS:
            looks = len(sequential.looks_up_to(budget))
            yield FalseVerdicts(name, "until decided", budget, _count(crossed[..., :looks].any(axis=(1, 2))), m)


def _covered(name: str, differences: Array, spread: int) -> Iterator[Coverage]:
    """An interval leaves 0 out just where the test rejects it."""
    for n in SEEDS:
        yield Coverage(name, "fixed", n, _count(_p_values(differences[:, :n]) >= LEVEL), spread)
    crossed = sequential.crossings(differences, LEVEL)
    yield Coverage(name, "until decided", BUDGETS[-1], _count((crossed == 0).all(axis=1)), spread)


def _found_until_decided(name: str, placebo: Array, spread: float) -> tuple[list[Detection], list[Saving]]:
    """What is found within the largest budget, and, with one method, what that saves."""
    found, saved = [], []
    for effect in EFFECTS:
        for m in METHODS:
            seeds, side = _first_crossing(placebo + effect * spread, LEVEL / m)
            found.append(Detection(name, "until decided", BUDGETS[-1], _count(side > 0), m, effect, None))
            if m == 1:
                saved += [_saving(effect, budget, seeds, side) for budget in BUDGETS[1:]]
    return found, saved


def _saving(effect: float, budget: int, seeds: NDArray[np.int64], side: NDArray[np.int8]) -> Saving:
    share = _count((side > 0) & (seeds <= budget))
    fixed = next(n for n in range(6, 10_000) if statistics.power(effect, 1.0, n) >= share.low)
    return Saving(effect, budget, *_median(np.minimum(seeds, budget)), fixed, share)


def _median(values: NDArray[np.int64]) -> tuple[float, float, float]:
    """The median, and its 95 % interval: as many values are below it as heads in so many throws of a coin."""
    ordered = np.sort(values)
    outside = max(0, int(stats.binom.ppf(0.025, ordered.size, 0.5)) - 1)
    return float(np.median(ordered)), float(ordered[outside]), float(ordered[-1 - outside])


def _first_crossing(differences: Array, level: float) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """How many seeds each series has at its first crossing, or in all, and on which side it was; 0 for none."""
    crossed = sequential.crossings(differences, level)
    first = (crossed != 0).argmax(axis=1)
    side = crossed[np.arange(len(crossed)), first]
    looks = np.array(sequential.looks_up_to(differences.shape[1]))
    return np.where(side != 0, looks[first], differences.shape[1]), side
