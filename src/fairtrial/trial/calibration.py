"""The bench measured on itself: how often its verdicts are wrong, how often they find what is there.

A pool of real runs of a task's baseline, each with a seed of its own: everything that a seed decides is drawn anew in
each, initial weights, the method's own random stream, order and split of the data. Comparisons are drawn from it, all
runs of one without replacement: n runs stand for the baseline and n for each of the methods, which are placebos, since
they are the baseline. Whatever the distribution of the pool, exchanging two of its runs changes nothing, so that the
differences are symmetric around 0: a verdict of `better` or `worse` is false, and an interval should hold 0. Runs that
shared their seed's split and order, as a comparison's do, would be exchangeable just as well; they would only differ by
less, and that the figures here do not depend on, as everything is measured in standard deviations of the differences.

Real pools are tame or not as they happen to be. Each is therefore also used in other shapes: with the ranks of its
values, ties included, on a heavy-tailed and on a skewed distribution, with values rounded until most are tied, and with
one run in twenty diverged.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fairtrial.contract import BadInput, Metric, Task
from fairtrial.trial import sequential, statistics
from fairtrial.trial.comparison import Progress, evaluate, unwatched
from fairtrial.trial.execute import Executor
from fairtrial.trial.recipe import Recipe, check_budget
from fairtrial.trial.statistics import LEVEL, holm
from fairtrial.trial.store import Store

FIRST_POOL_SEED = 2_000_000  # evaluation seeds count from 0, tuning seeds from 1 000 000
RUNS = 400
COMPARISONS = 5000  # so that a rate of 5 % has an interval that ends well below 6.5 %
WITH_EFFECT = 2000  # of these, with a planted effect
SEEDS = (6, 10, 20)
METHODS = (1, 3, 8)
BUDGETS = (10, 20, 40)  # seeds, of comparisons that run until decided; the last for the pool as measured only
EFFECTS = (0.5, 0.75, 1.0)  # in standard deviations of the paired difference: 20 seeds find 56 %, 88 % and 99 %
DIVERGED = 0.05
MEASURED = "as measured"
SKEWED = "skewed (exponential)"

Design = Literal["fixed", "until decided"]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Share:
    """A number of cases among all, and the 95 % interval for its share (Clopper & Pearson 1934)."""

    count: int
    of: int

    @property
    def rate(self) -> float:
        return self.count / self.of

    @property
    def low(self) -> float:
        return float(stats.beta.ppf(0.025, self.count, self.of - self.count + 1)) if self.count else 0.0

    @property
    def high(self) -> float:
        return float(stats.beta.ppf(0.975, self.count + 1, self.of - self.count)) if self.count < self.of else 1.0

    def as_json(self) -> dict[str, Any]:
        return {"count": self.count, "of": self.of, "rate": self.rate, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class FalseVerdicts:
    """Comparisons of placebos with any `better` or `worse` among them.

    Attributes:
        pool: 'as measured', or another shape of it.
        design: a number of seeds fixed beforehand, or looking again and again up to a budget.
        seeds: that number, or the budget.
        methods: placebos compared to the baseline at once, under Holm's correction.
        share: of comparisons with a false verdict.
    """

    pool: str
    design: Design
    seeds: int
    methods: int
    share: Share


@dataclass(frozen=True)
class Coverage:
    """Comparisons in which the interval, at every look if there are several, holds the true difference of means.

    Attributes:
        pool, design, seeds: as in `FalseVerdicts`.
        spread: 1 for a placebo. 2 for one whose values lie twice as far from their mean: if the pool is skewed then
            differences are so too, and the intervals promise nothing; the figure says what that costs.
        share: of comparisons whose interval holds it.
    """

    pool: str
    design: Design
    seeds: int
    spread: int
    share: Share


@dataclass(frozen=True)
class Detection:
    """Comparisons in which one method is better by a known amount, among placebos, and is found to be.

    Attributes:
        pool, design, seeds, methods: as in `FalseVerdicts`.
        effect: what is added to its values, in standard deviations of the paired difference.
        share: of comparisons in which its verdict is `better`.
        computed: what `statistics.power` says for a fixed number of seeds at the level that Holm leaves the only method
            to be found; it takes differences for normal.
    """

    pool: str
    design: Design
    seeds: int
    methods: int
    effect: float
    share: Share
    computed: float | None


@dataclass(frozen=True)
class Saving:
    """What looking again and again saves, with one method.

    Attributes:
        effect: as in `Detection`.
        median_seeds: seeds at which half of the comparisons had been decided, or the budget of 40.
        fixed_seeds: how many a fixed number must be to find the effect as often (as the lower end of the interval for
            how often it was found within the budget).
        ratio: of the two; of runs as well, since both recipes have as many.
    """

    effect: float
    median_seeds: float
    fixed_seeds: int
    ratio: float


@dataclass(frozen=True)
class Calibration:
    """All of it, for the baseline of one task."""

    task: str
    version: int
    metric: str
    runs: int
    failed: int
    distinct: int
    mean: float
    spread: float
    comparisons: int
    false_verdicts: Sequence[FalseVerdicts]
    coverage: Sequence[Coverage]
    detection: Sequence[Detection]
    savings: Sequence[Saving]

    @property
    def ties(self) -> bool:
        """Whether any two runs measured the same."""
        return self.distinct < self.runs

    @property
    def misses(self) -> list[str]:
        """What is not as it should be, a sentence each; none is expected.

        False verdicts: no more than 5 % beyond chance, and the interval's upper end at most 6.5 %. Coverage, with
        placebos: 95 ± 1.5 % at 10 and 20 seeds, or more where there are ties or fewer seeds; over all looks together no
        less than 95 % beyond chance. Detection, on the pool as measured: within 10 points of what was computed.
        Savings, at the largest effect: at most 60 % of the runs.
        """
        return [
            *self._false_too_often(),
            *self._covered_too_seldom(),
            *self._not_found_as_computed(),
            *self._too_long(),
        ]

    def _false_too_often(self) -> Iterator[str]:
        for found in self.false_verdicts:
            if found.share.low > LEVEL or found.share.high > 0.065:
                yield f"false verdicts in {found.share.rate:.1%} of cases: {_case(found)}, {found.methods} methods"

    def _covered_too_seldom(self) -> Iterator[str]:
        for found in self.coverage:
            few = found.share.rate < 0.935 if found.design == "fixed" else found.share.high < 0.95
            exact = found.design == "fixed" and found.seeds >= 10 and found.pool == MEASURED and not self.ties
            many = exact and found.share.rate > 0.965
            if found.spread == 1 and (few or many):
                yield f"intervals hold the truth in {found.share.rate:.1%} of cases: {_case(found)}"

    def _not_found_as_computed(self) -> Iterator[str]:
        for found in self.detection:
            if found.pool != MEASURED or found.computed is None:
                continue
            if abs(found.share.rate - found.computed) > 0.1:
                yield (
                    f"an effect of {found.effect:g} found in {found.share.rate:.1%} of cases and not "
                    f"{found.computed:.1%}: {_case(found)}, {found.methods} methods"
                )

    def _too_long(self) -> Iterator[str]:
        for saving in self.savings:
            if saving.effect == max(EFFECTS) and saving.ratio > 0.6:
                yield f"an effect of {saving.effect:g} takes {saving.ratio:.0%} of the runs of a fixed number of seeds"

    def as_json(self) -> dict[str, Any]:
        """Plain data: the attributes, each share as {'count', 'of', 'rate', 'low', 'high'}, and `misses`."""
        return {
            "task": self.task,
            "version": self.version,
            "metric": self.metric,
            "pool": {
                "runs": self.runs,
                "failed": self.failed,
                "distinct": self.distinct,
                "mean": self.mean,
                "spread": self.spread,
            },
            "comparisons": self.comparisons,
            "false_verdicts": [_with_share(found) for found in self.false_verdicts],
            "coverage": [_with_share(found) for found in self.coverage],
            "detection": [_with_share(found) for found in self.detection],
            "savings": [asdict(saving) for saving in self.savings],
            "misses": self.misses,
        }


def _case(found: FalseVerdicts | Coverage | Detection) -> str:
    seeds = f"{found.seeds} seeds" if found.design == "fixed" else f"until decided, up to {found.seeds} seeds"
    return f"pool {found.pool}, {seeds}"


def _with_share(found: FalseVerdicts | Coverage | Detection) -> dict[str, Any]:
    return {**asdict(found), "share": found.share.as_json()}


def calibrate(
    load: Callable[[str], Task],
    reference: str,
    *,
    executor: Executor,
    store: Store,
    runs: int = RUNS,
    comparisons: int = COMPARISONS,
    progress: Progress = unwatched,
) -> Calibration:
    """Run a task's baseline, every slot at its default, `runs` times, and draw comparisons from these runs.

    Args:
        load: gives the task for a reference; a module-level function, since workers call it too.
        reference: the task's name, or what else `load` takes.
        executor: carries the runs out; entered by the caller.
        store: what is recorded there is not run again.
        runs: size of the pool; 8 methods, a baseline and 40 seeds take 360 of them.
        comparisons: how many are drawn for every figure.
        progress: told after every run; the drawing after the last one takes a minute or two.

    Raises:
        BadInput: something asked for does not exist or is out of range, or all runs measure the same.
        StoreError: the store cannot be used.
    """
    check_budget("runs", runs, RUNS)
    check_budget("comparisons", comparisons)
    task = load(reference)
    baseline = Recipe(reference, {name: slot.default for name, slot in task.slots.items()})
    seeds = range(FIRST_POOL_SEED, FIRST_POOL_SEED + runs)
    outcomes = evaluate(task, baseline, seeds, executor=executor, store=store, progress=progress)
    values = [outcome.value for outcome in outcomes]
    failed = sum(outcome.failed for outcome in outcomes)
    return calibration_of(values, task.metric, comparisons, task=task.name, version=task.version, failed=failed)


def calibration_of(
    values: Sequence[float],
    metric: Metric,
    comparisons: int = COMPARISONS,
    *,
    task: str = "",
    version: int = 0,
    failed: int = 0,
) -> Calibration:
    """What comparisons drawn from these runs of one recipe come to. The draws are fixed."""
    pool = np.asarray(values, dtype=np.float64)
    if np.ptp(pool) == 0:
        raise BadInput(f"all {pool.size} runs of the baseline measured {pool[0]:g}: there is nothing to calibrate on")
    drawn = _drawn(pool.size, comparisons)
    false_verdicts: list[FalseVerdicts] = []
    coverage: list[Coverage] = []
    detection: list[Detection] = []
    savings: list[Saving] = []
    for name, shape in shapes(pool, metric).items():
        baseline, methods = shape[drawn[:, 0]], shape[drawn[:, 1:]]
        placebos = methods - baseline[:, None]
        spread = _spread(shape)
        for n in SEEDS:
            p = _p_values(placebos[..., :n])
            false_verdicts += [FalseVerdicts(name, "fixed", n, m, _any_significant(p[:, :m])) for m in METHODS]
            detection += _found_with_fixed_seeds(name, placebos[:WITH_EFFECT, 0, :n], p[:WITH_EFFECT], spread)
        budgets = BUDGETS if name == MEASURED else BUDGETS[:-1]
        false_verdicts += _false_until_decided(name, placebos, budgets)
        coverage += _covered(name, placebos[:, 0], 1, budgets[-1])
        if name in (MEASURED, SKEWED):
            coverage += _covered(name, 2 * methods[:, 0] - shape.mean() - baseline, 2, budgets[-1])
        if name == MEASURED:
            detection += _found_until_decided(name, placebos[:WITH_EFFECT, 0], spread)
            savings += _savings(placebos[:WITH_EFFECT, 0], spread)
    return Calibration(
        task,
        version,
        metric.name,
        pool.size,
        failed,
        int(np.unique(pool).size),
        float(pool.mean()),
        _spread(pool),
        comparisons,
        false_verdicts,
        coverage,
        detection,
        savings,
    )


def shapes(pool: Array, metric: Metric) -> dict[str, Array]:
    """The pool as measured, and in other shapes."""
    share = (stats.rankdata(pool) - 0.5) / pool.size  # ties share a rank
    rng = np.random.default_rng(pool.size)
    diverged = np.where(rng.permutation(pool.size) < DIVERGED * pool.size, metric.worst, pool)
    spread = pool.std()
    return {
        MEASURED: pool,
        "heavy tails (Student's t, 2 degrees of freedom)": stats.t.ppf(share, 2),
        SKEWED: stats.expon.ppf(share),
        "many ties (rounded to standard deviations)": np.round((pool - pool.mean()) / spread),
        "one in twenty diverged": diverged,
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
            yield Detection(name, "fixed", n, m, effect, share, statistics.power(effect, 1.0, n, LEVEL / m))


def _false_until_decided(name: str, placebos: Array, budgets: Sequence[int]) -> Iterator[FalseVerdicts]:
    """The first verdict of all is a rejection at the level divided by the number of methods."""
    most = budgets[-1]
    least = sequential.least_levels(placebos[..., :most].reshape(-1, most)).reshape(placebos.shape[:2])
    for m in METHODS:
        near = least[:, :m] <= LEVEL / m
        crossed = np.zeros((*near.shape, len(sequential.looks_up_to(most))), dtype=bool)
        crossed[near] = sequential.crossings(placebos[:, :m, :most][near], LEVEL / m) != 0
        for n in budgets:
            looks = len(sequential.looks_up_to(n))
            yield FalseVerdicts(name, "until decided", n, m, _count(crossed[..., :looks].any(axis=(1, 2))))


def _covered(name: str, differences: Array, spread: int, budget: int) -> Iterator[Coverage]:
    """An interval leaves 0 out just where the test rejects it."""
    for n in SEEDS:
        yield Coverage(name, "fixed", n, spread, _count(_p_values(differences[:, :n]) >= LEVEL))
    crossed = sequential.crossings(differences[:, :budget], LEVEL)
    yield Coverage(name, "until decided", budget, spread, _count((crossed == 0).all(axis=1)))


def _found_until_decided(name: str, placebo: Array, spread: float) -> Iterator[Detection]:
    for effect in EFFECTS:
        for m in METHODS:
            _, side = _first_crossing(placebo + effect * spread, LEVEL / m)
            yield Detection(name, "until decided", BUDGETS[-1], m, effect, _count(side > 0), None)


def _savings(placebo: Array, spread: float) -> Iterator[Saving]:
    for effect in EFFECTS:
        seeds, side = _first_crossing(placebo + effect * spread, LEVEL)
        often = _count(side > 0).low
        fixed = next(n for n in range(6, 10_000) if statistics.power(effect, 1.0, n) >= often)
        median = float(np.median(seeds))
        yield Saving(effect, median, fixed, median / fixed)


def _first_crossing(differences: Array, level: float) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """How many seeds each series has at its first crossing, or in all, and on which side it was; 0 for none."""
    crossed = sequential.crossings(differences, level)
    first = (crossed != 0).argmax(axis=1)
    side = crossed[np.arange(len(crossed)), first]
    looks = np.array(sequential.looks_up_to(differences.shape[1]))
    return np.where(side != 0, looks[first], differences.shape[1]), side
