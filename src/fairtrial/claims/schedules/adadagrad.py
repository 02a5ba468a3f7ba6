"""The claims of the AdAdaGrad paper: fewer steps than small batches, better accuracy than large ones.

Logistic regression and a perceptron on digits instead of MNIST and CIFAR-10, with AdaGrad and a budget of samples. Each
of the three test parameters and of the three fixed batches has the best of five learning rates on validation data.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch
from torch import nn
from torch.nn import functional as F

from fairtrial.catalog import Finding, Measurement, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.measure import Measure, measured
from fairtrial.claims.paired import above_zero, gaps, surely_above
from fairtrial.contract import Diverged
from fairtrial.methods.schedules.adadagrad import (
    AdaptiveBatchSampler,
    AdaptiveBatchSize,
    norm_test,
    per_sample_gradients,
)
from fairtrial.tasks import digits
from fairtrial.tasks.measures import accuracy
from fairtrial.tasks.samples import divide
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import predict

MODELS = ("logistic regression", "perceptron")
ETAS = (0.1, 0.25, 0.5)
BATCHES = (8, 64, 512)
INITIAL, EPOCHS, WIDTH = 8, 30, 64
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
TUNING_SEEDS, SEEDS = 1, 12
SAVING = 3  # times fewer steps


@dataclass(frozen=True)
class Arm:
    """A model, and either a test parameter or a fixed batch size."""

    model: str
    eta: float | None = None
    batch: int = INITIAL

    def __str__(self) -> str:
        return f"{self.model}, " + (f"batch {self.batch}" if self.eta is None else f"η = {self.eta:g}")


@dataclass(frozen=True)
class Setting:
    """An arm with its learning rate."""

    arm: Arm
    lr: float


@dataclass(frozen=True)
class Trained:
    """Accuracy on the run's split, 0 if training has diverged, and how many steps the budget was enough for."""

    accuracy: float
    steps: int


Results = Mapping[Arm, list[Trained]]


def arms() -> list[Arm]:
    adaptive = [Arm(model, eta) for model in MODELS for eta in ETAS]
    return adaptive + [Arm(model, None, batch) for model in MODELS for batch in BATCHES]


def check(measure: Measure) -> list[Finding]:
    grids = {arm: [Setting(arm, lr) for lr in RATES] for arm in arms()}
    chosen = tune(measure, trained, grids, seeds=TUNING_SEEDS, score=lambda found: found.accuracy)
    results = evaluate(measure, trained, chosen, seeds=SEEDS)
    rates = "Rates: " + "; ".join(f"{arm} {setting.lr:g}" for arm, setting in chosen.items()) + "."
    return [_fewer_steps(results, rates), _large_batches(results, rates)]


def _accuracies(results: Results, arm: Arm) -> list[float]:
    return [found.accuracy for found in results[arm]]


def _above(results: Results, arm: Arm, batch: int) -> list[float]:
    return gaps(_accuracies(results, arm), _accuracies(results, Arm(arm.model, None, batch)))


def _saving(results: Results, arm: Arm) -> float:
    small = results[Arm(arm.model, None, BATCHES[0])]
    return fmean(found.steps for found in small) / fmean(found.steps for found in results[arm])


def _for_most_parameters(held: Mapping[Arm, bool]) -> bool:
    """Whether it holds on both models for at least two of the three test parameters."""
    return sum(all(held[Arm(model, eta)] for model in MODELS) for eta in ETAS) >= 2


def _fewer_steps(results: Results, rates: str) -> Finding:
    adaptive = [Arm(model, eta) for model in MODELS for eta in ETAS]
    fewer = {arm: _saving(results, arm) >= SAVING for arm in adaptive}
    lost = {arm: _above(results, arm, BATCHES[0]) for arm in adaptive}
    half = {arm: fewer[arm] and surely_above(found, -0.005) for arm, found in lost.items()}
    whole = {arm: fewer[arm] and surely_above(found, -0.01) for arm, found in lost.items()}
    says: Verdict = (
        "reproduced" if _for_most_parameters(half) else "partly" if _for_most_parameters(whole) else "not reproduced"
    )
    return Finding(
        claim="fewer-steps",
        verdict=says,
        criterion="For at least two of the three test parameters, on both models, the mean number of steps is at most "
        "a third of that with batches of 8, and test accuracy is at most 0.005 below theirs, by the lower end of the "
        "95 % interval of the paired difference; partly if at most 0.01.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *_all(results),
            *(
                measured(f"test accuracy above that of batch {BATCHES[0]}, {arm}", found, "fraction")
                for arm, found in lost.items()
            ),
        ),
        note=rates,
    )


def _large_batches(results: Results, rates: str) -> Finding:
    gains = {arm: _above(results, arm, BATCHES[-1]) for arm in (Arm(model, eta) for model in MODELS for eta in ETAS)}
    better = dict(zip(gains, above_zero(*gains.values()), strict=True))
    higher = {arm: fmean(found) > 0 for arm, found in gains.items()}
    says: Verdict = (
        "reproduced" if _for_most_parameters(better) else "partly" if _for_most_parameters(higher) else "not reproduced"
    )
    return Finding(
        claim="beats-large-batch",
        verdict=says,
        criterion="For at least two of the three test parameters, on both models, test accuracy after equally many "
        "samples is significantly above that with batches of 512 (paired sign-flip test, Holm over the six); partly if "
        "above in the mean.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *_all(results),
            *(
                measured(f"test accuracy above that of batch {BATCHES[-1]}, {arm}", found, "fraction")
                for arm, found in gains.items()
            ),
        ),
        note=rates,
    )


def _all(results: Results) -> list[Measurement]:
    accuracies = [measured(f"test accuracy, {arm}", _accuracies(results, arm), "fraction") for arm in results]
    steps = [measured(f"steps, {arm}", [one.steps for one in found], "steps") for arm, found in results.items()]
    return accuracies + steps


def trained(run: Run[Setting]) -> Trained:
    """Train on `EPOCHS` times as many samples as there are; with a test on the gradients of every step."""
    arm, streams = run.setting.arm, Streams(run.seed)
    division = divide(digits.samples(), 0.2, "all", streams)
    x, y = division.training
    with streams.globally("model"):
        model = (
            nn.Linear(64, 10)
            if arm.model == MODELS[0]
            else nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
        )
    optimizer = torch.optim.Adagrad(model.parameters(), lr=run.setting.lr)
    order = int(torch.randint(2**31, (), generator=streams("order")))
    sampler = AdaptiveBatchSampler(len(x), arm.batch, len(x), order)
    size = None if arm.eta is None else AdaptiveBatchSize(partial(norm_test, eta=arm.eta), arm.batch, len(x))
    steps = seen = 0
    try:
        while seen < EPOCHS * len(x):
            for batch in sampler:
                if size is None:
                    optimizer.zero_grad()
                    F.cross_entropy(model(x[batch]), y[batch]).backward()  # type: ignore[no-untyped-call]
                else:
                    grads = per_sample_gradients(model, F.cross_entropy, x[batch], y[batch])
                    for name, p in model.named_parameters():
                        p.grad = grads[name].mean(0)
                    sampler.batch_size = size.update(grads)
                optimizer.step()
                steps, seen = steps + 1, seen + len(batch)
        return Trained(accuracy(*predict(model, getattr(division, run.split))), steps)
    except Diverged:
        return Trained(0.0, steps)
