"""A comparison: recipes tuned alike, run on the same fresh seeds, judged against the baseline."""

import math
import statistics as median_of
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any, Protocol

from fairtrial.contract import BadInput, Metric, Outcome, Task
from fairtrial.trial.execute import Executor, Job
from fairtrial.trial.fingerprint import fingerprint
from fairtrial.trial.recipe import Recipe, Run, check_budget, recipe_name, recipes_for
from fairtrial.trial.statistics import (
    Difference,
    Verdict,
    differences,
    fewest_seeds,
    seeds_to_decide,
    verdict,
)
from fairtrial.trial.store import Store
from fairtrial.trial.tuning import Tuned, tune

FIRST_TUNING_SEED = 1_000_000  # evaluation seeds count from 0; the two never meet


class Progress(Protocol):
    """Told what a comparison is doing; all figures count runs."""

    def __call__(self, *, done: int, total: int, running: int, failed: int, stored: int) -> None: ...


def unwatched(*, done: int, total: int, running: int, failed: int, stored: int) -> None:
    """For those who only want the result."""


@dataclass(frozen=True)
class CostRatios:
    """What a recipe costs; ratios are to the baseline of the same comparison, medians over seeds."""

    step_time_ratio: float | None
    peak_memory_ratio: float | None
    optimizer_state_bytes: int | None
    trainable_parameters: int | None


@dataclass(frozen=True)
class Judged:
    """A recipe of a comparison: what it was tuned to, what it measured, and what may be said of it."""

    name: str
    recipe: Recipe
    tuned: Tuned
    outcomes: Sequence[Outcome]
    costs: CostRatios
    difference: Difference | None
    verdict: Verdict | None
    seeds_to_decide: int | None

    @property
    def values(self) -> list[float]:
        return [outcome.value for outcome in self.outcomes]

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.outcomes)

    @property
    def failed(self) -> int:
        return sum(outcome.failed for outcome in self.outcomes)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "choices": self.recipe.as_json(),
            "tuned": {slot: dict(params) for slot, params in self.tuned.params.items()},
            "values": self.values,
            "mean": self.mean,
            "difference": {key: _finite(value) for key, value in asdict(self.difference).items()}
            if self.difference
            else None,
            "verdict": self.verdict,
            "seeds_to_decide": self.seeds_to_decide,
            "failed": self.failed,
            "costs": asdict(self.costs),
        }


@dataclass(frozen=True)
class Comparison:
    """The whole of it; the first recipe is the baseline."""

    task: str
    version: int
    metric: Metric
    trials: int
    tuning_seeds: Sequence[int]
    evaluation_seeds: Sequence[int]
    recipes: Sequence[Judged]

    @property
    def decidable(self) -> bool:
        """Whether any outcome could have been significant with so many seeds and methods."""
        return len(self.evaluation_seeds) >= fewest_seeds(len(self.recipes) - 1)

    def as_json(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "version": self.version,
            "metric": {key: getattr(self.metric, key) for key in ("name", "direction", "unit", "margin", "worst")},
            "baseline": self.recipes[0].name,
            "trials": self.trials,
            "seeds": {"tuning": list(self.tuning_seeds), "evaluation": list(self.evaluation_seeds)},
            "decidable": self.decidable,
            "recipes": [judged.as_json() for judged in self.recipes],
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def compare(
    load: Callable[[str], Task],
    reference: str,
    wanted: Mapping[str, str],
    *,
    executor: Executor,
    store: Store,
    trials: int = 8,
    seeds: int = 10,
    progress: Progress = unwatched,
) -> Comparison:
    """Tune every recipe with equal budgets, run the best of each on fresh seeds, judge.

    Args:
        load: gives the task for a reference; a module-level function, since workers call it too.
        reference: the task's name, or what else `load` takes.
        wanted: choices by slot, as text: {'optimizer': 'AdamW,FRUGAL(density=0.25)'}.
        executor: carries the runs out; entered by the caller.
        store: what is recorded there is not run again.
        trials: tuning runs of each recipe.
        seeds: evaluation seeds.
        progress: told after every run.

    Raises:
        BadInput: something asked for does not exist or is out of range.
        StoreError: the store cannot be used.
    """
    check_budget("trials", trials)
    check_budget("seeds", seeds)
    if seeds > FIRST_TUNING_SEED:
        raise BadInput(f"seeds must be at most {FIRST_TUNING_SEED}, got {seeds}")
    task = load(reference)
    recipes = recipes_for(task, reference, wanted)
    conduct = _Conduct(task, executor, store, progress, total=len(recipes) * (trials + seeds))
    tuned = conduct.all_of([tune(task, recipe, trials, FIRST_TUNING_SEED) for recipe in recipes])
    conduct.total = conduct.done + len(recipes) * seeds
    best = [recipe.with_params(result.params) for recipe, result in zip(recipes, tuned, strict=True)]
    jobs = [Job(Run(recipe, seed, "test")) for seed in range(seeds) for recipe in best]
    outcomes = conduct.all_of([_one_wave(jobs)])[0]
    by_recipe = [outcomes[place :: len(recipes)] for place in range(len(recipes))]
    return Comparison(
        task.name,
        task.version,
        task.metric,
        trials,
        [FIRST_TUNING_SEED],
        list(range(seeds)),
        _judge(task.metric, recipes, tuned, by_recipe),
    )


def _one_wave(jobs: list[Job]) -> Generator[list[Job], list[Outcome], list[Outcome]]:
    outcomes = yield jobs
    return outcomes


def _judge(
    metric: Metric, recipes: Sequence[Recipe], tuned: Sequence[Tuned], by_recipe: Sequence[Sequence[Outcome]]
) -> list[Judged]:
    values = [[outcome.value for outcome in outcomes] for outcomes in by_recipe]
    found: list[Difference | None] = [None, *differences(values[0], values[1:])]
    judged = []
    for place, (recipe, difference) in enumerate(zip(recipes, found, strict=True)):
        said = None if difference is None else verdict(difference, metric.sign, metric.margin)
        needed = None
        if said == "undecided":
            paired = [a - b for a, b in zip(values[place], values[0], strict=True)]
            needed = seeds_to_decide(paired, metric.margin, len(recipes) - 1)
        name = _baseline_name(recipes) if place == 0 else recipe_name(recipe, recipes[0])
        costs = _cost_ratios(by_recipe[place], by_recipe[0])
        judged.append(Judged(name, recipe, tuned[place], by_recipe[place], costs, difference, said, needed))
    return judged


def _baseline_name(recipes: Sequence[Recipe]) -> str:
    """The baseline is called after what it has where the others differ."""
    baseline = recipes[0].choices
    swapped = [slot for slot in baseline if any(other.choices[slot] != baseline[slot] for other in recipes[1:])]
    return " + ".join(str(baseline[slot]) for slot in swapped)


def _cost_ratios(outcomes: Sequence[Outcome], baseline: Sequence[Outcome]) -> CostRatios:
    paired = [(a.costs, b.costs) for a, b in zip(outcomes, baseline, strict=True) if not (a.failed or b.failed)]
    own = [outcome.costs for outcome in outcomes if not outcome.failed]

    def ratio(name: str) -> float | None:
        ratios = [getattr(a, name) / getattr(b, name) for a, b in paired if getattr(a, name) and getattr(b, name)]
        return median_of.median(ratios) if ratios else None

    def middle(name: str) -> int | None:
        known = [getattr(costs, name) for costs in own if getattr(costs, name) is not None]
        return int(median_of.median_low(known)) if known else None

    return CostRatios(
        ratio("step_time"), ratio("peak_memory"), middle("optimizer_state_bytes"), middle("trainable_parameters")
    )


class _Conduct:
    """Hands jobs to the executor and outcomes to the store and to those who wait for them."""

    def __init__(self, task: Task, executor: Executor, store: Store, progress: Progress, total: int) -> None:
        self.task, self.executor, self.store, self.progress, self.total = task, executor, store, progress, total
        self.done = self.failed = self.stored = 0
        self.fingerprints: dict[tuple[str, ...], str] = {}

    def all_of(self, flows: Sequence[Generator[list[Job], list[Outcome], Any]]) -> list[Any]:
        """Drive flows, which yield waves of jobs and are sent their outcomes, to their ends, side by side."""
        results: list[Any] = [None] * len(flows)
        waves: dict[int, list[Outcome | None]] = {}
        origin: dict[Job, tuple[int, int]] = {}

        def begin(flow: int, sent: list[Outcome] | None) -> None:
            while True:
                try:
                    jobs = next(flows[flow]) if sent is None else flows[flow].send(sent)
                except StopIteration as end:
                    results[flow] = end.value
                    return
                waves[flow] = [self._recorded(job) for job in jobs]
                for place, job in enumerate(jobs):
                    if waves[flow][place] is None:
                        origin[job] = (flow, place)
                        self.executor.submit(job)
                if None in waves[flow]:
                    return
                sent = [outcome for outcome in waves[flow] if outcome is not None]

        for flow in range(len(flows)):
            begin(flow, None)
        while origin:
            job, outcome = self.executor.next()
            flow, place = origin.pop(job)
            code = self._fingerprint(job.run)
            self.store.put(self._key(job.run), job.run, self.task.name, self.task.version, code, outcome)
            self._count(outcome)
            wave = waves[flow]
            wave[place] = outcome
            if None not in wave:
                begin(flow, [finished for finished in wave if finished is not None])
        return results

    def _count(self, outcome: Outcome) -> None:
        self.done += 1
        self.failed += outcome.failed
        self.progress(
            done=self.done, total=self.total, running=self.executor.running, failed=self.failed, stored=self.stored
        )

    def _recorded(self, job: Job) -> Outcome | None:
        """What the store has, as if it had just been run: stopped where the pruner would have stopped it."""
        outcome = self.store.get(self._key(job.run))
        if outcome is None:
            return None
        if job.pruner is not None:
            for length in range(1, len(outcome.curve) + 1):
                if job.pruner.hopeless(outcome.curve[:length]):
                    curve = outcome.curve[:length]
                    outcome = replace(outcome, value=curve[-1][1], ended="pruned", curve=curve, error=None)
                    break
            else:
                if outcome.ended == "pruned":
                    return None  # it was stopped under other conditions; now it must run to its end
        elif outcome.ended == "pruned":
            return None
        self.stored += 1
        self._count(outcome)
        return outcome

    def _key(self, run: Run) -> str:
        return run.key(task=self.task.name, version=self.task.version, fingerprint=self._fingerprint(run))

    def _fingerprint(self, run: Run) -> str:
        """Code of the task and of the methods chosen, and the versions of what computes."""
        names = tuple(choice.name for _, choice in sorted(run.recipe.choices.items()))
        if names not in self.fingerprints:
            modules = [source_of(self.task, run.recipe.task)]
            for slot, choice in run.recipe.choices.items():
                option = self.task.slots[slot].options[choice.name]
                modules += [option.factory.__module__, option.bind.__module__]
            versions = "-".join(version(package) for package in ("torch", "numpy", "scikit-learn"))
            self.fingerprints[names] = f"{fingerprint(modules)}-{versions}"
        return self.fingerprints[names]


def source_of(task: Task, reference: str) -> str:
    """The module, or the file, whose code decides what a task does; a task may name it as `source`."""
    path, ending, rest = reference.rpartition(".py")
    if ending and rest[:1] in ("", ":"):
        return path + ending
    return str(getattr(task, "source", type(task).__module__))
