"""The claims of Data Diet: pruning by EL2N, wrong labels, scores from another network, GraNd at initialisation.

MNIST-1D instead of CIFAR, with a perceptron of two hidden layers and the bench's convolutional network, trained as in
the authors' CIFAR runs but for fewer steps. Every seed takes its own scores, as means over ten initialisations that it
does not train from; EL2N is taken after a tenth of the steps, at the learning rate that is best with all the data.
Every arm then has its own learning rate tuned over the same four values with three seeds, and trains for as many steps
as every other of its network.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

from fairtrial.catalog import Finding
from fairtrial.claims.arms import FIRST_TUNING_SEED, Run, evaluate, tune
from fairtrial.claims.curves import curves
from fairtrial.claims.measure import Measure, measured
from fairtrial.claims.paired import above_zero, gaps, surely_above
from fairtrial.claims.training import fit
from fairtrial.contract import Diverged
from fairtrial.methods.data.data_diet import average_scores, el2n_scores, grand_scores, prune_indices
from fairtrial.tasks.measures import accuracy
from fairtrial.tasks.mnist1d import POINTS, convolutional
from fairtrial.tasks.samples import Division, Part
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import predict

CLASSES = 10
BATCH = 128
MLP, CNN = "perceptron", "CNN"
STEPS = {MLP: 1000, CNN: 600}
MEMBERS, EARLY = 10, 0.1
WRONG = 0.1  # of the labels, redrawn
RATES = (0.1, 0.2, 0.4, 0.8)
TUNING_SEEDS, SEEDS = 3, 12
CLOSE = 0.01  # a point of accuracy

EL2N, GRAND, NORM, CHANCE = "EL2N", "GraNd before training", "norm of the input", "chance"


@dataclass(frozen=True)
class Ranking:
    """What examples are ranked by: a score, the network that gives it, and whether some labels are wrong."""

    score: str
    network: str = MLP
    wrong_labels: bool = False


@dataclass(frozen=True)
class Arm:
    """A network and what it is trained on: part is pruned, at the low end, or a tenth at the top and the rest there."""

    ranking: Ranking
    pruned: float = 0.0
    network: str = MLP
    window: bool = False


BY_SCORE = {
    (score, pruned): Arm(Ranking(score), pruned) for pruned in (0.3, 0.5) for score in (EL2N, CHANCE, GRAND, NORM)
}
ALL = Arm(Ranking(CHANCE))
WRONG_ALL = Arm(Ranking(CHANCE, wrong_labels=True))
HARDEST = Arm(Ranking(EL2N, wrong_labels=True), 0.5)
WINDOW = Arm(Ranking(EL2N, wrong_labels=True), 0.5, window=True)
CNN_ALL = Arm(Ranking(CHANCE), network=CNN)
CNN_BY_CHANCE = Arm(Ranking(CHANCE), 0.3, CNN)
CNN_BY_MLP = Arm(Ranking(EL2N, MLP), 0.3, CNN)
CNN_BY_CNN = Arm(Ranking(EL2N, CNN), 0.3, CNN)
WHOLE = ALL, WRONG_ALL, CNN_ALL
PRUNED = *BY_SCORE.values(), HARDEST, WINDOW, CNN_BY_CHANCE, CNN_BY_MLP, CNN_BY_CNN


@dataclass(frozen=True)
class Scoring:
    """A ranking of one seed's training examples, and the learning rate before it is taken."""

    ranking: Ranking
    lr: float
    seed: int


Scores = Mapping[int, NDArray[np.float32]]  # of the training examples, for each seed


@dataclass(frozen=True)
class Setting:
    """An arm with its learning rate, and the scores that its examples are ranked by."""

    arm: Arm
    lr: float
    scores: Scores = field(repr=False)


Accuracies = Mapping[Arm, list[float]]


def check(measure: Measure) -> list[Finding]:
    scores = _scores(measure, [arm.ranking for arm in WHOLE], {})
    whole = tune(measure, accuracy_of, _grids(WHOLE, scores), seeds=TUNING_SEEDS, score=float)
    rates = {(arm.network, arm.ranking.wrong_labels): setting.lr for arm, setting in whole.items()}
    scores |= _scores(measure, [arm.ranking for arm in PRUNED], rates)
    pruned = tune(measure, accuracy_of, _grids(PRUNED, scores), seeds=TUNING_SEEDS, score=float)
    right = evaluate(measure, accuracy_of, {**whole, **pruned}, seeds=SEEDS)
    return [
        _half_of_the_data(right),
        _wrong_labels(right, scores[HARDEST.ranking]),
        _transfer(right),
        _before_training(right),
    ]


def _scores(
    measure: Measure, rankings: Iterable[Ranking], rates: Mapping[tuple[str, bool], float]
) -> dict[Ranking, Scores]:
    """The scores of every seed's examples; `rates` are those of the networks, without and with wrong labels."""
    seeds = (*range(SEEDS), *range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + TUNING_SEEDS))
    distinct = list(dict.fromkeys(rankings))
    scorings = [
        Scoring(ranking, rates.get((ranking.network, ranking.wrong_labels), 0.0), seed)
        for ranking in distinct
        for seed in seeds
    ]
    found = iter(measure.map(example_scores, scorings))
    return {ranking: {seed: next(found) for seed in seeds} for ranking in distinct}


def _grids(arms: Iterable[Arm], scores: Mapping[Ranking, Scores]) -> dict[Arm, list[Setting]]:
    return {arm: [Setting(arm, lr, scores[arm.ranking]) for lr in RATES] for arm in arms}


def _half_of_the_data(right: Accuracies) -> Finding:
    over_all = gaps(right[BY_SCORE[EL2N, 0.5]], right[ALL])
    over_chance = {
        pruned: gaps(right[BY_SCORE[EL2N, pruned]], right[BY_SCORE[CHANCE, pruned]]) for pruned in (0.5, 0.3)
    }
    better = dict(zip(over_chance, above_zero(*over_chance.values()), strict=True))
    as_good = surely_above(over_all, -CLOSE)
    return Finding(
        claim="half-of-the-data",
        verdict="reproduced" if as_good and better[0.5] else "partly" if better[0.3] else "not reproduced",
        criterion="With half pruned by EL2N the test accuracy is less than a point below that on all the data (95 % "
        "interval of the mean paired difference) and significantly above that with half pruned at random; partly if it "
        "is significantly above random at 30 % pruned (paired sign-flip test, Holm over 50 % and 30 %).",
        seeds=tuple(range(SEEDS)),
        measurements=(
            measured("test accuracy, all the data", right[ALL], "fraction"),
            *(
                measured(
                    f"test accuracy, {100 * pruned:.0f} % pruned by {score}", right[BY_SCORE[score, pruned]], "fraction"
                )
                for pruned in (0.3, 0.5)
                for score in (EL2N, CHANCE)
            ),
            measured(
                "50 % pruned by EL2N above all the data", over_all, "fraction", paper="slightly above 0 on CIFAR-10"
            ),
            *(
                measured(f"EL2N above chance, {100 * pruned:.0f} % pruned", over, "fraction")
                for pruned, over in over_chance.items()
            ),
        ),
    )


def _wrong_labels(right: Accuracies, scores: Scores) -> Finding:
    areas = [
        float(roc_auc_score(_division(seed, True).training.y != _division(seed).training.y, scores[seed]))
        for seed in range(SEEDS)
    ]
    over_hardest = gaps(right[WINDOW], right[HARDEST])
    found, (better,) = surely_above(areas, 0.8), above_zero(over_hardest)
    return Finding(
        claim="noisy-labels",
        verdict="reproduced" if found and better else "partly" if found else "not reproduced",
        criterion="The area under the ROC curve of EL2N for changed labels exceeds 0.8 (95 % interval of the mean) and "
        "half of the data without the top 10 % gives significantly higher test accuracy than the hardest half (paired "
        "sign-flip test); partly if only the first holds.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            measured("area under the ROC curve, EL2N for changed labels", areas, "fraction"),
            measured("test accuracy, all the data", right[WRONG_ALL], "fraction"),
            measured("test accuracy, hardest half", right[HARDEST], "fraction"),
            measured("test accuracy, half without the top 10 %", right[WINDOW], "fraction"),
            measured("half without the top 10 % above hardest half", over_hardest, "fraction"),
        ),
        note="A tenth of the training labels redrawn among all classes, so that about nine in ten of these change; "
        "validation and test labels as they are.",
    )


def _transfer(right: Accuracies) -> Finding:
    over_chance = gaps(right[CNN_BY_MLP], right[CNN_BY_CHANCE])
    over_own = gaps(right[CNN_BY_MLP], right[CNN_BY_CNN])
    (better,) = above_zero(over_chance)
    return Finding(
        claim="scores-transfer",
        verdict="reproduced" if better and surely_above(over_own, -CLOSE) else "partly" if better else "not reproduced",
        criterion="With 30 % pruned by the perceptron's EL2N the CNN's test accuracy is significantly above that with "
        "30 % pruned at random (paired sign-flip test) and less than a point below that with its own EL2N (95 % "
        "interval of the mean paired difference); partly if only the first holds.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            measured("test accuracy of the CNN, all the data", right[CNN_ALL], "fraction"),
            measured("test accuracy of the CNN, 30 % pruned by chance", right[CNN_BY_CHANCE], "fraction"),
            measured("test accuracy of the CNN, 30 % pruned by the perceptron's EL2N", right[CNN_BY_MLP], "fraction"),
            measured("test accuracy of the CNN, 30 % pruned by its own EL2N", right[CNN_BY_CNN], "fraction"),
            measured("the perceptron's EL2N above chance", over_chance, "fraction"),
            measured("the perceptron's EL2N above the CNN's own", over_own, "fraction"),
        ),
    )


def _before_training(right: Accuracies) -> Finding:
    over_chance = {
        pruned: gaps(right[BY_SCORE[GRAND, pruned]], right[BY_SCORE[CHANCE, pruned]]) for pruned in (0.3, 0.5)
    }
    better = above_zero(*over_chance.values())
    return Finding(
        claim="grand-at-initialisation",
        verdict="reproduced" if all(better) else "partly" if any(better) else "not reproduced",
        criterion="Pruned by GraNd before training, the test accuracy is significantly above that with as much pruned "
        "at random, at 30 % and at 50 % (paired sign-flip test, Holm); partly at one of them.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(
                    f"test accuracy, {100 * pruned:.0f} % pruned by {score}", right[BY_SCORE[score, pruned]], "fraction"
                )
                for pruned in (0.3, 0.5)
                for score in (GRAND, CHANCE, NORM)
            ),
            *(
                measured(f"GraNd above chance, {100 * pruned:.0f} % pruned", over, "fraction")
                for pruned, over in over_chance.items()
            ),
        ),
        note="A replication (arXiv:2303.14753) finds these scores no better than chance and close to the norm of the "
        "input, which is here for comparison and no part of the criterion.",
    )


def example_scores(scoring: Scoring) -> NDArray[np.float32]:
    """The scores of one seed's training examples."""
    ranking, streams = scoring.ranking, Streams(scoring.seed)
    part = _division(scoring.seed, ranking.wrong_labels).training
    if ranking.score == CHANCE:
        found = torch.rand(len(part.x), generator=streams("chance"))
    elif ranking.score == NORM:
        found = part.x.norm(dim=1)
    else:
        score, fraction = (el2n_scores, EARLY) if ranking.score == EL2N else (grand_scores, 0.0)
        members = (streams.inside(f"scoring {member}") for member in range(MEMBERS))
        models = (_trained(ranking.network, part, scoring.lr, own, fraction) for own in members)
        found = average_scores([score(model, [tuple(part)]) for model in models])
    scores: NDArray[np.float32] = found.numpy()
    return scores


def accuracy_of(run: Run[Setting]) -> float:
    """Train on what the arm keeps, and give the accuracy on held-out data; 0 if training diverges."""
    arm, scores = run.setting.arm, torch.from_numpy(run.setting.scores[run.seed])
    division = _division(run.seed, arm.ranking.wrong_labels)
    keep = len(scores) - round(arm.pruned * len(scores))
    if arm.window:
        kept = prune_indices(scores, keep, "window", len(scores) - keep - len(scores) // 10)
    else:
        kept = prune_indices(scores, keep)
    part = Part(division.training.x[kept], division.training.y[kept])
    try:
        model = _trained(arm.network, part, run.setting.lr, Streams(run.seed))
        return accuracy(*predict(model, getattr(division, run.split)))
    except Diverged:
        return 0.0


def _division(seed: int, wrong_labels: bool = False) -> Division:
    """A seed's data; with wrong labels, a tenth of those to train on is redrawn among all classes."""
    division = curves(seed)
    if not wrong_labels:
        return division
    generator = Streams(seed)("wrong labels")
    x, y = division.training
    redrawn = torch.randperm(len(y), generator=generator)[: round(WRONG * len(y))]
    labels = torch.randint(CLASSES, (len(redrawn),), generator=generator)
    return division._replace(training=Part(x, y.index_copy(0, redrawn, labels)))


def _trained(network: str, part: Part, lr: float, streams: Streams, fraction: float = 1.0) -> nn.Module:
    """A network after a fraction of its training."""
    with streams.globally("model"):
        model = _perceptron() if network == MLP else convolutional()
    optimizer = SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    milestones = [round(passed * STEPS[network]) for passed in (0.3, 0.6, 0.8)]
    schedule = MultiStepLR(optimizer, milestones, 0.2)
    steps = round(fraction * STEPS[network])
    fit(model, optimizer, part, streams, steps=steps, batch_size=BATCH, schedule=schedule)
    return model


def _perceptron() -> nn.Module:
    """40-100-100-10."""
    return nn.Sequential(nn.Linear(POINTS, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, CLASSES))
