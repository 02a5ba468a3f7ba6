"""The claims of LOOK: features that carry over to finer classes, and small neighbourhoods that keep the modes.

Digits instead of ImageNet: a perceptron is trained on two coarse classes, odd against even or 0-4 against 5-9, and its
64 features, the projection left out, are then asked for all ten digits, by five nearest neighbours and by a linear
probe, both fitted to the training part. Batches of 256, 60 epochs. Every arm gets four learning rates, chosen by the
coarse classes alone; k = 10 stands for LOOK where one k must.
"""

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.measure import Measure, measured
from fairtrial.claims.paired import above_zero, gaps
from fairtrial.claims.training import fit
from fairtrial.contract import Diverged
from fairtrial.methods.losses.look import LOOKLoss
from fairtrial.methods.losses.sc_mil import SupConLoss
from fairtrial.tasks import digits
from fairtrial.tasks.samples import divide
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import predict

EPOCHS, BATCH, NEIGHBOURS = 60, 256, 5
TUNING_SEEDS, SEEDS = 2, 10
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
CODINGS = ("parity", "halves")
CROSS_ENTROPY, SUPERVISED = "cross entropy", "supervised contrastive"
LOCAL = {"LOOK, k = 5": 5, "LOOK, k = 10": 10, "LOOK, k = 20": 20, "LOOK, k = 40": 40}
ALL = "LOOK, all of the batch"
CHOSEN = "LOOK, k = 10"
WITH_K = {**LOCAL, ALL: BATCH - 1}
ARMS = (CROSS_ENTROPY, SUPERVISED, *WITH_K)


@dataclass(frozen=True)
class Setting:
    """How the digits are made coarse, the loss, and the learning rate."""

    coding: str
    arm: str
    lr: float


@dataclass(frozen=True)
class Features:
    """How well trained features do, all as accuracies; 0 if the run diverged.

    Attributes:
        coarse: of the coarse classes, by nearest neighbours.
        neighbours: of the ten digits, by nearest neighbours.
        probe: of the ten digits, by a linear probe.
    """

    coarse: float = 0.0
    neighbours: float = 0.0
    probe: float = 0.0


def check(measure: Measure) -> list[Finding]:
    grids = {(coding, arm): [Setting(coding, arm, lr) for lr in RATES] for coding in CODINGS for arm in ARMS}
    best = tune(measure, features, grids, seeds=TUNING_SEEDS, score=lambda found: found.coarse)
    results = evaluate(measure, features, best, seeds=SEEDS)
    found = {
        arm: [_mean(each) for each in zip(*(results[coding, arm] for coding in CODINGS), strict=True)] for arm in ARMS
    }
    return [_transfer(found), _locality(found)]


def _mean(of_codings: tuple[Features, ...]) -> Features:
    """Mean over the ways of making digits coarse, of one seed."""
    names = ("coarse", "neighbours", "probe")
    return Features(*(float(np.mean([getattr(each, name) for each in of_codings])) for name in names))


def coarse(digit: Tensor, coding: str) -> Tensor:
    """Odd against even, or 0-4 against 5-9."""
    return digit % 2 if coding == "parity" else digit // 5


def features(run: Run[Setting]) -> Features:
    """Train on the coarse classes, and judge the features by coarse and fine ones."""
    setting, streams = run.setting, Streams(run.seed)
    division = divide(digits.samples(), 0.2, "all", streams)
    training, judged = division.training, getattr(division, run.split)
    with streams.globally("model"):
        trunk = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        head = nn.Linear(64, 2 if setting.arm == CROSS_ENTROPY else 32)
    losses: dict[str, nn.Module] = {CROSS_ENTROPY: nn.CrossEntropyLoss(), SUPERVISED: SupConLoss()}
    loss = losses[setting.arm] if setting.arm in losses else LOOKLoss(WITH_K[setting.arm])
    model = nn.Sequential(trunk, head)
    try:
        fit(
            model,
            torch.optim.AdamW(model.parameters(), lr=setting.lr),
            training._replace(y=coarse(training.y, setting.coding)),
            streams,
            steps=EPOCHS * (len(training.x) // BATCH),
            batch_size=BATCH,
            loss=loss,
        )
        known, asked = (predict(trunk, part)[0].numpy() for part in (training, judged))
    except Diverged:
        return Features()
    fine, wanted = training.y.numpy(), judged.y.numpy()
    neighbours = KNeighborsClassifier(NEIGHBOURS).fit(known, fine)
    of_coarse = KNeighborsClassifier(NEIGHBOURS).fit(known, coarse(training.y, setting.coding).numpy())
    scale = max(float(known.std()), 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # its accuracy has settled long before its weights
        probe = LogisticRegression(max_iter=300).fit(known / scale, fine)
    return Features(
        of_coarse.score(asked, coarse(judged.y, setting.coding).numpy()),
        neighbours.score(asked, wanted),
        probe.score(asked / scale, wanted),
    )


def _values(found: dict[str, list[Features]], arm: str, name: str) -> list[float]:
    return [getattr(each, name) for each in found[arm]]


def _transfer(found: dict[str, list[Features]]) -> Finding:
    rivals = (CROSS_ENTROPY, SUPERVISED)
    gained = {
        (name, rival): gaps(_values(found, CHOSEN, name), _values(found, rival, name))
        for name in ("neighbours", "probe")
        for rival in rivals
    }
    better = dict(zip(gained, above_zero(*gained.values()), strict=True))
    by = {name: all(better[name, rival] for rival in rivals) for name in ("neighbours", "probe")}
    coarse_gaps = [gaps(_values(found, CHOSEN, "coarse"), _values(found, rival, "coarse")) for rival in rivals]
    as_accurate = all(float(np.mean(gap)) > -0.01 for gap in coarse_gaps)
    full = by["neighbours"] and by["probe"] and as_accurate
    says: Verdict = "reproduced" if full else "partly" if by["neighbours"] else "not reproduced"
    title = {"neighbours": "5 nearest neighbours", "probe": "linear probe"}
    return Finding(
        claim="transfer-gain",
        verdict=says,
        criterion="Features of LOOK (k = 10) are significantly more accurate on the ten digits than those of cross "
        "entropy and of supervised contrastive pre-training, by nearest neighbours and by a linear probe (paired "
        "sign-flip test, Holm over the four), with coarse accuracy not more than one point below either; partly if by "
        "nearest neighbours.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"gain over {rival}, {title[name]}", gain, "fraction")
                for (name, rival), gain in gained.items()
            ),
            *(
                measured(f"{what}, {arm}", _values(found, arm, name), "fraction")
                for name, what in (*title.items(), ("coarse", "coarse classes"))
                for arm in (CHOSEN, ALL, *rivals)
            ),
        ),
        note=_note(),
    )


def _locality(found: dict[str, list[Features]]) -> Finding:
    full = _values(found, ALL, "neighbours")
    gained = {arm: gaps(_values(found, arm, "neighbours"), full) for arm in LOCAL}
    places = np.log(list(WITH_K.values()))
    by_seed = np.array([_values(found, arm, "neighbours") for arm in WITH_K]).T
    fall = [float(-np.polyfit(places / math.log(10), each, 1)[0]) for each in by_seed]
    *better, falls = above_zero(*gained.values(), fall)
    says: Verdict = "reproduced" if any(better) and falls else "partly" if any(better) else "not reproduced"
    return Finding(
        claim="locality",
        verdict=says,
        criterion="By nearest neighbours some k below all of the batch is significantly more accurate on the ten "
        "digits than all of it, and accuracy falls significantly with the logarithm of k (paired sign-flip tests, Holm "
        "over the five); partly if only the first holds.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(measured(f"gain over all of the batch, {arm}", gain, "fraction") for arm, gain in gained.items()),
            measured("fall of accuracy as k grows tenfold", fall, "fraction"),
            *(
                measured(f"5 nearest neighbours, {arm}", _values(found, arm, "neighbours"), "fraction")
                for arm in WITH_K
            ),
        ),
        note=_note(),
    )


def _note() -> str:
    return (
        "Means over both ways of making the digits coarse. Temperature 0.1 for LOOK and supervised contrastive; "
        f"learning rates chosen by coarse validation accuracy on {TUNING_SEEDS} tuning seeds. LOOK skips an image "
        "without a neighbour of its class."
    )
