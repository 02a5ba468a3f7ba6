"""The claims of DEXML: ranking of queries with many correct labels, by decoupled softmax and by soft top-k.

Synthetic retrieval instead of the corpora: 256 labels, unit vectors of 32 numbers, some far more frequent than others.
A query is the sum of its labels' vectors, with unequal weights and noise; it has 5 to 20 labels, or one. A small dual
encoder is trained with each loss at the authors' temperature, 0.05, by AdamW along a cosine; each loss has the same
learning rates to choose among. InfoNCE is tried over all correct labels of a query, and over one that is drawn in each
step, as in the authors' code. Soft top-5 draws five, as there.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.measure import Measure, measured
from fairtrial.claims.paired import above_zero, gaps
from fairtrial.claims.training import fit
from fairtrial.contract import Diverged
from fairtrial.methods.losses.dexml import (
    DecoupledSoftmaxLoss,
    MultiLabelInfoNCELoss,
    SoftTopKLoss,
    sample_positives,
)
from fairtrial.tasks.samples import Part
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.unflattened import Unflattened
from fairtrial.trial.statistics import mean_interval

LABELS, DIM = 256, 32
QUERIES = {"training": 1000, "validation": 500, "test": 1000}
TEMPERATURE, TOP = 0.05, 5
STEPS, BATCH = 300, 64
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
TUNING_SEEDS, SEEDS = 2, 10
ALL, ONE, BCE, DECOUPLED, SOFT = LOSSES = (
    "InfoNCE over all",
    "InfoNCE over one drawn",
    "binary cross entropy",
    "decoupled softmax",
    "soft top-5",
)

Positives = Literal["many", "one"]
NOISE: dict[Positives, float] = {"many": 0.3, "one": 1.5}  # length beside a query's 1


@dataclass(frozen=True)
class Setting:
    """A loss, how many labels the queries have, and the learning rate."""

    loss: str
    positives: Positives
    lr: float


class Ranked(NamedTuple):
    """Of the five labels on top those that are correct, over as many as could be; and whether the first one is."""

    at_5: float
    at_1: float


def check(measure: Measure) -> list[Finding]:
    grids = {
        (loss, positives): [Setting(loss, positives, lr) for lr in RATES] for positives in NOISE for loss in LOSSES
    }
    chosen = tune(measure, ranked, grids, seeds=TUNING_SEEDS, score=lambda result: result.at_5)
    results = evaluate(measure, ranked, chosen, seeds=SEEDS)
    at_5 = {arm: [result.at_5 for result in found] for arm, found in results.items()}
    at_1 = {arm: [result.at_1 for result in found] for arm, found in results.items()}
    note = f"{SEEDS} seeds; learning rates tuned for P@5 on {TUNING_SEEDS} others: " + "; ".join(
        f"{loss}, {positives}: {setting.lr:g}" for (loss, positives), setting in chosen.items()
    )
    return [_many(at_5, at_1, note), _soft(at_5, note)]


def _many(
    at_5: dict[tuple[str, Positives], list[float]], at_1: dict[tuple[str, Positives], list[float]], note: str
) -> Finding:
    gains = [gaps(at_5[DECOUPLED, "many"], at_5[other, "many"]) for other in (ALL, ONE)]
    alone = gaps(at_5[DECOUPLED, "one"], at_5[ALL, "one"])
    low, high = mean_interval(alone)
    equal = low > -0.005 and high < 0.005
    says: Verdict = "not reproduced"
    if equal and all(sum(gain) > 0 for gain in gains):
        says = "reproduced" if all(above_zero(*gains)) else "partly"
    return Finding(
        claim="many-positives",
        verdict=says,
        criterion="With 5 to 20 labels a query, the P@5 of decoupled softmax is significantly above that of both forms "
        "of InfoNCE (paired sign-flip tests, Holm), and with one label the 95 % interval of the difference to InfoNCE "
        "lies within half a point; partly if it is above both, but not significantly.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"gain in P@5 over {other}, many labels", gain, "fraction")
                for other, gain in zip((ALL, ONE), gains, strict=True)
            ),
            measured(f"gain in recall@5 over {ALL}, one label", alone, "fraction", paper="0, the losses being equal"),
            *(measured(f"P@5, {loss}, many labels", at_5[loss, "many"], "fraction") for loss in LOSSES),
            *(measured(f"P@1, {loss}, many labels", at_1[loss, "many"], "fraction") for loss in LOSSES),
            *(measured(f"recall@5, {loss}, one label", at_5[loss, "one"], "fraction") for loss in LOSSES),
        ),
        note=note,
    )


def _soft(at_5: dict[tuple[str, Positives], list[float]], note: str) -> Finding:
    others = [loss for loss in LOSSES if loss != SOFT]
    gains = [gaps(at_5[SOFT, "many"], at_5[other, "many"]) for other in others]
    behind = above_zero(*([-gap for gap in gain] for gain in gains))
    says: Verdict = "reproduced" if all(above_zero(*gains)) else "not reproduced" if any(behind) else "partly"
    return Finding(
        claim="soft-top-k",
        verdict=says,
        criterion="With 5 to 20 labels a query, the P@5 of soft top-5 is significantly above that of every other loss "
        "(paired sign-flip tests, Holm); partly if significantly below none of them.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"gain in P@5 over {other}", gain, "fraction", paper="above" if other == DECOUPLED else "")
                for other, gain in zip(others, gains, strict=True)
            ),
            measured("P@5, soft top-5", at_5[SOFT, "many"], "fraction"),
        ),
        note=note,
    )


def queries(seed: int, part: str, positives: Positives) -> Part:
    """Queries (n, 32) and their labels (n, 256). The labels' vectors and frequencies are the seed's own."""
    streams = Streams(seed)
    generator = streams(f"{part} {positives}")
    count = QUERIES[part]
    frequency = torch.arange(1, LABELS + 1, dtype=torch.float64) ** -0.5
    frequency = frequency[torch.randperm(LABELS, generator=streams("frequency"))]
    keys = frequency.log() - torch.rand(count, LABELS, generator=generator, dtype=torch.float64).log().neg().log()
    rank = keys.argsort(1, descending=True).argsort(1)  # of a draw without replacement
    least, most = (5, 20) if positives == "many" else (1, 1)
    correct = rank < torch.randint(least, most + 1, (count, 1), generator=generator)
    weights = torch.rand(count, LABELS, generator=generator).log().neg().square() * correct  # strongly unequal
    noise = torch.randn(count, DIM, generator=generator) * NOISE[positives] / DIM**0.5
    return Part(F.normalize(weights @ prototypes(seed), dim=1) + noise, correct.long())


def prototypes(seed: int) -> Tensor:
    """Unit vectors (256, 32), one for each label."""
    return F.normalize(torch.randn(LABELS, DIM, generator=Streams(seed)("labels")), dim=1)


class DualEncoder(nn.Module):
    """Scores (n, labels): cosine of encoded query and encoded label, over the temperature.

    Args:
        labels: the labels' vectors.
    """

    labels: Tensor

    def __init__(self, labels: Tensor) -> None:
        super().__init__()
        self.register_buffer("labels", labels)
        self.of_query = nn.Sequential(nn.Linear(DIM, 64), nn.ReLU(), nn.Linear(64, DIM))
        self.of_label = nn.Linear(DIM, DIM)
        self.bias = nn.Parameter(torch.tensor(-1 / TEMPERATURE / 2))  # without effect in losses over a whole row

    def forward(self, x: Tensor) -> Tensor:
        query, label = F.normalize(self.of_query(x), dim=1), F.normalize(self.of_label(self.labels), dim=1)
        return query @ label.T / TEMPERATURE + self.bias


class Criterion(nn.Module):
    """The loss of scores (n, labels) and targets (n, labels).

    Args:
        loss: its name.
        generator: what correct labels are drawn from.
    """

    def __init__(self, loss: str, generator: torch.Generator) -> None:
        super().__init__()
        self.name, self.generator = loss, generator
        self.losses = nn.ModuleDict(
            {ALL: MultiLabelInfoNCELoss(), DECOUPLED: DecoupledSoftmaxLoss(), SOFT: SoftTopKLoss(TOP)}
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if self.name == BCE:
            return F.binary_cross_entropy_with_logits(input, target.to(input.dtype))
        loss: Tensor
        if self.name == ONE:  # the others stay in the denominator
            loss = self.losses[ALL](input, sample_positives(target, self.generator)[0])
        elif self.name == SOFT:
            loss = self.losses[SOFT](input, *sample_positives(target, self.generator, TOP))
        else:
            loss = self.losses[self.name](input, target)
        return loss


def ranked(run: Run[Setting]) -> Ranked:
    """Train, and rank the labels for the split's queries; nothing is right where training diverged."""
    setting, streams = run.setting, Streams(run.seed)
    with streams.globally("model"):
        model = DualEncoder(prototypes(run.seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr)
    part = queries(run.seed, "training", setting.positives)
    criterion = Unflattened(Criterion(setting.loss, streams("method")))
    try:
        fit(model, optimizer, part, streams, steps=STEPS, batch_size=BATCH, loss=criterion)
    except Diverged:
        return Ranked(0.0, 0.0)
    asked, correct = queries(run.seed, run.split, setting.positives)
    with torch.no_grad():
        top = correct.gather(1, model(asked).topk(TOP).indices)
    possible = correct.sum(1).clamp(max=TOP)
    return Ranked((top.sum(1) / possible).mean().item(), top[:, 0].double().mean().item())
