"""What n paired differences may honestly say.

Everything here rests on one assumption: under the null hypothesis a paired difference is as likely to be +x as -x.
No normality, no equal variances; ties and heavy tails are allowed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.05
EXACT_UP_TO = 18  # so many values' sign patterns, or subsets, are all enumerated: 2^18
DRAWN = 2**16  # beyond that, a group of so many is drawn


def fewest_seeds(comparisons: int = 1) -> int:
    """Seeds below which no outcome can be significant: the smallest p-value, 2 / 2^n, is not below 0.05 after Holm."""
    return 1 + math.floor(math.log2(2 * comparisons / LEVEL))


Verdict = Literal["better", "worse", "equivalent", "undecided"]


def _subset_sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums over all subsets, in the order of the subsets' binary numbers."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums, sums + value])
    return sums


def characters(n: int, dimension: int) -> NDArray[np.int64]:
    """The v_i of a group of 2^dimension sign patterns: in pattern b, value i turns if b & v_i has oddly many ones.

    The first `dimension` values turn freely, and the others by a draw that is the same for everyone.
    All v_i have an odd number of ones, so that in the last pattern all values turn.
    """
    numbers = np.arange(2**dimension)
    odd = numbers[np.bitwise_count(numbers) % 2 == 1]
    free = 2 ** np.arange(dimension)
    drawn = np.random.default_rng(dimension).permutation(np.setdiff1d(odd, free))
    return np.concatenate([free, np.resize(drawn, max(0, n - dimension))])[:n].astype(np.int64)


@lru_cache(maxsize=2)  # 50 MB each at 100 differences
def _balanced_subsets(n: int) -> NDArray[np.float64]:
    """Some subsets of a sample too large to enumerate them all, the empty one first and the whole sample last.

    The symmetric difference of any two is among them; Hartigan (1969) calls such subsets balanced. Test and interval
    are as exact with them as with all subsets. With a mere draw of subsets they would be so on average over draws, but
    nobody draws more than once.
    """
    dimension = DRAWN.bit_length() - 1
    turned = np.bitwise_count(np.arange(2**dimension)[:, None] & characters(n, dimension)) % 2
    subsets = np.where(turned, 1.0, 0.0)
    subsets.flags.writeable = False
    return subsets


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of the paired sign-flip permutation test on the mean.

    The share of sign patterns whose absolute mean is at least the observed one: all 2^n of them up to n = 18, beyond
    that a fixed group of 2^16. The observed pattern is among them, so p is never 0.
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.size == 0:
        raise ValueError("differences must hold at least one value")
    observed = abs(d.sum())
    sums = _subset_sums(d) if d.size <= EXACT_UP_TO else _balanced_subsets(d.size) @ d
    flipped = d.sum() - 2.0 * sums
    return float(np.count_nonzero(np.abs(flipped) >= observed - _roundoff(d)) / sums.size)


def _roundoff(d: NDArray[np.float64]) -> float:
    """Sums of the same numbers in another order differ by this much at most; such sums are ties."""
    return float(8 * d.size * np.finfo(np.float64).eps * np.abs(d).sum())


def mean_interval(differences: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Interval for the mean difference: the sign-flip test turned around.

    By Hartigan's typical value theorem (1969) the means of all 2^n - 1 non-empty subsets cut the line into 2^n
    intervals, each as likely to hold the centre of a symmetric distribution. Leaving out the same number at either
    end gives an interval with at least the nominal coverage, and it leaves out 0 just where the test rejects 0.
    With fewer than 6 values no bounded interval reaches 95 %: the result is then (-inf, inf).
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.size <= EXACT_UP_TO:
        sums, sizes = _subset_sums(d)[1:], _subset_sums(np.ones(d.size))[1:]
    else:
        subsets = _balanced_subsets(d.size)[1:]
        sums, sizes = subsets @ d, subsets.sum(axis=1)
    sums[2 * np.abs(sums) <= _roundoff(d)] = 0.0  # as the test takes them for ties
    means = sums / sizes
    outside = math.ceil(level / 2 * (means.size + 1)) - 1
    if outside < 1:
        return -math.inf, math.inf
    means.sort()
    return float(means[outside - 1]), float(means[means.size - outside])


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values that hold for the whole family of comparisons."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * (p.size - np.arange(p.size)))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in corrected]


@dataclass(frozen=True)
class Difference:
    """Mean paired difference to the baseline, positive where the metric's value is larger."""

    mean: float
    low: float
    high: float
    p: float
    p_holm: float


def differences(baseline: Sequence[float], others: Sequence[Sequence[float]]) -> list[Difference]:
    """Paired differences of several recipes to one baseline, corrected over all of them."""
    paired = [np.asarray(values, dtype=np.float64) - np.asarray(baseline, dtype=np.float64) for values in others]
    raw = [sign_flip_p(d.tolist()) for d in paired]
    found = []
    for d, p, corrected in zip(paired, raw, holm(raw), strict=True):
        low, high = mean_interval(d.tolist())
        found.append(Difference(float(d.mean()), low, high, p, corrected))
    return found


def verdict(difference: Difference, sign: int, margin: float) -> Verdict:
    """`better` or `worse` if the corrected p < 0.05; else `equivalent` if the interval lies inside ± margin.

    Args:
        sign: +1 where more is better, -1 where less is.
        margin: the smallest difference that matters.
    """
    if difference.p_holm < LEVEL:
        return "better" if sign * difference.mean > 0 else "worse"
    if -margin < difference.low and difference.high < margin:
        return "equivalent"
    return "undecided"


def power(effect: float, spread: float, n: int, level: float = LEVEL) -> float:
    """Chance that n normal paired differences of this mean and standard deviation are significant.

    That of the t test, at the level that sign flips attain: of 2^n patterns only a whole number can count as extreme.
    Where that is one on either side, as with 6 differences, significant means all of one sign; the t test would promise
    up to 16 points too much there.
    """
    extreme = math.floor(level / 2 * 2**n) if n <= EXACT_UP_TO else math.inf
    if extreme < 1:
        return 0.0
    if spread == 0:
        return float(effect != 0)
    if extreme == 1:
        above = stats.norm.cdf(min(abs(effect) / spread, 1e6))
        return float(above**n + (1 - above) ** n)
    attained = level if extreme == math.inf else 2 * extreme / 2**n
    critical = stats.t.ppf(1 - attained / 2, n - 1)
    shift = min(abs(effect) / spread * math.sqrt(n), 1e6)
    # the lower tail by symmetry: SciPy's nct.cdf gives NaN there
    return float(stats.nct.sf(critical, n - 1, shift) + stats.nct.sf(critical, n - 1, -shift))


def seeds_to_decide(values: Sequence[float], margin: float, comparisons: int = 1, chance: float = 0.8) -> int | None:
    """Number of seeds with which an undecided comparison would probably be decided, were its mean and spread the truth.

    Decided means significant at the level divided by the number of comparisons, or an interval inside ± margin,
    whichever needs fewer seeds. None if even 10,000 seeds would not do.
    """
    d = np.asarray(values, dtype=np.float64)
    effect, spread = abs(float(d.mean())), float(d.std(ddof=1)) if d.size > 1 else 0.0
    if spread == 0:
        return fewest_seeds(comparisons)
    z_chance, z_level = stats.norm.ppf(chance), stats.norm.ppf(1 - LEVEL / (2 * comparisons))
    needed = []
    if effect > 0:
        needed.append(((z_level + z_chance) * spread / effect) ** 2 + z_level**2 / 2)
    if effect < margin:  # both ends must stay inside
        half = (stats.norm.ppf(1 - LEVEL / 2) + stats.norm.ppf((1 + chance) / 2)) * spread / (margin - effect)
        needed.append(half**2 + 2)
    fewest = max(fewest_seeds(comparisons), d.size + 1, math.ceil(min(needed)))
    return fewest if fewest <= 10_000 else None
