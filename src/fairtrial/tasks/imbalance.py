"""Classes of unequal size: how to make them so, and a measure that does not mind."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fairtrial.methods.arguments import require
from fairtrial.tasks.samples import Part


def long_tail(classes: int, largest: int, ratio: float) -> list[int]:
    """Sizes of classes that fall geometrically from the largest to `ratio` times fewer, but to 1 at least.

    Args:
        classes: how many, at least 2.
        largest: size of the first one.
        ratio: of the first one's size to the last one's, at least 1.
    """
    require(classes >= 2, "classes", classes, "at least 2")
    require(largest >= 1, "largest", largest, "at least 1")
    require(ratio >= 1, "ratio", ratio, "at least 1")
    return [max(1, round(largest * ratio ** (-rank / (classes - 1)))) for rank in range(classes)]


def thinned(part: Part, sizes: Sequence[int], generator: torch.Generator) -> Part:
    """At most so many samples of each class, drawn at random; they stay in their order."""
    kept = torch.zeros(len(part.y), dtype=torch.bool)
    for label, size in enumerate(sizes):
        places = (part.y == label).nonzero()[:, 0]
        kept[places[torch.randperm(len(places), generator=generator)[:size]]] = True
    return Part(part.x[kept], part.y[kept])


def balanced_accuracy(output: Float[Tensor, "n *c"], target: Int[Tensor, " n"]) -> float:
    """Mean over classes of the part of their samples that is recognised, by the highest score or a logit's sign."""
    decided = output.argmax(1) if output.ndim == 2 else (output > 0).long()
    sizes = torch.bincount(target)
    right = torch.bincount(target[decided == target], minlength=len(sizes))
    return (right / sizes)[sizes > 0].double().mean().item()
