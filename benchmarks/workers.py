"""Throughput of two workers, processes or on Ray, against one run after the other, on the same comparison.

python benchmarks/workers.py [ROUNDS [SEEDS]]
"""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

from fairtrial.tasks import load
from fairtrial.trial.comparison import compare
from fairtrial.trial.execute import Executor, Inline, Local
from fairtrial.trial.ray_executor import Ray
from fairtrial.trial.store import Store

EXECUTORS: dict[str, Callable[[], Executor]] = {
    "inline": lambda: Inline(load),
    "local": lambda: Local(load, 2),
    "ray": lambda: Ray(load, workers=2),
}


def seconds(executor: Executor, seeds: int) -> float:
    """Wall time of a comparison of two recipes with nothing to tune; the workers have all been busy before."""
    wanted = {"optimizer": "AdamW(lr=0.001),AdamW(lr=0.001, weight_decay=0.02)"}
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "warm.db") as store:
        compare(load, "digits", wanted, executor=executor, store=store, seeds=10)
        with Store(Path(folder) / "runs.db") as fresh:
            start = perf_counter()
            compare(load, "digits", wanted, executor=executor, store=fresh, seeds=seeds)
            return perf_counter() - start


def main(rounds: int = 5, seeds: int = 30) -> None:
    ratios: dict[str, list[float]] = {name: [] for name in EXECUTORS}
    for _ in range(rounds):
        took = {}
        for name, made in EXECUTORS.items():
            with made() as executor:
                took[name] = seconds(executor, seeds)
            ratios[name].append(took["inline"] / took[name])
        print(
            f"{2 * seeds} runs: " + ", ".join(f"{name} {second:.1f} s" for name, second in took.items()),
            f"(load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs)",
            flush=True,
        )
    for name in ("local", "ray"):
        print(f"throughput of two workers over inline, {name}: median {median(ratios[name]):.2f} of {rounds}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
