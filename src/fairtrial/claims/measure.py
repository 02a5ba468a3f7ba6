"""What a claims file measures with: comparisons through the bench, or functions of its own over seeds."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np

from fairtrial import tasks
from fairtrial.catalog import Measurement
from fairtrial.trial.comparison import Comparison, compare
from fairtrial.trial.execute import Local, leave_with_parent, one_thread
from fairtrial.trial.statistics import mean_interval
from fairtrial.trial.store import Store

A = TypeVar("A")
R = TypeVar("R")


class Measure:
    """Runs what a claim needs on worker processes, one thread each; nothing is taken from earlier runs.

    Args:
        workers: processes; figures do not depend on it.
        say: told in a line what is being measured.
    """

    def __init__(self, workers: int | None = None, say: Callable[[str], None] = lambda line: None) -> None:
        self.workers = workers or os.cpu_count() or 1
        self.say = say

    def compare(self, task: str, wanted: Mapping[str, str], *, trials: int, seeds: int) -> Comparison:
        """A comparison through the bench, on an empty store."""
        self.say(f"comparing on {task}: " + ", ".join(f"{slot}={text}" for slot, text in wanted.items()))
        with (
            TemporaryDirectory() as folder,
            Store(Path(folder) / "runs.db") as store,
            Local(tasks.load, self.workers) as executor,
        ):
            return compare(tasks.load, task, wanted, executor=executor, store=store, trials=trials, seeds=seeds)

    def map(self, function: Callable[[A], R], arguments: Iterable[A]) -> list[R]:
        """`function` of each argument, in order; both must be importable by worker processes."""
        waiting = list(arguments)
        name = getattr(function, "__name__", "measuring").strip("_").replace("_", " ")
        with ProcessPoolExecutor(self.workers, get_context("spawn"), initializer=leave_with_parent) as pool:
            futures = [pool.submit(_alone, function, argument) for argument in waiting]
            for done, _ in enumerate(as_completed(futures), 1):
                self.say(f"{name}: {done} of {len(waiting)}")
            return [future.result() for future in futures]


def _alone(function: Callable[[A], R], argument: A) -> R:
    with one_thread():
        return function(argument)


def measured(name: str, values: Sequence[float], unit: str, *, paper: str = "") -> Measurement:
    """The mean over seeds with its 95 % interval (open where fewer than 6 values bound none)."""
    low, high = mean_interval(values)
    return Measurement(
        name=name,
        value=float(np.mean(values)),
        low=low if np.isfinite(low) else None,
        high=high if np.isfinite(high) else None,
        unit=unit,
        paper=paper,
    )


def single(name: str, value: float, unit: str, *, paper: str = "") -> Measurement:
    """A figure without an interval: exact, or a ratio of medians."""
    return Measurement(name=name, value=float(value), low=None, high=None, unit=unit, paper=paper)
