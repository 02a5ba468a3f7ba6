"""The claims of the GAQAT paper: freezing the task gradient of quantisers' scales helps on domains not seen.

Digits instead of PACS and DomainNet: five domains, turned by 0 to 60 degrees, each with a contrast and a noise of its
own. One is left out, in turn by seed; a perceptron whose inner layers are rounded to 3 or 4 bits learns the other four.
Every arm has as many backward passes, so that one pass a step takes twice the steps, and the best of four settings by
validation data of the domains it is trained on.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.measure import Measure, measured
from fairtrial.claims.paired import above_zero, gaps, surely_above, surely_below
from fairtrial.claims.training import fit
from fairtrial.contract import Diverged
from fairtrial.methods.optimizers.sam import SAM
from fairtrial.methods.quantization.gaqat import GAQAT, first_and_last, lsq_layers, quantizers_of
from fairtrial.tasks.digits import samples
from fairtrial.tasks.measures import accuracy
from fairtrial.tasks.samples import Part, divide
from fairtrial.tasks.streams import Streams

ANGLES = 0.0, 15.0, 30.0, 45.0, 60.0
CONTRASTS = 1.0, 0.8, 1.2, 0.7, 1.0
NOISES = 0.0, 0.1, 0.2, 0.1, 0.3  # standard deviations, of pixels with deviation 1
BITS = 3, 4
STEPS, BATCH, WINDOW, WIDTH = 300, 64, 30, 64
LSQ, PLAIN_SAM, SAGM, FREEZE_TASK, FREEZE_SMOOTH = (
    "LSQ",
    "LSQ with SAM",
    "LSQ with SAGM",
    "task gradient frozen",
    "smoothness gradient frozen",
)
RATES = 3e-3, 1e-2  # of arms that take half as many steps
SETTINGS = {
    LSQ: [(lr, 0.0) for lr in (3e-4, 1e-3, 3e-3, 1e-2)],
    PLAIN_SAM: [(lr, rho) for lr in RATES for rho in (0.05, 0.2)],
    SAGM: [(lr, rho) for lr in RATES for rho in (0.05, 0.2)],
    FREEZE_TASK: [(lr, tau) for lr in RATES for tau in (0.3, 0.45)],
    FREEZE_SMOOTH: [(lr, tau) for lr in RATES for tau in (0.3, 0.45)],
}
RADIUS = 0.05  # of the arms that tune the threshold
TUNING_SEEDS, SEEDS = 3, 10
FREQUENT = 0.1


@dataclass(frozen=True)
class Setting:
    """An arm at some bits, with its learning rate and the radius ρ, or the threshold τ of an arm that freezes."""

    arm: str
    bits: int
    lr: float
    other: float


@dataclass(frozen=True)
class Result:
    """Accuracy on the domain left out and on the others, and what became of the scales of the first rounded layer.

    Attributes:
        unseen: accuracy on the domain left out.
        seen: accuracy on the domains trained on.
        opposed: share of steps in which the scales' two gradients have different signs; NaN where it is not watched.
        flips: share of steps whose task gradient flips its sign, in the first and in the last third.
        frozen: share of scales that lose a gradient at the end.
    """

    unseen: float
    seen: float
    opposed: float = math.nan
    flips: tuple[float, float] = (math.nan, math.nan)
    frozen: float = math.nan


Found = dict[tuple[str, int], list[Result]]


def check(measure: Measure) -> list[Finding]:
    grids = {
        (arm, bits): [Setting(arm, bits, lr, other) for lr, other in settings]
        for bits in BITS
        for arm, settings in SETTINGS.items()
    }
    chosen = tune(measure, result_of, grids, seeds=TUNING_SEEDS, score=lambda found: found.seen)
    found = evaluate(measure, result_of, chosen, seeds=SEEDS)
    settings = ", ".join(f"{arm} at {bits} bits {s.lr:g} and {s.other:g}" for (arm, bits), s in chosen.items())
    note = (
        f"Learning rate and radius or threshold, by {TUNING_SEEDS} seeds: {settings}. An earlier check tuned by "
        "one seed: training with SAGM collapsed at 4 bits on some others, and no claim was reproduced there either."
    )
    return [_held_out_domain(found, note), _gradient_conflict(found), _freeze_task(found, note)]


def _unseen(found: Found, arm: str, bits: int) -> list[float]:
    return [result.unseen for result in found[arm, bits]]


def _held_out_domain(found: Found, note: str) -> Finding:
    gains = {bits: gaps(_unseen(found, FREEZE_TASK, bits), _unseen(found, SAGM, bits)) for bits in BITS}
    higher = above_zero(*gains.values())
    over_lsq = {
        (arm, bits): gaps(_unseen(found, arm, bits), _unseen(found, LSQ, bits))
        for arm in (SAGM, FREEZE_TASK)
        for bits in BITS
    }
    lower = any(surely_below(gain, 0.0) for gain in gains.values())
    tied = not lower and all(above_zero(*over_lsq.values()))
    says: Verdict = (
        "reproduced" if all(higher) else "partly" if (any(higher) and not lower) or tied else "not reproduced"
    )
    return Finding(
        claim="held-out-domain",
        verdict=says,
        criterion="Accuracy on the domain left out is significantly higher with the task gradient frozen than with "
        "LSQ and SAGM, at 3 and at 4 bits (paired sign-flip test, Holm over the two); partly if at one of them, or if "
        "both are significantly above LSQ alone at both (Holm over the four), and at neither it is significantly "
        "lower.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"accuracy on the domain left out, {bits} bits, {arm}", _unseen(found, arm, bits), "fraction")
                for arm, bits in found
            ),
            *(
                measured(f"accuracy on the domains seen, {bits} bits, {arm}", [r.seen for r in results], "fraction")
                for (arm, bits), results in found.items()
            ),
            *(
                measured(
                    f"freezing above SAGM, {bits} bits", gain, "fraction", paper="up to 0.045 on PACS" * (bits == 4)
                )
                for bits, gain in gains.items()
            ),
            *(measured(f"{arm} above LSQ, {bits} bits", gain, "fraction") for (arm, bits), gain in over_lsq.items()),
            *(
                measured(
                    f"scales frozen at the end, {bits} bits", [r.frozen for r in found[FREEZE_TASK, bits]], "share"
                )
                for bits in BITS
            ),
        ),
        note=note,
    )


def _gradient_conflict(found: Found) -> Finding:
    watched = {bits: found[SAGM, bits] for bits in BITS}
    opposed = {bits: [result.opposed for result in results] for bits, results in watched.items()}
    thirds = {bits: tuple(zip(*(result.flips for result in results), strict=True)) for bits, results in watched.items()}
    falls = {bits: gaps(first, last) for bits, (first, last) in thirds.items()}
    frequent = all(surely_above(shares, FREQUENT) for shares in opposed.values())
    falling = all(above_zero(*falls.values()))
    says: Verdict = "reproduced" if frequent and falling else "partly" if frequent or falling else "not reproduced"
    return Finding(
        claim="gradient-conflict",
        verdict=says,
        criterion=f"In the first rounded layer the two gradients of a scale oppose each other in more than {FREQUENT} "
        "of the steps, by the 95 % interval, at 3 and at 4 bits; and the share of sign flips of the task gradient is "
        "significantly lower in the last third of the training than in the first, at both (paired sign-flip test, "
        "Holm over the two). Partly if one of the two.",
        seeds=tuple(range(SEEDS)),
        measurements=tuple(
            measurement
            for bits in BITS
            for measurement in (
                measured(f"steps with opposed gradients, {bits} bits", opposed[bits], "share"),
                measured(f"sign flips in the first third, {bits} bits", thirds[bits][0], "share"),
                measured(f"sign flips in the last third, {bits} bits", thirds[bits][1], "share"),
                measured(f"sign flips, first third above last, {bits} bits", falls[bits], "share"),
            )
        ),
        note="Watched in the training with SAGM, where nothing is frozen. A cosine of two numbers is their signs' "
        "product.",
    )


def _freeze_task(found: Found, note: str) -> Finding:
    means = {
        arm: [sum(pair) / len(BITS) for pair in zip(*(_unseen(found, arm, bits) for bits in BITS), strict=True)]
        for arm in (FREEZE_TASK, FREEZE_SMOOTH)
    }
    gain = gaps(means[FREEZE_TASK], means[FREEZE_SMOOTH])
    higher = all(above_zero(gain))
    says: Verdict = "reproduced" if higher else "partly" if sum(gain) > 0 else "not reproduced"
    return Finding(
        claim="freeze-task-not-smooth",
        verdict=says,
        criterion="Accuracy on the domain left out, its mean over 3 and 4 bits, is significantly higher with the task "
        "gradient frozen than with the smoothness gradient (paired sign-flip test); partly if it is higher on average "
        "only.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(measured(f"accuracy on the domain left out, {arm}", values, "fraction") for arm, values in means.items()),
            measured("task above smoothness", gain, "fraction", paper="above 0"),
        ),
        note=note,
    )


def in_domain(part: Part, domain: int, generator: torch.Generator) -> Part:
    """The images turned, with the contrast and the noise of a domain."""
    angle = math.radians(ANGLES[domain])
    turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])
    images = part.x.view(-1, 1, 8, 8)
    background = images.min()  # what is turned in from outside
    grid = F.affine_grid(turn.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    turned = F.grid_sample(images - background, grid, align_corners=False) + background
    noise = torch.randn(part.x.shape, generator=generator)
    return Part(CONTRASTS[domain] * turned.flatten(1) + NOISES[domain] * noise, part.y)


def all_of(parts: list[Part]) -> Part:
    return Part(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))


def network(bits: int, streams: Streams) -> nn.Module:
    """A perceptron with four inner layers, whose weights and inputs are rounded."""
    sizes = [64] + [WIDTH] * 5
    with streams.globally("model"):
        layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
        model = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    return lsq_layers(model, bits, bits, skip=first_and_last(model))


def optimizer_of(setting: Setting, model: nn.Module) -> tuple[Optimizer, int]:
    """The optimizer, and how many steps it takes."""
    params = list(model.parameters())
    match setting.arm:
        case "LSQ":
            return torch.optim.Adam(params, lr=setting.lr), 2 * STEPS
        case "LSQ with SAM":
            return SAM(params, torch.optim.Adam, rho=setting.other, lr=setting.lr), STEPS
        case "LSQ with SAGM":  # whose windows hold all of the training, and which freezes nothing
            options: dict[str, Any] = {"rho": setting.other, "window": STEPS, "threshold": 0.0}
        case arm:
            mode = "freeze_task" if arm == FREEZE_TASK else "freeze_smooth"
            options = {"rho": RADIUS, "window": WINDOW, "threshold": setting.other, "mode": mode}
    return GAQAT(params, torch.optim.Adam, quantizers_of(model), **options, lr=setting.lr), STEPS


def result_of(run: Run[Setting]) -> Result:
    """Train on all domains but one; accuracies are on the run's split."""
    streams = Streams(run.seed)
    division, left_out = divide(samples(), 0.2, "all", streams), run.seed % len(ANGLES)
    noise = streams("domains")
    seen = [domain for domain in range(len(ANGLES)) if domain != left_out]
    training = all_of([in_domain(division.training, domain, noise) for domain in seen])
    held_out: Part = getattr(division, run.split)
    known = all_of([in_domain(held_out, domain, noise) for domain in seen])
    model = network(run.setting.bits, streams)
    with torch.no_grad():
        model(training.x[:BATCH])  # which starts the quantisers
    optimizer, steps = optimizer_of(run.setting, model)
    try:
        fit(model, optimizer, training, streams, steps=steps, batch_size=BATCH)
    except Diverged:
        return Result(0.0, 0.0)
    unseen = accuracy_on(model, in_domain(held_out, left_out, noise))
    on_known = accuracy_on(model, known)
    if not isinstance(optimizer, GAQAT):
        return Result(unseen, on_known)
    frozen = optimizer.frozen.float().mean().item()
    if run.setting.arm != SAGM:
        return Result(unseen, on_known, frozen=frozen)
    # two scales belong to the first rounded layer, that of its weights and that of its inputs
    task, smooth = (tracker.latest()[:, :2] for tracker in (optimizer.task, optimizer.smooth))
    flips = (task[1:] != task[:-1]).double().mean(1)
    third = len(flips) // 3
    return Result(
        unseen,
        on_known,
        opposed=(task * smooth < 0).double().mean().item(),
        flips=(flips[:third].mean().item(), flips[-third:].mean().item()),
        frozen=frozen,
    )


@torch.no_grad()
def accuracy_on(model: nn.Module, part: Part) -> float:
    """Wrong for every sample where the scores are no longer finite."""
    model.eval()
    output: Tensor = model(part.x)
    return accuracy(output, part.y) if output.isfinite().all() else 0.0
