"""The claims of SuSana Distancia: few-shot accuracy by the prototype triplet, and by the neighbourhood loss beside it.

The bench's digits-fewshot instead of miniImageNet: 5-way episodes of classes that are neither trained on nor validated
with, an MLP, trained and judged with 1 and with 5 examples of each class. Every arm gets the same nine tuning settings
at each number of shots: three learning rates, and three temperatures of cross entropy, margins of the triplet, or both.
"""

from dataclasses import dataclass, replace
from functools import partial

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.measure import Measure, measured
from fairtrial.claims.paired import above_zero, gaps
from fairtrial.contract import Choice, Diverged
from fairtrial.tasks.digits_fewshot import digits_fewshot
from fairtrial.tasks.episodes import QUERIES, WAYS, episode_slots, few_shot_accuracy
from fairtrial.tasks.retrieval import RetrievalTask

TUNING_SEEDS, SEEDS = 2, 12
STEPS = 300
SHOTS = (1, 5)
RATES = (3e-4, 1e-3, 3e-3)
VALUES = ((0.1, 0.2), (1.0, 0.5), (10.0, 2.0))  # temperature and margin
CROSS, TRIPLET = "cross entropy", "triplet"
BOTH, ALL = "cross entropy and triplet", "with the neighbourhood loss"
TERMS = {
    CROSS: ("cross",),
    TRIPLET: ("prototriplet",),
    BOTH: ("cross", "prototriplet"),
    ALL: ("cross", "prototriplet", "fullicnn"),
}

Accuracies = dict[tuple[str, int], list[float]]


@dataclass(frozen=True)
class Setting:
    """An arm, the shots of its episodes, and what is tuned."""

    arm: str
    shots: int
    temperature: float
    margin: float
    lr: float

    def __str__(self) -> str:
        return f"{self.shots}-shot {self.arm}: {self.temperature:g}, {self.margin:g}, {self.lr:g}"


def check(measure: Measure) -> list[Finding]:
    grids = {
        (arm, shots): [Setting(arm, shots, *values, lr) for values in VALUES for lr in RATES]
        for arm in TERMS
        for shots in SHOTS
    }
    best = tune(measure, accuracy, grids, seeds=TUNING_SEEDS, score=float)
    found = evaluate(measure, accuracy, best, seeds=SEEDS)
    chosen = "; ".join(map(str, best.values()))
    note = f"Temperature, margin and learning rate chosen on {TUNING_SEEDS} tuning seeds: {chosen}."
    return [_triplet(found, note), _neighbourhood(found, note)]


def accuracy(run: Run[Setting]) -> float:
    """Train on episodes, and classify queries of classes that were not trained on."""
    setting = run.setting
    loss = {"terms": TERMS[setting.arm], "margin": setting.margin, "temperature": setting.temperature}
    choices = {"loss": Choice("EpisodeLoss", loss), "optimizer": Choice("AdamW", {"lr": setting.lr})}
    try:
        return with_shots(setting.shots).run(choices, run.seed, split=run.split).value
    except Diverged:
        return 0.0


def with_shots(shots: int) -> RetrievalTask:
    """The bench's task, trained and judged with so many examples of each class."""
    return replace(
        digits_fewshot,
        total_steps=STEPS,
        batch_size=WAYS * (shots + QUERIES),
        slots=episode_slots(shots),
        measure=partial(few_shot_accuracy, shots=shots),
        also={},
    )


def _triplet(found: Accuracies, note: str) -> Finding:
    gained = {(arm, shots): gaps(found[arm, shots], found[CROSS, shots]) for arm in (TRIPLET, BOTH) for shots in SHOTS}
    better = above_zero(*gained.values())
    says: Verdict = "reproduced" if all(better) else "partly" if any(better) else "not reproduced"
    return Finding(
        claim="proto-triplet",
        verdict=says,
        criterion="With 1 and with 5 shots, the triplet alone and with cross entropy are both significantly more "
        "accurate on unseen classes than cross entropy (paired sign-flip test, Holm over the four); partly if one is "
        "at one number of shots.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"gain over {CROSS}, {arm}, {shots}-shot", gain, "fraction", paper=_paper(arm))
                for (arm, shots), gain in gained.items()
            ),
            *(
                measured(f"accuracy, {arm}, {shots}-shot", found[arm, shots], "fraction")
                for shots in SHOTS
                for arm in (CROSS, TRIPLET, BOTH)
            ),
        ),
        note=note,
    )


def _paper(arm: str) -> str:
    return "about 0.02 on miniImageNet, over other methods" if arm == BOTH else ""


def _neighbourhood(found: Accuracies, note: str) -> Finding:
    gained = {shots: gaps(found[ALL, shots], found[BOTH, shots]) for shots in SHOTS}
    better = above_zero(*gained.values())
    says: Verdict = "reproduced" if all(better) else "partly" if any(better) else "not reproduced"
    return Finding(
        claim="neighbourhood-term",
        verdict=says,
        criterion="With 1 and with 5 shots, adding the neighbourhood loss to cross entropy and triplet makes the "
        "accuracy on unseen classes significantly higher (paired sign-flip test, Holm over the two); partly if with "
        "one of them.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(measured(f"gain by the neighbourhood loss, {shots}-shot", gained[shots], "fraction") for shots in SHOTS),
            *(
                measured(f"accuracy, {arm}, {shots}-shot", found[arm, shots], "fraction")
                for shots in SHOTS
                for arm in (BOTH, ALL)
            ),
        ),
        note=note,
    )
