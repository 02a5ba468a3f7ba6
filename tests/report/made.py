"""Comparisons made by hand: what the figures are is up to the test."""

from fairtrial.contract import Choice, Costs, Metric, Outcome
from fairtrial.report.origin import Origin
from fairtrial.trial.comparison import Comparison, CostRatios, Judged
from fairtrial.trial.recipe import Recipe
from fairtrial.trial.statistics import differences, verdict
from fairtrial.trial.tuning import Tuned

ACCURACY = Metric("accuracy", "maximize", "fraction", margin=0.005, worst=0.0)
ERROR = Metric("error", "minimize", "fraction", margin=0.005, worst=2.0)
ORIGIN = Origin(
    "fairtrial compare digits optimizer=A,B --trials 3 --seeds 8",
    {"python": "3.11.7", "torch": "2.13.0"},
    ["0123abcd"],
)
TRACEBACK = 'Traceback (most recent call last):\n  File "task.py", line 1, in run\nRuntimeError: it broke'


def finished(value, steps=4, **more):
    curve = [(10 * step, value * step / steps) for step in range(1, steps + 1)]
    return Outcome(value, curve=curve, costs=Costs(0.001, 5_000_000, 800, 100), seconds=1.5, **more)


def failed(metric=ACCURACY, ended="diverged", error="the loss is infinite"):
    return Outcome(metric.worst, ended, curve=[(10, 0.1)], error=error)


def pruned(value):
    return Outcome(value, "pruned", curve=[(10, value)])


def tuning(recipe, *tried):
    """A tuning by hand: (params, outcome), … of which the best finished one is taken."""
    came_through = [(params, outcome.value) for params, outcome in tried if outcome.ended == "finished"]
    if not came_through:
        return Tuned(recipe, {}, tried)
    best, value = max(came_through, key=lambda found: found[1])
    by_slot = {}
    for key, setting in best.items():
        slot, _, name = key.partition(".")
        by_slot.setdefault(slot, {})[name] = setting
    return Tuned(recipe, by_slot, tried, value)


def tunings(recipe, seeds):
    """For each seed three runs: one finished, one pruned, one better."""
    return [
        tuning(
            recipe,
            ({"optimizer.lr": 0.001, "optimizer.kind": "soft"}, finished(0.7 + seed / 100)),
            ({"optimizer.lr": 0.5, "optimizer.kind": "hard"}, pruned(0.2)),
            ({"optimizer.lr": 0.01 * (1 + seed), "optimizer.kind": "soft"}, finished(0.8 + seed / 100)),
        )
        for seed in range(seeds)
    ]


def comparison(outcomes, *, task="digits", metric=ACCURACY, slot="optimizer", tuned=tunings, seeds=None, **more):
    """Of outcomes by the recipes' names, the baseline's first; seeds may be fewer for some."""
    names = list(outcomes)
    values = [[outcome.value for outcome in found] for found in outcomes.values()]
    count = len(values[0])
    found = [None]
    for place in range(1, len(names)):
        found += differences(values[0][: len(values[place])], [values[place]])
    judged = []
    for place, name in enumerate(names):
        recipe = Recipe(task, {slot: Choice(name)})
        own = tuned(recipe, len(values[place]))
        difference = found[place]
        judged.append(
            Judged(
                name,
                recipe,
                own[0] if own else Tuned(recipe, {}),
                outcomes[name],
                CostRatios(1.0 + 0.5 * place, 1.0 - 0.1 * place, 800, 100),
                difference,
                difference and verdict(difference, metric.sign, metric.margin),
                50 if difference else None,
                own,
            )
        )
    given = {"trials": 3, "tuning_seeds": [1_000_000 + seed for seed in range(count)], **more}
    return Comparison(task, 1, metric, evaluation_seeds=list(range(count)), recipes=judged, **given)


def usual(**more):
    """A baseline, a better, a worse and an equivalent method, and one of which two runs fail."""
    noise = [0.01, -0.02, 0.015, 0.0, -0.005, 0.02, -0.01, 0.005]
    jitter = [0.001, -0.001, 0.0005, -0.0005, 0.001, 0.0, -0.001, 0.0]
    base = [0.9 + n for n in noise]
    return comparison(
        {
            "A": [finished(v) for v in base],
            "Better": [finished(v + 0.03 + j) for v, j in zip(base, jitter, strict=True)],
            "Worse": [finished(v - 0.05 + j) for v, j in zip(base, jitter, strict=True)],
            "Alike": [finished(v + j) for v, j in zip(base, jitter, strict=True)],
            "Broken": [
                failed() if seed in (1, 2) else failed(ended="died", error=TRACEBACK) if seed == 5 else finished(v)
                for seed, v in enumerate(base)
            ],
        },
        **more,
    )
