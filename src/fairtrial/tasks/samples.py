"""The samples of a task: a test part that is the same for every seed, and the rest, divided anew for each."""

import hashlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from fairtrial.methods.arguments import require
from fairtrial.tasks.streams import Streams


@dataclass(frozen=True)
class Samples:
    """All samples of a task.

    Attributes:
        x: inputs to train on and to validate with, one row each. Floating-point ones get standardised.
        y: their targets: class indices, or numbers to predict, which get standardised.
        x_test: inputs held out for the test.
        y_test: their targets.
        groups: rows with equal numbers stay together when training and validation part are divided; by default each
            row is on its own.
        num_classes: number of classes; counted if not given, 0 where the targets are numbers.
    """

    x: Shaped[Tensor, "n ..."]
    y: Shaped[Tensor, "n ..."]
    x_test: Shaped[Tensor, "m ..."]
    y_test: Shaped[Tensor, "m ..."]
    groups: Int[Tensor, " n"] | None = None
    num_classes: int = -1

    def __post_init__(self) -> None:
        require(len(self.x) == len(self.y), "y", len(self.y), f"{len(self.x)} rows, as many as x has")
        require(len(self.x_test) == len(self.y_test), "y_test", len(self.y_test), f"{len(self.x_test)} rows, as x_test")
        if self.num_classes < 0:
            counted = 0 if self.y.is_floating_point() else int(self.y.max()) + 1
            object.__setattr__(self, "num_classes", counted)

    @property
    def hash(self) -> str:
        """Changes when any of the samples does."""
        digest = hashlib.sha256()
        for tensor in (self.x, self.y, self.x_test, self.y_test):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


class Part(NamedTuple):
    """Inputs and targets, one row each."""

    x: Shaped[Tensor, "n ..."]
    y: Shaped[Tensor, "n ..."]


class Division(NamedTuple):
    """What one run trains on, and the parts that it may be judged by."""

    training: Part
    validation: Part
    test: Part


def hold_out(
    x: Shaped[Tensor, "n ..."],
    y: Shaped[Tensor, "n ..."],
    fraction: float = 0.2,
    *,
    groups: Int[Tensor, " n"] | None = None,
) -> Samples:
    """Hold a random part of the samples out for the test, always the same one, with each class's share."""
    test = random_part(y, fraction, groups, Streams(0)("test"))
    return Samples(x[~test], y[~test], x[test], y[test], None if groups is None else groups[~test])


def random_part(
    y: Shaped[Tensor, "n ..."], fraction: float, groups: Int[Tensor, " n"] | None, generator: torch.Generator
) -> Bool[Tensor, " n"]:
    """Mark a random part of the samples, with each class's share; whole groups where there are any."""
    require(0 < fraction < 1, "fraction", fraction, "between 0 and 1")
    if groups is not None:
        names = torch.unique(groups)
        marked = random_part(names.double(), fraction, None, generator)
        return torch.isin(groups, names[marked])
    order = torch.randperm(len(y), generator=generator)
    if y.ndim == 1 and not y.is_floating_point():
        order = order[y[order].argsort(stable=True)]  # by class, and at random within a class
    edges = (torch.arange(len(y) + 1, dtype=torch.float64) * fraction + 1e-9).floor()
    marked = torch.zeros(len(y), dtype=torch.bool)
    marked[order[edges[1:] > edges[:-1]]] = True
    require(bool(marked.any()), "fraction", fraction, f"enough for at least one of {len(y)} samples")
    return marked


def divide(samples: Samples, fraction: float, scale: Literal["each", "all"], streams: Streams) -> Division:
    """Divide into a training and a validation part, and standardise by the training part's mean and deviation.

    Args:
        samples: what to divide.
        fraction: the validation part's share.
        scale: standardise 'each' feature, or 'all' of them alike, as the pixels of an image.
        streams: those of the run.
    """
    validation = random_part(samples.y, fraction, samples.groups, streams("split"))
    dims = (0,) if scale == "each" else tuple(range(samples.x.ndim))
    x = _standardised(samples.x[~validation], samples.x[validation], samples.x_test, dims)
    y = _standardised(samples.y[~validation], samples.y[validation], samples.y_test, (0,))
    return Division(*map(Part, x, y))


def _standardised(training: Tensor, validation: Tensor, test: Tensor, dims: tuple[int, ...]) -> list[Tensor]:
    parts = [training, validation, test]
    if not training.is_floating_point():
        return parts
    deviation, mean = torch.std_mean(training, dims, correction=0, keepdim=True)
    deviation = deviation.masked_fill(deviation == 0, 1.0)  # a constant feature says nothing, whatever its scale
    return [(part - mean) / deviation for part in parts]
