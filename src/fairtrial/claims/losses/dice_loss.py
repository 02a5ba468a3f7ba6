"""The claims of the Dice losses: F1 with few positives, and how the gain depends on their share.

Synthetic tables instead of tagged text: 20 features of two classes, 1 %, 5 % or half of the samples positive, a
logistic model and a perceptron 20-64-1, Adam along a cosine. Every arm has eight settings to choose among: cross
entropy, plain, with its threshold chosen on validation data, or weighted by the classes' ratio, has eight learning
rates, focal loss and the two Dice arms have four forms and two learning rates. A Dice arm takes the coefficient either
of the batch as a set, or of each sample.
"""

from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np
import torch
from sklearn.datasets import make_classification
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.measure import Measure, measured
from fairtrial.claims.paired import above_zero, gaps
from fairtrial.claims.training import fit
from fairtrial.contract import Diverged
from fairtrial.methods.losses.dice_loss import (
    BinaryDiceLoss,
    BinarySelfAdjustingDiceLoss,
    BinarySquaredDiceLoss,
    BinaryTverskyLoss,
)
from fairtrial.tasks.samples import Division, Part
from fairtrial.tasks.streams import Streams

TRAINING, HELD_OUT = 6000, 12_000  # validation and test have as many each
STEPS, BATCH = 200, 256
TUNING_SEEDS, SEEDS = 2, 10
RATES = tuple(float(rate) for rate in np.geomspace(1e-3, 1e-1, 8))
FEW_RATES = (3e-3, 3e-2)
SHARES = (0.01, 0.05, 0.5)

PLAIN, THRESHOLD, WEIGHTED, FOCAL, OF_BATCH, OF_SAMPLES = ARMS = (
    "cross entropy",
    "cross entropy, tuned threshold",
    "weighted cross entropy",
    "focal loss",
    "Dice of the batch",
    "Dice of samples",
)
DICE = (OF_BATCH, OF_SAMPLES)
Model = Literal["logistic", "perceptron"]
MODELS: tuple[Model, ...] = ("logistic", "perceptron")


@dataclass(frozen=True)
class Form:
    """A loss and its constants."""

    name: str
    values: tuple[float, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} {', '.join(f'{value:g}' for value in self.values)}".strip()


FORMS = {
    FOCAL: [Form("focal", (gamma,)) for gamma in (0.5, 1.0, 2.0, 5.0)],
    OF_BATCH: [Form("batch", (alpha, smooth)) for alpha in (0.01, 0.3) for smooth in (1.0, 1e-4)],
    OF_SAMPLES: [Form("squared"), Form("Tversky"), Form("self-adjusting", (0.3,)), Form("self-adjusting", (1.0,))],
}


@dataclass(frozen=True)
class Setting:
    """An arm's loss, the share of positives, the model, and the learning rate."""

    arm: str
    form: Form
    share: float
    model: Model
    lr: float


class Key(NamedTuple):
    """What is tuned for by itself."""

    arm: str
    share: float
    model: Model


class Judged(NamedTuple):
    """F1 and accuracy of a trained model; 0 if it diverged."""

    f1: float
    accuracy: float


def check(measure: Measure) -> list[Finding]:
    grids = {Key(arm, share, model): _grid(arm, share, model) for arm in ARMS for share in SHARES for model in MODELS}
    chosen = tune(measure, judged, grids, seeds=TUNING_SEEDS, score=lambda result: result.f1)
    results = evaluate(measure, judged, chosen, seeds=SEEDS)

    def over_models(arm: str, share: float, of: Literal["f1", "accuracy"]) -> list[float]:
        by_model = [[getattr(result, of) for result in results[Key(arm, share, model)]] for model in MODELS]
        return [fmean(values) for values in zip(*by_model, strict=True)]

    f1 = {(arm, share): over_models(arm, share, "f1") for arm in ARMS for share in SHARES}
    accuracy = {arm: over_models(arm, SHARES[-1], "accuracy") for arm in ARMS}
    forms = "; ".join(
        f"{key.arm}, {key.share:.0%}, {key.model}: {setting.form}" for key, setting in chosen.items() if key.arm in DICE
    )
    note = f"Means of both models; tuned for F1 on {TUNING_SEEDS} tuning seeds. Forms chosen: {forms}."
    return [_imbalanced(f1, note), _grows(f1, accuracy, note)]


def _grid(arm: str, share: float, model: Model) -> list[Setting]:
    if arm in FORMS:
        return [Setting(arm, form, share, model, lr) for form in FORMS[arm] for lr in FEW_RATES]
    return [Setting(arm, Form(arm), share, model, lr) for lr in RATES]


def _imbalanced(f1: dict[tuple[str, float], list[float]], note: str) -> Finding:
    few = SHARES[:-1]
    compared = [(dice, other, share) for dice in DICE for other in (PLAIN, THRESHOLD) for share in few]
    gains = [gaps(f1[dice, share], f1[other, share]) for dice, other, share in compared]
    above = dict(zip(compared, above_zero(*gains), strict=True))
    beats = {dice: [all(above[dice, other, share] for share in few) for other in (PLAIN, THRESHOLD)] for dice in DICE}
    says: Verdict = "not reproduced"
    if any(plain for plain, _ in beats.values()):
        says = "reproduced" if any(plain and tuned for plain, tuned in beats.values()) else "partly"
    return Finding(
        claim="f1-when-imbalanced",
        verdict=says,
        criterion="One of the two Dice arms has a significantly higher F1 than cross entropy, plain and with tuned "
        "threshold, at 1 % and at 5 % positives (paired sign-flip tests, Holm over all eight); partly if than plain "
        "cross entropy only.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(
                    f"gain in F1 of {dice} over {other}, {share:.0%}",
                    gain,
                    "fraction",
                    paper="0.003 to 0.01" if other == PLAIN else "",
                )
                for (dice, other, share), gain in zip(compared, gains, strict=True)
            ),
            *(measured(f"F1, {arm}, {share:.0%}", f1[arm, share], "fraction") for share in few for arm in ARMS),
        ),
        note=note,
    )


def _grows(f1: dict[tuple[str, float], list[float]], accuracy: dict[str, list[float]], note: str) -> Finding:
    fewest, half = SHARES[0], SHARES[-1]
    gains = {(dice, share): gaps(f1[dice, share], f1[PLAIN, share]) for dice in DICE for share in SHARES}
    falls = {dice: gaps(gains[dice, fewest], gains[dice, half]) for dice in DICE}
    more_accurate = {dice: gaps(accuracy[dice], accuracy[PLAIN]) for dice in DICE}
    falling = any(above_zero(*falls.values()))
    at_least_equal = not any(above_zero(*more_accurate.values()))
    says: Verdict = "not reproduced"
    if at_least_equal:
        says = "reproduced" if falling else "partly"
    return Finding(
        claim="gain-grows-with-imbalance",
        verdict=says,
        criterion="The gain in F1 over cross entropy of one of the two Dice arms falls significantly from 1 % to 50 % "
        "positives, and at 50 % neither is significantly more accurate than cross entropy (paired sign-flip tests, "
        "Holm); partly if only the latter holds.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(measured(f"fall of the gain of {dice}, 1% to 50%", fall, "fraction") for dice, fall in falls.items()),
            *(
                measured(f"gain in F1 of {dice} over {PLAIN}, {share:.0%}", gain, "fraction")
                for (dice, share), gain in gains.items()
            ),
            *(
                measured(f"gain in accuracy of {dice}, {half:.0%}", gain, "fraction", paper="none")
                for dice, gain in more_accurate.items()
            ),
            *(measured(f"accuracy, {arm}, {half:.0%}", accuracy[arm], "fraction") for arm in ARMS),
        ),
        note=note,
    )


class WeightedCrossEntropy(nn.Module):
    """Binary cross entropy in which positives have a weight.

    Args:
        pos_weight: that weight.
    """

    def __init__(self, pos_weight: float) -> None:
        super().__init__()
        self.pos_weight = pos_weight

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        weight = torch.tensor(self.pos_weight)
        return F.binary_cross_entropy_with_logits(input, target.to(input.dtype), pos_weight=weight)


class Focal(nn.Module):
    """Cross entropy times (1 - p of the target)^γ (Lin et al. 2017).

    Args:
        gamma: γ.
    """

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        log_p = F.logsigmoid(torch.where(target == 1, input, -input))
        return -((1 - log_p.exp()) ** self.gamma * log_p).mean()


def loss_of(form: Form, share: float) -> nn.Module:
    match form.name, form.values:
        case "batch", (alpha, smooth):
            return BinaryDiceLoss(alpha, smooth)
        case "squared", _:
            return BinarySquaredDiceLoss()
        case "Tversky", _:
            return BinaryTverskyLoss()
        case "self-adjusting", (alpha,):
            return BinarySelfAdjustingDiceLoss(alpha)
        case "focal", (gamma,):
            return Focal(gamma)
        case _:
            return WeightedCrossEntropy((1 - share) / share if form.name == WEIGHTED else 1.0)


def tables(seed: int, share: float) -> Division:
    """Standard normal clusters in 20 features, ten of which tell the classes apart; a seed has a table of its own."""
    x, y = make_classification(
        TRAINING + 2 * HELD_OUT,
        n_features=20,
        n_informative=10,
        n_redundant=0,
        n_clusters_per_class=2,
        weights=[1 - share],
        flip_y=0.0,
        random_state=seed,
    )
    parts = np.split(np.arange(len(y)), [TRAINING, TRAINING + HELD_OUT])
    return Division(*(Part(torch.from_numpy(x[rows]).float(), torch.from_numpy(y[rows]).long()) for rows in parts))


def judged(run: Run[Setting]) -> Judged:
    """Train, and judge at the threshold 0.5, or the one that gives the best F1 on validation data."""
    setting, streams = run.setting, Streams(run.seed)
    division = tables(run.seed, setting.share)
    with streams.globally("model"):
        first = (
            [nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 1)] if setting.model == "perceptron" else [nn.Linear(20, 1)]
        )
        model = nn.Sequential(*first, nn.Flatten(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=setting.lr)
    loss = loss_of(setting.form, setting.share)
    try:
        fit(model, optimizer, division.training, streams, steps=STEPS, batch_size=BATCH, loss=loss)
    except Diverged:
        return Judged(0.0, 0.0)
    part: Part = getattr(division, run.split)
    with torch.no_grad():
        logits = model(part.x)
        threshold = best_threshold(model(division.validation.x), division.validation.y)
    found = logits > (threshold if setting.arm == THRESHOLD else 0.0)
    there = part.y == 1
    return Judged(
        2 * int((found & there).sum()) / max(1, int(found.sum()) + int(there.sum())),
        (found == there).double().mean().item(),
    )


def best_threshold(logits: Tensor, y: Tensor) -> float:
    """The logit above which taking samples for positive gives the highest F1."""
    ordered, order = logits.sort(descending=True)
    right = y[order].cumsum(0)
    f1 = 2 * right / (torch.arange(1, len(y) + 1) + y.sum())
    best = int(f1.argmax())
    following = ordered[min(best + 1, len(y) - 1)]
    return ((ordered[best] + following) / 2).item()
