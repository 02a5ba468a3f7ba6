"""What the tests have other processes do. They are forked from a server that has imported the bench once."""

import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import toy
from jobs import job

from fairtrial.contract import Outcome
from fairtrial.trial.comparison import compare
from fairtrial.trial.execute import Inline, Local
from fairtrial.trial.migrations import upgrade
from fairtrial.trial.store import Store, StoreError

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["fairtrial.trial.comparison", "optuna", "scipy.stats", "torch"])

PATIENCE = 120  # seconds until a test that waits gives up; nothing is ever measured by it


def start(function: Any, *arguments: Any) -> Any:
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def wait_for(condition: Any) -> None:
    for _ in range(PATIENCE * 100):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError("what was waited for has not come about")


def lives(pid: int) -> bool:
    """Whether a process is there and is more than an exit code that nobody has fetched."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def put(store: Store, seed: int, outcome: Outcome | None = None, task: str = "toy") -> str:
    """Record a run that nobody has carried out."""
    run = job("raise", seed).run
    key = run.key(task=task, version=1, fingerprint="f")
    store.put(key, run, task, 1, "f", outcome or Outcome(seed / 10))
    return key


def write_runs(location: str, go: str, first: int, count: int) -> None:
    wait_for(Path(go).exists)
    with Store(location) as store:
        for seed in range(first, first + count):
            put(store, seed)


def read_until(stop: str, location: str) -> None:
    """Reads all the while; what has been there once must stay there."""
    seen: set[str] = set()
    with Store(location) as store:
        while not Path(stop).exists():
            listed = {stored.key for stored in store.list()}
            assert seen <= listed
            assert len(listed) <= store.count()
            seen = listed


def write_until_full(location: str, limit: int, told: str) -> None:
    """Files may grow no further than `limit` bytes: as on a full disk."""
    with Store(location) as store:
        put(store, 0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        written = 1
        try:
            while written < 10_000:
                put(store, written, Outcome(0.0, error="x" * 2000))
                written += 1
        except StoreError as error:
            Path(told).write_text(json.dumps([written, str(error)]))


def compare_into(location: str, answer: str, reference: str, wanted: dict[str, str], trials: int, seeds: int) -> None:
    with Store(location) as store, Inline(toy.load) as executor:
        found = compare(toy.load, reference, wanted, executor=executor, store=store, trials=trials, seeds=seeds)
        Path(answer).write_text(json.dumps(found.as_json()))


def upgrade_and_die(location: str, moment: str) -> None:
    """Is killed just before a statement that begins like this, or before the transaction is committed."""

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def look(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.strip().startswith(moment):
            die()

    sa.event.listen(sa.Engine, "before_cursor_execute", look)
    if moment == "COMMIT":
        sa.event.listen(sa.Engine, "commit", die)
    upgrade(location)


def compare_on_ray(
    location: str, address: str, reference: str, wanted: dict[str, str], trials: int, seeds: int
) -> None:
    from fairtrial.trial.ray_executor import Ray

    with Store(location) as store, Ray(toy.load, address=address, workers=2, cpus=0.5) as executor:
        compare(toy.load, reference, wanted, executor=executor, store=store, trials=trials, seeds=seeds)


def keep_workers_busy(told: str, workers: int, started: bool) -> None:
    """Tells its workers' process ids, if wanted when all have started their jobs; exits with 130 when interrupted."""
    log = Path(told + ".log")
    log.touch()
    try:
        with Local(toy.load, workers) as executor:
            for seed in range(workers):
                executor.submit(job("sleep", seed, task=f"toy log={log}"))
            wait_for(lambda: not started or log.read_text().count("\n") == workers)
            Path(told).write_text(json.dumps([worker.process.pid for worker in executor.workers]))
            os.rename(told, told + ".json")
            executor.next()
    except KeyboardInterrupt:
        sys.exit(130)
