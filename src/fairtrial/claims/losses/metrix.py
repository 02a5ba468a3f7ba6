"""The claims of Metrix: retrieval above the same loss without mixing, and mixed examples near the unseen classes.

The bench's digits-retrieval instead of birds, cars and products: classes that are neither trained on nor validated
with, a small convolutional encoder, 32-dimensional embeddings, balanced batches of 8 classes and 8 samples. Contrastive
and multi-similarity losses, each plain, with embeddings mixed, and with inputs mixed. Every arm gets six tuning
settings: the plain ones six learning rates, the mixed ones three weights of mixing and two learning rates.
"""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.measure import Measure, measured
from fairtrial.claims.paired import above_zero, gaps
from fairtrial.claims.retrieval import Retrieval, divided, judged, trained
from fairtrial.contract import Diverged
from fairtrial.methods.losses.metric_learning import unit
from fairtrial.methods.losses.metrix import MetricMix, utilization
from fairtrial.tasks.samples import Division, Part
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import predict

TUNING_SEEDS, SEEDS = 2, 10
RATES = tuple(float(rate) for rate in np.geomspace(1e-3, 2e-2, 6))
FEW_RATES, WEIGHTS = RATES[2:5:2], (0.05, 0.15, 0.4)
BASES = ("contrastive", "multi_similarity")
PLAIN, EMBEDDINGS, INPUTS = "plain", "embeddings mixed", "inputs mixed"
MIXED = (EMBEDDINGS, INPUTS)
ALPHA = 2.0  # of the Beta distribution of λ
JITTER = 0.4  # standard deviations of the pixels, about the noise that the images have


@dataclass(frozen=True)
class Setting:
    """A base loss, what is mixed and with which weight, and the learning rate."""

    base: str
    mixing: str
    weight: float
    lr: float


@dataclass(frozen=True)
class Trained:
    """What came of a run.

    Attributes:
        retrieval: of classes that were not trained on.
        to_originals: mean squared distance of the judged classes' embeddings to the nearest training embedding.
        to_mixed: the same with mixed embeddings added.
        to_jittered: the same with as many embeddings of training images under further noise added.
    """

    retrieval: Retrieval = field(default_factory=Retrieval)
    to_originals: float = 0.0
    to_mixed: float = 0.0
    to_jittered: float = 0.0


def check(measure: Measure) -> list[Finding]:
    grids = {(base, mixing): _grid(base, mixing) for base in BASES for mixing in (PLAIN, *MIXED)}
    best = tune(measure, outcome, grids, seeds=TUNING_SEEDS, score=lambda found: found.retrieval.precision)
    results = evaluate(measure, outcome, best, seeds=SEEDS)
    return [_gain(results, best), _utilisation(results)]


def _grid(base: str, mixing: str) -> list[Setting]:
    if mixing == PLAIN:
        return [Setting(base, mixing, 0.0, lr) for lr in RATES]
    return [Setting(base, mixing, weight, lr) for weight in WEIGHTS for lr in FEW_RATES]


def outcome(run: Run[Setting]) -> Trained:
    """Train, retrieve classes that were not trained on, and see how far they lie from examples."""
    setting, streams = run.setting, Streams(run.seed)
    division = divided(streams)
    mode = "input" if setting.mixing == INPUTS else "embedding"
    loss = MetricMix(setting.base, mode, weight=setting.weight, generator=streams("method"))
    try:
        encoder = trained(partial(_of_batch, loss), division, streams, lr=setting.lr)
        part = getattr(division, run.split)
        return Trained(judged(encoder, part), *_distances(encoder, division, part, streams))
    except Diverged:
        return Trained()


def _of_batch(loss: MetricMix, encoder: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    embeddings: Tensor = encoder(x)
    if loss.mode == "input" and loss.weight:
        mixed, mixture = loss.mix_inputs(x, embeddings, y)
        value: Tensor = loss(embeddings, y, encoder(mixed), mixture)
    else:
        value = loss(embeddings, y)
    return value


@torch.no_grad()
def _distances(encoder: nn.Module, division: Division, part: Part, streams: Streams) -> tuple[float, float, float]:
    """From the judged classes to the originals alone, with mixed and with jittered examples added, one of each pair."""
    queries, originals = (unit(predict(encoder, each)[0]) for each in (part, division.training))
    x, y = division.training
    other = torch.randperm(len(x), generator=streams("partners"))
    kept = (y != y[other]).nonzero()[:, 0]
    lam = torch.from_numpy(np.random.default_rng(streams.seed).beta(ALPHA, ALPHA, (len(kept), 1))).float()
    mixed = unit(torch.lerp(originals[other[kept]], originals[kept], lam))
    moved = x[kept] + JITTER * torch.randn(x[kept].shape, generator=streams("jitter"))
    jittered = unit(predict(encoder, Part(moved, y[kept]))[0])
    return (
        float(utilization(queries, originals)),
        float(utilization(queries, torch.cat([originals, mixed]))),
        float(utilization(queries, torch.cat([originals, jittered]))),
    )


def _gain(results: dict[tuple[str, str], list[Trained]], best: dict[tuple[str, str], Setting]) -> Finding:
    arms = {arm: [found.retrieval for found in runs] for arm, runs in results.items()}
    gained = {
        (base, mixing): gaps(*([found.precision for found in arms[base, each]] for each in (mixing, PLAIN)))
        for base in BASES
        for mixing in MIXED
    }
    better = dict(zip(gained, above_zero(*gained.values()), strict=True))
    of_bases = [any(better[base, mixing] for mixing in MIXED) for base in BASES]
    says: Verdict = "reproduced" if all(of_bases) else "partly" if any(of_bases) else "not reproduced"
    chosen = "; ".join(f"{_name(arm)}: weight {each.weight:g}, rate {each.lr:.2g}" for arm, each in best.items())
    return Finding(
        claim="recall-gain",
        verdict=says,
        criterion="Mixing embeddings or inputs makes MAP@R on unseen classes significantly higher for the contrastive "
        "and for the multi-similarity loss (paired sign-flip test, Holm over the four); partly if for one of them.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(measured(f"gain in MAP@R, {_name(arm)}", gain, "fraction") for arm, gain in gained.items()),
            *(
                measured(f"MAP@R, {_name(arm)}", [r.precision for r in found], "fraction")
                for arm, found in arms.items()
            ),
            *(
                measured(
                    f"Recall@1, {_name(arm)}",
                    [each.recall for each in found],
                    "fraction",
                    paper={PLAIN: "0.678 on CUB-200", INPUTS: "0.714 on CUB-200"}.get(arm[1], "")
                    if arm[0] == "multi_similarity"
                    else "",
                )
                for arm, found in arms.items()
            ),
        ),
        note=f"Equal steps for all. Chosen on {TUNING_SEEDS} tuning seeds: {chosen}.",
    )


def _name(arm: tuple[str, str]) -> str:
    return f"{arm[0].replace('_', '-')}, {arm[1]}"


def _utilisation(results: dict[tuple[str, str], list[Trained]]) -> Finding:
    found = results["multi_similarity", EMBEDDINGS]
    closer = gaps([each.to_jittered for each in found], [each.to_mixed for each in found])
    (better,) = above_zero(closer)
    return Finding(
        claim="utilisation",
        verdict="reproduced" if better else "partly" if sum(closer) > 0 else "not reproduced",
        criterion="With mixed examples added to the training examples, embeddings of unseen classes lie significantly "
        "closer to the nearest of them (mean squared distance) than with equally many training images under further "
        "noise added (paired sign-flip test); partly if closer on average.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            measured("squared distance, how much less with mixed than with jittered examples", closer, "unit sphere"),
            measured("squared distance, training examples", [each.to_originals for each in found], "unit sphere"),
            measured("squared distance, with mixed examples", [each.to_mixed for each in found], "unit sphere"),
            measured("squared distance, with jittered examples", [each.to_jittered for each in found], "unit sphere"),
        ),
        note=f"Encoders trained with multi-similarity and mixed embeddings. One mixture of a training embedding with "
        f"one of another class, λ from Beta({ALPHA:g}, {ALPHA:g}), and one jittered copy for each training image; "
        f"jitter is white noise of {JITTER:g} standard deviations of the pixels, about what the images have already.",
    )
