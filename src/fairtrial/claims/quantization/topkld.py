"""The claims of the TopKLD paper: top classes treated apart make better students, and tokens stand rounding better.

Students are the bench's byte transformer with weights of 2 and 3 bits, trained on Python's documentation to follow the
same transformer in float32; the generators are small perceptrons for digits. TopKLD's formula is a reconstruction, so
its result is the reconstruction's.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import log

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.optim.lr_scheduler import OneCycleLR

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.digit_generators import (
    NoiseModel,
    TokenModel,
    features,
    frechet_distance,
    images,
    noise_model,
    token_model,
)
from fairtrial.claims.measure import Measure, measured, single
from fairtrial.claims.paired import above_zero, gaps
from fairtrial.claims.training import fit
from fairtrial.contract import Diverged, Split
from fairtrial.methods.quantization.fake_quantization import straight_through
from fairtrial.methods.quantization.quantize import RoundToNearest, fit_range, quantize_, round_to
from fairtrial.methods.quantization.topkld import TopKLDLoss
from fairtrial.tasks.samples import Division, divide
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import predict
from fairtrial.tasks.text import CONTEXT, ByteTransformer, samples, text
from fairtrial.trial.statistics import LEVEL, holm, sign_flip_p

FORWARD, REVERSE, TOPKLD = "forward divergence", "reverse divergence", "TopKLD"
RENORMALISED, HARD = "TopKLD, renormalised", "hard labels"
ARMS = (FORWARD, REVERSE, TOPKLD, RENORMALISED, HARD)
CLASSES, K, GROUP = 256, 64, 32  # the top is a quarter, as much as VAR's 900 of 4096
WIDTHS = (2, 3)
RATES = (3e-4, 1e-3, 3e-3)
TEACHER_STEPS, TEACHER_RATE, STEPS, BATCH, TUNING_SEEDS, SEEDS = 300, 1e-2, 100, 8, 1, 9
CONTINUED, DRAWN = 64, 16  # windows, and bytes at the end of each that are drawn
BITS = (8, 4, 3, 2)
GENERATED, GENERATORS = 1000, 8
TOKEN_STEPS, NOISE_STEPS, FEATURE_STEPS, GENERATOR_RATE = 900, 3000, 400, 2e-3


def check(measure: Measure) -> list[Finding]:
    return [_distillation(measure), _generators(measure)]


# Distillation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A student: the loss that it is trained with, the bits of its weights and its learning rate."""

    arm: str
    bits: int
    lr: float


@dataclass(frozen=True)
class Student:
    """What became of it, in bits per byte.

    Attributes:
        held_out: of text that nothing has seen, under the student.
        drawn: of what it draws among its top k, under the teacher.
        untrained: as `held_out`, of the teacher when it is rounded and not trained any more.
        teacher: as `held_out`, of the teacher.
    """

    held_out: float
    drawn: float
    untrained: float
    teacher: float


MEASURES = {"held_out": "held-out text", "drawn": "samples under the teacher"}


def _distillation(measure: Measure) -> Finding:
    grids = {(arm, bits): [Setting(arm, bits, lr) for lr in RATES] for arm, bits in product(ARMS, WIDTHS)}
    chosen = tune(measure, student, grids, seeds=TUNING_SEEDS, score=lambda found: -found.held_out)
    found = evaluate(measure, student, chosen, seeds=SEEDS)
    reached = {(key, name): [getattr(one, name) for one in found[key]] for key in found for name in MEASURES}
    better = {
        (bits, name, rival): gaps(reached[(rival, bits), name], reached[(TOPKLD, bits), name])
        for bits, name, rival in product(WIDTHS, MEASURES, (FORWARD, REVERSE))
    }
    says = verdict_of(better)
    rates = ", ".join(f"{arm} at {bits} bits {setting.lr:g}" for (arm, bits), setting in chosen.items())
    return Finding(
        claim="topk-distillation",
        verdict=says,
        criterion="At 2 and at 3 bits TopKLD is significantly better than the forward and than the reverse "
        "divergence, in bits per byte of held-out text or of samples under the teacher, and significantly worse "
        "than neither by the other of the two (paired sign-flip test, Holm over all eight); partly if nowhere "
        "significantly worse than both.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"{rival} above TopKLD, {bits} bits, {MEASURES[name]}", gained, "bits per byte")
                for (bits, name, rival), gained in better.items()
            ),
            *(
                measured(f"{MEASURES[name]}, {arm}, {bits} bits", values, "bits per byte")
                for ((arm, bits), name), values in reached.items()
            ),
            *(
                measured(
                    f"held-out text, not trained after rounding, {bits} bits",
                    [one.untrained for one in found[TOPKLD, bits]],
                    "bits per byte",
                )
                for bits in WIDTHS
            ),
            measured("held-out text, the teacher", [one.teacher for one in found[TOPKLD, WIDTHS[0]]], "bits per byte"),
        ),
        note=f"{STEPS} steps, k = {K} of {CLASSES}, groups of {GROUP} weights. Learning rates: {rates}. TopKLD is the "
        "reconstruction 'split' with generalised terms.",
    )


def verdict_of(better: Mapping[tuple[int, str, str], Sequence[float]]) -> Verdict:
    """By bits, measure and rival: by how much TopKLD is better."""
    p_values = dict(zip(better, holm([sign_flip_p(found) for found in better.values()]), strict=True))
    won = {key: p_values[key] < LEVEL and sum(found) > 0 for key, found in better.items()}
    lost = {key: p_values[key] < LEVEL and sum(found) < 0 for key, found in better.items()}
    rivals = (FORWARD, REVERSE)
    wins = [
        any(all(won[bits, name, rival] for rival in rivals) for name in MEASURES)
        and not any(lost[bits, name, rival] for name in MEASURES for rival in rivals)
        for bits in WIDTHS
    ]
    if all(wins):
        return "reproduced"
    worst = any(all(lost[bits, name, rival] for rival in rivals) for bits in WIDTHS for name in MEASURES)
    return "not reproduced" if worst else "partly"


class FakeQuantized(nn.Module):
    """Weights at the nearest of symmetric levels in groups along the input, with their own gradient."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, weight: Tensor) -> Tensor:
        grouped = weight.detach().view(len(weight), -1, GROUP)
        grid = fit_range(grouped, self.bits, symmetric=True)
        levels = round_to(grouped, grid, self.bits) * grid.scale[..., None] + grid.offset[..., None]
        return straight_through(levels.view_as(weight), weight)


def fake_quantized(model: nn.Module, bits: int) -> nn.Module:
    """A copy whose layers, but for the last, have weights of few bits."""
    changed = copy.deepcopy(model)
    for name, layer in changed.named_modules():
        if isinstance(layer, nn.Linear) and name != "head":
            parametrize.register_parametrization(layer, "weight", FakeQuantized(bits))
    return changed


class Distillation(nn.Module):
    """The divergence from a teacher that sees the same windows."""

    def __init__(self, teacher: nn.Module, windows: Tensor, divergence: TopKLDLoss) -> None:
        super().__init__()
        self.teacher, self.windows, self.divergence = teacher, windows, divergence

    def forward(self, input: Tensor, target: Tensor, *, index: Int[Tensor, " b"]) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(self.windows[index])
        loss: Tensor = self.divergence(input, wanted)
        return loss


def loss_of(arm: str, teacher: nn.Module, windows: Tensor) -> nn.Module:
    if arm == HARD:
        return nn.CrossEntropyLoss()
    losses = {
        FORWARD: TopKLDLoss(0),
        REVERSE: TopKLDLoss(CLASSES),
        TOPKLD: TopKLDLoss(K),
        RENORMALISED: TopKLDLoss(K, variant="renormalised"),
    }
    return Distillation(teacher, windows, losses[arm])


@cache
def division_of(seed: int) -> Division:
    return divide(samples(), text.validation, text.scale, Streams(seed))


@cache
def teacher_of(seed: int) -> nn.Module:
    """The transformer in float32, trained on a seed's text."""
    streams = Streams(seed)
    with streams.globally("model"):
        model = ByteTransformer()
    _fit(model, nn.CrossEntropyLoss(), seed, streams, TEACHER_RATE, TEACHER_STEPS)
    return model.eval().requires_grad_(False)


def _fit(model: nn.Module, loss: nn.Module, seed: int, streams: Streams, lr: float, steps: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    schedule = OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2, cycle_momentum=False)
    part = division_of(seed).training
    fit(model, optimizer, part, streams, steps=steps, batch_size=BATCH, loss=loss, schedule=schedule)


def student(run: Run[Setting]) -> Student:
    """Train a student, and judge it on one split; the worst values where training diverged."""
    setting, streams = run.setting, Streams(run.seed).inside("student")
    teacher, division = teacher_of(run.seed), division_of(run.seed)
    model = fake_quantized(teacher, setting.bits).requires_grad_()
    judged = getattr(division, run.split)
    untrained, whole = before_training(run.seed, run.split, setting.bits)
    try:
        _fit(model, loss_of(setting.arm, teacher, division.training.x), run.seed, streams, setting.lr, STEPS)
    except Diverged:
        return Student(text.metric.worst, text.metric.worst, untrained, whole)
    held_out = text.measure(*predict(model, judged))
    drawn = bits_of_samples(model.eval(), teacher, judged.x[:CONTINUED], streams("samples"))
    return Student(held_out, drawn, untrained, whole)


@cache
def before_training(seed: int, split: Split, bits: int) -> tuple[float, float]:
    """Bits per byte of the teacher with rounded weights, and as it is."""
    judged, teacher = getattr(division_of(seed), split), teacher_of(seed)
    rounded, whole = (text.measure(*predict(model, judged)) for model in (fake_quantized(teacher, bits), teacher))
    return rounded, whole


@torch.no_grad()
def bits_of_samples(
    model: nn.Module, teacher: nn.Module, windows: Int[Tensor, "n t"], generator: torch.Generator
) -> float:
    """Bits per byte under the teacher of what a model draws, among its top k, at the end of windows."""
    start = CONTEXT - DRAWN
    ids = windows[:, :start]
    while ids.shape[1] < CONTEXT:
        scores = model(ids).view(*ids.shape, -1)[:, -1]
        top = scores.topk(K)
        place = torch.multinomial(top.values.softmax(1), 1, generator=generator)
        ids = torch.cat([ids, top.indices.gather(1, place)], 1)
    scores = teacher(ids).view(*ids.shape, -1)[:, start - 1 : -1]
    return F.cross_entropy(scores.flatten(0, 1), ids[:, start:].flatten()).item() / log(2)


# Generators --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generated:
    """Fréchet distances from held-out digits, and the weights that are rounded.

    Attributes:
        token, noise: of the two generators: in float32, and with weights of 8, 4, 3 and 2 bits.
        token_weights, noise_weights: how many there are.
    """

    token: tuple[float, ...]
    noise: tuple[float, ...]
    token_weights: int
    noise_weights: int


def _generators(measure: Measure) -> Finding:
    found = measure.map(generated, range(GENERATORS))
    whole = {name: [getattr(one, name)[0] for one in found] for name in ("token", "noise")}
    worse = {
        (name, bits): [log(getattr(one, name)[place] / getattr(one, name)[0]) for one in found]
        for name in whole
        for place, bits in enumerate(BITS, 1)
    }
    less = {bits: gaps(worse["noise", bits], worse["token", bits]) for bits in BITS}
    below_eight = [bits for bits in BITS if bits < 8]
    holds = above_zero(*(less[bits] for bits in below_eight))
    says: Verdict = "reproduced" if all(holds) else "partly" if sum(holds) > len(holds) / 2 else "not reproduced"
    names = {"token": "tokens", "noise": "noise"}
    return Finding(
        claim="token-models-scale",
        verdict=says,
        criterion="The Fréchet distance of the token model rises significantly less, as a ratio to its own in float32, "
        "than that of the denoising network at 4, 3 and 2 bits (paired sign-flip test of the logarithms, Holm over the "
        "three); partly if at two of them.",
        seeds=tuple(range(GENERATORS)),
        measurements=(
            *(measured(f"distance in float32, {names[name]}", values, "") for name, values in whole.items()),
            *(
                measured(f"log of distance over that in float32, {names[name]}, {bits} bits", values, "nats")
                for (name, bits), values in worse.items()
            ),
            *(measured(f"the same, noise above tokens, {bits} bits", values, "nats") for bits, values in less.items()),
            single("weights of the token model", found[0].token_weights, "weights"),
            single("weights of the denoising network", found[0].noise_weights, "weights"),
        ),
        note=f"{GENERATED} images of each, with the same random numbers at all widths; weights rounded to nearest, a "
        "scale and an offset for each row. Features are those of a classifier.",
    )


def generated(seed: int) -> Generated:
    """Train both generators, and judge what they draw when their weights are rounded."""
    streams = Streams(seed)
    training, held_out = images()
    embed = features(training, streams.inside("features"), steps=FEATURE_STEPS)
    tokens = token_model(training, streams.inside("tokens"), steps=TOKEN_STEPS, lr=GENERATOR_RATE)
    noise = noise_model(training, streams.inside("noise"), steps=NOISE_STEPS, lr=GENERATOR_RATE)
    with torch.no_grad():
        wanted = embed(held_out.x)

    def distances(model: TokenModel | NoiseModel) -> tuple[float, ...]:
        whole, found = model.net, []
        for bits in (None, *BITS):
            net = copy.deepcopy(whole)
            model.net = net if bits is None else quantize_(net, RoundToNearest(bits, -1))
            with torch.no_grad():
                found.append(frechet_distance(embed(model.draw(GENERATED, streams("draws"))), wanted))
        model.net = whole
        return tuple(found)

    def weights(model: nn.Module) -> int:
        return sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))

    return Generated(
        distances(tokens),
        distances(noise),
        weights(tokens),
        weights(noise),
    )
