"""The claims of TopoMortar: clDice with accurate labels, and Skeleton Recall with noisy ones.

The tasks `thin-structures` and `thin-structures-noisy` instead of photographs: synthetic brick walls, a small U-Net,
AdamW along a cosine. The losses keep the paper's constants; each has four learning rates to choose among for each kind
of labels, by the Betti dissimilarity on validation data with accurate labels.
"""

from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from fairtrial.catalog import Finding, Measurement, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.measure import Measure, measured
from fairtrial.claims.paired import above_zero, gaps
from fairtrial.contract import Choice, Diverged
from fairtrial.tasks.thin_structures import thin_structures, thin_structures_noisy

RATES = (3e-3, 6e-3, 1.2e-2, 2.4e-2)
TUNING_SEEDS, SEEDS = 1, 10
FEWER, AS_GOOD = 0.2, 0.02  # part of the baseline's error, and Dice

ACCURATE, NOISY = "accurate labels", "noisy labels"
TASKS = {ACCURATE: thin_structures, NOISY: thin_structures_noisy}
CE, CE_DICE, CL_DICE, RECALL = "CE", "CE + Dice", "clDice", "Skeleton Recall"
LOSSES = {CE: "CrossEntropyLoss", CE_DICE: "CEDiceLoss", CL_DICE: "SoftCLDiceLoss", RECALL: "SkeletonRecallLoss"}
PAPER = {
    (ACCURATE, CE_DICE): ("3.31", "2.13", "0.91"),
    (ACCURATE, CL_DICE): ("1.17", "1.41", "0.91"),
    (ACCURATE, RECALL): ("3.08", "1.73", "0.91"),
    (NOISY, CE_DICE): ("6.24", "5.08", "0.63"),
    (NOISY, CL_DICE): ("5.01", "6.77", "0.69"),
    (NOISY, RECALL): ("3.79", "1.49", "0.76"),
}


@dataclass(frozen=True)
class Setting:
    """The labels to learn from, the loss, and the learning rate."""

    labels: str
    loss: str
    lr: float


class Judged(NamedTuple):
    """What a trained model found, on average over images."""

    dissimilarity: float
    components: float
    holes: float
    dice: float


DIVERGED = Judged(1.0, 100.0, 100.0, 0.0)  # more errors than any model that was trained

Arm = tuple[str, str]  # labels and loss


def check(measure: Measure) -> list[Finding]:
    grids = {(labels, loss): [Setting(labels, loss, lr) for lr in RATES] for labels in TASKS for loss in LOSSES}
    chosen = tune(measure, judged, grids, seeds=TUNING_SEEDS, score=lambda result: -result.dissimilarity)
    results = evaluate(measure, judged, chosen, seeds=SEEDS)
    return [_components(results, _note(chosen, ACCURATE)), _noisy(results, _note(chosen, NOISY))]


def judged(run: Run[Setting]) -> Judged:
    """Train, and judge by accurate labels."""
    setting = run.setting
    choices = {"loss": Choice(LOSSES[setting.loss]), "optimizer": Choice("AdamW", {"lr": setting.lr})}
    try:
        outcome = TASKS[setting.labels].run(choices, run.seed, split=run.split)
    except Diverged:
        return DIVERGED
    found = outcome.metrics
    return Judged(outcome.value, found["Betti-0 error"], found["Betti-1 error"], found["Dice"])


def _note(chosen: dict[Arm, Setting], labels: str) -> str:
    rates = "; ".join(f"{loss}: {chosen[labels, loss].lr:g}" for loss in LOSSES)
    return f"Learning rates, by validation: {rates}. The paper has photographs of 38 to 68 bricks."


def _components(results: dict[Arm, list[Judged]], note: str) -> Finding:
    baseline, ours = results[ACCURATE, CE_DICE], results[ACCURATE, CL_DICE]
    errors = [[result.components for result in arm] for arm in (baseline, ours)]
    fall = gaps(*errors)
    (fewer,) = above_zero(fall)
    by_enough = fmean(fall) >= FEWER * fmean(errors[0])
    change = gaps([result.dice for result in ours], [result.dice for result in baseline])
    at_equal_dice = abs(fmean(change)) <= AS_GOOD
    says: Verdict = "not reproduced"
    if fewer:
        says = "reproduced" if by_enough and at_equal_dice else "partly"
    return Finding(
        claim="cldice-components",
        verdict=says,
        criterion="clDice's Betti-0 error is significantly below that of CE + Dice (paired sign-flip test), by at "
        "least 20 % of the latter's mean, with mean Dice within 0.02; partly if significantly below it, but by less or "
        "at another Dice.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            measured("fall of the Betti-0 error, CE + Dice to clDice", fall, "pieces", paper="2.14"),
            measured("change in Dice, CE + Dice to clDice", change, "fraction", paper="0"),
            *_figures(results, ACCURATE),
        ),
        note=note,
    )


def _noisy(results: dict[Arm, list[Judged]], note: str) -> Finding:
    recall = results[NOISY, RECALL]

    def fall(other: str, of: int) -> list[float]:
        return gaps([result[of] for result in results[NOISY, other]], [result[of] for result in recall])

    components, holes = Judged._fields.index("components"), Judged._fields.index("holes")
    falls = [fall(CE_DICE, components), fall(CE_DICE, holes), fall(CL_DICE, holes)]
    *below_baseline, below_cl_dice = above_zero(*falls)
    says: Verdict = "not reproduced"
    if any(below_baseline):
        says = "reproduced" if all(below_baseline) and below_cl_dice else "partly"
    names = (
        ("fall of the Betti-0 error, CE + Dice to Skeleton Recall", "pieces", "2.45"),
        ("fall of the Betti-1 error, CE + Dice to Skeleton Recall", "holes", "3.59"),
        ("fall of the Betti-1 error, clDice to Skeleton Recall", "holes", "5.28"),
    )
    return Finding(
        claim="skeleton-recall-noisy",
        verdict=says,
        criterion="Skeleton Recall's errors are significantly below those of CE + Dice in Betti-0 and in Betti-1, and "
        "below that of clDice in Betti-1 (paired sign-flip tests, Holm over the three); partly if below CE + Dice in "
        "at least one of the two.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(name, values, unit, paper=paper)
                for values, (name, unit, paper) in zip(falls, names, strict=True)
            ),
            *_figures(results, NOISY),
        ),
        note=note,
    )


def _figures(results: dict[Arm, list[Judged]], labels: str) -> list[Measurement]:
    names = (("Betti-0 error", "pieces"), ("Betti-1 error", "holes"), ("Dice", "fraction"))
    found = []
    for loss in LOSSES:
        _, *columns = zip(*results[labels, loss], strict=True)
        papers = PAPER.get((labels, loss), ("", "", ""))
        for (name, unit), values, paper in zip(names, columns, papers, strict=True):
            found.append(measured(f"{name}, {loss}", values, unit, paper=paper))
    return found
