"""The figures of a calibration, and whether they are as they should be.

- **False verdicts**: at most 5 % of comparisons, and the upper end of the interval at most 6.5 %. A test that is exact
  is wrong in just 5 %, and of many intervals around that some begin above it by chance. More than 5 % therefore means
  more than chance explains, over all of these figures at once: exact binomial tests under Holm's correction.
- **Coverage** of the intervals, with placebos: 95 ± 1.5 % at 10 and 20 seeds for the pool as measured; with 6 seeds and
  in its other shapes no less than 93.5 %. Over all looks together no less than 95 %.
- **Power**: on the pool as measured, effects are found as often as was computed, within 10 points.
- **Savings**: with one method, a clear effect and a budget of 40 seeds, half of all comparisons that run until decided
  need at most 60 % of the seeds that a fixed number must be to find the effect as often. An effect is clear from 0.75
  standard deviations of the paired difference on. Smaller ones are decided late or not at all, and waiting for them
  costs more seeds than it saves; they are shown beside, as are budgets that are too short.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from scipy import stats

from fairtrial.contract import Metric
from fairtrial.trial.statistics import LEVEL, holm

AS_MEASURED = "as measured"
AMPLE = 40  # seeds
CLEAR = 0.75  # standard deviations of the paired difference
FALSE_AT_MOST = 0.065  # upper end of the interval
COVERED = (0.935, 0.965)
OFF_AT_MOST = 0.1  # of power
RATIO_AT_MOST = 0.6

Design = Literal["fixed", "until decided"]


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

    def __str__(self) -> str:
        """'4.9 % [4.5, 5.3]'."""
        return f"{100 * self.rate:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    def as_json(self) -> dict[str, Any]:
        ends = {"rate": self.rate, "low": self.low, "high": self.high}
        return {"count": self.count, "of": self.of, **{name: round(end, 5) for name, end in ends.items()}}


@dataclass(frozen=True)
class Case:
    """What comparisons were drawn for a figure.

    Attributes:
        pool: 'as measured', or another shape of it.
        design: a number of seeds fixed beforehand, or looking again and again up to a budget.
        seeds: that number, or the budget.
        share: of these comparisons those that are counted.
    """

    pool: str
    design: Design
    seeds: int
    share: Share

    def __str__(self) -> str:
        seeds = f"{self.seeds} seeds" if self.design == "fixed" else f"until decided, up to {self.seeds} seeds"
        return f"pool {self.pool}, {seeds}"

    def as_json(self) -> dict[str, Any]:
        """The attributes, with those of the share among them."""
        row = asdict(self)
        del row["share"]
        return {**row, **self.share.as_json()}


@dataclass(frozen=True)
class FalseVerdicts(Case):
    """Comparisons of placebos with any `better` or `worse` among them.

    Attributes:
        methods: placebos compared to the baseline at once, under Holm's correction.
    """

    methods: int


@dataclass(frozen=True)
class Coverage(Case):
    """Comparisons in which the interval, at every look if there are several, holds the true difference of means.

    Attributes:
        spread: 1 for a placebo. 2 for a method whose values lie twice as far from their mean: where the pool is skewed
            its differences are so too, the intervals promise nothing, and the figure says what that costs.
    """

    spread: int


@dataclass(frozen=True)
class Detection(Case):
    """Comparisons in which one method is better by a known amount, among placebos, and is found to be.

    Attributes:
        methods: as in `FalseVerdicts`.
        effect: what is added to its values, in standard deviations of the paired difference.
        computed: what `statistics.power` says for a fixed number of seeds at the level that Holm leaves the only method
            to be found; it takes differences for normal. None if there is no fixed number.
    """

    methods: int
    effect: float
    computed: float | None


@dataclass(frozen=True)
class Saving:
    """What looking again and again saves, with one method, on the pool as measured.

    Attributes:
        effect: as in `Detection`.
        budget: seeds at most.
        median_seeds: seeds at which half of the comparisons had ended, those at the end of their budget among them.
        median_low, median_high: its 95 % interval, from order statistics (binomial).
        fixed_seeds: how many a fixed number must be to find the effect as often, that is as often as the lower end of
            the share's interval says.
        share: of comparisons that found the effect.
    """

    effect: float
    budget: int
    median_seeds: float
    median_low: float
    median_high: float
    fixed_seeds: int
    share: Share

    @property
    def ratio(self) -> float:
        """Of the seeds of half of the comparisons to a fixed number; of runs too, as both recipes have as many."""
        return self.median_seeds / self.fixed_seeds

    @property
    def clear(self) -> bool:
        """Whether something was promised of it."""
        return self.effect >= CLEAR and self.budget >= AMPLE

    def as_json(self) -> dict[str, Any]:
        row = asdict(self)
        del row["share"]
        ends = {"ratio": self.median_seeds, "ratio_low": self.median_low, "ratio_high": self.median_high}
        ratios = {name: round(seeds / self.fixed_seeds, 4) for name, seeds in ends.items()}
        return {**row, **ratios, "clear": self.clear, **self.share.as_json()}


@dataclass(frozen=True)
class Pool:
    """Runs of the baseline of a task, each with a seed of its own.

    Attributes:
        task, version, metric: the task's.
        trials: runs of the tuning that each of them had for itself; 0 if it ran with the defaults.
        first_seed: the seeds count from there.
        values: what they measured on test data.
        failed: how many of them count with the metric's worst value.
        seconds: what they took one after the other, with their tunings.
    """

    task: str
    version: int
    metric: Metric
    trials: int
    first_seed: int
    values: Sequence[float]
    failed: int
    seconds: float

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.values)

    @property
    def standard_deviation(self) -> float:
        mean = self.mean
        return math.sqrt(math.fsum((value - mean) ** 2 for value in self.values) / (len(self.values) - 1))

    @property
    def distinct(self) -> int:
        """How many different values there are."""
        return len(set(self.values))

    @property
    def ties(self) -> str:
        return "" if self.distinct == len(self.values) else f" ({self.distinct} different values)"


@dataclass(frozen=True)
class Calibration:
    """All figures, for the baseline of one task.

    Attributes:
        pool: what comparisons were drawn from.
        comparisons: how many were drawn for every figure, for those with a planted effect `with_effect`.
        seconds: what that took.
    """

    pool: Pool
    comparisons: int
    with_effect: int
    seconds: float
    false_verdicts: Sequence[FalseVerdicts]
    power: Sequence[Detection]
    coverage: Sequence[Coverage]
    savings: Sequence[Saving]

    @property
    def misses(self) -> list[str]:
        """What is not as it should be, a sentence each."""
        return [said for said in self._judged() if said is not None]

    @property
    def judged(self) -> int:
        """Of how many figures something is expected."""
        return sum(1 for _ in self._judged())

    def _judged(self) -> Iterator[str | None]:
        above = [stats.binom.sf(found.share.count - 1, found.share.of, LEVEL) for found in self.false_verdicts]
        for verdicts, p in zip(self.false_verdicts, holm(above) if above else [], strict=True):
            yield _false_too_often(verdicts, p)
        for detection in self.power:
            if detection.pool == AS_MEASURED and detection.computed is not None:
                yield _not_as_computed(detection, detection.computed, self.pool.ties)
        for coverage in self.coverage:
            if coverage.spread == 1:
                yield _not_covered(coverage, self.pool.ties)
        for saving in self.savings:
            if saving.clear:
                yield _too_long(saving)

    def as_json(self) -> dict[str, Any]:
        """Plain data: the facts, and every figure as a row of its own with its share's count, rate and interval."""
        pool, metric = self.pool, self.pool.metric
        return {
            "task": pool.task,
            "version": pool.version,
            "metric": {key: getattr(metric, key) for key in ("name", "direction", "unit", "margin", "worst")},
            "trials": pool.trials,
            "runs": len(pool.values),
            "first_seed": pool.first_seed,
            "failed": pool.failed,
            "distinct": pool.distinct,
            "mean": float(f"{pool.mean:.6g}"),
            "standard_deviation": float(f"{pool.standard_deviation:.6g}"),
            "comparisons": self.comparisons,
            "with_effect": self.with_effect,
            "seconds": {"runs": round(pool.seconds, 1), "drawing": round(self.seconds, 1)},
            "judged": self.judged,
            "misses": self.misses,
            "false_verdicts": [found.as_json() for found in self.false_verdicts],
            "power": [found.as_json() for found in self.power],
            "coverage": [found.as_json() for found in self.coverage],
            "savings": [saving.as_json() for saving in self.savings],
            "values": list(pool.values),
        }


def _false_too_often(found: FalseVerdicts, p: float) -> str | None:
    if p >= LEVEL and found.share.high <= FALSE_AT_MOST:
        return None
    too_many = "too many" if p < LEVEL else "perhaps too many"
    return f"false verdicts in {found.share}, {too_many}: {found}, {_methods(found.methods)}"


def _not_as_computed(found: Detection, computed: float, ties: str) -> str | None:
    if abs(found.share.rate - computed) <= OFF_AT_MOST:
        return None
    shares = f"{found.share} and not {100 * computed:.1f} %"
    return f"an effect of {found.effect:g} is found in {shares}: {found}, {_methods(found.methods)}{ties}"


def _not_covered(found: Coverage, ties: str) -> str | None:
    least, most = COVERED
    if found.share.rate < (least if found.design == "fixed" else 1 - LEVEL):
        return f"intervals hold the truth in only {found.share}: {found}"
    exact = found.design == "fixed" and found.seeds >= 10 and found.pool == AS_MEASURED
    if exact and found.share.rate > most:
        return f"intervals are wider than need be, they hold the truth in {found.share}: {found}{ties}"
    return None


def _too_long(saving: Saving) -> str | None:
    if saving.ratio <= RATIO_AT_MOST:
        return None
    ratio = f"{100 * saving.ratio:.0f} % of a fixed number of seeds"
    return f"an effect of {saving.effect:g} takes {ratio}: until decided, up to {saving.budget} seeds"


def _methods(count: int) -> str:
    return "1 method" if count == 1 else f"{count} methods"
