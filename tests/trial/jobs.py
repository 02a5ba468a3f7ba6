"""Jobs for executors, and what comes of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import toy

from fairtrial import tasks
from fairtrial.contract import Choice, Outcome, Task
from fairtrial.trial.execute import Executor, Job
from fairtrial.trial.recipe import Recipe, Run

WRONG = ["diverge", "raise", "exit", "prune", "nan", "nan on the way", "said to diverge", "numpy", "number", "text"]


def load(reference: str) -> Task:
    """The toy task, or one from a file."""
    return toy.load(reference) if reference.startswith("toy") else tasks.load(reference)


def job(how: str, seed: int = 0, split: Any = "test", task: str = "toy", **params: Any) -> Job:
    choices = {"optimizer": Choice("Broken", {"how": how, **params}), "filter": Choice("Clean")}
    return Job(Run(Recipe(task, choices), seed, split))


def sound(seed: int, lr: float = 0.1, task: str = "toy") -> Job:
    choices = {"optimizer": Choice("Plain", {"lr": lr}), "filter": Choice("Blurred", {"width": 2})}
    return Job(Run(Recipe(task, choices), seed, "test"))


def outcomes(executor: Executor, jobs: Sequence[Job]) -> list[Outcome]:
    """What comes of the jobs, in their order."""
    for each in jobs:
        executor.submit(each)
    ended = dict(executor.next() for _ in jobs)
    return [ended[each] for each in jobs]


def apart_from_times(outcome: Outcome) -> Outcome:
    """Tracebacks name the same lines, but those of a worker begin further out."""
    last = outcome.error and outcome.error.strip().splitlines()[-1]
    return replace(outcome, seconds=0.0, curve=list(outcome.curve), error=last)
