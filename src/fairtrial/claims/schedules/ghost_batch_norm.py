"""The claims of the large-batch paper: what closes the gap to small batches, and how far weights go.

MNIST-1D instead of CIFAR, with the bench's network of three convolutions, each followed by batch normalisation; batches
of 32 against batches of 512 with ghosts of 32. As in the paper the large batches' rates follow from that of the small
ones, the best of four on validation data over two tuning seeds; one more arm has its own, the best of as many. All have
momentum 0.9, gradients clipped to norm 5, and a rate divided by ten after a half and three quarters of the epochs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median

import torch
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.curves import curves
from fairtrial.claims.measure import Measure, measured, single
from fairtrial.claims.paired import above_zero, gaps, surely_above
from fairtrial.claims.training import fit
from fairtrial.contract import Diverged
from fairtrial.methods.schedules.ghost_batch_norm import (
    LogFit,
    PowerFit,
    WeightDistance,
    adapt_regime,
    convert_ghost_batchnorm,
    sqrt_lr,
)
from fairtrial.tasks.measures import accuracy
from fairtrial.tasks.mnist1d import convolutional
from fairtrial.tasks.standard import constant
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import predict

SMALL, LARGE, EPOCHS = 32, 512, 8
RATES = {"small": (0.025, 0.05, 0.1, 0.2), "large, tuned": (0.1, 0.2, 0.4, 0.8)}
TUNING_SEEDS, SEEDS = 2, 8
CLIP = 5.0
MARGIN = 0.01  # accuracy within which the gap counts as closed
WALK_STEPS, WALK_RATE = 1000, 0.1
ARMS = ("small", "large", "+ rate", "+ ghosts", "+ updates", "large, tuned")
PAPER = {"small": 0.9283, "large": 0.8610, "+ rate": 0.8930, "+ ghosts": 0.9050, "+ updates": 0.9307}


@dataclass(frozen=True)
class Setting:
    """An arm, each of the large ones with what those before it have, and its learning rate."""

    arm: str
    lr: float


def check(measure: Measure) -> list[Finding]:
    grids = {arm: [Setting(arm, lr) for lr in rates] for arm, rates in RATES.items()}
    tuned = tune(measure, accuracy_of, grids, seeds=TUNING_SEEDS, score=float)
    base = tuned["small"].lr
    chosen = {
        arm: tuned.get(arm, Setting(arm, base if arm == "large" else sqrt_lr(base, LARGE, SMALL))) for arm in ARMS
    }
    accuracies = evaluate(measure, accuracy_of, chosen, seeds=SEEDS)
    rates = "Rates: " + ", ".join(f"{arm} {setting.lr:g}" for arm, setting in chosen.items())
    fits = measure.map(walk, range(SEEDS))
    return [_gap(accuracies, rates), _ghosts(accuracies, rates), _distance(fits)]


def _gap(accuracies: Mapping[str, list[float]], rates: str) -> Finding:
    recipe = ("large", "+ rate", "+ ghosts", "+ updates")
    means = [fmean(accuracies[arm]) for arm in recipe]
    ordered = means == sorted(means) and len(set(means)) == len(means)
    left = gaps(accuracies["+ updates"], accuracies["small"])
    closed = surely_above(left, -MARGIN)
    says: Verdict = "reproduced" if ordered and closed else "partly" if closed else "not reproduced"
    return Finding(
        claim="gap-closes",
        verdict=says,
        criterion="Mean test accuracy rises from large batches over those with the rate scaled, with ghosts and with "
        "as many updates, and the last is, by the lower end of the 95 % interval of the paired difference, at most "
        f"{MARGIN:g} below small batches; partly if only the latter holds.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(
                    f"test accuracy, {arm}",
                    found,
                    "fraction",
                    paper=f"{PAPER[arm]} on CIFAR-10, ResNet44" if arm in PAPER else "",
                )
                for arm, found in accuracies.items()
            ),
            measured("test accuracy, + updates above small", left, "fraction", paper="0.0024 on CIFAR-10, ResNet44"),
            measured(
                "test accuracy, large with a tuned rate above large",
                gaps(accuracies["large, tuned"], accuracies["large"]),
                "fraction",
            ),
            *(single(f"updates, {arm}", updates(arm), "steps") for arm in ARMS),
        ),
        note=f"{rates}. Epochs are {EPOCHS}, but for the arm with as many updates, which has {epochs_of('+ updates')}.",
    )


def _ghosts(accuracies: Mapping[str, list[float]], rates: str) -> Finding:
    gain = gaps(accuracies["+ ghosts"], accuracies["+ rate"])
    (better,) = above_zero(gain)
    says: Verdict = "reproduced" if better else "partly" if fmean(gain) > 0 else "not reproduced"
    return Finding(
        claim="virtual-batches",
        verdict=says,
        criterion="Test accuracy with ghosts is significantly above that with the rate alone scaled (paired sign-flip "
        "test); partly if above in the mean.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"test accuracy, {arm}", accuracies[arm], "fraction", paper=f"{PAPER[arm]} on CIFAR-10")
                for arm in ("+ rate", "+ ghosts")
            ),
            measured("gain of ghosts", gain, "fraction", paper="0.0120 on CIFAR-10, 0.0005 on MNIST"),
        ),
        note=f"{rates}.",
    )


def _distance(fits: list[tuple[LogFit, PowerFit]]) -> Finding:
    logs, powers = [log for log, _ in fits], [power for _, power in fits]
    logarithmic = median(log.r2 for log in logs) > 0.95
    better = median(log.r2 - power.r2 for log, power in fits) >= 0
    says: Verdict = "reproduced" if logarithmic and better else "partly" if logarithmic else "not reproduced"
    return Finding(
        claim="logarithmic-distance",
        verdict=says,
        criterion="In the median over seeds the least-squares fit of the distance from the start in ln t has r² above "
        "0.95 and not below that of the fit by a power of t; partly if only the first holds.",
        seeds=tuple(range(len(fits))),
        measurements=(
            measured("r² of the logarithm", [log.r2 for log in logs], "fraction", paper="above 0.98"),
            measured("r² of the power", [power.r2 for power in powers], "fraction"),
            measured("slope of the logarithm", [log.slope for log in logs], "distance per factor e"),
            measured("exponent of the power", [power.exponent for power in powers], "exponent"),
        ),
        note=f"Batches of {SMALL}, {WALK_STEPS} steps at the constant rate {WALK_RATE:g}; both fits have two "
        "parameters and minimise the squared error of the distance.",
    )


def epochs_of(arm: str) -> int:
    return adapt_regime([], EPOCHS, LARGE, SMALL)[1] if arm == "+ updates" else EPOCHS


def updates(arm: str) -> int:
    """Steps of an arm on the 4000 curves that a seed trains on; what does not fill a batch is left out."""
    return epochs_of(arm) * (4000 // batch_of(arm))


def batch_of(arm: str) -> int:
    return SMALL if arm == "small" else LARGE


def accuracy_of(run: Run[Setting]) -> float:
    """Accuracy after training; 0 where it has diverged."""
    arm, streams, division = run.setting.arm, Streams(run.seed), curves(run.seed)
    with streams.globally("model"):
        model = convolutional()
    if arm in ("+ ghosts", "+ updates"):
        model = convert_ghost_batchnorm(model, SMALL)
    optimizer = sgd(model, run.setting.lr)
    steps = updates(arm)
    try:
        fit(
            model,
            optimizer,
            division.training,
            streams,
            steps=steps,
            batch_size=batch_of(arm),
            schedule=MultiStepLR(optimizer, [steps // 2, 3 * steps // 4], gamma=0.1),
        )
        return accuracy(*predict(model, getattr(division, run.split)))
    except Diverged:
        return 0.0


def walk(seed: int) -> tuple[LogFit, PowerFit]:
    """How the distance of the weights grows with small batches at a constant rate."""
    streams = Streams(seed)
    with streams.globally("model"):
        model = convolutional()
    optimizer, distance = sgd(model, WALK_RATE), WeightDistance(model)
    fit(
        model,
        optimizer,
        curves(seed).training,
        streams,
        steps=WALK_STEPS,
        batch_size=SMALL,
        schedule=constant(optimizer),
        after=distance.update,
    )
    return distance.fit_log(), distance.fit_power()


def sgd(model: nn.Module, lr: float) -> torch.optim.SGD:
    """SGD with momentum that clips the gradient before every step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)

    def clip(*_: object) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)

    optimizer.register_step_pre_hook(clip)
    return optimizer
