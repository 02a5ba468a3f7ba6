"""Tuning: every recipe, the baseline too, gets the same number of runs over the search space its methods declare.

Optuna's TPE proposes, its median pruner stops hopeless runs. Configurations are asked for in waves of a fixed size and
reported in order, so the proposals depend neither on the executor nor on which run happens to end first.
"""

import hashlib
import inspect
import json
import zlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import version
from typing import Any, Literal

import optuna
from optuna.trial import TrialState, create_trial

from fairtrial.contract import Outcome, Task
from fairtrial.trial.execute import Job, Pruner
from fairtrial.trial.fingerprint import fingerprint
from fairtrial.trial.recipe import Recipe, Run

WAVE = 4  # configurations under way at once; also how many are drawn at random, and run to the end, at first


@dataclass(frozen=True)
class MedianPruner:
    """Optuna's median pruner over the runs that a study had finished when a wave began."""

    direction: Literal["maximize", "minimize"]
    finished: tuple[tuple[tuple[int, float], ...], ...]

    @cached_property
    def _study(self) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = optuna.pruners.MedianPruner(n_startup_trials=WAVE, n_warmup_steps=0)
        study = optuna.create_study(direction=self.direction, pruner=pruner)
        study.add_trials(
            create_trial(state=TrialState.COMPLETE, value=curve[-1][1], intermediate_values=dict(curve))
            for curve in self.finished
            if curve
        )
        return study

    def hopeless(self, curve: Sequence[tuple[int, float]]) -> bool:
        trial = self._study.ask()
        for step, value in curve:
            trial.report(value, step)
        stop = trial.should_prune()
        self._study.tell(trial, state=TrialState.FAIL)
        return stop

    def __getstate__(self) -> dict[str, Any]:
        return {"direction": self.direction, "finished": self.finished}


@dataclass(frozen=True)
class Stop:
    """Stops a run where a pruner has stopped it before: after so many points of its curve, or never."""

    after: int | None

    def hopeless(self, curve: Sequence[tuple[int, float]]) -> bool:
        return self.after is not None and len(curve) >= self.after


# A configuration; after how many points of its curve its run was pruned, if it was; and what it measured.
Tried = tuple[Mapping[str, Any], int | None, float]


@dataclass(frozen=True)
class Tuned:
    """What tuning a recipe came to.

    Attributes:
        recipe: as it was asked for.
        params: the best configuration, by slot; empty if no run came through.
        history: every configuration tried, with its outcome.
        value: what the best one measured on validation data, if any came through.
    """

    recipe: Recipe
    params: Mapping[str, Mapping[str, Any]]
    history: Sequence[tuple[Mapping[str, Any], Outcome]] = field(default=(), repr=False)
    value: float | None = None

    @property
    def tried(self) -> list[Tried]:
        """What `tune` takes as `known` to come to the same again."""
        return [
            (params, len(outcome.curve) if outcome.ended == "pruned" else None, outcome.value)
            for params, outcome in self.history
        ]


def search_space(task: Task, recipe: Recipe) -> dict[str, Any]:
    """Ranges of the hyperparameters that the recipe leaves open, by 'slot.hyperparameter'."""
    return {
        f"{slot}.{name}": space
        for slot, choice in sorted(recipe.choices.items())
        for name, space in task.slots[slot].options[choice.name].search.items()
        if name not in choice.params
    }


def tuning_key(task: Task, recipe: Recipe, trials: int, seed: int, code: str) -> str:
    """What identifies a tuning in a store: equal keys mean that the same would be tried. `code` is the runs' own."""
    space = {name: repr(ranges) for name, ranges in search_space(task, recipe).items()}
    asked = [task.name, task.version, task.metric.direction, recipe.as_json(), space, trials, seed]
    content = [*asked, code, *_tuner()]
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()[:32]


@cache
def _tuner() -> tuple[str, str]:
    """What proposals and prunings depend on beside a tuning's own setting and the runs."""
    return fingerprint([__name__]), version("optuna")


def tune(
    task: Task, recipe: Recipe, trials: int, seed: int, known: Sequence[Tried] | None = None
) -> Generator[list[Job], list[Outcome], Tuned]:
    """Yields waves of jobs, is sent their outcomes, and returns the best configuration on validation data.

    The first configuration is the methods' own defaults. Ties go to the configuration tried first. If no run came
    through, the defaults stand.

    To find out again what to try takes far longer than to read the runs of it. With `known`, what this tuning tried
    before, it is tried again in a single wave, and looked for anew only if something else comes of it.
    """
    space = search_space(task, recipe)
    if not space:
        return Tuned(recipe, {})
    if known is not None:
        outcomes = yield [_job(recipe, params, seed, Stop(stopped)) for params, stopped, _ in known]
        again = _judged(
            task, recipe, [(params, outcome) for (params, *_), outcome in zip(known, outcomes, strict=True)]
        )
        if again.tried == known:
            return again
    metric = task.metric
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Recipes with the same search space are proposed the same configurations, as far as their results agree.
    sampler_seed = zlib.crc32(json.dumps([list(space), seed]).encode())
    study = optuna.create_study(
        direction=metric.direction,
        sampler=optuna.samplers.TPESampler(seed=sampler_seed, n_startup_trials=WAVE),
    )
    study.enqueue_trial(_defaults(task, recipe, space))
    history: list[tuple[Mapping[str, Any], Outcome]] = []
    while len(history) < trials:
        asked, jobs = [], []
        pruner = MedianPruner(
            metric.direction,
            tuple(tuple(outcome.curve) for _, outcome in history if outcome.ended == "finished"),
        )
        for _ in range(min(WAVE, trials - len(history))):
            trial = study.ask()
            params = {key: ranges.suggest(trial, key) for key, ranges in space.items()}
            asked.append((trial, params))
            jobs.append(_job(recipe, params, seed, pruner))
        outcomes = yield jobs
        for (trial, params), outcome in zip(asked, outcomes, strict=True):
            for step, value in outcome.curve:
                trial.report(value, step)
            if outcome.ended == "pruned":
                study.tell(trial, state=TrialState.PRUNED)
            else:
                study.tell(trial, outcome.value)
            history.append((params, outcome))
    return _judged(task, recipe, history)


def _job(recipe: Recipe, params: Mapping[str, Any], seed: int, pruner: Pruner) -> Job:
    return Job(Run(recipe.with_params(_by_slot(params)), seed, "validation"), pruner)


def _judged(task: Task, recipe: Recipe, history: Sequence[tuple[Mapping[str, Any], Outcome]]) -> Tuned:
    finished = [(params, outcome.value) for params, outcome in history if outcome.ended == "finished"]
    if not finished:
        return Tuned(recipe, {}, history)
    best, value = max(finished, key=lambda tried: task.metric.sign * tried[1])
    return Tuned(recipe, _by_slot(best), history, value)


def _by_slot(params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    grouped: dict[str, dict[str, Any]] = {}
    for key, value in params.items():
        slot, _, name = key.partition(".")
        grouped.setdefault(slot, {})[name] = value
    return grouped


def _defaults(task: Task, recipe: Recipe, space: Mapping[str, Any]) -> dict[str, Any]:
    """The methods' own defaults, where they lie inside the range that is searched."""
    found = {}
    for key, ranges in space.items():
        slot, _, name = key.partition(".")
        factory = task.slots[slot].options[recipe.choices[slot].name].factory
        parameter = inspect.signature(factory).parameters.get(name)
        if parameter is not None and ranges.contains(parameter.default):
            found[key] = parameter.default
    return found
