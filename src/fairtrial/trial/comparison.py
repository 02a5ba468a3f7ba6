"""A comparison: recipes tuned alike, run on the same fresh seeds, judged against the baseline."""

import math
import statistics as median_of
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any, Protocol

from fairtrial.contract import BadInput, Metric, Outcome, Task
from fairtrial.trial import sequential, statistics
from fairtrial.trial.database import StoreError
from fairtrial.trial.execute import Executor, Job
from fairtrial.trial.fingerprint import fingerprint
from fairtrial.trial.recipe import Recipe, Run, check_budget, check_recipes, recipe_name, recipes_for
from fairtrial.trial.statistics import Difference, Verdict, verdict
from fairtrial.trial.store import Store
from fairtrial.trial.tuning import Tried, Tuned, search_space, tune, tuning_key

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
    """A recipe of a comparison: what it was tuned to, what it measured, and what may be said of it.

    Attributes:
        name: what sets it apart from the baseline.
        recipe: as it was asked for.
        tuned: of its tunings the one that did best on validation data.
        outcomes: on test data, one for each evaluation seed.
        costs: relative to the baseline.
        difference: to the baseline; None for the baseline itself.
        verdict: what may be said of it; None for the baseline.
        seeds_to_decide: how many would probably decide it, if it is undecided and that can be said.
        tunings: what it was tuned to for each evaluation seed.
    """

    name: str
    recipe: Recipe
    tuned: Tuned
    outcomes: Sequence[Outcome]
    costs: CostRatios
    difference: Difference | None
    verdict: Verdict | None
    seeds_to_decide: int | None
    tunings: Sequence[Tuned] = ()

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
            "tuned": _plain(self.tuned),
            "tuned_by_seed": [_plain(tuned) for tuned in self.tunings],
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
class Stopping:
    """How far a comparison went that was to stop when every verdict was in.

    Attributes:
        budget: seeds that every recipe might have had, the last look that the seeds asked for allow.
        looks: how many seeds there were each time it was looked.
        runs: runs that it came to, tuning and the baseline's too.
        saved: runs that the budget would have allowed beyond those.
    """

    budget: int
    looks: Sequence[int]
    runs: int
    saved: int


@dataclass(frozen=True)
class Comparison:
    """The whole of it; the first recipe is the baseline.

    With `until_decided` a recipe has outcomes up to the look that decided it, and is compared to the baseline's up to
    there; the evaluation seeds are the baseline's.
    """

    task: str
    version: int
    metric: Metric
    trials: int
    tuning_seeds: Sequence[int]
    evaluation_seeds: Sequence[int]
    recipes: Sequence[Judged]
    until_decided: Stopping | None = None

    @property
    def fewest_seeds(self) -> int:
        """Seeds that it takes for any outcome at all to be significant, with so many methods."""
        rules: _Rules = statistics if self.until_decided is None else sequential
        return rules.fewest_seeds(len(self.recipes) - 1)

    @property
    def decidable(self) -> bool:
        """Whether any outcome could have been significant with so many seeds and methods."""
        seeds = len(self.evaluation_seeds) if self.until_decided is None else self.until_decided.budget
        return seeds >= self.fewest_seeds

    def as_json(self) -> dict[str, Any]:
        """Plain data. `until_decided` is null, or says how far it went (see `Stopping`).

        It is then such as {'budget': 40, 'looks': [8, 10], 'runs': 28, 'saved': 92}, and a recipe's 'values' are those
        of the seeds 0, 1, 2, … that it needed.
        """
        return {
            "task": self.task,
            "version": self.version,
            "metric": {key: getattr(self.metric, key) for key in ("name", "direction", "unit", "margin", "worst")},
            "baseline": self.recipes[0].name,
            "trials": self.trials,
            "seeds": {"tuning": list(self.tuning_seeds), "evaluation": list(self.evaluation_seeds)},
            "decidable": self.decidable,
            "until_decided": None
            if self.until_decided is None
            else {**asdict(self.until_decided), "looks": list(self.until_decided.looks)},
            "recipes": [judged.as_json() for judged in self.recipes],
        }


def _plain(tuned: Tuned) -> dict[str, dict[str, Any]]:
    return {slot: dict(params) for slot, params in tuned.params.items()}


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
    until_decided: bool = False,
    tune_once: bool = False,
    progress: Progress = unwatched,
) -> Comparison:
    """Tune every recipe with equal budgets, run the best of each on fresh seeds, judge.

    Each evaluation seed has a tuning of its own: `trials` runs on validation data, on a tuning seed and with proposals
    of its own, and then one run of the best configuration on test data. A difference between two recipes is then a
    difference between methods that are tuned like this, luck in tuning included. With a single tuning for all seeds it
    would be one between two configurations, and a method compared with itself would come out better or worse than
    itself far more often than in one case of twenty.

    Args:
        load: gives the task for a reference; a module-level function, since workers call it too.
        reference: the task's name, or what else `load` takes.
        wanted: choices by slot, as text: {'optimizer': 'AdamW,FRUGAL(density=0.25)'}.
        executor: carries the runs out; entered by the caller.
        store: what is recorded there is not run again.
        trials: tuning runs of each recipe, for each evaluation seed.
        seeds: evaluation seeds; with `until_decided` as many at most.
        until_decided: look at the verdicts after 8 seeds, 10, 12 and so on (`sequential.LOOKS`), and give further seeds
            only to recipes that are still undecided, and to the baseline. P-values and intervals stay valid under this
            (see `sequential`). Neither the executor nor what is stored already has a say in when it stops, and a
            comparison that ended undecided may be given more seeds.
        tune_once: tune each recipe a single time instead, for all evaluation seeds. That is cheap, but verdicts then
            speak of the configurations that happened to be found, not of the methods.
        progress: told after every run.

    Raises:
        BadInput: something asked for does not exist or is out of range.
        StoreError: the store cannot be used.
    """
    check_budget("trials", trials)
    check_budget("seeds", seeds)
    if seeds > FIRST_TUNING_SEED:
        raise BadInput(f"seeds must be at most {FIRST_TUNING_SEED}, got {seeds}")
    if until_decided and not sequential.LOOKS[0] <= seeds <= sequential.LOOKS[-1]:
        first, last = sequential.LOOKS[0], sequential.LOOKS[-1]
        raise BadInput(f"seeds must be from {first} to {last} when a comparison is to run until decided, got {seeds}")
    task = load(reference)
    recipes = recipes_for(task, reference, wanted)
    budget = sequential.looks_up_to(seeds)[-1] if until_decided else seeds
    tuning_runs = [trials if search_space(task, recipe) else 0 for recipe in recipes]

    def runs_for(places: Sequence[int], seeds: int) -> int:
        return sum(seeds if tune_once else seeds * (1 + tuning_runs[place]) for place in places)

    total = runs_for(range(len(recipes)), budget) + (sum(tuning_runs) if tune_once else 0)
    conduct = _Conduct(task, recipes, executor, store, progress, total)
    once = conduct.tunings([(recipe, FIRST_TUNING_SEED) for recipe in recipes], trials) if tune_once else []
    tuned: list[Tuned] = conduct.all_of(once)

    by_recipe: list[list[Seed]] = [[] for _ in recipes]
    going = list(range(len(recipes)))
    for look in sequential.looks_up_to(seeds) if until_decided else [seeds]:
        wanted_now = [(place, seed) for seed in range(len(by_recipe[0]), look) for place in going]
        tunings: Sequence[_Tuning | Tuned] = (
            [tuned[place] for place, _ in wanted_now]
            if tune_once
            else conduct.tunings([(recipes[place], FIRST_TUNING_SEED + seed) for place, seed in wanted_now], trials)
        )
        flows = [_one_seed(recipes[place], seed, how) for (place, seed), how in zip(wanted_now, tunings, strict=True)]
        for (place, _), found in zip(wanted_now, conduct.all_of(flows), strict=True):
            by_recipe[place].append(found)
        if until_decided:
            undecided = _undecided(task.metric, by_recipe, going)
            going = [0, *undecided]
            conduct.expect(runs_for(going, budget - look) if undecided else 0)
            if not undecided:
                break
    return Comparison(
        task.name,
        task.version,
        task.metric,
        trials,
        [FIRST_TUNING_SEED + seed for seed in range(1 if tune_once else len(by_recipe[0]))],
        list(range(len(by_recipe[0]))),
        _judge(task.metric, recipes, by_recipe, sequential if until_decided else statistics),
        _stopping(budget, by_recipe, tune_once) if until_decided else None,
    )


Seed = tuple[Tuned, Outcome]  # of one recipe


def evaluate(
    task: Task,
    recipe: Recipe,
    seeds: Sequence[int],
    trials: int = 0,
    *,
    executor: Executor,
    store: Store,
    progress: Progress = unwatched,
) -> list[Seed]:
    """Run one recipe on test data, in the order of the seeds; what is stored is not run again.

    With `trials` each seed has a tuning of its own, as in a comparison; without, nothing is tuned.
    """
    total = len(seeds) * (1 + (trials if search_space(task, recipe) else 0))
    conduct = _Conduct(task, [recipe], executor, store, progress, total)
    tunings: Sequence[_Tuning | Tuned] = [Tuned(recipe, {})] * len(seeds)
    if trials:
        tunings = conduct.tunings([(recipe, FIRST_TUNING_SEED + seed) for seed in seeds], trials)
    found: list[Seed] = conduct.all_of([_one_seed(recipe, *how) for how in zip(seeds, tunings, strict=True)])
    return found


_Tuning = Generator[list[Job], list[Outcome], Tuned]


def _one_seed(recipe: Recipe, seed: int, tuning: _Tuning | Tuned) -> Generator[list[Job], list[Outcome], Seed]:
    """Tune, unless that has been done, and run the best configuration."""
    found = tuning if isinstance(tuning, Tuned) else (yield from tuning)
    outcomes = yield [Job(Run(recipe.with_params(found.params), seed, "test"))]
    return found, outcomes[0]


def _undecided(metric: Metric, by_recipe: Sequence[Sequence[Seed]], going: Sequence[int]) -> list[int]:
    """Those of the recipes still going that have no verdict yet."""
    found = sequential.differences(*_baseline_and_others(by_recipe))
    return [p for p in going if p and verdict(found[p - 1], metric.sign, metric.margin) == "undecided"]


def _baseline_and_others(by_recipe: Sequence[Sequence[Seed]]) -> tuple[list[float], list[list[float]]]:
    baseline, *others = [[outcome.value for _, outcome in seeds] for seeds in by_recipe]
    return baseline, others


def _stopping(budget: int, by_recipe: Sequence[Sequence[Seed]], tune_once: bool) -> Stopping:
    runs = saved = 0
    for seeds in by_recipe:
        tuning = len(seeds[0][0].history)
        runs += tuning + len(seeds) if tune_once else (tuning + 1) * len(seeds)
        saved += (budget - len(seeds)) * (1 if tune_once else tuning + 1)
    return Stopping(budget, sequential.looks_up_to(len(by_recipe[0])), runs, saved)


class _Rules(Protocol):
    """What judges differences: `statistics` for a number of seeds fixed beforehand, else `sequential`."""

    def differences(self, baseline: Sequence[float], others: Sequence[Sequence[float]]) -> list[Difference]: ...
    def fewest_seeds(self, comparisons: int = ...) -> int: ...
    def seeds_to_decide(self, values: Sequence[float], margin: float, comparisons: int = ...) -> int | None: ...


def _judge(
    metric: Metric,
    recipes: Sequence[Recipe],
    by_recipe: Sequence[Sequence[Seed]],
    rules: _Rules,
) -> list[Judged]:
    baseline, others = _baseline_and_others(by_recipe)
    found: list[Difference | None] = [None, *rules.differences(baseline, others)]
    judged = []
    for place, (recipe, difference) in enumerate(zip(recipes, found, strict=True)):
        said = None if difference is None else verdict(difference, metric.sign, metric.margin)
        needed = None
        if said == "undecided":
            paired = [a - b for a, b in zip(others[place - 1], baseline, strict=False)]
            needed = rules.seeds_to_decide(paired, metric.margin, len(recipes) - 1)
        name = _baseline_name(recipes) if place == 0 else recipe_name(recipe, recipes[0])
        tunings, outcomes = zip(*by_recipe[place], strict=True)
        costs = _cost_ratios(outcomes, [outcome for _, outcome in by_recipe[0][: len(outcomes)]])
        best = max(tunings, key=lambda tuned: -math.inf if tuned.value is None else metric.sign * tuned.value)
        judged.append(Judged(name, recipe, best, outcomes, costs, difference, said, needed, tunings))
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

    def __init__(
        self,
        task: Task,
        recipes: Sequence[Recipe],
        executor: Executor,
        store: Store,
        progress: Progress,
        total: int,
    ) -> None:
        self.task, self.recipes, self.executor, self.store = task, recipes, executor, store
        self.progress, self.total = progress, total
        self.done = self.failed = self.stored = 0
        self.fingerprints: dict[tuple[str, ...], str] = {}
        self.ready = False  # nobody has looked yet whether runs can be made and stored

    def tunings(self, wanted: Sequence[tuple[Recipe, int]], trials: int) -> list[_Tuning]:
        """Flows for `all_of` that tune recipes, each on a seed; the store is asked what they tried before."""
        keys = [tuning_key(self.task, recipe, trials, seed, self._code(recipe)) for recipe, seed in wanted]
        known = self.store.tunings(keys)
        return [
            self._tuning(recipe, trials, seed, key, known.get(key))
            for (recipe, seed), key in zip(wanted, keys, strict=True)
        ]

    def _tuning(self, recipe: Recipe, trials: int, seed: int, key: str, known: Sequence[Tried] | None) -> _Tuning:
        found = yield from tune(self.task, recipe, trials, seed, known)
        if found.history and found.tried != known and not any(outcome.ended == "lost" for _, outcome in found.history):
            with suppress(StoreError):  # it only saves time, and not to a reader who may not write
                self.store.put_tuning(key, self.task.name, found.tried)
        return found

    def all_of(self, flows: Sequence[Generator[list[Job], Any, Any]]) -> list[Any]:
        """Drive flows, which yield waves of jobs and are sent their outcomes, to their ends, side by side."""
        results: list[Any] = [None] * len(flows)
        waves: dict[int, list[Outcome | None]] = {}
        origin: dict[Job, tuple[int, int]] = {}

        def drive(going: list[int]) -> None:
            """As far as what is stored will take them; the store is asked for the next waves of all of them at once."""
            while going:
                asked: dict[int, list[Job]] = {}
                for flow in going:
                    try:
                        asked[flow] = flows[flow].send(waves.get(flow))
                    except StopIteration as end:
                        results[flow] = end.value
                recorded = self._recorded([job for jobs in asked.values() for job in jobs])
                for flow, jobs in asked.items():
                    waves[flow] = [recorded.get(job) for job in jobs]
                    for place, job in enumerate(jobs):
                        if job not in recorded:
                            origin[job] = (flow, place)
                            self._submit(job)
                going = [flow for flow in asked if None not in waves[flow]]

        drive(list(range(len(flows))))
        try:
            while origin:
                job, outcome = self.executor.next()
                flow, place = origin.pop(job)
                if outcome.ended != "lost":
                    code = self._code(job.run.recipe)
                    self.store.put(self._key(job.run), job.run, self.task.name, self.task.version, code, outcome)
                self._count(outcome)
                waves[flow][place] = outcome
                if None not in waves[flow]:
                    drive([flow])
        except StoreError as error:
            raise StoreError(f"{error}; the runs recorded before are kept, those under way are not") from error
        return results

    def _submit(self, job: Job) -> None:
        if not self.ready:
            check_recipes(self.task, self.recipes)
            self.store.check_writable()
            self.ready = True
        self.executor.submit(job)

    def expect(self, further: int) -> None:
        """Tell that so many runs are still to come."""
        self.total = self.done + further
        self._tell()

    def _count(self, outcome: Outcome) -> None:
        self.done += 1
        self.failed += outcome.failed
        self._tell()

    def _tell(self) -> None:
        self.progress(
            done=self.done, total=self.total, running=self.executor.running, failed=self.failed, stored=self.stored
        )

    def _recorded(self, jobs: Sequence[Job]) -> dict[Job, Outcome]:
        """What the store has of them, as if it had just been run."""
        keys = [self._key(job.run) for job in jobs]
        stored = self.store.outcomes(keys)
        recorded = {}
        for job, key in zip(jobs, keys, strict=True):
            outcome = _as_just_run(job, stored[key]) if key in stored else None
            if outcome is not None:
                recorded[job] = outcome
                self.stored += 1
                self._count(outcome)
        return recorded

    def _key(self, run: Run) -> str:
        return run.key(task=self.task.name, version=self.task.version, fingerprint=self._code(run.recipe))

    def _code(self, recipe: Recipe) -> str:
        names = tuple(choice.name for _, choice in sorted(recipe.choices.items()))
        if names not in self.fingerprints:
            self.fingerprints[names] = code_of(self.task, recipe)
        return self.fingerprints[names]


def _as_just_run(job: Job, outcome: Outcome) -> Outcome | None:
    """A recorded outcome, stopped where the job's pruner would have stopped it; None if it was stopped before that."""
    if job.pruner is not None:
        for length in range(1, len(outcome.curve) + 1):
            if job.pruner.hopeless(outcome.curve[:length]):
                curve = outcome.curve[:length]
                return replace(outcome, value=curve[-1][1], ended="pruned", curve=curve, error=None)
    return None if outcome.ended == "pruned" else outcome


def code_of(task: Task, recipe: Recipe) -> str:
    """Fingerprints of the code of task and methods, and of the data if the task tells; versions of what computes."""
    modules = [source_of(task, recipe.task)]
    for slot, choice in recipe.choices.items():
        option = task.slots[slot].options[choice.name]
        modules += [option.factory.__module__, option.bind.__module__]
    parts = [fingerprint(modules), *(version(package) for package in ("torch", "numpy", "scikit-learn"))]
    data_hash = getattr(task, "data_hash", None)
    return "-".join(parts if data_hash is None else [*parts, data_hash])


def source_of(task: Task, reference: str) -> str:
    """The module, or the file, whose code decides what a task does; a task may name it as `source`."""
    path, ending, rest = reference.rpartition(".py")
    if ending and rest[:1] in ("", ":"):
        return path + ending
    return str(getattr(task, "source", type(task).__module__))
