"""The claims of the EnsLoss paper: how often a random loss wins against a fixed one where there is much to overfit.

Ten data sets instead of the paper's fourteen tables: five made ones with few rows and many columns, and five pairs of
digits, with some of the training labels flipped; a perceptron with three hidden layers of 128, trained by SGD with
momentum 0.9 and weight decay 5e-4 along a cosine. Every loss gets four tuning runs of the learning rate in each, judged
on validation data with right labels. As in the authors' trainer, the exponential loss has its gradient's norm clipped
at 10.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits, make_classification
from torch import nn

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.measure import Measure, measured, single
from fairtrial.claims.paired import above_zero, gaps
from fairtrial.claims.training import fit
from fairtrial.contract import Diverged
from fairtrial.methods.losses.ensloss import EnsLoss, EnsLossScheduler, MarginLoss
from fairtrial.tasks.samples import Part, Samples, divide, hold_out
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import predict

SEEDS, TUNING_SEEDS, STEPS, BATCH = 10, 1, 200, 64
RATES = tuple(float(rate) for rate in np.geomspace(0.003, 0.3, 4))
FIXED = ("logistic", "hinge", "exponential")
DRAWN, DRAWN_LAMBDA = "EnsLoss", "EnsLoss with random λ"
LOSSES = (*FIXED, DRAWN, DRAWN_LAMBDA)


@dataclass(frozen=True)
class Data:
    """A binary data set: a made one with so many columns, or a digit to be told from another.

    Attributes:
        columns: of a made set, 20 of them informative; 0 for digits.
        pair: of digits.
        rows: to train with.
        flipped: share of wrong training labels.
    """

    columns: int
    pair: tuple[int, int]
    rows: int
    flipped: float

    def __str__(self) -> str:
        what = f"{self.columns} columns" if self.columns else f"digits {self.pair[0]} and {self.pair[1]}"
        return f"{what}, {self.rows} rows, {self.flipped:.0%} flipped"


SETS = (
    Data(100, (0, 0), 300, 0.10),
    Data(200, (0, 0), 300, 0.15),
    Data(300, (0, 0), 300, 0.20),
    Data(200, (0, 0), 200, 0.10),
    Data(500, (0, 0), 300, 0.10),
    Data(0, (3, 5), 150, 0.20),
    Data(0, (4, 9), 150, 0.20),
    Data(0, (1, 8), 150, 0.20),
    Data(0, (3, 8), 150, 0.15),
    Data(0, (7, 9), 150, 0.15),
)


def check(measure: Measure) -> list[Finding]:
    grids = {(data, loss): [Setting(data, loss, lr) for lr in RATES] for data in SETS for loss in LOSSES}
    chosen = tune(measure, accuracy_of, grids, seeds=TUNING_SEEDS, score=float)
    found = evaluate(measure, accuracy_of, chosen, seeds=SEEDS)
    return [_wins(found)]


@dataclass(frozen=True)
class Setting:
    """A data set, a loss and the learning rate."""

    data: Data
    loss: str
    lr: float


def _wins(found: dict[tuple[Data, str], list[float]]) -> Finding:
    overall = {loss: [fmean(found[data, loss][seed] for data in SETS) for seed in range(SEEDS)] for loss in LOSSES}
    best = max(FIXED, key=lambda loss: fmean(overall[loss]))
    wins, losses = _counts(found, DRAWN, "logistic")
    gain, over_best = (gaps(overall[DRAWN], overall[loss]) for loss in ("logistic", best))
    (better,) = above_zero(gain)
    (worse,), (below_best,) = (above_zero([-gap for gap in found]) for found in (gain, over_best))
    says: Verdict = (
        "reproduced"
        if wins > losses and better and not below_best
        else "partly"
        if wins > losses and not worse
        else "not reproduced"
    )
    paper = {"logistic": "11, 0 of 14", "hinge": "13, 1 of 14"}
    counts = {(drawn, loss): _counts(found, drawn, loss) for drawn in (DRAWN, DRAWN_LAMBDA) for loss in FIXED}
    return Finding(
        claim="tabular-wins",
        verdict=says,
        criterion="Its mean accuracy is above that of logistic loss on more of the ten data sets than below, on "
        "average over the sets significantly so (paired sign-flip test), and there not significantly below the best "
        "fixed loss; partly if only the first holds and it is not significantly below logistic loss.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                single(f"{drawn} against {loss}, {what}", count, f"of {len(SETS)}", paper=paper.get(loss, ""))
                for (drawn, loss), both in counts.items()
                for what, count in zip(("wins", "losses"), both, strict=True)
            ),
            measured("gain over logistic, mean over the sets", gain, "fraction"),
            measured(f"gain over {best}, the best fixed loss, mean over the sets", over_best, "fraction"),
            *(measured(f"accuracy, mean over the sets, {loss}", overall[loss], "fraction") for loss in LOSSES),
            *(
                measured(f"accuracy, {data}, {loss}", found[data, loss], "fraction")
                for data in SETS
                for loss in (*FIXED, DRAWN)
            ),
        ),
        note="Test labels are right, and accuracy is that after the last step. λ is 0, as in the released experiments; "
        "random λ is drawn for every epoch. The paper counts significant differences only; its networks of one layer, "
        "where it gains less, are not measured.",
    )


def _counts(found: dict[tuple[Data, str], list[float]], loss: str, other: str) -> tuple[int, int]:
    """On how many sets a loss is more accurate than another, and on how many less."""
    means = [fmean(gaps(found[data, loss], found[data, other])) for data in SETS]
    return sum(mean > 0 for mean in means), sum(mean < 0 for mean in means)


@cache
def samples(data: Data) -> Samples:
    """The set with right labels, the test part held out."""
    if data.columns:
        x, y = make_classification(
            3000,
            data.columns,
            n_informative=20,
            n_redundant=0,
            flip_y=0.0,
            class_sep=1.5,
            random_state=data.columns + data.rows,
        )
        return hold_out(torch.from_numpy(x).float(), torch.from_numpy(y).long(), 0.6)
    x, y = load_digits(return_X_y=True)
    kept = np.isin(y, data.pair)
    return hold_out(torch.from_numpy(x[kept]).float(), torch.from_numpy(y[kept] == data.pair[1]).long(), 0.4)


def accuracy_of(run: Run[Setting]) -> float:
    """Train on some rows with flipped labels, and count right decisions on others; 0 if it diverged."""
    setting, streams = run.setting, Streams(run.seed)
    data = setting.data
    division = divide(samples(data), 0.25, "each" if data.columns else "all", streams)
    training = few_and_flipped(division.training, data, streams)
    inputs = training.x.shape[1]
    with streams.globally("model"):
        hidden = [(nn.Linear(width, 128), nn.ReLU()) for width in (inputs, 128, 128)]
        model = nn.Sequential(*(layer for pair in hidden for layer in pair), nn.Linear(128, 1), nn.Flatten(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.lr, momentum=0.9, weight_decay=5e-4)

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)

    if setting.loss == "exponential":
        optimizer.register_step_pre_hook(clip)
    loss, after = criterion(setting.loss, len(training.x) // BATCH, streams)
    try:
        fit(model, optimizer, training, streams, steps=STEPS, batch_size=BATCH, loss=loss, after=after)
        logits, labels = predict(model, getattr(division, run.split))
    except Diverged:
        return 0.0
    return float(((logits > 0).long() == labels).double().mean())


def few_and_flipped(part: Part, data: Data, streams: Streams) -> Part:
    """Some rows of the part, drawn at random, some of them with the other label."""
    rows = torch.randperm(len(part.y), generator=streams("rows"))[: data.rows]
    flipped = torch.rand(len(rows), generator=streams("flips")) < data.flipped
    return Part(part.x[rows], torch.where(flipped, 1 - part.y[rows], part.y[rows]))


def criterion(name: str, steps_per_epoch: int, streams: Streams) -> tuple[nn.Module, Callable[[int], None]]:
    """The loss, and what is to be done after every step."""
    if name in FIXED:
        return MarginLoss(name), lambda step: None
    loss = EnsLoss(generator=streams("method"))
    if name == DRAWN:
        return loss, lambda step: None
    scheduler = EnsLossScheduler(loss, period=1)
    scheduler.step()

    def after(step: int) -> None:
        if step % steps_per_epoch == 0:
            scheduler.step()

    return loss, after
