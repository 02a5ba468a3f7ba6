"""The claims of the AdaQuant paper: layers tuned after rounding, on few samples, with bits by an integer programme.

A perceptron 64-128-128-10 with batch norms on digits instead of ResNet-50 on ImageNet, trained in float32; then weights
and inputs of all its layers are rounded to 2 or 3 bits, with 16 to 256 unlabelled images. At 4 bits hardly anything is
lost there. Errors are those of the logits, relative to the float network's. Layer-wise and end-to-end tuning have the
same parameters, the paper's learning rates but for that of the weights, which is the best of three on validation data,
and as many steps in all.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.measure import Measure, measured
from fairtrial.claims.paired import above_zero, gaps
from fairtrial.claims.training import fit
from fairtrial.methods.quantization.adaquant import (
    FakeQuantLayer,
    Rates,
    adaquant_model,
    allocate_bits_ip,
    rate_groups,
    retune_batchnorm,
)
from fairtrial.tasks.digits import samples
from fairtrial.tasks.measures import accuracy
from fairtrial.tasks.samples import Division, divide
from fairtrial.tasks.streams import Streams

ROUNDED, PARALLEL, SEQUENTIAL, END_TO_END = "rounding alone", "parallel", "sequential", "end to end"
WIDTHS, SAMPLES, TUNED_ON, FEW = (3, 2), (16, 64, 256), 64, (16, 64)
RATES = (1e-5, 1e-4, 1e-3)  # of the weights
STEPS, BATCH, PRETRAINING_STEPS, TUNING_SEEDS, SEEDS = 500, 50, 300, 2, 8
LAYERS = ("0", "3", "6")
BASE, OPTIONS, UNIFORM = 8, (2, 4), (3, 4, 5)


def check(measure: Measure) -> list[Finding]:
    arms = [(arm, bits) for arm in (PARALLEL, SEQUENTIAL, END_TO_END) for bits in WIDTHS]
    grids = {key: [Setting(*key, TUNED_ON, rate) for rate in RATES] for key in arms}
    rates = {
        key: chosen.rate
        for key, chosen in tune(measure, quantised, grids, seeds=TUNING_SEEDS, score=lambda found: -found.error).items()
    }
    settings = [Setting(arm, bits, n) for arm in (ROUNDED, PARALLEL, SEQUENTIAL) for bits in WIDTHS for n in SAMPLES]
    settings += [Setting(END_TO_END, WIDTHS[-1], n) for n in FEW]
    chosen = {
        (s.arm, s.bits, s.samples): Setting(s.arm, s.bits, s.samples, rates.get((s.arm, s.bits), 0.0)) for s in settings
    }
    found = evaluate(measure, quantised, chosen, seeds=SEEDS)
    note = "Rates of the weights: " + ", ".join(f"{arm} {bits} bits {rate:g}" for (arm, bits), rate in rates.items())
    return [_calibration(found, note), _overfit(found, note), _programme(measure)]


@dataclass(frozen=True)
class Setting:
    """An arm at a width for weights and inputs, with its calibration samples and the learning rate of weights."""

    arm: str
    bits: int
    samples: int
    rate: float = 0.0


@dataclass(frozen=True)
class Quantised:
    """The relative error of the logits, and the accuracy."""

    error: float
    accuracy: float


Key = tuple[str, int, int]


def _calibration(found: dict[Key, list[Quantised]], note: str) -> Finding:
    less = [_errors(found, ROUNDED, SEQUENTIAL, 3, n) for n in SAMPLES]
    more = [_accuracies(found, SEQUENTIAL, ROUNDED, 2, n) for n in SAMPLES]
    significant = above_zero(*less, *more)
    falls, rises = all(significant[: len(SAMPLES)]), all(significant[len(SAMPLES) :])
    says: Verdict = "reproduced" if falls and rises else "partly" if falls else "not reproduced"
    shown = [(arm, bits, n) for arm in (ROUNDED, PARALLEL, SEQUENTIAL) for bits in WIDTHS for n in SAMPLES]
    return Finding(
        claim="layerwise-calibration",
        verdict=says,
        criterion="With 16, 64 and 256 samples the sequential form has a significantly lower relative error of the "
        "logits than rounding alone at 3 bits, and a significantly higher accuracy at 2 bits (paired sign-flip tests, "
        "Holm over the six); partly if only the errors are lower.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"error of the logits, {arm}, {bits} bits, {n} samples", errors, "part of their variance")
                for arm, bits, n in shown
                for errors in [[result.error for result in found[arm, bits, n]]]
            ),
            *(
                measured(
                    f"accuracy, {arm}, {bits} bits, {n} samples",
                    values,
                    "fraction",
                    paper="within 1 % of float32 for ResNet-50 at 4 bits" if arm == SEQUENTIAL and bits == 3 else "",
                )
                for arm, bits, n in shown
                for values in [[result.accuracy for result in found[arm, bits, n]]]
            ),
        ),
        note=note,
    )


def _overfit(found: dict[Key, list[Quantised]], note: str) -> Finding:
    bits = WIDTHS[-1]
    ahead = [_accuracies(found, SEQUENTIAL, END_TO_END, bits, n) for n in FEW]
    better = above_zero(*ahead)
    says: Verdict = "reproduced" if all(better) else "partly" if any(better) else "not reproduced"
    return Finding(
        claim="less-overfit",
        verdict=says,
        criterion="At 2 bits the sequential form has a significantly higher test accuracy than end-to-end tuning "
        "towards the float network's outputs, with 16 and with 64 samples (paired sign-flip tests, Holm over the two); "
        "partly if with one of them.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"accuracy, {arm}, {bits} bits, {n} samples", values, "fraction")
                for arm in (SEQUENTIAL, END_TO_END)
                for n in FEW
                for values in [[result.accuracy for result in found[arm, bits, n]]]
            ),
            *(
                measured(f"accuracy, {SEQUENTIAL} above {END_TO_END}, {n} samples", values, "fraction")
                for n, values in zip(FEW, ahead, strict=True)
            ),
        ),
        note=f"{note}. Each layer is tuned for {STEPS} steps, the whole network for {STEPS * len(LAYERS)}.",
    )


def _programme(measure: Measure) -> Finding:
    results = measure.map(programme, range(SEEDS))
    less = [[result[bits][0] - result[bits][1] for result in results] for bits in UNIFORM]
    more = [[-value for value in values] for values in less]
    lower, higher = above_zero(*less), above_zero(*more)
    says: Verdict = "not reproduced"
    if any(lower):
        says = "partly" if any(higher) else "reproduced"
    return Finding(
        claim="integer-programme",
        verdict=says,
        criterion=f"Cross entropy on test data with 2, 4 or 8 bits for each layer by the programme is significantly "
        f"lower than with uniform {', '.join(map(str, UNIFORM))} bits at equal size or less for one or more of them "
        "(paired sign-flip tests, Holm over the three), and significantly higher for none; partly if lower for one and "
        "higher for another.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"cross entropy, {name}, size of {bits} bits", [result[bits][place] for result in results], "")
                for bits in UNIFORM
                for place, name in enumerate(("uniform", "by the programme"))
            ),
            *(
                measured(f"cross entropy, uniform above the programme, size of {bits} bits", values, "")
                for bits, values in zip(UNIFORM, less, strict=True)
            ),
        ),
        note="Weights and inputs of a layer have equal bits, rounded with the ranges of 256 samples, and batch norms "
        "are retuned on them. What a layer costs is the divergence of the outputs on these samples.",
    )


def _errors(found: dict[Key, list[Quantised]], arm: str, other: str, bits: int, n: int) -> list[float]:
    return gaps(*([result.error for result in found[name, bits, n]] for name in (arm, other)))


def _accuracies(found: dict[Key, list[Quantised]], arm: str, other: str, bits: int, n: int) -> list[float]:
    return gaps(*([result.accuracy for result in found[name, bits, n]] for name in (arm, other)))


# Runs --------------------------------------------------------------------------------------------------------------


def perceptron() -> nn.Module:
    """64-128-128-10 with batch norms."""
    hidden: list[nn.Module] = []
    for width in 64, 128:
        hidden += [nn.Linear(width, 128), nn.BatchNorm1d(128), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(128, 10))


def network(seed: int) -> tuple[nn.Module, Division, Streams]:
    """A network trained in float32, and the seed's data."""
    streams = Streams(seed)
    division = divide(samples(), 0.2, "all", streams)
    with streams.globally("model"):
        model = perceptron()
    fit(model, torch.optim.Adam(model.parameters(), lr=3e-3), division.training, streams, steps=PRETRAINING_STEPS)
    return model.eval(), division, streams


def calibration(division: Division, count: int, streams: Streams) -> Tensor:
    """Unlabelled training images; fewer ones are among more."""
    return division.training.x[torch.randperm(len(division.training.x), generator=streams("calibration"))[:count]]


def quantised(run: Run[Setting]) -> Quantised:
    """Train in float32, round, tune, and judge."""
    model, division, streams = network(run.seed)
    setting, part = run.setting, getattr(division, run.split)
    x = calibration(division, setting.samples, streams)
    with torch.no_grad():
        exact, target = model(part.x), model(x)
    tuned = setting.arm in (PARALLEL, SEQUENTIAL)
    adaquant_model(
        model,
        [x],
        setting.arm == SEQUENTIAL,
        weight_bits=setting.bits,
        act_bits=setting.bits,
        steps=STEPS if tuned else 0,
        batch=BATCH,
        lrs=Rates(weight=setting.rate),
        generator=streams("method"),
    )
    if setting.arm == END_TO_END:
        _tune_whole(model, x, target, setting.rate, streams("method"))
    with torch.no_grad():
        output = model(part.x)
    spread = (exact - exact.mean(0)).square().mean()
    return Quantised(float((output - exact).square().mean() / spread), accuracy(output, part.y))


def _tune_whole(model: nn.Module, x: Tensor, target: Tensor, rate: float, generator: torch.Generator) -> None:
    """Tune all rounded layers at once towards the float network's outputs; batch norms stay as they are."""
    layers = [m.requires_grad_() for m in model.modules() if isinstance(m, FakeQuantLayer)]
    optimizer = torch.optim.Adam(rate_groups(layers, Rates(weight=rate)))
    for _ in range(STEPS * len(layers)):
        index = torch.randperm(len(x), generator=generator)[:BATCH]
        optimizer.zero_grad()
        divergence(model(x[index]), target[index]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def divergence(output: Tensor, target: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the float network's probabilities, both given by logits."""
    return F.kl_div(output.log_softmax(1), target.log_softmax(1), reduction="batchmean", log_target=True)


def programme(seed: int) -> dict[int, tuple[float, float]]:
    """Cross entropy on test data for each size: with uniform bits, and with those of the programme."""
    model, division, streams = network(seed)
    x = calibration(division, SAMPLES[-1], streams)
    sizes = [int(model.get_submodule(name).get_parameter("weight").numel()) for name in LAYERS]

    def rounded(bits: list[int]) -> nn.Module:
        copied, widths = copy.deepcopy(model), dict(zip(LAYERS, bits, strict=True))
        adaquant_model(copied, [x], weight_bits=widths, act_bits=widths, steps=0)
        retune_batchnorm(copied, [x])
        return copied

    @torch.no_grad()
    def apart(bits: list[int]) -> float:
        return float(divergence(rounded(bits)(x), model(x)))

    @torch.no_grad()
    def loss(bits: list[int]) -> float:
        return float(F.cross_entropy(rounded(bits)(division.test.x), division.test.y))

    whole = [BASE] * len(LAYERS)
    costs = {
        bits: [apart([*whole[:place], bits, *whole[place + 1 :]]) - apart(whole) for place in range(len(LAYERS))]
        for bits in OPTIONS
    }
    return {
        bits: (loss([bits] * len(LAYERS)), loss(allocate_bits_ip(costs, sizes, BASE, bits / 32).bits))
        for bits in UNIFORM
    }
