"""The claims of the study of the contrastive loss's temperature: accuracy, hard negatives, uniformity and tolerance.

Digits in two views instead of CIFAR, SVHN and ImageNet-100, the task `digits-ssl` with the other images of a batch of
128 as negatives. Every arm has eight settings to choose among on validation data: where the temperature is given, eight
learning rates; for the best temperature in between, four temperatures and two learning rates each.
"""

from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import numpy as np
from torch import nn

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.measure import Measure, measured
from fairtrial.claims.paired import above_zero, gaps
from fairtrial.claims.pretraining import Worth, pretrained_worth
from fairtrial.methods.losses.contrastive_temperature import HardSimpleLoss, InfoNCELoss, SimpleContrastiveLoss
from fairtrial.tasks.digits_ssl import Encoder

LOWEST, BETWEEN, HIGHEST = 0.03, (0.07, 0.15, 0.3, 1.0), 3.0
RATES = tuple(float(rate) for rate in np.geomspace(3e-4, 3e-2, 8))
FEW_RATES = RATES[2:6:3]
CURVE_RATE = 3e-3
STEPS, LONG, BATCH, TUNING_SEEDS, SEEDS = 120, 240, 128, 1, 9
PAPER = {LOWEST: "0.7975 at 0.07, CIFAR-10", HIGHEST: "0.8221 at 1.0, CIFAR-10"}


def check(measure: Measure) -> list[Finding]:
    return [*_accuracy(measure), _spread(measure)]


@dataclass(frozen=True)
class Setting:
    """A loss with its temperature if it has one, the learning rate and the number of steps."""

    loss: str
    lr: float
    temperature: float = 1.0
    steps: int = STEPS


def _accuracy(measure: Measure) -> list[Finding]:
    grids = {
        "lowest": [Setting("InfoNCE", lr, LOWEST) for lr in RATES],
        "between": [Setting("InfoNCE", lr, temperature) for temperature in BETWEEN for lr in FEW_RATES],
        "highest": [Setting("InfoNCE", lr, HIGHEST) for lr in RATES],
        "simple": [Setting("simple", lr) for lr in RATES],
        "hard simple": [Setting("hard simple", lr) for lr in RATES],
    }
    chosen = tune(measure, features_worth, grids, seeds=TUNING_SEEDS, score=lambda found: found.probe)
    found = evaluate(measure, features_worth, chosen, seeds=SEEDS)
    probe = {arm: [of_seed.probe for of_seed in worths] for arm, worths in found.items()}
    best = chosen["between"].temperature
    return [_inverted_u(probe, best), _hard_negatives(probe, best)]


def _inverted_u(probe: dict[str, list[float]], best: float) -> Finding:
    above = {end: gaps(probe["between"], probe[end]) for end in ("lowest", "highest")}
    beaten = above_zero(*above.values())
    says: Verdict = "reproduced" if all(beaten) else "partly" if any(beaten) else "not reproduced"
    return Finding(
        claim="inverted-u",
        verdict=says,
        criterion="The temperature between 0.03 and 3 that is best on validation data has a significantly higher "
        "linear probe accuracy than either end (paired sign-flip tests, Holm over the two); partly if than one.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            measured(
                f"linear probe accuracy, temperature {best:g}", probe["between"], "fraction", paper="0.8327 at 0.3"
            ),
            *(
                measured(f"linear probe accuracy, temperature {end:g}", probe[arm], "fraction", paper=PAPER[end])
                for arm, end in (("lowest", LOWEST), ("highest", HIGHEST))
            ),
            *(measured(f"temperature {best:g} above the {end}", values, "fraction") for end, values in above.items()),
        ),
        note=f"Temperatures in between: {', '.join(f'{temperature:g}' for temperature in BETWEEN)}.",
    )


def _hard_negatives(probe: dict[str, list[float]], best: float) -> Finding:
    ordinary, simple, hard = probe["between"], probe["simple"], probe["hard simple"]
    behind = {"ordinary": gaps(ordinary, simple), "hard": gaps(hard, simple)}
    last = all(above_zero(*behind.values()))
    recovered = fmean(behind["hard"]) / fmean(behind["ordinary"]) if fmean(behind["ordinary"]) > 0 else 0.0
    says: Verdict = "reproduced" if last and recovered >= 0.5 else "partly" if last else "not reproduced"
    return Finding(
        claim="hard-negatives-restore",
        verdict=says,
        criterion="The simple loss has a significantly lower linear probe accuracy than both InfoNCE at its best "
        "temperature and the simple loss on the hardest tenth of negatives (paired sign-flip tests, Holm over the "
        "two), and the latter recovers at least half of the gap; partly if only the first holds.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            measured(f"linear probe accuracy, InfoNCE, temperature {best:g}", ordinary, "fraction", paper="0.8327"),
            measured("linear probe accuracy, simple loss", simple, "fraction", paper="0.7483"),
            measured("linear probe accuracy, simple loss on the hardest tenth", hard, "fraction", paper="0.8484"),
            measured("InfoNCE above the simple loss", behind["ordinary"], "fraction"),
            measured("hard negatives above the simple loss", behind["hard"], "fraction"),
        ),
        note="The paper's figures are of CIFAR-10.",
    )


def _spread(measure: Measure) -> Finding:
    temperatures = (LOWEST, *BETWEEN, HIGHEST)
    settings = {temperature: Setting("InfoNCE", CURVE_RATE, temperature, LONG) for temperature in temperatures}
    found = evaluate(measure, features_worth, settings, seeds=SEEDS)
    uniformities = {t: [of_seed.uniformity for of_seed in worths] for t, worths in found.items()}
    tolerances = {t: [of_seed.tolerance for of_seed in worths] for t, worths in found.items()}
    rising = [_rises([fmean(values) for values in of_measure.values()]) for of_measure in (uniformities, tolerances)]
    says: Verdict = "reproduced" if all(rising) else "partly" if any(rising) else "not reproduced"
    return Finding(
        claim="uniformity-tolerance",
        verdict=says,
        criterion="Means over seeds of uniformity (log of the mean of exp(-2 d²), lower is more uniform) and of "
        "tolerance (mean cosine within a class) of the test embeddings both rise from each temperature to the next; "
        "partly if only one does.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(measured(f"uniformity, temperature {t:g}", values, "") for t, values in uniformities.items()),
            *(measured(f"tolerance, temperature {t:g}", values, "cosine") for t, values in tolerances.items()),
        ),
        note=f"{LONG} steps at learning rate {CURVE_RATE:g}.",
    )


def _rises(values: list[float]) -> bool:
    return all(low < high for low, high in pairwise(values))


def features_worth(run: Run[Setting]) -> Worth:
    """Pre-train with the loss, and judge features and embeddings."""
    setting = run.setting
    losses: dict[str, nn.Module] = {
        "InfoNCE": InfoNCELoss(setting.temperature),
        "simple": SimpleContrastiveLoss(),
        "hard simple": HardSimpleLoss(0.1),
    }
    return pretrained_worth(
        lambda: (Encoder(), losses[setting.loss]),
        run.seed,
        run.split,
        lr=setting.lr,
        steps=setting.steps,
        batch_size=BATCH,
    )
