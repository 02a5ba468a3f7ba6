"""The claims of the study of post-training formats and temperature: nf4 is as good as fp4, and 0.5 to 0.8 is delicate.

SmolLM2 in place of Llama-2 and Falcon, on Python's documentation, and beside it the small language model of bytes: the
weights of SmolLM2 that is on hand lie on a grid of 4 bits already, those of the small model do not. The reference has
weights rounded to bfloat16; all models compute in float32, with the weights that their codes stand for.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fairtrial.catalog import Finding, Measurement, Verdict
from fairtrial.claims.measure import Measure, measured
from fairtrial.claims.paired import relative_gaps, surely_above, surely_below
from fairtrial.methods.quantization.ptq_impact import (
    Sensitivity,
    likelihoods,
    sample,
    temperature_divergence,
    temperature_sensitivity,
)
from fairtrial.methods.quantization.weight_formats import Method, dequantize, quantize_4bit, quantize_codes
from fairtrial.tasks import documentation
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.trained import loaded, part_of
from fairtrial.trial.statistics import LEVEL, holm, sign_flip_p

LLM, SMALL = "smollm2", "small-gpt"
NAMES = {LLM: "SmolLM2", SMALL: "the small model"}
FORMATS = ("int8", "nf4", "nf4-dq", "fp4", "fp4-dq")
PAIRS = (("nf4", "fp4"), ("nf4-dq", "fp4-dq"))
PASSAGES, LENGTH = 16, 64  # 1024 positions
TEMPERATURES = (0.2, 0.35, 0.5, 0.65, 0.8, 1.0)
SAMPLED = ("nf4", "fp4")
SAMPLED_TEMPERATURES = (0.2, 0.5, 0.8, 1.0)
PROMPTS, PROMPT_LENGTH, NEW_TOKENS, SEEDS = 24, 16, 32, 2


def check(measure: Measure) -> list[Finding]:
    arms = [Arm(model, fmt) for model in (LLM, SMALL) for fmt in FORMATS]
    divergences = dict(zip(arms, measure.map(divergence, arms), strict=True))
    return [_parity(divergences), _zone(measure, divergences)]


@dataclass(frozen=True)
class Arm:
    """A model and the format of its weights."""

    model: str
    fmt: str


Divergences = Mapping[Arm, list[list[float]]]  # at each temperature, for each passage


def _parity(divergences: Divergences) -> Finding:
    means = {arm: torch.tensor(found).mean(0).tolist() for arm, found in divergences.items()}
    further = {
        (model, pair): relative_gaps(means[Arm(model, pair[1])], means[Arm(model, pair[0])])
        for model in (LLM, SMALL)
        for pair in PAIRS
    }
    near = {key: surely_above(found, -0.1) and surely_below(found, 0.1) for key, found in further.items()}
    differs = [p < LEVEL for p in holm([sign_flip_p(found) for found in further.values()])]
    of_one_model = any(all(near[model, pair] for pair in PAIRS) for model in (LLM, SMALL))
    says: Verdict = "reproduced" if all(near.values()) else "not reproduced"
    if says != "reproduced" and (of_one_model or not any(differs)):
        says = "partly"
    return Finding(
        claim="format-parity",
        verdict=says,
        criterion="The divergence from the reference, averaged over temperatures, is less than 10 % apart for fp4 "
        "and nf4 (95 % interval of the mean over passages), with and without double quantisation and for both "
        "models; partly if for one model, or if no difference is significant (sign-flip test, Holm over the four).",
        seeds=(0,),
        measurements=(
            *(
                measured(f"divergence of {arm.fmt}, {NAMES[arm.model]}", found, "nats per token")
                for arm, found in means.items()
            ),
            *(
                measured(f"divergence, {b} above {a}, {NAMES[model]}", found, "fraction of the latter")
                for (model, (a, b)), found in further.items()
            ),
        ),
        note=f"{PASSAGES * LENGTH} positions in {PASSAGES} passages, for each model; temperatures "
        f"{', '.join(map(str, TEMPERATURES))}. The scales of -dq are in even steps of 8 bits. Weights of "
        f"{NAMES[LLM]} lie on a grid of 4 bits, groups of 32 with an offset, before they are rounded again.",
    )


def _zone(measure: Measure, divergences: Divergences) -> Finding:
    draws = [Draw(fmt, t, seed) for fmt in ("bf16", *SAMPLED) for t in SAMPLED_TEMPERATURES for seed in range(SEEDS)]
    nats = dict(zip(draws, measure.map(likelihood, draws), strict=True))

    def mean(fmt: str, temperature: float) -> Tensor:
        return torch.tensor([nats[Draw(fmt, temperature, seed)] for seed in range(SEEDS)]).mean(0)

    added = {fmt: torch.stack([mean(fmt, t) - mean("bf16", t) for t in SAMPLED_TEMPERATURES]) for fmt in SAMPLED}
    found = {("samples", fmt): temperature_sensitivity(SAMPLED_TEMPERATURES, added[fmt]) for fmt in SAMPLED}
    for fmt in SAMPLED:
        values = torch.tensor(divergences[Arm(LLM, fmt)])
        found["divergence", fmt] = temperature_sensitivity(TEMPERATURES, values)
    exceeds = steeper_inside(found)
    sides = {key: sum(exceeds[key, side] for side in SIDES) for key in found}
    both = all(count == 2 for count in sides.values())
    of_one = any(all(sides[what, fmt] for fmt in SAMPLED) for what in ("samples", "divergence"))
    says: Verdict = "reproduced" if both else "partly" if of_one else "not reproduced"
    names = {"samples": "likelihood of samples", "divergence": "divergence"}
    return Finding(
        claim="temperature-zone",
        verdict=says,
        criterion="For nf4 and fp4, the divergence from the reference, and the nats that samples gain under it, change "
        "more per unit of temperature between 0.5 and 0.8 than on either side: the mean slope is larger in magnitude, "
        "and the slopes differ significantly (paired sign-flip test, Holm over all eight); partly if by one of the two "
        "measures, for both formats, on at least one side.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *_slopes({(names[what], fmt): value for (what, fmt), value in found.items()}),
            *(
                measured(f"nats per token of samples above the reference's, {fmt} at {t:g}", values.tolist(), "nats")
                for fmt in SAMPLED
                for t, values in zip(SAMPLED_TEMPERATURES, added[fmt], strict=True)
            ),
        ),
        note=f"{NAMES[LLM]}; {PROMPTS} prompts of {PROMPT_LENGTH} tokens, {NEW_TOKENS} drawn after each, with the "
        f"same random numbers for all formats and temperatures, {SEEDS} times. Intervals are over prompts, for the "
        "divergence over passages.",
    )


SIDES = ("below", "above")


def steeper_inside(found: Mapping[tuple[str, str], Sensitivity]) -> dict[tuple[tuple[str, str], str], bool]:
    """Whether slopes inside the zone exceed those on a side of it."""
    compared = {(key, side): (value.inside, getattr(value, side)) for key, value in found.items() for side in SIDES}
    p_values = holm([sign_flip_p((inside - beside).tolist()) for inside, beside in compared.values()])
    return {
        key: p < LEVEL and bool(inside.mean().abs() > beside.mean().abs())
        for (key, (inside, beside)), p in zip(compared.items(), p_values, strict=True)
    }


def _slopes(found: Mapping[tuple[str, str], Sensitivity]) -> list[Measurement]:
    places = {"below": "below 0.5", "inside": "from 0.5 to 0.8", "above": "above 0.8"}
    return [
        measured(f"slope of {what} {places[place]}, {fmt}", getattr(value, place).tolist(), "nats per unit")
        for (what, fmt), value in found.items()
        for place in places
    ]


@torch.no_grad()
def rounded(name: str, fmt: str) -> nn.Module:
    """A copy of a model with the weights that a format leaves, as numbers of float32."""
    model: nn.Module = copy.deepcopy(loaded(name).model)
    for layer_name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer_name != "lm_head":
            layer.weight.copy_(levels_of(layer.weight, fmt))
    return model


def levels_of(weight: Tensor, fmt: str) -> Tensor:
    if fmt == "bf16":
        return weight.bfloat16().to(weight.dtype)
    kind: Method = "int8" if fmt == "int8" else "nf4" if fmt.startswith("nf4") else "fp4"
    if kind == "int8":
        return dequantize(quantize_codes(weight, kind), kind)
    return quantize_4bit(weight, kind, 64, fmt.endswith("-dq")).dequantize()


def passages_of(name: str, count: int, length: int, purpose: str) -> Tensor:
    return documentation.windows(part_of(name, "test"), count, length, Streams(0)(purpose))


@torch.no_grad()
def divergence(arm: Arm) -> list[list[float]]:
    """Mean divergence from the reference at each temperature, for each passage."""
    reference, changed = rounded(arm.model, "bf16"), rounded(arm.model, arm.fmt)
    found = []
    for ids in torch.split(passages_of(arm.model, PASSAGES, LENGTH, "passages"), 1):
        pair = reference(ids).logits[0], changed(ids).logits[0]
        found.append(temperature_divergence(*pair, TEMPERATURES).mean(1))
    by_temperature: list[list[float]] = torch.stack(found, 1).tolist()
    return by_temperature


@dataclass(frozen=True)
class Draw:
    """Text drawn from the language model in a format, at a temperature."""

    fmt: str
    temperature: float
    seed: int


@torch.no_grad()
def likelihood(draw: Draw) -> list[float]:
    """Mean nats of the tokens drawn after each prompt, under the reference."""
    prompts = passages_of(LLM, PROMPTS, PROMPT_LENGTH, "prompts")
    mask = torch.ones_like(prompts)
    generator = Streams(draw.seed)("draws")
    drawn = sample(rounded(LLM, draw.fmt), prompts, mask, NEW_TOKENS, draw.temperature, 0, generator)
    nats: Sequence[float] = likelihoods(rounded(LLM, "bf16"), prompts, mask, drawn).tolist()
    return list(nats)
