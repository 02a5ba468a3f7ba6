"""What paired differences may honestly say when one looks at them again and again while they come in.

The assumption is that of `statistics`: under the null hypothesis a paired difference is as likely to be +x as -x.
Looking after every few seeds and stopping at the first p < 0.05 would find something in far more than 5 % of cases
without anything to be found. Here a test of level α spends it over a fixed schedule of looks (`LOOKS`): up to n seeds

    α · spent(n),  spent(n) = 1 - (6 / n)^(3/4),

which comes to α only at infinity (a spending function, Lan & DeMets 1983). The boundaries need no normal approximation.
Given the sizes |d_1|, …, |d_n|, all sign patterns of a group G are equally likely under the null hypothesis, and each
has a path of sums S_8(g), S_10(g), …, which can be worked out. At look n the patterns that have crossed no boundary
earlier are ranked by S_n, and those at the top are said to cross, as many as

    #{g in G that have crossed by look n} ≤ α/2 · spent(n) · #G

allows; ties at the boundary stay below. The data cross upwards if their own pattern's sum is above the boundary, and
downwards if the sum with all signs turned is. The count takes in the joint distribution of all looks as the data have
it, with heavy tails and ties: what one look cannot spend for coarseness is left to the next, and nothing is spent
twice. As the data's own pattern is equally likely to be any of those in its orbit under G, and no more than α/2 of them
ever cross upwards, the chance that the data ever cross is at most α, for every symmetric distribution and whenever one
stops. (Permutation boundaries given the sizes, with normal ones in the limit: Mehta, Patel & Senchaudhuri 1994.)

G holds all 2^n patterns up to n = 14, and from there on a fixed subgroup of 2^14. The test is exact with any subgroup
(Hartigan 1969 calls such sets of subsamples balanced); a random draw of patterns would be so only on average.

Schedule and spending know neither budget nor step: a comparison that ended undecided may be given more seeds, and still
all that was said on the way holds together with a chance of 95 %. The price is power at a budget that would have been
final anyway.

Tried and not taken, as all of these leave unused what the looks have in common: a corrected level for each of 7 looks
(Bonferroni), betting on the signs (Waudby-Smith & Ramdas 2024), and the mixture of exp(λS - λ²V/2) with V = Σ d² (de la
Peña 1999; Howard et al. 2021), its scale known. A normal difference of one standard deviation is found within 20 seeds
in 84 %, 82 % and 69 % of cases by these, in 93 % by this test, and in 99 % by one that looks only once, at 20 seeds.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fairtrial.trial.statistics import LEVEL, Difference, characters, holm

DIMENSION = 14  # the group of sign patterns has 2^14 elements, or 2^n if that is less
LOOKS = tuple(  # how many seeds there are when one looks
    look
    for first, last, step in (
        (8, 20, 2),
        (25, 50, 5),
        (60, 100, 10),
        (120, 200, 20),
        (250, 500, 50),
        (600, 1000, 100),
    )
    for look in range(first, last + 1, step)
)
# A p-value is the smallest of these levels; they include 0.05 divided by 1, 2, …, 100, which is what Holm asks for.
LEVELS = tuple(1 / k for k in (*range(2, 41), *range(60, 2001, 20)))
POINTS = 7  # centres tried at once when an interval's end is sought
SERIES = 4  # worked out at once; more do not fit into a processor's cache
ROUNDS = 7  # each narrows it down by a factor of 8


def spent(n: int) -> float:
    """The share of its level that a test may have spent when there are n seeds."""
    return max(0.0, 1 - math.pow(6 / n, 0.75))


def looks_up_to(seeds: int) -> list[int]:
    """The looks that so many seeds allow."""
    return [look for look in LOOKS if look <= seeds]


def fewest_seeds(comparisons: int = 1) -> int:
    """The first look at which anything can be significant: where the level after Holm allows one pattern to cross.

    With more than 100 comparisons that is none, and the result is beyond the last look.
    """
    level = LEVEL / comparisons
    enough = (look for look in LOOKS if level >= 0.999 * LEVELS[-1] and _allowed(level, look, _patterns(look)) >= 1)
    return next(enough, LOOKS[-1] + 1)


def _patterns(n: int) -> int:
    """How many sign patterns of n differences are worked out."""
    return int(2 ** min(n, DIMENSION))


def _allowed(level: float, look: int, patterns: int) -> int:
    """How many patterns may have crossed upwards by a look."""
    return math.floor(level / 2 * spent(look) * patterns + 1e-9)


@cache
def _signs(first: int, last: int, patterns: int) -> NDArray[np.float64]:
    """Signs of the differences from `first` to before `last` in all patterns, the data's own first."""
    common = characters(last, DIMENSION)[first:, None] & np.arange(patterns)
    return np.where(np.bitwise_count(common) % 2, -1.0, 1.0)


def crossings(differences: NDArray[np.float64], level: float) -> NDArray[np.int8]:
    """Where series of differences cross the boundaries of the test of centre 0.

    Args:
        differences: (series, n), every row a series of its own.
        level: of the test, both sides together; below 1.

    Returns:
        (series, looks up to n): +1 where the sum is above the boundary of that look, -1 where it is below the other.
    """
    found = np.zeros((len(differences), len(looks_up_to(differences.shape[1]))), dtype=np.int8)
    for first in range(0, len(differences), SERIES):
        near = first + np.flatnonzero(_least_levels(differences[first : first + SERIES]) <= level)
        if near.size:
            found[near] = _crossings(differences[near], level)
    return found


def least_levels(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each series a level; below it there is no crossing at any look. It takes no account of the looks before.

    Args:
        differences: (series, n), every row a series of its own.
    """
    parts = [_least_levels(differences[first : first + SERIES]) for first in range(0, len(differences), SERIES)]
    return np.concatenate(parts)


def _paths(
    differences: NDArray[np.float64], patterns: int
) -> Iterator[tuple[int, NDArray[np.float64], NDArray[np.float64]]]:
    """Look by look what is added to the sums of the patterns, and by how much rounding may move a sum."""
    sizes = np.abs(differences).cumsum(axis=1)
    before = 0
    for look in looks_up_to(differences.shape[1]):
        added = differences[:, before:look] @ _signs(before, look, _patterns(differences.shape[1]))[:, :patterns]
        yield look, added, 8 * look * np.finfo(np.float64).eps * sizes[:, look - 1]
        before = look


def _least_levels(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """A series that crosses at a look is there among as many of all patterns as may have crossed by then.

    The patterns of the second half are those of the first with all signs turned.
    """
    half = _patterns(differences.shape[1]) // 2
    least = np.full(len(differences), np.inf)
    sums = np.zeros((len(differences), half))
    for look, added, roundoff in _paths(differences, half):
        sums += added
        as_far = np.abs(sums) >= (np.abs(sums[:, 0]) - roundoff)[:, None]
        counts = np.array([np.count_nonzero(row) for row in as_far])
        least = np.minimum(least, (counts - 1e-6) / (half * spent(look)))
    return least


def _crossings(differences: NDArray[np.float64], level: float) -> NDArray[np.int8]:
    series = np.arange(len(differences))
    found = []
    patterns = _patterns(differences.shape[1])
    sums = np.zeros((series.size, patterns))  # of patterns that have crossed: -inf
    own = np.zeros(series.size)
    crossed = np.zeros(series.size, dtype=np.int64)
    for look, added, roundoff in _paths(differences, patterns):
        sums += added
        own += added[:, 0]
        allowed = _allowed(level, look, patterns) - crossed
        most = int(allowed.max()) + 1
        top = np.partition(sums, patterns - most, axis=1)[:, patterns - most :]
        top.sort(axis=1)
        boundary = top[series, most - 1 - allowed] + roundoff  # the largest sum of all that must stay below
        found.append((own > boundary).astype(np.int8) - (-own > boundary))
        crossing = sums > boundary[:, None]
        crossed += [np.count_nonzero(row) for row in crossing]
        sums[crossing] = -np.inf
    return np.stack(found, axis=1)


def sign_flip_p(differences: Sequence[float]) -> float:
    """p-value of the sequential sign-flip test at the look that the differences have reached.

    The smallest of `LEVELS` at which they cross the boundary of this look, as they do at all larger ones; times
    spent(1000), as no look comes after that. The chance that it is ever α or less, at any look, is at most α.
    """
    d = _at_a_look(differences)
    p = 1.0
    if d.size >= LOOKS[0]:
        for level in LEVELS:
            if crossings(d[None, :], level)[0, -1] == 0:
                break
            p = level * spent(LOOKS[-1])
    return p


def mean_interval(differences: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Interval for the mean difference at the look that the differences have reached: the test turned around.

    It holds the centres from which the differences do not cross at this look. With a chance of at least 1 - level the
    intervals of all looks hold the centre of a symmetric distribution. Before the first look it is (-inf, inf).
    """
    d = _at_a_look(differences)
    if d.size < LOOKS[0] or _allowed(level, d.size, _patterns(d.size)) < 1:
        return -math.inf, math.inf
    return -_upper_end(-d, level), _upper_end(d, level)


def _upper_end(d: NDArray[np.float64], level: float) -> float:
    """The largest centre that is not too large. None above the largest difference can be, as all signs would be -1."""
    kept, refused = float(d.mean()), float(d.max())
    for _ in range(ROUNDS):
        tried = np.linspace(kept, refused, POINTS + 2)[1:-1]
        not_refused = np.flatnonzero(crossings(d - tried[:, None], level)[:, -1] >= 0)
        last = int(not_refused[-1]) if not_refused.size else -1
        kept, refused = (kept if last < 0 else tried[last]), (refused if last == POINTS - 1 else tried[last + 1])
    return float(refused)


def _at_a_look(differences: Sequence[float]) -> NDArray[np.float64]:
    d = np.asarray(differences, dtype=np.float64)
    if d.size >= LOOKS[0] and d.size not in LOOKS:
        near = max(looks_up_to(d.size))
        raise ValueError(f"differences must reach a look, that is {near} and not {d.size} values (sequential.LOOKS)")
    return d


def differences(baseline: Sequence[float], others: Sequence[Sequence[float]]) -> list[Difference]:
    """Paired differences of several recipes to one baseline, each at the look it has reached, corrected over all.

    Holm's correction holds though every recipe may stop at a look of its own, chosen by what the others came to: it
    needs nothing but p-values each of which is valid by itself, and these are, however the look came about. What was
    rejected at one look stays so when the p-values of recipes that go on change, since Holm's rejections rest on the
    p-values of the rejected alone.
    """
    paired = [tuple(value - before for value, before in zip(v, baseline, strict=False)) for v in others]
    looked = [_p_and_interval(d) for d in paired]
    return [
        Difference(math.fsum(d) / len(d), low, high, p, corrected)
        for d, (p, low, high), corrected in zip(paired, looked, holm([p for p, _, _ in looked]), strict=True)
    ]


@lru_cache(maxsize=1024)
def _p_and_interval(d: tuple[float, ...]) -> tuple[float, float, float]:
    """Recipes that are decided are looked at again with those that go on."""
    return sign_flip_p(d), *mean_interval(d)


def seeds_to_decide(values: Sequence[float], margin: float, comparisons: int = 1, chance: float = 0.8) -> int | None:
    """The look by which an undecided comparison would probably be decided, were its mean and spread the truth.

    As `statistics.seeds_to_decide`, with the level that a look has for itself: with normal differences, and from 20
    seeds on, about half of what is not spent yet. None if the last look would not do either.
    """
    d = np.asarray(values, dtype=np.float64)
    effect, spread = abs(float(d.mean())), float(d.std(ddof=1)) if d.size > 1 else 0.0
    z_chance, z_both = stats.norm.ppf(chance), stats.norm.ppf((1 + chance) / 2)
    for look in LOOKS:
        if look <= d.size or look < fewest_seeds(comparisons):
            continue
        own = LEVEL * (1 - spent(look)) / 2
        z, z_interval = stats.norm.ppf(1 - own / (2 * comparisons)), stats.norm.ppf(1 - own / 2)
        decided = effect > 0 and effect * math.sqrt(max(0.0, look - z**2 / 2)) >= (z + z_chance) * spread
        inside = (margin - effect) * math.sqrt(look - 2) >= (z_interval + z_both) * spread  # both ends must stay inside
        if decided or (effect < margin and inside):
            return look
    return None
