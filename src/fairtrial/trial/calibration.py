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
COMPARISONS = 2000
SEEDS = (6, 10, 20)
METHODS = (1, 3, 8)
BUDGET = 40  # seeds, of comparisons that run until decided
EFFECTS = (0.5, 0.75, 1.0)  # in standard deviations of the paired difference: 20 seeds find 56 %, 88 % and 99 %
DIVERGED = 0.05
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
        median_seeds: seeds at which half of the comparisons had been decided, or the budget.
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
    def misses(self) -> list[str]:
        """What is not as it should be, a sentence each; none is expected.

        False verdicts: 5 % lies in the interval or above it, whose upper end is at most 6.5 %. Coverage, with placebos:
        at 10 and 20 seeds within 95 ± 1.5 %, unless ties make it larger; over a sequence of looks not below 95 % beyond
        chance. Detection, on the pool as measured: within 10 points of what was computed. Savings, at the largest
        effect: at most 60 % of the runs.
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
            many = found.share.rate > 0.965 and found.design == "fixed" and found.seeds >= 10
            if found.spread == 1 and (few or (many and found.pool == "as measured")):
                yield f"intervals hold the truth in {found.share.rate:.1%} of cases: {_case(found)}"

    def _not_found_as_computed(self) -> Iterator[str]:
        for found in self.detection:
            if found.pool != "as measured" or found.computed is None:
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
        runs: size of the pool; a comparison of 8 methods up to 40 seeds takes 360 of them.
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
    for name, shape in shapes(pool, metric).items():
        baseline, methods = shape[drawn[:, 0]], shape[drawn[:, 1:]]
        placebos = methods - baseline[:, None]
        truth = {1: placebos[:, 0]}
        if name in ("as measured", SKEWED):
            truth[2] = 2 * methods[:, 0] - shape.mean() - baseline
        shift = math.sqrt(2) * float(shape.std(ddof=1))
        for n in SEEDS:
            p = _p_values(placebos[..., :n])
            false_verdicts += [FalseVerdicts(name, "fixed", n, m, _any_significant(p[:, :m])) for m in METHODS]
            coverage += [Coverage(name, "fixed", n, k, _count(_p_values(d[:, :n]) >= LEVEL)) for k, d in truth.items()]
            for effect in EFFECTS:
                better = placebos[:, 0, :n] + effect * shift
                p[:, 0] = _p_values(better)
                for m in METHODS:
                    found = np.array([holm(row)[0] < LEVEL for row in p[:, :m]]) & (better.mean(axis=1) > 0)
                    computed = statistics.power(effect, 1.0, n, LEVEL / m)
                    detection.append(Detection(name, "fixed", n, m, effect, _count(found), computed))
        least = sequential.least_levels(placebos.reshape(-1, BUDGET)).reshape(placebos.shape[:2])
        for m in METHODS:
            crossed = np.zeros((comparisons, m), dtype=bool)
            near = least[:, :m] <= LEVEL / m
            crossed[near] = _ever_crossed(placebos[:, :m][near], LEVEL / m)
            false_verdicts.append(FalseVerdicts(name, "until decided", BUDGET, m, _count(crossed.any(axis=1))))
        for k, d in truth.items():
            coverage.append(Coverage(name, "until decided", BUDGET, k, _count(~_ever_crossed(d, LEVEL))))
    placebo = pool[drawn[:, 1]] - pool[drawn[:, 0]]
    spread = math.sqrt(2) * float(pool.std(ddof=1))
    savings = []
    for effect in EFFECTS:
        for m in METHODS:
            seeds, side = _first_crossing(placebo + effect * spread, LEVEL / m)
            share = _count(side > 0)
            detection.append(Detection("as measured", "until decided", BUDGET, m, effect, share, None))
            if m == 1:
                savings.append(_saving(effect, seeds, share))
    return Calibration(
        task,
        version,
        metric.name,
        pool.size,
        failed,
        int(np.unique(pool).size),
        float(pool.mean()),
        spread,
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
        "as measured": pool,
        "heavy tails (Student's t, 2 degrees of freedom)": stats.t.ppf(share, 2),
        SKEWED: stats.expon.ppf(share),
        "many ties (rounded to standard deviations)": np.round((pool - pool.mean()) / spread),
        "one in twenty diverged": diverged,
    }


def _drawn(runs: int, comparisons: int) -> NDArray[np.int64]:
    """Places in the pool, none twice in a comparison: (comparisons, 1 + methods, seeds)."""
    recipes = 1 + max(METHODS)
    rng = np.random.default_rng(0)
    places = np.stack([rng.permutation(runs)[: recipes * BUDGET] for _ in range(comparisons)])
    return places.reshape(comparisons, recipes, BUDGET)


def _p_values(differences: Array) -> Array:
    """What `statistics.sign_flip_p` says of each series along the last axis."""
    *shape, n = differences.shape
    series = differences.reshape(-1, n)
    if n <= statistics.EXACT_UP_TO:  # patterns with the first sign kept; the others are their opposites
        flips = 1.0 - 2.0 * ((np.arange(2 ** (n - 1))[:, None] >> np.arange(n)) & 1)
        patterns, further = 2**n, 0
    else:
        subsets = statistics._drawn_subsets(n)
        flips = 1.0 - 2.0 * subsets[: len(subsets) // 2]
        patterns, further = len(subsets) + 1, 2
    roundoff = 8 * n * np.finfo(np.float64).eps * np.abs(series).sum(axis=1)
    observed = np.abs(series.sum(axis=1)) - roundoff
    step = max(1, 2**18 // len(flips))
    extreme = np.empty(len(series))
    for first in range(0, len(series), step):
        part = slice(first, first + step)
        extreme[part] = (np.abs(series[part] @ flips.T) >= observed[part, None]).sum(axis=1)
    p: Array = ((2 * extreme + further) / patterns).reshape(shape)
    return p


def _any_significant(p: Array) -> Share:
    return _count(np.array([min(holm(row)) < LEVEL for row in p]))


def _count(cases: NDArray[np.bool_]) -> Share:
    return Share(int(np.count_nonzero(cases)), cases.size)


def _ever_crossed(differences: Array, level: float) -> NDArray[np.bool_]:
    crossed: NDArray[np.bool_] = (sequential.crossings(differences, level) != 0).any(axis=1)
    return crossed


def _first_crossing(differences: Array, level: float) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """How many seeds each series has at its first crossing, or in all, and on which side it was; 0 for none."""
    crossed = sequential.crossings(differences, level)
    first = (crossed != 0).argmax(axis=1)
    side = crossed[np.arange(len(crossed)), first]
    looks = np.array(sequential.looks_up_to(differences.shape[1]))
    return np.where(side != 0, looks[first], differences.shape[1]), side


def _saving(effect: float, seeds: NDArray[np.int64], found: Share) -> Saving:
    fixed = next(n for n in range(6, 10_000) if statistics.power(effect, 1.0, n) >= found.low)
    median = float(np.median(seeds))
    return Saving(effect, median, fixed, median / fixed)
