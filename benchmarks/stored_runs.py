"""What 9,999 stored runs cost: listing them, resuming the comparison that they are, and its report.

The runs are of digits, 11 recipes tuned for 101 seeds, with figures that are made up. Time is counted from when
everything is imported. The last line but one is the share of the comparison's own statistics.

    OMP_NUM_THREADS=1 python benchmarks/stored_runs.py [URL OF AN EMPTY DATABASE]
"""

import math
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TypeVar

from fairtrial.contract import Costs, Outcome, Pruned
from fairtrial.report.formats import as_text
from fairtrial.report.origin import origin
from fairtrial.report.tables import run_lines
from fairtrial.tasks import load
from fairtrial.trial.comparison import Comparison, compare
from fairtrial.trial.execute import Executor, Inline, Job, Watch
from fairtrial.trial.statistics import differences
from fairtrial.trial.store import Store

T = TypeVar("T")

WANTED = {
    "optimizer": "AdamW,AdamP,FRUGAL,SGD,Adam,NAdam",
    "loss": "CrossEntropyLoss,ZLoss,CSLoss,WWLoss",
    "batch": "NoTransform,DecoupledMixup,Mixup",
}


class Pretended(Inline):
    """Runs that nobody carries out, with figures as digits might have."""

    def next(self) -> tuple[Job, Outcome]:
        job = self.waiting.popleft()
        own, shared = random.Random(str(job.run)), random.Random(job.run.seed)
        lr = job.run.recipe.choices["optimizer"].params.get("lr", 1e-3)
        value = 0.96 + shared.gauss(0, 0.01) + own.gauss(0, 0.005) - 0.01 * math.log10(lr / 0.01) ** 2
        watch = Watch(job.pruner, 0.0)
        outcome = Outcome(value, metrics={"cross entropy": own.random()}, costs=Costs(own.random(), 441_476, 61_928, 7))
        try:
            for place in range(1, 6):
                watch(80 * place, 400, value - 0.02 * (5 - place) + own.gauss(0, 0.003))
        except Pruned:
            outcome = Outcome(watch.curve[-1][1], "pruned")
        return job, replace(outcome, curve=watch.curve, seconds=own.random())


def compared(store: Store, executor: Executor) -> Comparison:
    return compare(load, "digits", WANTED, executor=executor, store=store, trials=8, seeds=101)


def timed(what: str, work: Callable[[], T]) -> T:
    started = perf_counter()
    result = work()
    print(f"{what}: {perf_counter() - started:.2f} s", flush=True)
    return result


def main(location: str) -> None:
    with Store(location) as store:
        found = timed("carried out", lambda: compared(store, Pretended(load)))
    with Store(location) as store:
        timed("runs: the newest 20", lambda: "\n".join(run_lines(store.list(limit=20))))
        timed("runs: all of them", lambda: "\n".join(run_lines(store.list())))
        found = timed("resumed", lambda: compared(store, Inline(load)))
    baseline, *others = [judged.values for judged in found.recipes]
    timed("of that, statistics", lambda: differences(baseline, others))
    timed("report as a page, without the comparison", lambda: as_text(found, origin(found, load), "html"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(*sys.argv[1:] or [str(Path(folder) / "runs.db")])
