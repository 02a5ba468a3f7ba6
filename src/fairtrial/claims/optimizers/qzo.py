"""The claims of the QZO paper: the scales alone bring lost accuracy back, and clipping keeps large rates usable.

A perceptron 64-64-10 on digits instead of language models: trained in float32, then rounded to 2-bit codes in groups of
32, which costs a good part of its accuracy; at 3 and 4 bits hardly anything is lost. What follows sees 500 labelled
training images, all of them in every step, as MeZO's fine-tuning sees few samples.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.catalog import Finding, Measurement, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.measure import Measure, measured, single
from fairtrial.claims.paired import above_zero, gaps, surely_above, surely_below
from fairtrial.claims.training import fit
from fairtrial.methods.optimizers.mezo import MeZO, ZerothOrder
from fairtrial.methods.optimizers.qzo import QZO, quantize_linear_, scale_parameters
from fairtrial.tasks.digits import samples
from fairtrial.tasks.measures import accuracy
from fairtrial.tasks.samples import Division, Part, divide
from fairtrial.tasks.streams import Streams

BITS, GROUP, LABELLED, PRETRAINING_STEPS = 2, 32, 500, 540
QUANTIZED, FIRST_ORDER, WEIGHTS = "QZO, 2 bits", "Adam on the scales, 2 bits", "MeZO, float32"
RATES = {
    QUANTIZED: (1e-3, 3e-3, 1e-2, 3e-2),
    FIRST_ORDER: (3e-4, 1e-3, 3e-3, 1e-2),
    WEIGHTS: (1e-4, 3e-4, 1e-3, 3e-3),
}
STEPS, TUNING_SEEDS, SEEDS = 1500, 2, 8
CLIPS = (1.0, 10.0, 100.0)
CLIPPED_RATES, CLIPPED_STEPS = (0.05, 0.1, 0.2, 0.4, 0.8), 300


def check(measure: Measure) -> list[Finding]:
    return [_recovery(measure), _clipping(measure)]


@dataclass(frozen=True)
class Setting:
    """An arm with its learning rate."""

    arm: str
    lr: float


@dataclass(frozen=True)
class Recovery:
    """Accuracy in float32, rounded, and rounded or not after tuning."""

    whole: float
    rounded: float
    tuned: float


def _recovery(measure: Measure) -> Finding:
    grids = {arm: [Setting(arm, lr) for lr in rates] for arm, rates in RATES.items()}
    chosen = tune(measure, recovery_of, grids, seeds=TUNING_SEEDS, score=lambda found: found.tuned)
    found = evaluate(measure, recovery_of, chosen, seeds=SEEDS)
    tuned = {arm: [result.tuned for result in results] for arm, results in found.items()}
    whole, rounded = ([getattr(result, name) for result in found[QUANTIZED]] for name in ("whole", "rounded"))
    lost, regained = gaps(whole, rounded), gaps(tuned[QUANTIZED], rounded)
    above_share = gaps(regained, [0.3 * loss for loss in lost])
    behind = gaps(tuned[WEIGHTS], tuned[QUANTIZED])
    returns, near = surely_above(above_share, 0.0), surely_below(behind, 0.02)
    says: Verdict = "reproduced" if returns and near else "partly" if returns else "not reproduced"
    rates = ", ".join(f"{arm} {setting.lr:g}" for arm, setting in chosen.items())
    return Finding(
        claim="recovers-accuracy",
        verdict=says,
        criterion="QZO regains more than 30 % of the accuracy lost by rounding to 2 bits, and MeZO on the float32 "
        "weights is less than 0.02 ahead of it, both by the 95 % interval of the mean over seeds; partly if only the "
        "first.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            measured("accuracy in float32", whole, "fraction"),
            measured("accuracy rounded to 2 bits", rounded, "fraction"),
            *(measured(f"accuracy after tuning, {arm}", values, "fraction") for arm, values in tuned.items()),
            measured("accuracy regained less 30 % of that lost", above_share, "fraction"),
            measured("MeZO, float32, above QZO, 2 bits", behind, "fraction", paper="near 0"),
            *_bytes(),
        ),
        note=f"Learning rates: {rates}. MeZO starts from the float32 network, which has lost nothing.",
    )


def _bytes() -> list[Measurement]:
    """What there is to be kept of weights, codes packed, and of optimizer states."""
    weights = 64 * 64 + 64 * 10
    scales = 4 * (weights // GROUP)
    packed = weights * BITS // 8 + scales
    figures = {QUANTIZED: packed, FIRST_ORDER: packed + 2 * scales, WEIGHTS: 4 * weights}
    return [single(f"bytes of weights and optimizer states, {arm}", value, "bytes") for arm, value in figures.items()]


def perceptron() -> nn.Module:
    """64-64-10."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def network(seed: int) -> tuple[nn.Module, Division, Part]:
    """A network trained in float32, the seed's data, and the labelled images to go on with."""
    streams = Streams(seed)
    division = divide(samples(), 0.2, "all", streams)
    with streams.globally("model"):
        model = perceptron()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    fit(model, optimizer, division.training, streams, steps=PRETRAINING_STEPS)
    chosen = torch.randperm(len(division.training.x), generator=streams("labelled"))[:LABELLED]
    return model.eval(), division, Part(*(tensor[chosen] for tensor in division.training))


def loss_on(model: nn.Module, part: Part) -> Tensor:
    return F.cross_entropy(model(part.x), part.y)


@torch.no_grad()
def accuracy_on(model: nn.Module, part: Part) -> float:
    """Wrong for every sample where the scores are no longer finite."""
    output = model(part.x)
    return accuracy(output, part.y) if output.isfinite().all() else 0.0


def recovery_of(run: Run[Setting]) -> Recovery:
    """Train, round, tune, and measure on one split after each."""
    model, division, labelled = network(run.seed)
    held_out = getattr(division, run.split)
    whole = accuracy_on(model, held_out)
    if run.setting.arm == WEIGHTS:
        _follow(MeZO(model.parameters(), lr=run.setting.lr, seed=run.seed), model, labelled, STEPS)
        return Recovery(whole, whole, accuracy_on(model, held_out))
    quantize_linear_(model, BITS, GROUP)
    rounded = accuracy_on(model, held_out)
    if run.setting.arm == QUANTIZED:
        _follow(QZO(scale_parameters(model), lr=run.setting.lr, seed=run.seed), model, labelled, STEPS)
    else:
        scales = [scale.requires_grad_() for scale in scale_parameters(model)]
        optimizer = torch.optim.Adam(scales, lr=run.setting.lr)
        for _ in range(STEPS):
            optimizer.zero_grad()
            torch.autograd.backward(loss_on(model, labelled), inputs=scales)
            optimizer.step()
    return Recovery(whole, rounded, accuracy_on(model, held_out))


def _follow(optimizer: ZerothOrder, model: nn.Module, part: Part, steps: int) -> None:
    for _ in range(steps):
        optimizer.step(lambda: loss_on(model, part))


@dataclass(frozen=True)
class Clipped:
    """QZO with a threshold and a learning rate."""

    clip: float
    lr: float


def _clipping(measure: Measure) -> Finding:
    settings = {(clip, lr): Clipped(clip, lr) for clip in (math.inf, *CLIPS) for lr in CLIPPED_RATES}
    found = evaluate(measure, gain_of, settings, seeds=SEEDS)
    doublings = {clip: usable_doublings(found, clip) for clip in (math.inf, *CLIPS)}
    further = [gaps(doublings[clip], doublings[math.inf]) for clip in CLIPS]
    wider = above_zero(*further)
    doubled = [significant and sum(gained) >= len(gained) for significant, gained in zip(wider, further, strict=True)]
    says: Verdict = "reproduced" if any(doubled) else "partly" if any(wider) else "not reproduced"
    names = {clip: "no clipping" if clip == math.inf else f"C = {clip:g}" for clip in doublings}
    return Finding(
        claim="clipping-stabilises",
        verdict=says,
        criterion="With one of the thresholds 1, 10 and 100, the largest usable learning rate is significantly larger "
        "than without clipping (paired sign-flip test of its logarithm, Holm over the three), and at least twice as "
        "large in the geometric mean over seeds; partly if significantly larger only. A rate is usable if it and all "
        "smaller ones end above the accuracy of the rounded network.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"largest usable rate, {names[clip]}", values, f"doublings of {CLIPPED_RATES[0] / 2:g}")
                for clip, values in doublings.items()
            ),
            *(
                measured(f"largest usable rate, {names[clip]} above no clipping", values, "doublings")
                for clip, values in zip(CLIPS, further, strict=True)
            ),
            *(
                measured(f"accuracy above the rounded network, rate {lr:g}, {names[clip]}", found[clip, lr], "fraction")
                for clip, lr in settings
            ),
        ),
        note=f"Test data; {CLIPPED_STEPS} steps at each of the rates {', '.join(map(str, CLIPPED_RATES))}. "
        "Nothing is chosen, so nothing is tuned.",
    )


def usable_doublings(found: dict[tuple[float, float], list[float]], clip: float) -> list[float]:
    """For each seed, how many of the rates are usable, from the smallest on."""
    counts = []
    for gains in zip(*(found[clip, lr] for lr in CLIPPED_RATES), strict=True):
        unusable = [place for place, gain in enumerate(gains) if gain <= 0]
        counts.append(float(unusable[0] if unusable else len(gains)))
    return counts


def gain_of(run: Run[Clipped]) -> float:
    """By how much accuracy ends above that of the rounded network."""
    model, division, labelled = network(run.seed)
    held_out = getattr(division, run.split)
    quantize_linear_(model, BITS, GROUP)
    rounded = accuracy_on(model, held_out)
    optimizer = QZO(scale_parameters(model), lr=run.setting.lr, clip=run.setting.clip, seed=run.seed)
    _follow(optimizer, model, labelled, CLIPPED_STEPS)
    return accuracy_on(model, held_out) - rounded
