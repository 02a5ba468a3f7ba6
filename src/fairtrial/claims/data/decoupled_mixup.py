"""The claims of Decoupled Mixup: accuracy, hard mixtures recognised as both of their classes, and the cost.

MNIST-1D instead of CIFAR and ImageNet, with the bench's convolutional network; SGD as in the authors' CIFAR runs, with
a cosine schedule. Every policy of mixing is tuned by the same twelve draws of learning rate, α and η, of which it takes
what it has.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.stats import qmc
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import RandomSampler

from fairtrial.catalog import Finding
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.curves import curves
from fairtrial.claims.measure import Measure, measured, single
from fairtrial.claims.paired import above_zero, gaps, surely_above
from fairtrial.contract import Diverged
from fairtrial.methods.data.decoupled_mixup import DecoupledMixup
from fairtrial.methods.data.mixing import Mixup
from fairtrial.tasks.measures import accuracy
from fairtrial.tasks.mnist1d import convolutional
from fairtrial.tasks.samples import Part
from fairtrial.tasks.standard import NoTransform
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import predict
from fairtrial.tasks.training import Parts, train

CLASSES = 10
STEPS, BATCH = 1000, 100
TRIALS, TUNING_SEEDS, SEEDS = 12, 1, 12
RATE, ALPHA, ETA = (0.02, 1.0), (0.1, 2.0), (0.01, 1.0)  # α and η: the ranges that the method declares for tuning
PAIRINGS = 5  # how often each test curve is mixed
TIMED, WARM_UP = 100, 5  # steps

NONE, MIXUP, DECOUPLED = "no mixing", "Mixup", "decoupled Mixup"
POLICIES = NONE, MIXUP, DECOUPLED
ALIKE = "Mixup with decoupled Mixup's rate and α"  # beside the comparison: what the regulariser alone does


@dataclass(frozen=True)
class Setting:
    """A policy of mixing, the learning rate, and α and η as far as the policy has them."""

    policy: str
    lr: float
    alpha: float
    eta: float


def check(measure: Measure) -> list[Finding]:
    grids = {policy: [Setting(policy, *draw) for draw in _draws()] for policy in POLICIES}
    best = tune(measure, accuracies, grids, seeds=TUNING_SEEDS, score=lambda found: found[0])
    arms = {**best, ALIKE: replace(best[DECOUPLED], policy=MIXUP)}
    results = evaluate(measure, accuracies, {setting: setting for setting in arms.values()}, seeds=SEEDS)
    right, both = ({arm: [found[place] for found in results[arms[arm]]] for arm in arms} for place in (0, 1))
    return [_accuracy(right, best), _both_classes(both, best), _cost(measure)]


def _draws() -> list[tuple[float, float, float]]:
    """Learning rate, α and η, spread evenly over the logarithms of their ranges."""
    even = qmc.Halton(3, seed=0).random(TRIALS)
    low, high = np.log([RATE, ALPHA, ETA]).T
    return [(float(lr), float(alpha), float(eta)) for lr, alpha, eta in np.exp(low + even * (high - low))]


def _settings(best: dict[str, Setting]) -> str:
    none, mixup, decoupled = (best[policy] for policy in POLICIES)
    return (
        f"Tuned with one seed on validation data: no mixing, rate {none.lr:.2g}; Mixup, rate {mixup.lr:.2g}, "
        f"α {mixup.alpha:.2g}; decoupled Mixup, rate {decoupled.lr:.2g}, α {decoupled.alpha:.2g}, "
        f"η {decoupled.eta:.2g}. {ALIKE} is no part of the criterion."
    )


def _accuracy(right: dict[str, list[float]], best: dict[str, Setting]) -> Finding:
    gained = gaps(right[DECOUPLED], right[MIXUP])
    (better,) = above_zero(gained)
    return Finding(
        claim="accuracy-over-static-mixup",
        verdict="reproduced" if better else "partly" if surely_above(gained, -0.005) else "not reproduced",
        criterion="Mixup with the regulariser is significantly more accurate on test data than Mixup (paired sign-flip "
        "test); partly if the 95 % interval of the mean paired difference lies above -0.5 point.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(
                    f"test accuracy, {arm}", found, "fraction", paper="0.7912 on CIFAR-100" if arm == MIXUP else ""
                )
                for arm, found in right.items()
            ),
            measured(
                "test accuracy, decoupled Mixup above Mixup", gained, "fraction", paper="0.005 to 0.01 on CIFAR-100"
            ),
        ),
        note=_settings(best),
    )


def _both_classes(both: dict[str, list[float]], best: dict[str, Setting]) -> Finding:
    gained = gaps(both[DECOUPLED], both[MIXUP])
    (better,) = above_zero(gained)
    return Finding(
        claim="both-classes-of-hard-mixtures",
        verdict="reproduced" if better else "not reproduced",
        criterion="Mixup with the regulariser recognises both classes of half-and-half test mixtures of two different "
        "classes significantly more often than Mixup (paired sign-flip test): the two highest scores are theirs.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"both classes recognised, {arm}", found, "fraction of mixtures")
                for arm, found in both.items()
            ),
            measured("both classes recognised, decoupled Mixup above Mixup", gained, "fraction of mixtures"),
        ),
        note=f"The models of the accuracy claim, so that α too may differ. {_settings(best)}",
    )


def accuracies(run: Run[Setting]) -> tuple[float, float]:
    """Train, and give the accuracy on held-out curves, and on both classes of mixtures of them; 0 if it diverges."""
    setting, streams = run.setting, Streams(run.seed)
    division = curves(run.seed)
    held_out = getattr(division, run.split)
    with streams.globally("model"):
        model = convolutional()
    optimizer = SGD(model.parameters(), lr=setting.lr, momentum=0.9, weight_decay=1e-4)
    policies: dict[str, Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Any]]] = {
        NONE: NoTransform(),
        MIXUP: Mixup(CLASSES, setting.alpha),
        DECOUPLED: DecoupledMixup(CLASSES, setting.alpha, setting.eta),
    }
    parts = Parts(
        model=model,
        loss=nn.CrossEntropyLoss(),
        optimizer=optimizer,
        schedule=CosineAnnealingLR(optimizer, STEPS),
        batch=policies[setting.policy],
        sampler=RandomSampler(range(len(division.training.x)), generator=streams("order")),
    )
    try:
        train(parts, *division.training, steps=STEPS, batch_size=BATCH, generator=streams("batch"))
        return accuracy(*predict(model, held_out)), _both_recognised(model, held_out)
    except Diverged:
        return 0.0, 0.0


def _both_recognised(model: nn.Module, part: Part) -> float:
    """The share of half-and-half mixtures of two classes, the same ones for every model, whose top two these are."""
    generator = torch.Generator().manual_seed(0)
    place = torch.arange(len(part.y)).repeat(PAIRINGS)
    other = torch.cat([torch.randperm(len(part.y), generator=generator) for _ in range(PAIRINGS)])
    differ = part.y[place] != part.y[other]
    place, other = place[differ], other[differ]
    scores, _ = predict(model, Part((part.x[place] + part.x[other]) / 2, part.y[place]))
    classes = torch.stack((part.y[place], part.y[other]), 1)
    return float((scores.topk(2).indices.sort(1).values == classes.sort(1).values).all(1).double().mean())


def _cost(measure: Measure) -> Finding:
    measure.say("timing training steps")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    steps = {
        name: _timed_step(policy) for name, policy in ((MIXUP, Mixup(CLASSES)), (DECOUPLED, DecoupledMixup(CLASSES)))
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP + TIMED):
        for name in sorted(steps, reverse=bool(turn % 2)):
            seconds = steps[name]()
            if turn >= WARM_UP:
                times[name].append(seconds)
    torch.set_num_threads(threads)
    took = {name: median(found) for name, found in times.items()}
    ratio = took[DECOUPLED] / took[MIXUP]
    return Finding(
        claim="no-extra-cost",
        verdict="reproduced" if ratio < 1.05 else "partly" if ratio < 1.15 else "not reproduced",
        criterion="The median training step with the regulariser takes less than 1.05 times as long as with Mixup's "
        "cross entropy; partly if less than 1.15 times.",
        seeds=(0,),
        measurements=(
            single("training step, decoupled Mixup over Mixup", ratio, "ratio"),
            *(single(f"training step, {name}", 1000 * seconds, "ms") for name, seconds in took.items()),
        ),
        note=f"Medians over {TIMED} steps of each, taken in turn, one thread, float32. Two convolutions of 32 and 64 "
        "channels and a linear layer on 1x28x28 inputs, batch 100, 10 classes. What the regulariser adds does not grow "
        "with the network.",
    )


def _timed_step(policy: Mixup) -> Callable[[], float]:
    """A training step on new random images, mixed by the policy; gives the seconds it took."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 49, CLASSES),
        )
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    criterion: Callable[[Tensor, Tensor], Tensor] = getattr(policy, "criterion", nn.CrossEntropyLoss())
    x = torch.randn(100, 1, 28, 28, generator=generator)
    y = torch.randint(CLASSES, (100,), generator=generator)

    def step() -> float:
        started = time.perf_counter()
        mixed, labels = policy(x, y, generator)
        optimizer.zero_grad()
        criterion(model(mixed), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return time.perf_counter() - started

    return step
