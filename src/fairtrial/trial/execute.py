"""Carrying runs out: here (`inline`), or in worker processes on this machine (`local`); on others see `ray_executor`.

Executors differ in nothing that a result shows: one torch thread, the same code, the same seeds.
"""

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Protocol

from threadpoolctl import ThreadpoolController

from fairtrial.contract import BadInput, Costs, Diverged, Outcome, Pruned, Task
from fairtrial.trial.recipe import Run

Loader = Callable[[str], Task]
ATTEMPTS = 3  # a run whose worker vanishes is tried so often before it counts as lost


class Pruner(Protocol):
    """Tells from the curve so far whether a tuning run is hopeless; plain data that travels to workers."""

    def hopeless(self, curve: Sequence[tuple[int, float]]) -> bool: ...


@dataclass(frozen=True, eq=False)
class Job:
    """A run to be carried out, and what may stop it early; each job is its own, equal to no other."""

    run: Run
    pruner: Pruner | None = None


class Watch:
    """The progress that a task is given: keeps the curve, and stops a hopeless run."""

    def __init__(self, pruner: Pruner | None, worst: float) -> None:
        self.curve: list[tuple[int, float]] = []
        self.pruner = pruner
        self.worst = worst

    def __call__(self, step: int, total: int, value: float) -> None:
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        self.curve.append((int(step), float(value) if math.isfinite(value) else self.worst))
        if self.pruner is not None and self.pruner.hopeless(self.curve):
            raise Pruned


def carry_out(task: Task, job: Job) -> Outcome:
    """Run a job to its end, whatever that is: nothing a task does wrong comes out as an exception."""
    started = time.perf_counter()
    worst = task.metric.worst
    watch = Watch(job.pruner, worst)
    try:
        with one_thread(), contextlib.redirect_stdout(sys.stderr):
            outcome = task.run(job.run.recipe.choices, job.run.seed, split=job.run.split, progress=watch)
        if not isinstance(outcome, Outcome):
            raise TypeError(f"the task's run must return an Outcome, got {type(outcome).__name__}")
        outcome = _in_plain_numbers(outcome)
        if outcome.failed:
            outcome = replace(outcome, value=worst)
        elif not math.isfinite(outcome.value):
            outcome = replace(outcome, value=worst, ended="diverged", error=f"the task measured {outcome.value}")
    except Pruned:
        outcome = Outcome(watch.curve[-1][1] if watch.curve else worst, "pruned")
    except Diverged as error:
        outcome = Outcome(worst, "diverged", error=str(error))
    except (Exception, SystemExit):
        outcome = Outcome(worst, "died", error=traceback.format_exc())
    return replace(outcome, curve=watch.curve, seconds=time.perf_counter() - started)


def _in_plain_numbers(outcome: Outcome) -> Outcome:
    """Tasks also measure in NumPy's numbers and torch's; a store and other processes get Python's."""
    costs = outcome.costs
    counts = (costs.peak_memory, costs.optimizer_state_bytes, costs.trainable_parameters)
    return replace(
        outcome,
        value=float(outcome.value),
        metrics={str(name): float(value) for name, value in outcome.metrics.items()},
        costs=Costs(
            None if costs.step_time is None else float(costs.step_time),
            *(None if count is None else int(count) for count in counts),
        ),
    )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """More threads would change the order of sums, and with it the figures."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _thread_pools().limit(limits=1):
            yield
    finally:
        torch.set_num_threads(before)


@cache
def _thread_pools() -> ThreadpoolController:
    """The libraries with threads of their own; looked for once, after torch and the task have been imported."""
    return ThreadpoolController()


class Executor(Protocol):
    """Takes jobs in, gives outcomes back in the order in which they end."""

    def __enter__(self) -> "Executor": ...
    def __exit__(self, *exception: object) -> None: ...
    @property
    def running(self) -> int:
        """How many jobs are being carried out right now."""

    def submit(self, job: Job) -> None: ...
    def next(self) -> tuple[Job, Outcome]:
        """Wait for the next job to end. Only to be called while jobs are under way."""


class Inline:
    """One run after the other, in this process."""

    def __init__(self, load: Loader) -> None:
        self.load = load
        self.waiting: deque[Job] = deque()

    def __enter__(self) -> "Inline":
        return self

    def __exit__(self, *exception: object) -> None:
        self.waiting.clear()

    @property
    def running(self) -> int:
        return min(1, len(self.waiting))

    def submit(self, job: Job) -> None:
        self.waiting.append(job)

    def next(self) -> tuple[Job, Outcome]:
        job = self.waiting.popleft()
        return job, carry_out(self.load(job.run.recipe.task), job)


class Attempts:
    """How many workers each job has cost."""

    def __init__(self, load: Loader) -> None:
        self.load = load
        self.cost: dict[Job, int] = {}

    def lost(self, job: Job, how: str) -> Outcome | None:
        """A job's worker has vanished: what the job comes to if it is not to be tried again."""
        tried = self.cost[job] = self.cost.get(job, 0) + 1
        if tried < ATTEMPTS:
            return None
        del self.cost[job]
        worst = self.load(job.run.recipe.task).metric.worst
        return Outcome(worst, "lost", error=f"{how}, {ATTEMPTS} times")

    def ended(self, job: Job) -> None:
        self.cost.pop(job, None)


class Worker:
    """A process that carries out one job at a time."""

    def __init__(self, load: Loader) -> None:
        context = multiprocessing.get_context("spawn")
        self.link, far_end = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_work, args=(load, far_end))
        with _interrupts_ignored():  # Ctrl-C is the parent's to handle
            self.process.start()
        far_end.close()
        self.job: Job | None = None

    def give(self, job: Job) -> None:
        self.job = job
        with contextlib.suppress(OSError):  # a worker that is gone is noticed when its answer is waited for
            self.link.send(job)

    def stop(self) -> None:
        self.link.close()
        self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class Local:
    """Worker processes on this machine, one torch thread each."""

    def __init__(self, load: Loader, workers: int) -> None:
        if workers < 1:
            raise BadInput(f"workers must be at least 1, got {workers}")
        self.load = load
        self.size = workers
        self.workers: list[Worker] = []
        self.waiting: deque[Job] = deque()
        self.attempts = Attempts(load)

    def __enter__(self) -> "Local":
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self.workers:
            worker.stop()
        self.workers.clear()

    @property
    def running(self) -> int:
        return sum(worker.job is not None for worker in self.workers)

    def submit(self, job: Job) -> None:
        self.waiting.append(job)
        self._hand_out()

    def _hand_out(self) -> None:
        while self.waiting:
            free = next((worker for worker in self.workers if worker.job is None), None)
            if free is None:
                if len(self.workers) == self.size:
                    return
                free = Worker(self.load)
                self.workers.append(free)
            free.give(self.waiting.popleft())

    def next(self) -> tuple[Job, Outcome]:
        while True:
            self._hand_out()
            busy = {worker.link: worker for worker in self.workers if worker.job is not None}
            for link in wait(list(busy)):
                worker = busy[link]  # type: ignore[index]
                job = worker.job
                assert job is not None
                try:
                    outcome: Outcome = worker.link.recv()
                except (EOFError, OSError):
                    lost = self._replace(worker)
                    if lost is not None:
                        return job, lost
                    continue
                worker.job = None
                self.attempts.ended(job)
                self._hand_out()
                return job, outcome

    def _replace(self, worker: Worker) -> Outcome | None:
        """A worker has vanished: its job is tried again, until it has cost `ATTEMPTS` workers."""
        self.workers.remove(worker)
        worker.process.join()
        code = worker.process.exitcode
        worker.stop()
        job = worker.job
        assert job is not None
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        lost = self.attempts.lost(job, f"its worker process ended {how}")
        if lost is None:
            self.waiting.appendleft(job)
        return lost


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(load: Loader, link: Connection) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)  # what a task prints must not get between the lines of a JSON document
    leave_with_parent()
    with contextlib.suppress(EOFError, OSError):
        while True:
            job: Job = link.recv()
            link.send(carry_out(load(job.run.recipe.task), job))


def leave_with_parent() -> None:
    """When the parent is killed, a worker does not stay behind to finish what nobody waits for."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_after, args=(parent.sentinel,), daemon=True).start()


def _leave_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
