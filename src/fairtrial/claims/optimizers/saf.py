"""The claims of the SAF paper: accuracy, sharpness and cost, beside SGD, SAM and label smoothing.

MNIST-1D with the bench's network of three convolutions, instead of ImageNet: 1000 curves to train on, 40 epochs, batch
50, momentum 0.9 and weight decay 5e-4 for all, a cosine schedule. Every arm gets the best of four settings by
validation accuracy: of four learning rates where there is nothing else to choose, else of two with two values of what
there is.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.curves import curves
from fairtrial.claims.measure import Measure, measured, single
from fairtrial.claims.paired import above_zero, gaps, surely_above
from fairtrial.claims.sharpness import rise_uphill, top_curvature
from fairtrial.claims.training import fit
from fairtrial.contract import Diverged
from fairtrial.methods.optimizers.saf import MESALoss, TrajectoryLoss, mesa_teacher
from fairtrial.methods.optimizers.sam import SAM
from fairtrial.tasks.measures import accuracy
from fairtrial.tasks.mnist1d import convolutional
from fairtrial.tasks.samples import Part
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import predict

PLAIN, SAF, MESA, SHARPNESS_AWARE, HALF, SMOOTHED = (
    "SGD",
    "SAF",
    "MESA",
    "SAM",
    "SAM, half the steps",
    "label smoothing",
)
CURVES, BATCH, EPOCHS = 1000, 50, 40
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
RATES, MORE_RATES = (0.05, 0.2), (0.02, 0.05, 0.1, 0.2)
STRENGTHS = {  # λ, ρ, or the share of the label that is spread
    SAF: (0.3, 0.8),
    MESA: (0.3, 0.8),
    SHARPNESS_AWARE: (0.05, 0.1),
    HALF: (0.05, 0.1),
    SMOOTHED: (0.05, 0.1),
}
MEMORY = 0.18  # the part of the run that MESA's average remembers: 5000 of about 28,000 steps in the paper
TUNING_SEEDS, SEEDS = 1, 7
MARGIN, RADIUS, WORST_SHARPNESS = 0.01, 0.05, 1e4
TIMED_BATCH, TIMED_STEPS = 500, 40


def check(measure: Measure) -> list[Finding]:
    found, note = _trained(measure)
    return [_accuracy(found, note), _sharpness(found, note), _cost(measure)]


@dataclass(frozen=True)
class Setting:
    """An arm with its learning rate and, unless it is plain SGD, its strength."""

    arm: str
    lr: float
    strength: float = 0.0


@dataclass(frozen=True)
class Result:
    """Accuracy on held-out curves; on those trained on, the rise of the loss uphill and the top curvature."""

    accuracy: float
    rise: float
    curvature: float


Results = dict[str, list[Result]]


def _trained(measure: Measure) -> tuple[Results, str]:
    grids = {PLAIN: [Setting(PLAIN, lr) for lr in MORE_RATES]}
    grids |= {arm: [Setting(arm, *pair) for pair in product(RATES, own)] for arm, own in STRENGTHS.items()}
    chosen = tune(measure, result_of, grids, seeds=TUNING_SEEDS, score=lambda result: result.accuracy)
    settings = "; ".join(f"{arm} {setting.lr:g}, {setting.strength:g}" for arm, setting in chosen.items())
    note = f"Learning rate, and λ, ρ or share of the label spread: {settings}."
    return evaluate(measure, result_of, chosen, seeds=SEEDS), note


def _accuracy(found: Results, note: str) -> Finding:
    accuracies = {arm: [result.accuracy for result in results] for arm, results in found.items()}
    gains = {arm: gaps(accuracies[arm], accuracies[PLAIN]) for arm in (SAF, MESA)}
    to_sam = gaps(accuracies[SAF], accuracies[SHARPNESS_AWARE])
    better = above_zero(*gains.values())[0]
    no_worse = surely_above(to_sam, -MARGIN)
    says: Verdict = "reproduced" if better and no_worse else "partly" if better else "not reproduced"
    paper = {PLAIN: "0.760", SHARPNESS_AWARE: "0.769", SAF: "0.778", MESA: "0.775"}
    return Finding(
        claim="accuracy-over-sgd",
        verdict=says,
        criterion="Test accuracy of SAF is significantly above that of SGD (paired sign-flip test, Holm over SAF and "
        f"MESA), and at most {MARGIN} below that of SAM by the lower end of the 95 % interval of the mean paired "
        "difference; partly if only the first.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(
                    f"test accuracy, {arm}",
                    values,
                    "fraction",
                    paper=f"{paper[arm]} on ImageNet, ResNet-50" if arm in paper else "",
                )
                for arm, values in accuracies.items()
            ),
            measured(f"test accuracy, {SAF} above {PLAIN}", gains[SAF], "fraction", paper="0.018 on ImageNet"),
            measured(f"test accuracy, {MESA} above {PLAIN}", gains[MESA], "fraction", paper="0.015 on ImageNet"),
            measured(f"test accuracy, {SAF} above {SHARPNESS_AWARE}", to_sam, "fraction", paper="0.009 on ImageNet"),
            measured(f"test accuracy, {SAF} above {SMOOTHED}", gaps(accuracies[SAF], accuracies[SMOOTHED]), "fraction"),
        ),
        note=f"{note} SAF is close to distilling a network into itself, so label smoothing is there to compare with. "
        "There is no augmentation: a sample looks the same in every epoch.",
    )


def _sharpness(found: Results, note: str) -> Finding:
    rises, curvatures = (
        {arm: [getattr(result, name) for result in results] for arm, results in found.items()}
        for name in ("rise", "curvature")
    )
    flatter = above_zero(gaps(rises[PLAIN], rises[SAF]), gaps(curvatures[PLAIN], curvatures[SAF]))
    says: Verdict = "reproduced" if all(flatter) else "partly" if any(flatter) else "not reproduced"
    rise = f"rise of the loss within {RADIUS}"
    return Finding(
        claim="lower-sharpness",
        verdict=says,
        criterion=f"At the end, the rise of the training loss by a step of length {RADIUS} uphill and the largest "
        "eigenvalue of its Hessian are both significantly lower with SAF than with SGD (paired sign-flip test, Holm "
        "over the two); partly if one is.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(measured(f"{rise}, {arm}", values, "nats") for arm, values in rises.items()),
            *(measured(f"top eigenvalue, {arm}", values, "") for arm, values in curvatures.items()),
            measured(f"{rise}, {PLAIN} above {SAF}", gaps(rises[PLAIN], rises[SAF]), "nats"),
            measured(f"top eigenvalue, {PLAIN} above {SAF}", gaps(curvatures[PLAIN], curvatures[SAF]), ""),
        ),
        note=f"{note} The loss is plain cross entropy for all. The convolutions are blind to the scale of their "
        "weights, on which both figures depend; weight decay is the same for all, learning rates are not.",
    )


class Taught(nn.Module):
    """MESA's loss as the training loop asks for it, with the teacher's scores of the same samples."""

    def __init__(self, teacher: nn.Module, x: Tensor, lam: float) -> None:
        super().__init__()
        self.teacher, self.x, self.loss, self.calls = teacher, x, MESALoss(lam), 0

    def forward(
        self, input: Float[Tensor, "n c"], target: Int[Tensor, " n"], index: Int[Tensor, " n"]
    ) -> Float[Tensor, ""]:
        with torch.no_grad():
            scores = self.teacher(self.x[index])
        epoch = self.calls // max(1, len(self.x) // BATCH)
        self.calls += 1
        loss: Tensor = self.loss(input, target, scores, epoch)
        return loss


def nothing(step: int) -> None:
    """Most arms have nothing to do after a step."""


def loss_of(
    setting: Setting, model: nn.Module, part: Part, steps: int
) -> tuple[Callable[..., Tensor], Callable[[int], None]]:
    """The loss of an arm, and what is to be done after every step."""
    if setting.arm == SAF:
        return TrajectoryLoss(len(part.x), 10, setting.strength, steps_per_epoch=max(1, len(part.x) // BATCH)), nothing
    if setting.arm == MESA:
        teacher = mesa_teacher(model, 1 - 1 / (MEMORY * steps))
        return Taught(teacher, part.x, setting.strength), lambda step: teacher.update_parameters(model)
    return nn.CrossEntropyLoss(label_smoothing=setting.strength if setting.arm == SMOOTHED else 0.0), nothing


def optimizer_of(setting: Setting, model: nn.Module) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": setting.lr, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
    if setting.arm in (SHARPNESS_AWARE, HALF):
        return SAM(model.parameters(), rho=setting.strength, **options)
    return torch.optim.SGD(model.parameters(), **options)


def result_of(run: Run[Setting]) -> Result:
    """Train and measure; the worst of everything where training diverged, sharpness on test runs only."""
    setting, streams, division = run.setting, Streams(run.seed), curves(run.seed)
    part = Part(*(tensor[:CURVES] for tensor in division.training))
    with streams.globally("model"):
        model = convolutional()
    steps = EPOCHS * (CURVES // BATCH) // (2 if setting.arm == HALF else 1)
    loss, after = loss_of(setting, model, part, steps)
    optimizer = optimizer_of(setting, model)
    try:
        fit(model, optimizer, part, streams, steps=steps, batch_size=BATCH, loss=loss, after=after)
        reached = accuracy(*predict(model, getattr(division, run.split)))
    except Diverged:
        return Result(0.0, WORST_SHARPNESS, WORST_SHARPNESS)
    if run.split == "validation":
        return Result(reached, 0.0, 0.0)
    return Result(reached, rise_uphill(model, part, RADIUS), top_curvature(model, part, streams("method")))


def _cost(measure: Measure) -> Finding:
    measure.say("timing training steps")
    times = {arm: median(taken) for arm, taken in step_times().items()}
    ratios = {arm: taken / times[PLAIN] for arm, taken in times.items() if arm != PLAIN}
    cheap = ratios[SAF] < 1.1 and ratios[SHARPNESS_AWARE] >= 1.7
    says: Verdict = "reproduced" if cheap else "partly" if ratios[SAF] < 1.25 else "not reproduced"
    paper = {SAF: "1.01", MESA: "1.18", SHARPNESS_AWARE: "2.0"}
    return Finding(
        claim="no-extra-cost",
        verdict=says,
        criterion="A training step of SAF takes less than 1.1 times that of SGD, and one of SAM at least 1.7 times; "
        "partly if that of SAF takes less than 1.25 times.",
        seeds=(0,),
        measurements=(
            *(single(f"step, {arm} over {PLAIN}", ratio, "ratio", paper=paper[arm]) for arm, ratio in ratios.items()),
            single(f"step, {PLAIN}", times[PLAIN], "seconds"),
        ),
        note=f"The network of the other claims on batches of {TIMED_BATCH} curves, one thread; medians over "
        f"{TIMED_STEPS} steps each, taken in turn, all with the term that the arm adds.",
    )


def step_times() -> dict[str, list[float]]:
    """Seconds of training steps of each arm, measured in turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x, y = curves(0).training
    arms = {arm: Setting(arm, 0.01, 0.3 if arm in (SAF, MESA) else 0.05) for arm in (PLAIN, SAF, MESA, SHARPNESS_AWARE)}
    steps = {arm: _step_of(setting, x, y) for arm, setting in arms.items()}
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(TIMED_STEPS + 1):
        index = torch.arange(TIMED_BATCH) * len(x) // TIMED_BATCH
        for arm, step in steps.items():
            started = time.perf_counter()
            step(index)
            if number:  # the first warms up
                times[arm].append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    return times


def _step_of(setting: Setting, x: Tensor, y: Tensor) -> Callable[[Tensor], None]:
    with Streams(0).globally("model"):
        model = convolutional()
    optimizer = optimizer_of(setting, model)
    past = TrajectoryLoss(len(x), 10, setting.strength, delay=1, start_epoch=0)
    taught, teacher = MESALoss(setting.strength, start_epoch=0), mesa_teacher(model)
    epochs = iter(range(10 * (TIMED_STEPS + 1)))

    def loss(index: Tensor) -> Tensor:
        optimizer.zero_grad()
        output, target = model(x[index]), y[index]
        found: Tensor
        if setting.arm == SAF:
            found = past(output, target, index, next(epochs))
        elif setting.arm == MESA:
            with torch.no_grad():
                scores = teacher(x[index])
            found = taught(output, target, scores, 1)
        else:
            found = F.cross_entropy(output, target)
        found.backward()  # type: ignore[no-untyped-call]
        return found

    def step(index: Tensor) -> None:
        if isinstance(optimizer, SAM):
            optimizer.step(lambda: loss(index))
        else:
            loss(index)
            optimizer.step()
        if setting.arm == MESA:
            teacher.update_parameters(model)

    return step
