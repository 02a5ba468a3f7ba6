"""The claims of Data Diet: pruning by EL2N, wrong labels, scores from another network, GraNd at initialisation.

MNIST-1D instead of CIFAR, with a perceptron of two hidden layers and the bench's convolutional network, trained as in
the authors' CIFAR runs but for fewer steps. Every seed takes its own scores, as means over ten initialisations that it
does not train from; EL2N is taken after a tenth of the steps, at the learning rate that is best with all the data.
Every arm then has its own learning rate tuned over the same four values, and trains for as many steps as every other
of its network.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

from fairtrial.catalog import Finding
from fairtrial.claims.curves import curves
from fairtrial.claims.measure import Measure, measured
from fairtrial.claims.paired import above_zero, gaps, surely_above
from fairtrial.contract import Diverged, Split
from fairtrial.methods.data.data_diet import PrunedSampler, average_scores, el2n_scores, grand_scores
from fairtrial.tasks.measures import accuracy
from fairtrial.tasks.mnist1d import POINTS, convolutional
from fairtrial.tasks.samples import Division, Part
from fairtrial.tasks.standard import NoTransform
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import predict
from fairtrial.tasks.training import Parts, train

CLASSES = 10
BATCH = 128
MLP, CNN = "perceptron", "CNN"
STEPS = {MLP: 1500, CNN: 600}
MEMBERS, EARLY = 10, 0.1
WRONG = 0.1  # of the labels, redrawn
RATES = (0.01, 0.03, 0.1, 0.3)
TUNING_SEEDS, SEEDS = (1000, 1001), tuple(range(12))
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


@dataclass(frozen=True)
class Training:
    """One training run: an arm with its learning rate and the scores of its examples, and what to measure on."""

    arm: Arm
    lr: float
    scores: NDArray[np.float32]
    seed: int
    split: Split


Accuracies = dict[Arm, list[float]]
Scores = dict[tuple[Ranking, int], NDArray[np.float32]]


def check(measure: Measure) -> list[Finding]:
    seeds = (*TUNING_SEEDS, *SEEDS)
    by_chance = [Scoring(arm.ranking, 0.0, seed) for arm in WHOLE for seed in seeds]
    scores = {(scoring.ranking, scoring.seed): example_scores(scoring) for scoring in by_chance}
    rates = _tuned(measure, WHOLE, scores)
    rate_of = {(arm.network, arm.ranking.wrong_labels): rates[arm] for arm in WHOLE}
    rankings = dict.fromkeys(arm.ranking for arm in PRUNED)
    scorings = [
        Scoring(ranking, rate_of[ranking.network, ranking.wrong_labels], seed) for ranking in rankings for seed in seeds
    ]
    found = measure.map(example_scores, scorings)
    scores |= {(scoring.ranking, scoring.seed): taken for scoring, taken in zip(scorings, found, strict=True)}
    rates |= _tuned(measure, PRUNED, scores)
    runs = [Training(arm, rates[arm], scores[arm.ranking, seed], seed, "test") for arm in rates for seed in SEEDS]
    results = iter(measure.map(accuracy_of, runs))
    right = {arm: [next(results) for _ in SEEDS] for arm in rates}
    return [_half_of_the_data(right), _wrong_labels(right, scores), _transfer(right), _before_training(right)]


def _tuned(measure: Measure, arms: Iterable[Arm], scores: Scores) -> dict[Arm, float]:
    """The learning rate of each arm that is best on validation data, on average over the tuning seeds."""
    tried = [(arm, lr) for arm in arms for lr in RATES]
    runs = [
        Training(arm, lr, scores[arm.ranking, seed], seed, "validation") for arm, lr in tried for seed in TUNING_SEEDS
    ]
    means = np.reshape(measure.map(accuracy_of, runs), (len(tried), len(TUNING_SEEDS))).mean(1)
    best: dict[Arm, float] = {}
    for place in np.argsort(-means, kind="stable"):
        best.setdefault(*tried[place])
    return {arm: best[arm] for arm in arms}


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
        seeds=SEEDS,
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
        float(
            roc_auc_score(_division(seed, True).training.y != _division(seed).training.y, scores[HARDEST.ranking, seed])
        )
        for seed in SEEDS
    ]
    over_hardest = gaps(right[WINDOW], right[HARDEST])
    found, (better,) = surely_above(areas, 0.8), above_zero(over_hardest)
    return Finding(
        claim="noisy-labels",
        verdict="reproduced" if found and better else "partly" if found else "not reproduced",
        criterion="The area under the ROC curve of EL2N for changed labels exceeds 0.8 (95 % interval of the mean) and "
        "half of the data without the top 10 % gives significantly higher test accuracy than the hardest half (paired "
        "sign-flip test); partly if only the first holds.",
        seeds=SEEDS,
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
        seeds=SEEDS,
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
        seeds=SEEDS,
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
    division = _division(scoring.seed, ranking.wrong_labels)
    n = len(division.training.x)
    if ranking.score == CHANCE:
        found = torch.rand(n, generator=streams("chance"))
    elif ranking.score == NORM:
        found = division.training.x.norm(dim=1)
    else:
        score, steps = (el2n_scores, EARLY) if ranking.score == EL2N else (grand_scores, 0.0)
        members = [
            _trained(
                ranking.network,
                division.training,
                PrunedSampler(torch.zeros(n), 1.0, generator=own("order")),
                scoring.lr,
                own,
                round(steps * STEPS[ranking.network]),
            )
            for own in (streams.inside(f"scoring {member}") for member in range(MEMBERS))
        ]
        found = average_scores([score(model, [tuple(division.training)]) for model in members])
    scores: NDArray[np.float32] = found.numpy()
    return scores


def accuracy_of(run: Training) -> float:
    """Train on what the arm keeps, and give the accuracy on held-out data; 0 if training diverges."""
    arm, streams = run.arm, Streams(run.seed)
    division = _division(run.seed, arm.ranking.wrong_labels)
    keep = len(run.scores) - round(arm.pruned * len(run.scores))
    sampler = PrunedSampler(
        torch.from_numpy(run.scores),
        keep,
        "window" if arm.window else "hardest",
        len(run.scores) - keep - len(run.scores) // 10 if arm.window else 0,
        generator=streams("order"),
    )
    try:
        model = _trained(arm.network, division.training, sampler, run.lr, streams, STEPS[arm.network])
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


def _trained(network: str, part: Part, sampler: PrunedSampler, lr: float, streams: Streams, steps: int) -> nn.Module:
    """A network after the first `steps` steps of its training."""
    with streams.globally("model"):
        model = _perceptron() if network == MLP else convolutional()
    optimizer = SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    milestones = [round(fraction * STEPS[network]) for fraction in (0.3, 0.6, 0.8)]
    parts = Parts(
        model=model,
        loss=nn.CrossEntropyLoss(),
        optimizer=optimizer,
        schedule=MultiStepLR(optimizer, milestones, 0.2),
        batch=NoTransform(),
        sampler=sampler,
    )
    train(parts, *part, steps=steps, batch_size=BATCH, generator=streams("batch"))
    return model


def _perceptron() -> nn.Module:
    """40-100-100-10."""
    return nn.Sequential(nn.Linear(POINTS, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, CLASSES))
