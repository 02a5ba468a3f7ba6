"""How long something takes relative to something else: both in one process, alternating, medians over rounds."""

from collections.abc import Callable, Sequence
from statistics import median, quantiles
from time import perf_counter

import torch
from torch import Tensor


def forward_and_backward(loss: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], None]:
    """Value and gradients of a loss at the inputs that take one."""
    leaves = [x for x in inputs if x.requires_grad]
    return lambda: (torch.autograd.grad(loss(*inputs), leaves), None)[1]


def seconds(work: Callable[[], None], times: int) -> float:
    start = perf_counter()
    for _ in range(times):
        work()
    return (perf_counter() - start) / times


def compared(ours: Callable[[], None], theirs: Callable[[], None], *, rounds: int = 15) -> list[tuple[float, float]]:
    """Seconds of both in each round. A round lasts long enough to be measured; who is first alternates."""
    seconds(ours, 2), seconds(theirs, 2)  # the first calls import and allocate
    times = max(1, int(0.05 / max(seconds(ours, 1), seconds(theirs, 1))))
    rows = []
    for place in range(rounds):
        if place % 2:
            rows.append((seconds(ours, times), seconds(theirs, times)))
        else:
            rows.append((seconds(theirs, times), seconds(ours, times))[::-1])
    return rows


def line(what: str, rows: Sequence[tuple[float, float]]) -> str:
    ratios = [ours / theirs for ours, theirs in rows]
    low, _, high = quantiles(ratios, n=4)
    ours, theirs = (1e3 * median(column) for column in zip(*rows, strict=True))
    return f"{what:<66} {ours:8.2f} {theirs:8.2f} ms  ratio {median(ratios):5.2f}  ({low:.2f} to {high:.2f})"
