"""What the bench costs: runs through `compare`, store and all, against the same training in a hand-written loop.

Both train the digits perceptron for as many runs; they alternate in one process, and the median ratio of wall times
is printed with the range of the middle half.

    OMP_NUM_THREADS=1 python benchmarks/bench_overhead.py
"""

import sys
import tempfile
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

import torch
from loop_overhead import plain

from fairtrial.tasks import load
from fairtrial.tasks.samples import divide
from fairtrial.tasks.streams import Streams
from fairtrial.trial.comparison import compare
from fairtrial.trial.execute import Inline
from fairtrial.trial.store import Store

SEEDS = 3


def through_the_bench(folder: Path) -> None:
    """Two recipes with nothing to tune, 3 seeds each: 6 runs."""
    wanted = {"optimizer": "AdamW(lr=0.001),AdamW(lr=0.001, weight_decay=0.02)"}
    with Inline(load) as executor, Store(folder / "runs.db") as store:
        compare(load, "digits", wanted, executor=executor, store=store, seeds=SEEDS)


def main(pairs: int = 15) -> None:
    torch.set_num_threads(1)
    task = load("digits")
    division = divide(task.samples(), task.validation, task.scale, Streams(0))
    parts = [tensor for part in division for tensor in part]
    ratios = []
    for pair in range(-1, pairs):
        times = {}
        for which in ("bench", "plain") if pair % 2 else ("plain", "bench"):
            with tempfile.TemporaryDirectory() as folder:
                start = perf_counter()
                if which == "bench":
                    through_the_bench(Path(folder))
                else:
                    for _ in range(2 * SEEDS):
                        plain(*parts)
                times[which] = perf_counter() - start
        if pair >= 0:  # the first pair imports and allocates
            ratios.append(times["bench"] / times["plain"])
    low, _, high = quantiles(ratios, n=4)
    print(f"bench over plain loop, {pairs} pairs of {2 * SEEDS} runs each")
    print(f"ratio: median {median(ratios):.3f}, middle half {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
