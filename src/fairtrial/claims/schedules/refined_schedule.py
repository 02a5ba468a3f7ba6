"""The claims of the refinement paper: linear decay against other schedules, and refined schedules against it.

Penalised logistic regression on four small data sets and a perceptron on MNIST-1D instead of the paper's 22 tasks, the
peak rate of every schedule on every task being the best of the same eleven over two tuning seeds. The convex tasks are
judged by what the theory is about, the training loss of the last iterate, the perceptron by its loss on samples held
out. The norms behind a refined schedule are those of a run of linear decay with the same seed, at its tuned rate.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch
from scipy.stats import rankdata
from sklearn.datasets import load_breast_cancer, load_wine
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, MultiStepLR

from fairtrial.catalog import Finding, Measurement, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.curves import curves
from fairtrial.claims.measure import Measure, measured
from fairtrial.claims.paired import above_zero, gaps, surely_below
from fairtrial.claims.training import fit
from fairtrial.contract import Diverged
from fairtrial.methods.schedules.refined_schedule import GradNormRecorder, LinearDecayLR, RefinedLR, refined_schedule
from fairtrial.tasks import digits, tabular
from fairtrial.tasks.measures import cross_entropy
from fairtrial.tasks.samples import Division, Samples, divide
from fairtrial.tasks.standard import constant
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import predict

CONVEX = ("breast cancer", "wine", "digits above 4", "odd digits")
TASKS = (*CONVEX, "MNIST-1D")
BATCH, EPOCHS = 16, 10
MNIST1D_BATCH, MNIST1D_STEPS = 64, 500
RATES = tuple(2.0**k for k in range(-5, 6))
TUNING_SEEDS, SEEDS = 2, 10
RIVALS = ("constant", "1/√t", "steps", "cosine")
PENALTY = 0.01  # λ of λ/2 ‖w‖², without which separable classes have no minimum
WORST = 100.0  # loss of a run that has diverged


@dataclass(frozen=True)
class Setting:
    """A task and a schedule with its peak rate; a refined one also has that of the run whose norms it takes."""

    task: str
    schedule: str
    lr: float
    first_lr: float = math.nan


Arm = tuple[str, str]  # task and schedule


def check(measure: Measure) -> list[Finding]:
    plain = [(task, schedule) for task in TASKS for schedule in (*RIVALS, "linear")]
    chosen = _tuned(measure, {(task, name): [Setting(task, name, lr) for lr in RATES] for task, name in plain})
    first = {task: chosen[task, "linear"].lr for task in TASKS}
    chosen |= _tuned(
        measure,
        {(task, "refined"): [Setting(task, "refined", lr, first[task]) for lr in RATES] for task in TASKS},
    )
    losses = evaluate(measure, last_loss, chosen, seeds=SEEDS)
    rates = "Peak rates: " + "; ".join(
        f"{task}: " + ", ".join(f"{name} {chosen[task, name].lr:g}" for name in (*RIVALS, "linear", "refined"))
        for task in TASKS
    )
    return [_linear_decay(losses, rates), _refinement(losses, rates)]


def _tuned(measure: Measure, grids: Mapping[Arm, Sequence[Setting]]) -> dict[Arm, Setting]:
    return tune(measure, last_loss, grids, seeds=TUNING_SEEDS, score=lambda loss: -loss)


def _linear_decay(losses: Mapping[Arm, list[float]], rates: str) -> Finding:
    names = (*RIVALS, "linear")
    ranks: dict[str, list[float]] = {name: [] for name in names}  # of each seed, averaged over tasks
    for seed in range(SEEDS):
        by_task = [rankdata([losses[task, name][seed] for name in names]) for task in TASKS]
        for place, name in enumerate(names):
            ranks[name].append(fmean(float(found[place]) for found in by_task))
    behind = {name: gaps(ranks[name], ranks["linear"]) for name in RIVALS}
    beaten = dict(zip(RIVALS, above_zero(*behind.values()), strict=True))
    others = all(beaten[name] for name in RIVALS if name != "cosine")
    matched = fmean(behind["cosine"]) >= 0
    lost = surely_below(behind["cosine"], 0.0)
    says: Verdict = "reproduced" if others and matched else "partly" if others and not lost else "not reproduced"
    return Finding(
        claim="linear-decay",
        verdict=says,
        criterion="The rank of linear decay by final loss, averaged over five tasks, is significantly better than that "
        "of a constant rate, 1/√t and steps (paired sign-flip test over seeds, Holm over the four rivals), and no "
        "worse than that of cosine in the mean; partly if cosine's is better, but not significantly.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(measured(f"rank among five, {name}", found, "mean over tasks") for name, found in ranks.items()),
            *(measured(f"rank of {name} less that of linear", found, "ranks") for name, found in behind.items()),
            *_losses(losses, names),
        ),
        note=f"{rates}.",
    )


def _refinement(losses: Mapping[Arm, list[float]], rates: str) -> Finding:
    logs = {
        task: gaps([math.log(x) for x in losses[task, "refined"]], [math.log(x) for x in losses[task, "linear"]])
        for task in TASKS
    }
    mean = [fmean(found) for found in zip(*(logs[task] for task in CONVEX), strict=True)]
    lower = [fmean(logs[task]) < 0 for task in CONVEX]
    says: Verdict = (
        "reproduced" if surely_below(mean, 0.0) else "partly" if sum(lower) > len(lower) / 2 else "not reproduced"
    )
    return Finding(
        claim="refinement",
        verdict=says,
        criterion="On the convex tasks the final loss with the refined schedule is lower than with linear decay: the "
        "95 % interval of the mean log ratio, averaged over the four tasks, lies below 0; partly if it is lower in the "
        "mean on more than half of them.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            measured("log of refined over linear loss, mean of the convex tasks", mean, "log ratio"),
            *(
                measured(f"log of refined over linear loss, {task}", found, "log ratio", paper="mostly below 0")
                for task, found in logs.items()
            ),
            *_losses(losses, ("linear", "refined")),
        ),
        note=f"{rates}. The refined schedule needs a first run for its norms, which is not counted here.",
    )


def _losses(losses: Mapping[Arm, list[float]], names: Sequence[str]) -> list[Measurement]:
    return [measured(f"final loss, {task}, {name}", losses[task, name], "nats") for task in TASKS for name in names]


def samples_of(task: str) -> Samples:
    """A convex task's samples; of digits only what is asked of them."""
    if task == "breast cancer":
        return tabular.samples(load_breast_cancer, torch.long)
    if task == "wine":
        return tabular.samples(load_wine, torch.long)
    found = digits.samples()
    halves: Callable[[Tensor], Tensor] = (
        (lambda y: (y > 4).long()) if task == "digits above 4" else (lambda y: y.remainder(2))
    )
    return Samples(found.x, halves(found.y), found.x_test, halves(found.y_test))


def division_of(task: str, seed: int) -> Division:
    if task == "MNIST-1D":
        return curves(seed)
    return divide(samples_of(task), 0.2, "all" if "digits" in task else "each", Streams(seed))


def model_of(task: str, division: Division) -> nn.Module:
    inputs = division.training.x.shape[1]
    if task == "MNIST-1D":
        return nn.Sequential(nn.Linear(inputs, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    return nn.Linear(inputs, int(division.training.y.max()) + 1)


def schedule_of(name: str, optimizer: Optimizer, steps: int) -> LRScheduler:
    match name:
        case "constant":
            return constant(optimizer)
        case "1/√t":
            return LambdaLR(optimizer, lambda step: 1 / math.sqrt(step + 1))
        case "steps":
            return MultiStepLR(optimizer, [steps // 3, 2 * steps // 3], gamma=0.1)
        case "cosine":
            return CosineAnnealingLR(optimizer, steps)
        case _:
            return LinearDecayLR(optimizer, steps)


def last_loss(run: Run[Setting]) -> float:
    """Loss of the last iterate: with penalty on the training part of a convex task, on the run's split of MNIST-1D."""
    setting, division = run.setting, division_of(run.setting.task, run.seed)
    judged = getattr(division, run.split) if setting.task == "MNIST-1D" else division.training
    try:
        if setting.schedule == "refined":
            _, norms = _train(setting.task, division, run.seed, setting.first_lr, partial(schedule_of, "linear"))
            rates = refined_schedule(norms, "sgd")
            model, _ = _train(
                setting.task, division, run.seed, setting.lr, lambda optimizer, steps: RefinedLR(optimizer, rates)
            )
        else:
            schedule = partial(schedule_of, setting.schedule)
            model, _ = _train(setting.task, division, run.seed, setting.lr, schedule)
        penalty = penalty_of(model).item() if setting.task in CONVEX else 0.0
        return min(WORST, cross_entropy(*predict(model, judged)) + penalty)
    except Diverged:
        return WORST


def penalty_of(model: nn.Module) -> Tensor:
    return PENALTY / 2 * torch.stack([p.square().sum() for p in model.parameters()]).sum()


def _train(
    task: str, division: Division, seed: int, lr: float, schedule: Callable[[Optimizer, int], LRScheduler]
) -> tuple[nn.Module, Sequence[float]]:
    """SGD on the training part, on MNIST-1D with momentum; the model and the gradient norm of every step."""
    streams, convex = Streams(seed), task in CONVEX
    with streams.globally("model"):
        model = model_of(task, division)
    batch_size = BATCH if convex else MNIST1D_BATCH
    steps = EPOCHS * (len(division.training.x) // BATCH) if convex else MNIST1D_STEPS
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.0 if convex else 0.9)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        fitted = F.cross_entropy(output, target)
        return fitted + penalty_of(model) if convex else fitted

    recorder = GradNormRecorder(model.parameters())
    fit(
        model,
        optimizer,
        division.training,
        streams,
        steps=steps,
        batch_size=batch_size,
        loss=loss,
        schedule=schedule(optimizer, steps),
        after=lambda step: recorder.record(),
    )
    return model, recorder.norms.tolist()
