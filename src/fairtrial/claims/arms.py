"""The arms of a claim's own comparison: tuned alike on validation data, then run on the same fresh seeds."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Generic, TypeVar

from fairtrial.claims.measure import Measure
from fairtrial.contract import Split
from fairtrial.methods.arguments import require

FIRST_TUNING_SEED = 1_000_000  # evaluation seeds count from 0; the two never meet

S = TypeVar("S")
K = TypeVar("K", bound=Hashable)
R = TypeVar("R")


@dataclass(frozen=True)
class Run(Generic[S]):
    """A setting and a seed, to be carried out and judged on one split."""

    setting: S
    seed: int
    split: Split


def tune(
    measure: Measure,
    function: Callable[[Run[S]], R],
    grids: Mapping[K, Sequence[S]],
    *,
    seeds: int,
    score: Callable[[R], float],
) -> dict[K, S]:
    """The setting of each arm that scores highest on validation data, on average over tuning seeds.

    Args:
        measure: what runs are carried out with.
        function: carries a run out.
        grids: the settings to choose among, by arm; as many for each.
        seeds: how many tuning seeds.
        score: of what `function` returns; the larger the better.
    """
    sizes = {arm: len(grid) for arm, grid in grids.items()}
    require(len(set(sizes.values())) == 1, "grids", sizes, "of equal size")
    tuning_seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + seeds)
    runs = [Run(setting, seed, "validation") for grid in grids.values() for setting in grid for seed in tuning_seeds]
    results = iter(measure.map(function, runs))
    best = {}
    for arm, grid in grids.items():
        scores = [fmean(score(next(results)) for _ in tuning_seeds) for _ in grid]
        best[arm] = grid[scores.index(max(scores))]
    return best


def evaluate(
    measure: Measure, function: Callable[[Run[S]], R], chosen: Mapping[K, S], *, seeds: int
) -> dict[K, list[R]]:
    """What each arm gives on test data, on the same fresh seeds."""
    runs = [Run(setting, seed, "test") for seed in range(seeds) for setting in chosen.values()]
    results = measure.map(function, runs)
    return {arm: results[place :: len(chosen)] for place, arm in enumerate(chosen)}
