"""Handwritten digits of which many are mislabelled while training; those that judge are labelled right."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from fairtrial.contract import Metric
from fairtrial.tasks import digits
from fairtrial.tasks.altered import AlteredTask
from fairtrial.tasks.measures import accuracy, cross_entropy
from fairtrial.tasks.samples import Part

Wrong = Callable[[Tensor, torch.Generator], Tensor]

CLASSES = 10
LOOKALIKE = (6, 7, 5, 8, 9, 2, 0, 1, 3, 4)  # pairs of digits that are taken for each other: 0-6, 1-7, 2-5, 3-8, 4-9


def any_other(y: Int[Tensor, " n"], generator: torch.Generator) -> Int[Tensor, " n"]:
    """One of the nine other labels, all equally likely."""
    return (y + torch.randint(1, CLASSES, y.shape, generator=generator)) % CLASSES


def lookalike(y: Int[Tensor, " n"], generator: torch.Generator) -> Int[Tensor, " n"]:
    """The label's partner."""
    return torch.tensor(LOOKALIKE)[y]


def mislabelled(part: Part, generator: torch.Generator, *, rate: float, wrong: Wrong) -> Part:
    """Each label is replaced by a wrong one with probability `rate`."""
    replaced = torch.rand(part.y.shape, generator=generator) < rate
    return part._replace(y=torch.where(replaced, wrong(part.y, generator), part.y))


def _task(name: str, rate: float, wrong: Wrong) -> AlteredTask:
    return AlteredTask(
        name=name,
        version=1,
        metric=Metric("accuracy", "maximize", "fraction", margin=0.01, worst=0.0),
        measure=accuracy,
        also={"cross entropy": cross_entropy},
        samples=digits.samples,
        model=digits.perceptron,
        total_steps=400,
        scale="all",
        alter=partial(mislabelled, rate=rate, wrong=wrong),
    )


digits_noisy = _task("digits-noisy", 0.4, any_other)
digits_noisy_pairs = _task("digits-noisy-pairs", 0.3, lookalike)
