"""The claims of the WSD-S paper: one run for many budgets, going on from decayed weights, and the shape of the loss.

The bench's byte transformer on Python's documentation text instead of language models on the Pile. All rates fall to a
tenth of the peak, there is no warm-up, and every schedule sees the same batches in the same order. The peak rate of
each is tuned over the same three values: a cosine run's for its own budget, the others' by the mean over checkpoints.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice, pairwise
from statistics import fmean, median

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import RandomSampler

from fairtrial.catalog import Finding
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.measure import Measure, measured, single
from fairtrial.claims.paired import above_zero, gaps, relative_gaps, surely_below
from fairtrial.contract import Diverged
from fairtrial.methods.schedules.wsd_s import WSDLR, WSDSLR, CyclicCosineLR
from fairtrial.tasks.samples import Part, divide
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import predict
from fairtrial.tasks.text import ByteTransformer, samples, text
from fairtrial.tasks.training import index_batches

BATCH = 8
ENDS = (150, 300, 600)
DECAYS = tuple((end - start) // 10 for start, end in pairwise((0, *ENDS)))  # WSD's branches decay as long as WSD-S
PEAKS = (5e-4, 1e-3, 2e-3)
TUNING_SEEDS, SEEDS = 1, 8


@dataclass(frozen=True)
class Plan:
    """A schedule and the steps at which it has a decayed checkpoint; cosine with several is cyclic cosine."""

    schedule: str
    ends: tuple[int, ...]


ORACLE = tuple(Plan("cosine", (end,)) for end in ENDS)
CYCLIC, WSD_S, WSD = (Plan(schedule, ENDS) for schedule in ("cosine", "WSD-S", "WSD"))


@dataclass(frozen=True)
class Setting:
    """A plan with its peak rate."""

    plan: Plan
    peak: float


Losses = dict[Plan, list[dict[int, float]]]  # for each seed the loss after so many steps


def check(measure: Measure) -> list[Finding]:
    grids = {plan: [Setting(plan, peak) for peak in PEAKS] for plan in (*ORACLE, CYCLIC, WSD_S, WSD)}
    chosen = tune(measure, losses, grids, seeds=TUNING_SEEDS, score=lambda found: -fmean(found.values()))
    reached = evaluate(measure, losses, chosen, seeds=SEEDS)
    tuned = "Peak rates: " + ", ".join(
        f"{plan.schedule} to {'/'.join(map(str, plan.ends))} {setting.peak:g}" for plan, setting in chosen.items()
    )
    return [_one_run(reached, tuned), _against_wsd(reached, tuned), _shape_of_the_loss(reached)]


def _at(reached: Losses, plan: Plan, step: int) -> list[float]:
    return [found[step] for found in reached[plan]]


def _one_run(reached: Losses, tuned: str) -> Finding:
    one_run = {end: _at(reached, WSD_S, end) for end in ENDS}
    separate = {plan.ends[0]: _at(reached, plan, plan.ends[0]) for plan in ORACLE}
    cyclic = {end: _at(reached, CYCLIC, end) for end in ENDS}
    over = {end: relative_gaps(one_run[end], separate[end]) for end in ENDS}
    as_good = all(surely_below(over[end], 0.01) for end in ENDS)
    ahead = all(above_zero(*(gaps(cyclic[end], one_run[end]) for end in ENDS[1:])))
    return Finding(
        claim="one-run-many-budgets",
        verdict="reproduced" if as_good and ahead else "partly" if as_good or ahead else "not reproduced",
        criterion="The loss of WSD-S is less than 1 % above that of the separate cosine runs at every checkpoint (95 % "
        "interval of the mean paired difference) and significantly below that of cyclic cosine at the second and third "
        "(paired sign-flip test, Holm); partly if only one of the two holds.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"loss at step {end}, {name}", found[end], "bits per byte")
                for end in ENDS
                for name, found in (("WSD-S", one_run), ("separate cosine runs", separate), ("cyclic cosine", cyclic))
            ),
            *(
                measured(f"WSD-S above the separate cosine run, step {end}", over[end], "fraction of the latter's loss")
                for end in ENDS
            ),
            single("steps for all budgets, WSD-S", ENDS[-1], "steps"),
            single("steps for all budgets, separate cosine runs", sum(ENDS), "steps"),
        ),
        note=f"Loss on test text. {tuned}.",
    )


def _against_wsd(reached: Losses, tuned: str) -> Finding:
    over = {end: relative_gaps(_at(reached, WSD_S, end), _at(reached, WSD, end)) for end in ENDS}
    no_worse = [surely_below(over[end], 0.005) for end in ENDS[1:]]
    return Finding(
        claim="no-worse-than-wsd",
        verdict="reproduced" if all(no_worse) else "partly" if any(no_worse) else "not reproduced",
        criterion="The loss of WSD-S is less than 0.5 % above that of WSD at the second and third checkpoint (95 % "
        "interval of the mean paired difference); partly at one of them.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"loss at step {end}, {plan.schedule}", _at(reached, plan, end), "bits per byte")
                for end in ENDS
                for plan in (WSD_S, WSD)
            ),
            *(measured(f"WSD-S above WSD, step {end}", over[end], "fraction of WSD's loss") for end in ENDS),
            single("steps for all budgets, WSD-S", ENDS[-1], "steps"),
            single("steps for all budgets, WSD", ENDS[-1] + sum(DECAYS[:-1]), "steps"),
        ),
        note=f"Loss on test text. WSD's branches decay over as many steps as WSD-S does at the same checkpoint: "
        f"{', '.join(map(str, DECAYS))}. {tuned}.",
    )


def _shape_of_the_loss(reached: Losses) -> Finding:
    before, start, end = _last_decay(WSD_S)
    stable = gaps(_at(reached, WSD_S, before), _at(reached, WSD_S, start))
    decay = gaps(_at(reached, WSD_S, start), _at(reached, WSD_S, end))
    excess = gaps(decay, [3 * drop for drop in stable])
    sharp = [more >= 0 and drop > 0 for more, drop in zip(excess, decay, strict=True)]
    in_the_median = median(excess) >= 0 and median(decay) > 0
    return Finding(
        claim="decay-reveals-progress",
        verdict="reproduced" if all(sharp) else "partly" if in_the_median else "not reproduced",
        criterion="In the last decay the loss falls, and at least three times as far as over as many steps before it, "
        "in every seed; partly if so in the median over seeds.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            measured(f"fall of the loss in the decay, steps {start} to {end}", decay, "bits per byte"),
            measured(f"fall of the loss at the full rate, steps {before} to {start}", stable, "bits per byte"),
            single("seeds in which the fall in the decay is at least three times the other", sum(sharp), "seeds"),
        ),
        note="Loss of the WSD-S runs on test text.",
    )


def _last_decay(plan: Plan) -> tuple[int, int, int]:
    """As many steps before it as it has, its start, and its end."""
    return plan.ends[-1] - 2 * DECAYS[-1], plan.ends[-1] - DECAYS[-1], plan.ends[-1]


def losses(run: Run[Setting]) -> dict[int, float]:
    """Bits per byte at the checkpoints; of WSD-S on test text also before and at the start of the last decay."""
    plan, streams = run.setting.plan, Streams(run.seed)
    division = divide(samples(), text.validation, text.scale, streams)
    training, held_out = division.training, getattr(division, run.split)
    order = RandomSampler(range(len(training.x)), generator=streams("order"))
    batches = list(islice(index_batches(order, BATCH), plan.ends[-1]))
    with streams.globally("model"):
        model = ByteTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.setting.peak)
    found = {}
    done = 0
    if plan.schedule == "WSD":
        trunk = WSDLR(optimizer, ENDS[-1], decay_fraction=DECAYS[-1] / ENDS[-1])  # at the full rate as far as it goes
        for end, decay in zip(ENDS, DECAYS, strict=True):
            _advance(model, optimizer, trunk, training, batches[done : end - decay])
            done = end - decay
            branch, own = deepcopy((model, optimizer))
            _advance(
                branch,
                own,
                WSDLR(own, end, decay_fraction=decay / end, last_epoch=done - 1),
                training,
                batches[done:end],
            )
            found[end] = _bits(branch, held_out)
        return found
    schedule = {"cosine": CyclicCosineLR, "WSD-S": WSDSLR}[plan.schedule](optimizer, plan.ends)
    looks = {*plan.ends, *(_last_decay(plan) if plan == WSD_S and run.split == "test" else ())}
    for look in sorted(looks):
        _advance(model, optimizer, schedule, training, batches[done:look])
        found[look], done = _bits(model, held_out), look
    return found


def _advance(
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    training: Part,
    batches: Sequence[Int[Tensor, " b"]],
) -> None:
    for batch in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(training.x[batch]), training.y[batch].flatten()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def _bits(model: nn.Module, part: Part) -> float:
    """What the task measures; its worst value if training has diverged."""
    try:
        return text.measure(*predict(model, part))
    except Diverged:
        return text.metric.worst
