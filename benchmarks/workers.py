"""Throughput of two worker processes against one run after the other, on the same comparison.

python benchmarks/workers.py
"""

import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

from fairtrial.tasks import load
from fairtrial.trial.comparison import compare
from fairtrial.trial.execute import Executor, Inline, Local
from fairtrial.trial.store import Store


def seconds(executor: Executor, seeds: int) -> float:
    """Wall time of a comparison of two recipes with nothing to tune; the workers are started before."""
    wanted = {"optimizer": "AdamW(lr=0.001),AdamW(lr=0.001, weight_decay=0.02)"}
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "warm.db") as store:
        compare(load, "digits", wanted, executor=executor, store=store, seeds=2)
        with Store(Path(folder) / "runs.db") as fresh:
            start = perf_counter()
            compare(load, "digits", wanted, executor=executor, store=fresh, seeds=seeds)
            return perf_counter() - start


def main(rounds: int = 3, seeds: int = 30) -> None:
    ratios = []
    for _ in range(rounds):
        with Inline(load) as executor:
            one = seconds(executor, seeds)
        with Local(load, 2) as executor:
            two = seconds(executor, seeds)
        ratios.append(one / two)
        print(f"{2 * seeds} runs: inline {one:.1f} s, two workers {two:.1f} s, ratio {one / two:.2f}")
    print(f"throughput of two workers over inline: median {median(ratios):.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
