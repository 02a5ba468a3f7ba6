"""The claims on logistic regression with large steps: counts of steps until the training data are separated.

Digits instead of Fashion-MNIST: ten pairs of classes, each digit against the next, the first of a pair thinned to a
twentieth of the second. Pixels are divided by 16, and there is no intercept, so that counts can be compared with these
features only.
"""

import warnings
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import numpy as np
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.measure import Measure, measured, single
from fairtrial.methods.optimizers.normalized_logistic_gd import NormalizedLogisticGD, worst_case

SIZES, STEP_SIZE = (10, 100, 1000, 10_000), 100.0
STEP_SIZES = (0.01, 0.1, 1.0, 10.0, 100.0)
PAIRS, RATIO, MOST = 10, 20, 20_000


def check(measure: Measure) -> list[Finding]:
    wanted = [
        Separation(pair, normalize, g) for pair in range(PAIRS) for normalize in (True, False) for g in STEP_SIZES
    ]
    found = dict(zip(wanted, measure.map(separate, wanted), strict=True))
    return [_worst_case(measure), _imbalanced(found), _loss(found)]


@dataclass(frozen=True)
class Separation:
    """A pair of digits, and how they are to be told apart."""

    pair: int
    normalize: bool
    step_size: float


Separated = tuple[int, float]  # steps, MOST + 1 if they were not enough, and the largest loss before the last of them


def _worst_case(measure: Measure) -> Finding:
    measure.say("counting steps on the worst case")
    counts = {
        name: [NormalizedLogisticGD(STEP_SIZE, normalize=on).fit(*worst_case(n)).n_iter_ for n in SIZES]
        for name, on in (("plain", False), ("normalised", True))
    }
    slopes = {name: float(np.polyfit(np.log(SIZES), np.log(found), 1)[0]) for name, found in counts.items()}
    sloped = slopes["plain"] > 0.8 and slopes["normalised"] < 0.2
    at_1000 = {name: dict(zip(SIZES, found, strict=True)).get(1000) for name, found in counts.items()}
    says: Verdict = "not reproduced"
    if sloped:
        says = "reproduced" if at_1000 == {"plain": 308, "normalised": 2} else "partly"
    return Finding(
        claim="worst-case-set",
        verdict=says,
        criterion="The slope of log steps on log n is above 0.8 for plain descent and below 0.2 for the normalised "
        "method, and at n = 1000 they take 308 and 2 steps; partly if only the slopes hold.",
        seeds=(0,),
        measurements=(
            *(single(f"slope, {name}", slope, "") for name, slope in slopes.items()),
            *(
                single(
                    f"steps at n = {n}, {name}",
                    count,
                    "steps",
                    paper={1000: "308" if name == "plain" else "2"}.get(n, ""),
                )
                for name, found in counts.items()
                for n, count in zip(SIZES, found, strict=True)
            ),
        ),
        note="Step size 100.",
    )


def _imbalanced(found: dict[Separation, Separated]) -> Finding:
    best = {
        normalize: [min(found[Separation(pair, normalize, g)][0] for g in STEP_SIZES) for pair in range(PAIRS)]
        for normalize in (True, False)
    }
    fewer = sum(a < b for a, b in zip(best[True], best[False], strict=True))
    in_the_median = median(best[True]) < median(best[False])
    says: Verdict = "not reproduced"
    if in_the_median:
        says = "reproduced" if fewer >= 0.7 * PAIRS else "partly"
    return Finding(
        claim="imbalanced-classes",
        verdict=says,
        criterion="Each at its own best step size, the normalised method takes fewer steps than plain descent in the "
        "median over ten pairs and on at least 7 of them; partly if in the median only.",
        seeds=tuple(range(PAIRS)),
        measurements=(
            *(
                measured(
                    f"steps to separation, {name}", [float(count) for count in best[normalize]], "steps", paper=paper
                )
                for name, normalize, paper in (
                    ("normalised", True, "311 on Fashion-MNIST"),
                    ("plain", False, "538 on Fashion-MNIST"),
                )
            ),
            single("median, normalised", median(best[True]), "steps"),
            single("median, plain", median(best[False]), "steps"),
            single("pairs with fewer steps of the normalised method", fewer, "pairs"),
        ),
        note=f"Ratio 1:{RATIO}, step sizes 0.01 to 100, at most {MOST:,} steps.",
    )


def _loss(found: dict[Separation, Separated]) -> Finding:
    sizes = STEP_SIZES[1:]
    borne_out = 0
    for pair in range(PAIRS):
        steps, losses = zip(*(found[Separation(pair, False, g)] for g in sizes), strict=True)
        rises = all(a <= b for a, b in pairwise(losses)) and losses[0] < losses[-1]
        falls = all(a >= b for a, b in pairwise(steps)) and steps[0] > steps[-1]
        borne_out += rises and falls
    says: Verdict = (
        "reproduced" if borne_out >= 0.8 * PAIRS else "partly" if borne_out >= PAIRS / 2 else "not reproduced"
    )
    return Finding(
        claim="loss-against-steps",
        verdict=says,
        criterion="With plain descent, from step size 0.1 to 100, the largest loss before separation never falls and "
        "ends higher, and the number of steps never rises and ends lower, on at least 8 of 10 pairs; partly on 5.",
        seeds=tuple(range(PAIRS)),
        measurements=(
            single("pairs on which both hold", borne_out, "pairs"),
            *(
                measured(
                    f"{what}, step size {g:g}", [found[Separation(p, False, g)][place] for p in range(PAIRS)], unit
                )
                for g in sizes
                for place, what, unit in ((1, "largest loss", "nats"), (0, "steps to separation", "steps"))
            ),
        ),
        note=f"The same pairs. A run that {MOST:,} steps do not separate counts with one more.",
    )


def separate(wanted: Separation) -> Separated:
    X, y = load_digits(return_X_y=True)
    rare, common = wanted.pair, (wanted.pair + 1) % 10
    many = np.flatnonzero(y == common)
    few = np.random.default_rng(wanted.pair).permutation(np.flatnonzero(y == rare))[: max(1, len(many) // RATIO)]
    rows = np.concatenate([few, many])
    model = NormalizedLogisticGD(wanted.step_size, max_iter=MOST, normalize=wanted.normalize)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X[rows] / 16, y[rows])
    return (model.n_iter_ if model.separated_ else MOST + 1), float(model.loss_curve_[:-1].max())
