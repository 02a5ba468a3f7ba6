"""The claims of the MixDQ paper: sparing the first token, allocating bits by a programme, and a metric for each role.

A digit generator instead of SDXL-Turbo: one step from noise and a prompt to an image of 8 x 8 pixels, by two blocks of
self-attention, cross-attention and a feed-forward network, named as in diffusers. A prompt is a constant first token
with two huge entries, the class, and the coarse brightness of the four quarters. Weights that are not rounded stay in
float. Sensitivities and ranges come from prompts of the training images, all figures from those of the test images.
Nothing is tuned.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.measure import Measure, measured
from fairtrial.claims.paired import above_zero, gaps, surely_above, surely_below
from fairtrial.claims.training import fit
from fairtrial.methods.quantization.mixdq import (
    ActivationQuantizer,
    BOSAwareProjection,
    MixedGroup,
    decoupled_allocate,
    fake_quantize,
    global_ssim,
    is_content,
    layer_sensitivity,
    sqnr_db,
)
from fairtrial.tasks.digits import perceptron, samples
from fairtrial.tasks.samples import Part, divide
from fairtrial.tasks.streams import Streams

WIDTH, HEADS, DEPTH, PATCHES, TOKENS = 32, 4, 2, 16, 6
OUTLIER = 100.0  # times the other entries of the first token
STEPS, CLASSIFIER_STEPS, SEEDS = 600, 300, 12
CALIBRATION, ACTIVATION_BITS = 64, 8
CANDIDATES, BAND = (2, 4, 8), 0.25
MEAN = 4 - BAND  # so that no allocation is above 4, the uniform width
K_GRID = 0.5, 0.75, 1.0, 1.25, 1.5
UNIFORM, NOISE_ONLY, DECOUPLED = "4 bits everywhere", "noise ratio for all layers", "a metric for each role"


class Quality(NamedTuple):
    """What is left of a generator: noise ratio to the float output in dB, and share of images with the same label."""

    noise_ratio: float
    agreement: float


@dataclass(frozen=True)
class Outcome:
    """What a seed gives.

    Attributes:
        gain: log₁₀ of the squared error with activations rounded for all tokens over that with the first one spared.
        quality: of each way to allocate bits.
        label: share of images of the float generator that the classifier takes for the class asked for.
    """

    gain: float
    quality: dict[str, Quality]
    label: float


def check(measure: Measure) -> list[Finding]:
    found = measure.map(outcome_of, range(SEEDS))
    return [_first_token(found), _integer_programme(found), _decoupled_metrics(found)]


def _first_token(found: list[Outcome]) -> Finding:
    gains = [outcome.gain for outcome in found]
    tenfold, twofold = surely_above(gains, 1.0), surely_above(gains, math.log10(2))
    says: Verdict = "reproduced" if tenfold else "partly" if twofold else "not reproduced"
    return Finding(
        claim="first-token",
        verdict=says,
        criterion="The mean squared error of the generator's output is more than ten times lower with the first token "
        "spared, by the 95 % interval of its logarithm; partly if more than twice.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            measured("squared error, all tokens rounded over first one spared", gains, "log10 of a ratio"),
            measured("images of the class asked for, float", [outcome.label for outcome in found], "share"),
        ),
        note=f"Weights and inputs of the projections of the prompt at {ACTIVATION_BITS} bits, all else in float.",
    )


def _of(found: list[Outcome], arm: str, figure: str) -> list[float]:
    return [getattr(outcome.quality[arm], figure) for outcome in found]


def _gains(found: list[Outcome], arm: str, other: str) -> tuple[list[float], list[float]]:
    noise, agreement = (gaps(_of(found, arm, f), _of(found, other, f)) for f in Quality._fields)
    return noise, agreement


def _integer_programme(found: list[Outcome]) -> Finding:
    gains = _gains(found, DECOUPLED, UNIFORM)
    better = above_zero(*gains)
    worse = any(surely_below(gain, 0.0) for gain in gains)
    says: Verdict = "reproduced" if all(better) else "partly" if any(better) and not worse else "not reproduced"
    return Finding(
        claim="integer-programme",
        verdict=says,
        criterion="Both noise ratio and agreement of labels with the float generator are significantly higher with "
        "allocated bits, of at most 4 on average, than with 4 bits everywhere (paired sign-flip test, Holm over the "
        "two); partly if one is, and the other is not significantly lower.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measurement
                for arm in (UNIFORM, DECOUPLED)
                for measurement in (
                    measured(f"noise ratio, {arm}", _of(found, arm, "noise_ratio"), "dB"),
                    measured(f"agreement of labels, {arm}", _of(found, arm, "agreement"), "share"),
                )
            ),
            measured("noise ratio, allocated above uniform", gains[0], "dB"),
            measured("agreement, allocated above uniform", gains[1], "share"),
        ),
    )


def _decoupled_metrics(found: list[Outcome]) -> Finding:
    noise, agreement = _gains(found, DECOUPLED, NOISE_ONLY)
    agrees, noisier = all(above_zero(agreement)), surely_below(noise, 0.0)
    says: Verdict = "reproduced" if agrees and not noisier else "partly" if agrees else "not reproduced"
    return Finding(
        claim="decoupled-metrics",
        verdict=says,
        criterion="Agreement of labels is significantly higher with a metric for each role than with the noise ratio "
        "for all layers (paired sign-flip test), and the 95 % interval of the difference in noise ratio is not below "
        "0; partly if only agreement is higher.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            measured(f"noise ratio, {NOISE_ONLY}", _of(found, NOISE_ONLY, "noise_ratio"), "dB"),
            measured(f"noise ratio, {DECOUPLED}", _of(found, DECOUPLED, "noise_ratio"), "dB"),
            measured(f"agreement of labels, {NOISE_ONLY}", _of(found, NOISE_ONLY, "agreement"), "share"),
            measured(f"agreement of labels, {DECOUPLED}", _of(found, DECOUPLED, "agreement"), "share"),
            measured("noise ratio, decoupled above noise ratio for all", noise, "dB"),
            measured("agreement, decoupled above noise ratio for all", agreement, "share"),
        ),
        note="Groups, budgets, candidates and the choice among allocations are the same; only content layers' scores "
        "differ.",
    )


# The generator -----------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention of some tokens to others."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Float[Tensor, "n t d"], to: Float[Tensor, "n s d"]) -> Float[Tensor, "n t d"]:
        parts = self.to_q(x), self.to_k(to), self.to_v(to)
        q, k, v = (y.unflatten(2, (HEADS, -1)).transpose(1, 2) for y in parts)
        attended: Tensor = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return attended


class Block(nn.Module):
    """Self-attention, cross-attention and a feed-forward network, each on normalised input and added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.attn1, self.attn2 = Attention(), Attention()
        self.ff = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Float[Tensor, "n t d"], text: Float[Tensor, "n s d"]) -> Float[Tensor, "n t d"]:
        own = self.norms[0](x)
        x = x + self.attn1(own, own)
        x = x + self.attn2(self.norms[1](x), text)
        changed: Tensor = x + self.ff(self.norms[2](x))
        return changed


class Generator(nn.Module):
    """Images (n, 64) of prompts and noise (n, 6 + 16, 32): the former are the first tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.3 * torch.randn(PATCHES, WIDTH))
        self.conv_in, self.conv_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 64 // PATCHES)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, given: Float[Tensor, "n t d"]) -> Float[Tensor, "n p"]:
        text, noise = given[:, :TOKENS], given[:, TOKENS:]
        x = self.conv_in(noise) + self.positions
        for block in self.blocks:
            x = block(x, text)
        return F.fold(self.conv_out(x).transpose(1, 2), 8, 2, stride=2).flatten(1)


def prompts(part: Part, streams: Streams, name: str) -> Float[Tensor, "n t d"]:
    """Prompts for images of a part, and noise after them."""
    drawn = streams("prompts")
    first, classes = torch.randn(WIDTH, generator=drawn), torch.randn(10, WIDTH, generator=drawn)
    quarters = torch.randn(4, 4, WIDTH, generator=drawn) / 2
    first[:2] *= OUTLIER
    coarse = F.avg_pool2d(part.x.view(-1, 1, 8, 8), 2)
    by_quarter = F.unfold(coarse, 2, stride=2).transpose(1, 2)
    text = torch.cat(
        [
            first.expand(len(part.x), 1, WIDTH),
            classes[part.y][:, None],
            torch.einsum("nqp,qpd->nqd", by_quarter, quarters),
        ],
        1,
    )
    noise = 0.3 * torch.randn(len(part.x), PATCHES, WIDTH, generator=streams(f"noise {name}"))
    return torch.cat([text, noise], 1)


def outcome_of(seed: int) -> Outcome:
    """Train a generator and a classifier, and round the former in all ways."""
    streams = Streams(seed)
    division = divide(samples(), 0.2, "all", streams)
    training, test = division.training, division.test
    with streams.globally("model"):
        generator, classifier = Generator(), perceptron()
    fit(
        classifier,
        torch.optim.Adam(classifier.parameters(), lr=3e-3),
        training,
        streams.inside("classifier"),
        steps=CLASSIFIER_STEPS,
    )
    given = prompts(training, streams, "training")
    fit(
        generator,
        torch.optim.Adam(generator.parameters(), lr=3e-3),
        Part(given, torch.arange(len(given))),  # the target is which image, of those to be drawn
        streams,
        steps=STEPS,
        loss=lambda output, target: F.mse_loss(output, training.x[target]),
    )
    for model in (generator, classifier):
        model.eval().requires_grad_(False)
    known, asked = given[:CALIBRATION], prompts(test, streams, "test")
    exact = generator(asked)
    labels = classifier(exact).argmax(1)
    span = (training.x.max() - training.x.min()).item()
    quality = {}
    for arm, widths in allocations(generator, known, span).items():
        image = with_weights(generator, widths)(asked)
        agreement = (classifier(image).argmax(1) == labels).double().mean().item()
        quality[arm] = Quality(sqnr_db(image, exact), agreement)
    return Outcome(first_token_gain(generator, known, asked), quality, (labels == test.y).double().mean().item())


def linear_layers(generator: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in generator.named_modules() if isinstance(m, nn.Linear)}


def with_weights(generator: nn.Module, widths: dict[str, int]) -> nn.Module:
    """A copy whose weights are rounded to so many bits, by name."""
    rounded = copy.deepcopy(generator)
    for name, layer in linear_layers(rounded).items():
        layer.weight.copy_(fake_quantize(layer.weight, widths[name], channel_axis=0))
    return rounded


def allocations(generator: nn.Module, known: Float[Tensor, "n t d"], span: float) -> dict[str, dict[str, int]]:
    """Bits of every layer by each way to allocate them."""
    layers = linear_layers(generator)
    content = [name for name in layers if is_content(name)]
    quality = [name for name in layers if not is_content(name)]
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    exact = generator(known)

    def group(names: list[str], metric: Callable[[Tensor, Tensor], float]) -> MixedGroup:
        scores = layer_sensitivity(generator, names, CANDIDATES, lambda model: model(known), metric)
        return MixedGroup(scores, sizes, CANDIDATES)

    def likeness(image: Tensor, ref: Tensor) -> float:
        return global_ssim(image, ref, span)

    def error(widths: dict[str, int]) -> float:
        return F.mse_loss(with_weights(generator, widths)(known), exact).item()

    by_noise = group(quality, sqnr_db)
    return {UNIFORM: dict.fromkeys(layers, 4)} | {
        arm: decoupled_allocate(by_noise, group(content, metric), MEAN, error, k_grid=K_GRID, tol=BAND)
        for arm, metric in ((NOISE_ONLY, sqnr_db), (DECOUPLED, likeness))
    }


class EveryToken(nn.Module):
    """A projection of text with weights and inputs rounded, those of the first token too."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = fake_quantize(linear.weight, ACTIVATION_BITS, channel_axis=0), linear.bias
        self.inputs = ActivationQuantizer(ACTIVATION_BITS)

    def observe(self, x: Float[Tensor, "n t d"]) -> None:
        self.inputs.observe(x)

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        return F.linear(self.inputs(x), self.weight, self.bias)


def first_token_gain(generator: nn.Module, known: Float[Tensor, "n t d"], asked: Float[Tensor, "m t d"]) -> float:
    """log₁₀ of the squared error with all tokens rounded over that with the first one spared."""
    exact, errors = generator(asked), []
    for spared in (False, True):
        rounded = copy.deepcopy(generator)
        for name, linear in linear_layers(generator).items():
            if name.endswith(("attn2.to_k", "attn2.to_v")):
                new = BOSAwareProjection(linear, ACTIVATION_BITS, ACTIVATION_BITS) if spared else EveryToken(linear)
                new.observe(known[:, :TOKENS])
                rounded.set_submodule(name, new)
        errors.append(F.mse_loss(rounded(asked), exact).item())
    return math.log10(errors[0] / errors[1])
