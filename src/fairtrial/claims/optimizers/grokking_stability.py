"""The claims on grokking: orthogonal gradients generalise at once, the softmax collapses, StableMax does not.

Addition modulo 31 with three fifths of the table, in full batches, instead of modulo 113 with two fifths: the one-hot
perceptron 62-200-200-31 without biases. What is not trained on is halved, to validate and to test with. Sparse parity
as in the paper, for fewer steps. Learning rates are constant.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.measure import Measure, measured
from fairtrial.contract import Split
from fairtrial.methods.optimizers.grokking_stability import (
    OrthoGrad,
    StableMaxCrossEntropyLoss,
    modular_addition,
    softmax_collapse_fraction,
    sparse_parity,
)
from fairtrial.tasks.measures import accuracy
from fairtrial.tasks.modular_addition import OneHotPerceptron
from fairtrial.tasks.streams import Streams

MODULUS, FRACTION = 31, 0.6
RATES = (0.003, 0.01, 0.03)
STEPS, LOOKS, REACHED = 300, 30, 0.95
SEEDS, TUNING_SEEDS = 5, 1
COLLAPSE_STEPS, COLLAPSE_SEEDS = 2000, 2
PARITY_STEPS, PARITY_SEEDS = 4000, 3
PLAIN, DECAY, ORTHOGONAL, PROJECTED = "AdamW", "AdamW, decay 1", "OrthoGrad", "OrthoGrad without rescaling"


def check(measure: Measure) -> list[Finding]:
    return [_orthogonal(measure), _collapse(measure), _stablemax(measure)]


@dataclass(frozen=True)
class Setting:
    """What trains on the table of sums, and for how long."""

    arm: str
    lr: float = 0.01
    steps: int = 0
    precision: torch.dtype = torch.float32


def _orthogonal(measure: Measure) -> Finding:
    arms = (PLAIN, DECAY, ORTHOGONAL, PROJECTED)
    grids = {arm: [Setting(arm, lr, STEPS) for lr in RATES] for arm in arms}
    chosen = tune(measure, best_accuracy, grids, seeds=TUNING_SEEDS, score=float)
    found = evaluate(measure, best_accuracy, chosen, seeds=SEEDS)
    reached = sum(value >= REACHED for value in found[ORTHOGONAL])
    says: Verdict = "reproduced" if reached >= SEEDS - 1 else "partly" if reached >= 2 else "not reproduced"
    rates = ", ".join(f"{arm} {setting.lr:g}" for arm, setting in chosen.items())
    return Finding(
        claim="orthogonal-gradients",
        verdict=says,
        criterion=f"With orthogonal gradients at least {SEEDS - 1} of {SEEDS} seeds reach {REACHED:.0%} test accuracy "
        f"within {STEPS} steps; partly if at least 2 do.",
        seeds=tuple(range(SEEDS)),
        measurements=tuple(
            measured(f"highest test accuracy within {STEPS} steps, {arm}", values, "fraction")
            for arm, values in found.items()
        ),
        note=f"Learning rates: {rates}. Accuracy is looked at every {STEPS // LOOKS} steps; the paper's table is "
        "modulo 113, with 40 % of it to train on.",
    )


def _collapse(measure: Measure) -> Finding:
    settings = {
        precision: Setting(PLAIN, 0.01, COLLAPSE_STEPS, dtype)
        for precision, dtype in (("float32", torch.float32), ("float64", torch.float64))
    }
    found = evaluate(measure, final_state, settings, seeds=COLLAPSE_SEEDS)
    never = all(generalised < 0.05 for generalised, _ in found["float32"])
    collapsed = all(share > 0.25 for _, share in found["float32"])
    says: Verdict = "reproduced" if never and collapsed else "partly" if never else "not reproduced"
    return Finding(
        claim="softmax-collapse",
        verdict=says,
        criterion=f"After {COLLAPSE_STEPS} steps of plain AdamW test accuracy is below 5 % and the cross entropy of "
        "more than 25 % of the training samples is exactly 0 in float32, in every seed; partly if only the first.",
        seeds=tuple(range(COLLAPSE_SEEDS)),
        measurements=tuple(
            measured(f"{what}, loss in {precision}", [run[place] for run in runs], "fraction")
            for precision, runs in found.items()
            for place, what in enumerate(("test accuracy", "training samples with a float32 loss of 0"))
        ),
        note="Learning rate 0.01, no weight decay, eps 1e-8.",
    )


def _stablemax(measure: Measure) -> Finding:
    found = evaluate(measure, parity_accuracy, {"StableMax": True, "cross entropy": False}, seeds=PARITY_SEEDS)
    stable, plain = found["StableMax"], found["cross entropy"]
    says: Verdict = "not reproduced"
    if min(stable) > 0.95 and max(plain) < 0.6:
        says = "reproduced"
    elif all(a >= b + 0.2 for a, b in zip(stable, plain, strict=True)):
        says = "partly"
    return Finding(
        claim="stablemax",
        verdict=says,
        criterion=f"After {PARITY_STEPS} steps on sparse parity test accuracy is above 95 % with StableMax and below "
        "60 % with cross entropy, in every seed; partly if StableMax is ahead by at least 20 points in every seed.",
        seeds=tuple(range(PARITY_SEEDS)),
        measurements=tuple(measured(f"test accuracy, {name}", values, "fraction") for name, values in found.items()),
        note="The paper trains for 100,000 steps. AdamW at 0.01 without decay, eps 1e-18.",
    )


def optimizer_of(setting: Setting, model: nn.Module) -> Optimizer:
    decay = 1.0 if setting.arm == DECAY else 0.0
    if setting.arm in (ORTHOGONAL, PROJECTED):
        rescale = setting.arm == ORTHOGONAL
        return OrthoGrad(model.parameters(), torch.optim.AdamW, setting.lr, rescale=rescale, weight_decay=decay)
    return torch.optim.AdamW(model.parameters(), lr=setting.lr, weight_decay=decay)


def descend(
    model: nn.Module,
    optimizer: Optimizer,
    loss: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    steps: int,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Full-batch training."""
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        after(step)


def on_sums(run: Run[Setting], after: Callable[[int, Callable[[], float]], None]) -> float:
    """Train, and give the part of the training samples whose loss has become 0.

    `after` is called with the number of every step and a function that gives the accuracy on the run's split.
    """
    setting, streams = run.setting, Streams(run.seed)
    data = modular_addition(MODULUS, FRACTION, streams("split"))
    with streams.globally("model"):
        model = OneHotPerceptron(MODULUS)
    half = len(data.x_test) // 2
    kept: dict[Split, slice] = {"validation": slice(half), "test": slice(half, None)}

    @torch.no_grad()
    def generalised() -> float:
        return accuracy(model(data.x_test[kept[run.split]]), data.y_test[kept[run.split]])

    def loss(scores: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(scores.to(setting.precision), target)

    descend(
        model,
        optimizer_of(setting, model),
        loss,
        data.x,
        data.y,
        setting.steps,
        lambda step: after(step, generalised),
    )
    with torch.no_grad():
        return softmax_collapse_fraction(model(data.x), data.y)


def best_accuracy(run: Run[Setting]) -> float:
    """The highest accuracy within the run's steps."""
    every, found = max(1, run.setting.steps // LOOKS), [0.0]
    on_sums(run, lambda step, generalised: found.append(generalised()) if step % every == 0 else None)
    return max(found)


def final_state(run: Run[Setting]) -> tuple[float, float]:
    """The accuracy at the end, and the part of the training samples whose loss is 0 then."""
    found: list[float] = []
    last = run.setting.steps
    share = on_sums(run, lambda step, generalised: found.append(generalised()) if step == last else None)
    return found[-1], share


def parity_accuracy(run: Run[bool]) -> float:
    """The accuracy on sparse parity after training with StableMax, or with cross entropy."""
    streams = Streams(run.seed)
    data = sparse_parity(streams("split"))
    with streams.globally("model"):
        model = nn.Sequential(nn.Linear(43, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0, eps=1e-18)
    loss: nn.Module = StableMaxCrossEntropyLoss() if run.setting else nn.CrossEntropyLoss()
    descend(model, optimizer, loss, data.x, data.y, PARITY_STEPS)
    with torch.no_grad():
        return accuracy(model(data.x_test), data.y_test)
