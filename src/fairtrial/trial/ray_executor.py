"""Carrying runs out on a Ray cluster (`ray`): one that is there, or one that is started here for the purpose.

Workers are Ray actors, on whichever node has room for them. A worker must have the versions and the code that this
process has: it says so before it is given anything, and again for the code of every recipe. A task from a person's own
file is sent to it with the folder that it stands in. Figures agree bit for bit between nodes with processors of a kind.
"""

import contextlib
import math
import os
import pickle
import socket
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from fairtrial.contract import BadInput, Outcome
from fairtrial.trial.comparison import code_of, source_of
from fairtrial.trial.execute import ATTEMPTS, Attempts, Job, Loader, carry_out
from fairtrial.trial.fingerprint import fingerprint
from fairtrial.trial.ray_cluster import Cluster, last_line
from fairtrial.trial.shipping import pack, unpack
from fairtrial.trial.store import environment

LEAST = 0.0001  # of a CPU or GPU: Ray counts in parts of ten thousand
PATIENCE = 60  # seconds that a cluster which has lost the last node with room for a run is given to get one again


@dataclass(frozen=True)
class Parcel:
    """A person's task on its way to workers.

    Attributes:
        content: Ray's reference to the packed folder.
        name: the reference of the task, from the folder on.
        at_home: whether this process is in the folder; workers then are in theirs, for paths that start from there.
    """

    content: "ray.ObjectRef[bytes]"
    name: str
    at_home: bool


def makings() -> dict[str, str]:
    """What the figures of this process depend on; `differences` needs it of two."""
    versions = {what: str(found) for what, found in environment().items() if what != "cpus"}
    return {**versions, "the code of fairtrial": fingerprint([__name__])}


def differences(here: Mapping[str, str], there: Mapping[str, str]) -> str:
    """In words; nothing if there are none."""
    found = [what for what in here if here[what] != there.get(what)]
    return ", ".join(f"{what} is {there.get(what)} there and {here[what]} here" for what in found)


class Bench:
    """What carries runs out on a node of the cluster."""

    def __init__(self, load: Loader) -> None:
        os.dup2(2, 1)  # what a task prints must not get between the lines of a JSON document
        self.load = load
        self.unpacked: dict[str, str] = {}
        self.agreed: set[str] = set()

    def carry_out(self, job: Job, code: str, parcel: Parcel | None) -> Outcome:
        """Carry a job out; raises BadInput if the code of its recipe is another than `code` here."""
        recipe = job.run.recipe
        if parcel is not None:
            recipe = replace(recipe, task=self._laid_out(recipe.task, parcel))
        task = self.load(recipe.task)
        if code not in self.agreed:
            if code_of(task, recipe) != code:
                raise BadInput(f"the code or the data of {job.run.recipe.task} is another than here")
            self.agreed.add(code)
        return carry_out(task, job)

    def _laid_out(self, reference: str, parcel: Parcel) -> str:
        if reference not in self.unpacked:
            folder = unpack(ray.get(parcel.content))
            if parcel.at_home:
                os.chdir(folder)
            self.unpacked[reference] = str(folder / parcel.name)
        return self.unpacked[reference]


def _actor_class() -> type:
    """Defined in here it is sent as it stands, and can tell that this library is missing; so it mentions none of it."""

    class Carrier:
        def introduce(self, load: bytes) -> tuple[str, dict[str, str] | str]:
            """Where this is, and what it has, or why it cannot be used."""
            where = f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
            try:
                from fairtrial.trial.ray_executor import Bench, makings

                self.bench = Bench(pickle.loads(load))
                return where, makings()
            except Exception as error:
                return where, f"{type(error).__name__}: {error}"

        def carry_out(self, *given: Any) -> Any:
            return self.bench.carry_out(*given)

    return Carrier


class Worker:
    """A Ray actor that carries out one job at a time, and what it was last asked."""

    def __init__(self, actor: Any, load: Loader) -> None:
        self.actor = actor
        self.answer: Any = actor.introduce.remote(ray.cloudpickle.dumps(load))
        self.node: str | None = None  # known when it is ready
        self.job: Job | None = None

    def give(self, job: Job, code: str, parcel: Parcel | None) -> None:
        self.job = job
        self.answer = self.actor.carry_out.remote(job, code, parcel)

    def stop(self) -> None:
        with contextlib.suppress(RayError):
            ray.kill(self.actor)


class Ray:
    """Workers on a Ray cluster, one torch thread each; the cluster is joined when the first job is submitted.

    Args:
        load: gives the task for a reference; a module-level function, since workers call it too.
        address: of the cluster to join, HOST:PORT or 'auto'; this machine must be one of its nodes. Without one, it is
            the cluster that this process is connected to, else one that is started here, and stopped in the end.
        workers: most runs at once; unless given, as many as the nodes have room for, also those that join later. With a
            number, Ray is asked for that many workers, which lets a cluster that grows on demand do so.
        cpus: that Ray keeps for each run; torch has one thread in any case.
        gpus: likewise; a run is shown no others.

    Raises:
        BadInput: from the constructor, if a number is out of range. From `submit` and `next`, if there is no cluster,
            none of its nodes is large enough for a run, or a worker has other versions or other code. Nodes that a
            cluster might yet get do not count, but if it has lost the last that was large enough, it is given a minute.
    """

    def __init__(
        self, load: Loader, *, address: str | None = None, workers: int | None = None, cpus: float = 1, gpus: float = 0
    ) -> None:
        if workers is not None and workers < 1:
            raise BadInput(f"workers must be at least 1, got {workers}")
        if not LEAST <= cpus < math.inf:
            raise BadInput(f"CPUs per run must be a number of at least {LEAST}, got {cpus}")
        if not (gpus == 0 or LEAST <= gpus <= 1 or (1 < gpus < math.inf and gpus == int(gpus))):
            raise BadInput(f"GPUs per run must be a whole number or a share of one, got {gpus}")
        self.load = load
        self.address = address
        self.size = workers
        self.needs = {"CPU": float(cpus), "GPU": float(gpus)}
        self.carrier = ray.remote(_actor_class()).options(num_cpus=float(cpus), num_gpus=float(gpus))
        self.cluster: Cluster | None = None
        self.workers: list[Worker] = []
        self.waiting: deque[Job] = deque()
        self.attempts = Attempts(load)
        self.false_starts = 0  # of workers, in a row
        self.possible = 0.0  # when there last was room for a run
        self.codes: dict[tuple[str, ...], str] = {}
        self.parcels: dict[str, Parcel | None] = {}

    def __enter__(self) -> "Ray":
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self.workers:
            worker.stop()
        self.workers.clear()
        self.parcels.clear()
        if self.cluster is not None:
            self.cluster.close()

    @property
    def running(self) -> int:
        return sum(worker.job is not None for worker in self.workers)

    def submit(self, job: Job) -> None:
        if self.cluster is None:
            self.cluster = Cluster(self.address)
            if not self._room():
                raise self._no_room()
            self.possible = time.monotonic()
        self._code(job)
        self._parcel(job.run.recipe.task)
        self.waiting.append(job)
        self._hand_out()

    def next(self) -> tuple[Job, Outcome]:
        while True:
            self._start_workers()
            self._hand_out()
            asked = {worker.answer: worker for worker in self.workers if worker.answer is not None}
            for answer in _first_of(list(asked)):
                ended = self._hear(asked[answer])
                if ended is not None:
                    self._hand_out()
                    return ended

    def _start_workers(self) -> None:
        """As many as jobs are waiting for, within what there may be."""
        if not self.waiting:
            return
        room = self._room()
        if room or any(worker.node is not None for worker in self.workers):
            self.possible = time.monotonic()
        elif time.monotonic() > self.possible + PATIENCE:
            raise self._no_room()
        most = room if self.size is None else self.size
        starting = sum(worker.node is None for worker in self.workers)
        for _ in range(min(len(self.waiting) - starting, most - len(self.workers))):
            self.workers.append(Worker(self.carrier.remote(), self.load))

    def _room(self) -> int:
        """How many runs the nodes could carry out at once that are there."""
        return sum(_times(node["Resources"], self.needs) for node in ray.nodes() if node["Alive"])

    def _no_room(self) -> BadInput:
        there = {_in_words(node["Resources"]) for node in ray.nodes() if node["Alive"]}
        return BadInput(
            f"no node of the Ray cluster has {_in_words(self.needs)}, which each run is to have; "
            f"there are nodes with {' or '.join(sorted(there))}"
            if there
            else "the Ray cluster has no node any more"
        )

    def _hand_out(self) -> None:
        for worker in self.workers:
            if self.waiting and worker.answer is None:
                job = self.waiting[0]
                worker.give(job, self._code(job), self._parcel(job.run.recipe.task))
                self.waiting.popleft()

    def _code(self, job: Job) -> str:
        recipe = job.run.recipe
        names = (recipe.task, *(choice.name for _, choice in sorted(recipe.choices.items())))
        if names not in self.codes:
            self.codes[names] = code_of(self.load(recipe.task), recipe)
        return self.codes[names]

    def _parcel(self, reference: str) -> Parcel | None:
        """What a worker must be sent to load the task: nothing if it does not come from a file."""
        if reference not in self.parcels:
            source = source_of(self.load(reference), reference)
            file = Path(source).expanduser().resolve()
            if source.endswith(".py") and reference.startswith(source):
                name = file.name + reference.removeprefix(source)
                content = ray.put(pack(file.parent))
                self.parcels[reference] = Parcel(content, name, Path.cwd() == file.parent)
            else:
                self.parcels[reference] = None
        return self.parcels[reference]

    def _hear(self, worker: Worker) -> tuple[Job, Outcome] | None:
        """Take a worker's answer; what has ended with it, if anything has."""
        job = worker.job
        try:
            answer = ray.get(worker.answer)
        except RayTaskError as error:
            reason = error.cause if isinstance(error.cause, BadInput) else repr(error.cause)
            raise BadInput(f"the Ray node {worker.node} cannot carry runs out: {reason}") from error
        except RayError as error:
            return self._replace(worker, error)
        worker.job = worker.answer = None
        if job is not None:
            self.attempts.ended(job)
            return job, answer
        worker.node, there = answer
        found = there if isinstance(there, str) else differences(makings(), there)
        if found:
            raise BadInput(f"the Ray node {worker.node} must have what this one has: {found}")
        self.false_starts = 0
        return None

    def _replace(self, worker: Worker, error: RayError) -> tuple[Job, Outcome] | None:
        """A worker has vanished: its job, if it had one, is tried again, until it has cost `ATTEMPTS` workers."""
        self.workers.remove(worker)
        worker.stop()
        reason = last_line(error).partition(" Some common causes include:")[0]
        if worker.job is None:
            self.false_starts += 1
            if self.false_starts == ATTEMPTS:
                raise BadInput(f"Ray's workers end before they have begun: {reason}") from error
            return None
        lost = self.attempts.lost(worker.job, f"its Ray worker on {worker.node} vanished ({reason})")
        if lost is None:
            self.waiting.appendleft(worker.job)
            return None
        return worker.job, lost


def _first_of(answers: list[Any]) -> list[Any]:
    """The answer that comes first, if one comes within a second."""
    if not answers:
        time.sleep(1)
        return []
    ready, _ = ray.wait(answers, timeout=1)
    return list(ready)


def _times(resources: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """How often what is needed is there."""
    return min(round(resources.get(name, 0) / LEAST) // round(need / LEAST) for name, need in needs.items() if need)


def _in_words(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{(n := resources.get(name, 0)):g} {name}{'' if n == 1 else 's'}" for name in ("CPU", "GPU"))
