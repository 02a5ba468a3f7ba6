"""The claims of the AdamP paper: weights grow less, effective steps stay larger, and accuracy gains a little.

MNIST-1D instead of ImageNet, with the bench's network of three convolutions, each followed by batch normalisation. The
two claims on weights are measured as training goes at given learning rates, constant and without weight decay; for
accuracy every optimizer gets the best of four rates on validation data, over two tuning seeds, and a cosine schedule.
"""

from dataclasses import dataclass
from statistics import median

import torch
from torch import nn
from torch.optim import Optimizer

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.curves import curves
from fairtrial.claims.measure import Measure, measured
from fairtrial.claims.paired import above_zero, gaps, surely_below
from fairtrial.claims.training import fit
from fairtrial.contract import Diverged
from fairtrial.methods.optimizers.adamp import SGDP, AdamP
from fairtrial.tasks.measures import accuracy
from fairtrial.tasks.mnist1d import convolutional
from fairtrial.tasks.standard import constant
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import predict

PAIRS = (("SGD", "SGDP"), ("AdamW", "AdamP"))
BATCH = 100
GROWING_STEPS, GROWING_RATE, GROWING_SEEDS = 600, {"SGD": 0.1, "AdamW": 0.01}, 8
STEPS, TUNING_SEEDS, SEEDS = 1200, 2, 12
DECAY = {"SGD": 1e-4, "AdamW": 0.01}
RATES = {"SGD": (0.03, 0.1, 0.3, 1.0), "AdamW": (0.003, 0.01, 0.03, 0.1)}


def check(measure: Measure) -> list[Finding]:
    return [*_weights(measure), _accuracy(measure)]


@dataclass(frozen=True)
class Setting:
    """An optimizer with its learning rate, weight decay and the number of steps."""

    optimizer: str
    lr: float
    weight_decay: float
    steps: int


def _weights(measure: Measure) -> list[Finding]:
    settings = {
        name: Setting(name, GROWING_RATE[plain], 0.0, GROWING_STEPS)
        for plain, projected in PAIRS
        for name in (plain, projected)
    }
    lengths = evaluate(measure, squared_lengths, settings, seeds=GROWING_SEEDS)
    return [_growth(lengths), _effective_step(lengths)]


Lengths = list[tuple[float, float]]  # of each convolution: ‖w‖² before and after training


def _growth(lengths: dict[str, list[Lengths]]) -> Finding:
    growth = {
        name: [sum(after - before for before, after in found) for found in lengths[name]] for name in ("SGD", "SGDP")
    }
    larger = [plain > 2 * projected for plain, projected in zip(growth["SGD"], growth["SGDP"], strict=True)]
    ratios = [plain / projected for plain, projected in zip(growth["SGD"], growth["SGDP"], strict=True)]
    in_the_median = sum(larger) > len(larger) / 2
    says: Verdict = "reproduced" if all(larger) else "partly" if in_the_median else "not reproduced"
    return Finding(
        claim="norm-growth",
        verdict=says,
        criterion="The squared norms of the convolutions' weights, summed, grow more than twice as much with SGD as "
        "with SGDP in every seed; partly if in more than half of them.",
        seeds=tuple(range(GROWING_SEEDS)),
        measurements=(
            measured("growth with SGD over growth with SGDP", ratios, "ratio", paper="19, where growth is small"),
            *(measured(f"growth of the squared norm, {name}", found, "") for name, found in growth.items()),
        ),
        note="19 belongs to gradients of constant size. They shrink as 1/‖w‖, so that growth beyond the initial norm "
        "brings the ratio down, towards √19 where it is large.",
    )


def _effective_step(lengths: dict[str, list[Lengths]]) -> Finding:
    kept = {
        name: [
            median((before / after) ** (1.0 if plain == "SGD" else 0.5) for before, after in found)
            for found in lengths[name]
        ]
        for plain, projected in PAIRS
        for name in (plain, projected)
    }
    more = {pair: gaps(kept[pair[1]], kept[pair[0]]) for pair in PAIRS}
    larger = [min(found) > 0 for found in more.values()]
    says: Verdict = "reproduced" if all(larger) else "partly" if any(larger) else "not reproduced"
    return Finding(
        claim="effective-step",
        verdict=says,
        criterion="The effective step at the end relative to the start, the median over the convolutions, is larger "
        "with the projection in every seed, for both pairs; partly if for one.",
        seeds=tuple(range(GROWING_SEEDS)),
        measurements=(
            *(measured(f"effective step, end over start, {name}", found, "ratio") for name, found in kept.items()),
            *(measured(f"the same, {b} less {a}", found, "difference") for (a, b), found in more.items()),
        ),
        note="Of a weight w the effective step is lr/‖w‖² with SGD and lr/‖w‖ with AdamW, whose updates do not shrink "
        "with the gradient.",
    )


def _accuracy(measure: Measure) -> Finding:
    grids = {
        name: [Setting(name, lr, DECAY[plain], STEPS) for lr in RATES[plain]]
        for plain, projected in PAIRS
        for name in (plain, projected)
    }
    chosen = tune(measure, accuracy_of, grids, seeds=TUNING_SEEDS, score=float)
    accuracies = evaluate(measure, accuracy_of, chosen, seeds=SEEDS)
    gains = {pair: gaps(accuracies[pair[1]], accuracies[pair[0]]) for pair in PAIRS}
    better = above_zero(*gains.values())
    worse = any(surely_below(gain, 0.0) for gain in gains.values())
    says: Verdict = "reproduced" if all(better) else "partly" if any(better) and not worse else "not reproduced"
    paper = {"SGD": "0.7047", "SGDP": "0.7070", "AdamW": "0.7039", "AdamP": "0.7082"}
    rates = ", ".join(f"{name} {setting.lr:g}" for name, setting in chosen.items())
    return Finding(
        claim="accuracy",
        verdict=says,
        criterion="Test accuracy is significantly higher with the projection for both pairs (paired sign-flip test, "
        "Holm over the two); partly if for one, and the 95 % interval for the other is not below 0.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"test accuracy, {name}", found, "fraction", paper=f"{paper[name]} on ImageNet")
                for name, found in accuracies.items()
            ),
            *(
                measured(f"test accuracy, {b} above {a}", gain, "fraction", paper=f"{in_paper} on ImageNet")
                for ((a, b), gain), in_paper in zip(gains.items(), ("0.0023", "0.0043"), strict=True)
            ),
        ),
        note=f"Learning rates: {rates}. The paper's network is a ResNet-18.",
    )


def optimizer_of(setting: Setting, model: nn.Module) -> Optimizer:
    lr, decay = setting.lr, setting.weight_decay
    match setting.optimizer:
        case "SGD":
            return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=decay)
        case "SGDP":
            return SGDP(model.parameters(), lr=lr, momentum=0.9, weight_decay=decay)
        case "AdamW":
            return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
        case _:
            return AdamP(model.parameters(), lr=lr, weight_decay=decay)


def squared_lengths(run: Run[Setting]) -> Lengths:
    """Train at a constant learning rate, and give ‖w‖² of each convolution's weight before and after."""
    streams = Streams(run.seed)
    with streams.globally("model"):
        model = convolutional()
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv1d)]
    before = [w.detach().square().sum().item() for w in weights]
    optimizer = optimizer_of(run.setting, model)
    fit(
        model,
        optimizer,
        curves(run.seed).training,
        streams,
        steps=run.setting.steps,
        batch_size=BATCH,
        schedule=constant(optimizer),
    )
    return [(start, w.detach().square().sum().item()) for start, w in zip(before, weights, strict=True)]


def accuracy_of(run: Run[Setting]) -> float:
    """Train along a cosine, and give the accuracy; 0 where training diverged."""
    streams, division = Streams(run.seed), curves(run.seed)
    with streams.globally("model"):
        model = convolutional()
    optimizer = optimizer_of(run.setting, model)
    try:
        fit(model, optimizer, division.training, streams, steps=run.setting.steps, batch_size=BATCH)
        return accuracy(*predict(model, getattr(division, run.split)))
    except Diverged:
        return 0.0
