"""The claims of the LLM-QFA paper: a schedule of mean widths, adapters apart, and one training for all widths.

Digits instead of language models: a residual network with twelve narrow layers is trained in float32, and these layers
are frozen at 2, 3 and 4 bits, rounded to nearest in groups of 8. Then adapters are trained, for as many steps in every
arm; where each width is trained by itself, for a third of them. Every arm gets the best of as many learning rates on
validation data, by the mean accuracy over the three widths.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.measure import Measure, measured
from fairtrial.claims.paired import above_zero, gaps, surely_above, surely_below
from fairtrial.claims.training import fit
from fairtrial.contract import Diverged
from fairtrial.methods.quantization.one_quantllm import (
    OnceForAll,
    TriangularBitSchedule,
    adapter_parameters,
    once_for_all_layers,
    sample_config,
    set_config,
)
from fairtrial.methods.quantization.quantize import RoundToNearest, quantize_
from fairtrial.tasks.digits import samples
from fairtrial.tasks.measures import accuracy
from fairtrial.tasks.samples import Part, divide
from fairtrial.tasks.streams import Streams

WIDTHS = 2, 3, 4
DEPTH, WIDTH, GROUP, RANK, ALPHA = 12, 32, 8, 2, 4.0
PRETRAINING_STEPS, STEPS, PERIOD = 500, 600, 480
UNIFORM, SCHEDULED, SHARED, WIDE_SHARED, APART = (
    "uniform widths, an adapter for each",
    "scheduled widths, an adapter for each",
    "scheduled widths, one adapter",
    "scheduled widths, one adapter of three times the rank",
    "a training for each width",
)
ARMS = UNIFORM, SCHEDULED, SHARED, WIDE_SHARED, APART
RATES = 1e-3, 3e-3, 1e-2
TUNING_SEEDS, SEEDS, MIXED = 2, 10, 20
MARGIN = 0.01


@dataclass(frozen=True)
class Setting:
    """An arm with its learning rate."""

    arm: str
    lr: float


@dataclass(frozen=True)
class Accuracies:
    """With all layers at one width, for each, and on average over layers of mixed widths."""

    all_at: tuple[float, ...]
    mixed: float

    @property
    def mean(self) -> float:
        return sum(self.all_at) / len(self.all_at)


def check(measure: Measure) -> list[Finding]:
    grids = {arm: [Setting(arm, lr) for lr in RATES] for arm in ARMS}
    chosen = tune(measure, accuracies_of, grids, seeds=TUNING_SEEDS, score=lambda found: found.mean)
    found = evaluate(measure, accuracies_of, chosen, seeds=SEEDS)
    rates = "Learning rates: " + ", ".join(f"{arm} {setting.lr:g}" for arm, setting in chosen.items()) + "."
    return [_extreme_widths(found, rates), _separate_adapters(found, rates), _once_for_all(found, rates)]


def _at(found: dict[str, list[Accuracies]], arm: str, bits: int) -> list[float]:
    return [result.all_at[WIDTHS.index(bits)] for result in found[arm]]


def _extreme_widths(found: dict[str, list[Accuracies]], note: str) -> Finding:
    gains = {bits: gaps(_at(found, SCHEDULED, bits), _at(found, UNIFORM, bits)) for bits in (2, 4)}
    higher = above_zero(*gains.values())
    says: Verdict = "reproduced" if all(higher) else "partly" if any(higher) else "not reproduced"
    return Finding(
        claim="extreme-widths",
        verdict=says,
        criterion="Test accuracy is significantly higher with the schedule than with uniform widths, at 2 and at 4 "
        "bits throughout (paired sign-flip test, Holm over the two); partly if at one of them.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"accuracy at {bits} bits, {arm}", _at(found, arm, bits), "fraction")
                for arm in (UNIFORM, SCHEDULED)
                for bits in WIDTHS
            ),
            *(
                measured(f"accuracy at mixed widths, {arm}", [result.mixed for result in found[arm]], "fraction")
                for arm in (UNIFORM, SCHEDULED)
            ),
            *(
                measured(f"accuracy at {bits} bits, schedule above uniform", gain, "fraction", paper="above 0")
                for bits, gain in gains.items()
            ),
        ),
        note=note,
    )


def _separate_adapters(found: dict[str, list[Accuracies]], note: str) -> Finding:
    gains = {arm: gaps(_at(found, SCHEDULED, 2), _at(found, arm, 2)) for arm in (SHARED, WIDE_SHARED)}
    over_same, over_wide = above_zero(*gains.values())
    says: Verdict = "reproduced" if over_same and over_wide else "partly" if over_same else "not reproduced"
    return Finding(
        claim="separate-adapters",
        verdict=says,
        criterion="Test accuracy at 2 bits throughout is significantly higher with an adapter for each width than with "
        "a shared one, both of the same rank and of three times the rank (paired sign-flip test, Holm over the two); "
        "partly if only than with the first.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"accuracy at 2 bits, {arm}", _at(found, arm, 2), "fraction")
                for arm in (SCHEDULED, SHARED, WIDE_SHARED)
            ),
            *(
                measured(f"accuracy at 2 bits, adapters apart above {arm}", gain, "fraction", paper="above 0")
                for arm, gain in gains.items()
            ),
        ),
        note=note,
    )


def _once_for_all(found: dict[str, list[Accuracies]], note: str) -> Finding:
    means = {arm: [result.mean for result in found[arm]] for arm in (SCHEDULED, APART)}
    above = gaps(means[SCHEDULED], means[APART])
    near, lower = surely_above(above, -MARGIN), surely_below(above, 0.0)
    says: Verdict = "reproduced" if near else "partly" if not lower else "not reproduced"
    return Finding(
        claim="once-for-all",
        verdict=says,
        criterion=f"The mean test accuracy over the three widths is less than {MARGIN} below that of a training for "
        "each width, with as many steps in all, by the 95 % interval of the mean difference; partly if only that "
        "interval is not below 0.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"mean accuracy over widths, {arm}", values, "fraction", paper=f"{paper} on MMLU")
                for (arm, values), paper in zip(means.items(), ("0.379", "0.376"), strict=True)
            ),
            measured("mean accuracy, one training above three", above, "fraction", paper="0.003 on MMLU"),
        ),
        note=note,
    )


class Narrow(nn.Module):
    """A residual network of many narrow layers; only these are quantised."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, WIDTH), nn.Linear(WIDTH, 10)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x: Float[Tensor, "n p"]) -> Float[Tensor, "n c"]:
        x = self.first(x)
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        scores: Tensor = self.last(x)
        return scores


def accuracies_of(run: Run[Setting]) -> Accuracies:
    """Train in float32, freeze, train adapters, and measure at all widths."""
    arm = run.setting.arm
    if arm == APART:
        alone = [_trained(run, (bits,), STEPS // len(WIDTHS)) for bits in WIDTHS]
        return Accuracies(tuple(a.all_at[0] for a in alone), float("nan"))
    return _trained(run, WIDTHS, STEPS)


def _trained(run: Run[Setting], widths: tuple[int, ...], steps: int) -> Accuracies:
    arm, streams = run.setting.arm, Streams(run.seed)
    division = divide(samples(), 0.2, "all", streams)
    with streams.globally("model"):
        model = Narrow()
    fit(model, torch.optim.Adam(model.parameters(), lr=3e-3), division.training, streams, steps=PRETRAINING_STEPS)
    model.requires_grad_(False)
    rank = RANK * len(widths) if arm == WIDE_SHARED else RANK
    config = OnceForAll(widths, GROUP, rank, ALPHA * rank / RANK, RoundToNearest, streams("adapters"))
    quantize_(model, config, skip=("first", "last"))
    if arm in (SHARED, WIDE_SHARED):
        for layer in once_for_all_layers(model).values():
            for bits in widths:
                layer.adapters[str(bits)] = layer.adapters[str(widths[-1])]
    schedule, generator = TriangularBitSchedule(widths[0], widths[-1], PERIOD), streams("widths")

    def draw(step: int) -> None:
        mean = sum(widths) / len(widths) if arm in (UNIFORM, APART) else schedule(step)
        set_config(model, sample_config(model, mean, generator))

    draw(0)
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=run.setting.lr, weight_decay=0.0)
    try:
        fit(model, optimizer, division.training, streams.inside("adapters"), steps=steps, after=draw)
    except Diverged:
        return Accuracies((0.0,) * len(widths), 0.0)
    return _measured(model, getattr(division, run.split), widths, streams("mixed"))


@torch.no_grad()
def _measured(model: nn.Module, part: Part, widths: tuple[int, ...], generator: torch.Generator) -> Accuracies:
    model.eval()

    def at(config: dict[str, int]) -> float:
        set_config(model, config)
        return accuracy(model(part.x), part.y)

    names = list(once_for_all_layers(model))
    all_at = tuple(at(dict.fromkeys(names, bits)) for bits in widths)
    places = torch.randint(len(widths), (MIXED, len(names)), generator=generator).tolist()
    mixed = [at({name: widths[place] for name, place in zip(names, row, strict=True)}) for row in places]
    return Accuracies(all_at, sum(mixed) / MIXED)
