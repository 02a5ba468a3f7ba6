"""What claims ask of paired differences: one value for each seed, `a - b`."""

from collections.abc import Sequence

import numpy as np

from fairtrial.trial.statistics import LEVEL, differences, mean_interval


def gaps(values: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """How far the values lie above the baseline's, seed by seed."""
    return [value - other for value, other in zip(values, baseline, strict=True)]


def relative_gaps(values: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """How far the values lie above the baseline's, as parts of the latter."""
    return [value / other - 1 for value, other in zip(values, baseline, strict=True)]


def above_zero(*found: Sequence[float]) -> list[bool]:
    """Whether each mean is significantly above 0: sign-flip test, with Holm's correction over all that are given."""
    nothing = np.zeros(len(found[0])).tolist()
    return [difference.p_holm < LEVEL and difference.mean > 0 for difference in differences(nothing, found)]


def surely_above(found: Sequence[float], bound: float) -> bool:
    """Whether the 95 % interval of the mean lies above the bound."""
    return mean_interval(found)[0] > bound


def surely_below(found: Sequence[float], bound: float) -> bool:
    """Whether the 95 % interval of the mean lies below the bound."""
    return mean_interval(found)[1] < bound
