"""What tasks share whose model gives scores of classes for every pixel of an image: slot, model and measures."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.contract import BadInput, Choice, Slot
from fairtrial.methods.arguments import require
from fairtrial.methods.losses.topomortar import BettiNumbers, betti_error, betti_numbers
from fairtrial.methods.registry import LogUniform, Method
from fairtrial.tasks.slots import Options


class CrossEntropyLoss(nn.Module):
    """Mean cross entropy of logits (n, c, h, w) and class indices (n, 1, h, w).

    Args:
        foreground_weight: of the pixels that are not of class 0; > 0.
    """

    def __init__(self, foreground_weight: float = 1.0) -> None:
        super().__init__()
        require(foreground_weight > 0, "foreground_weight", foreground_weight, "above 0")
        self.foreground_weight = foreground_weight

    def forward(self, input: Float[Tensor, "n c h w"], target: Int[Tensor, "n 1 h w"]) -> Float[Tensor, ""]:
        weight = input.new_full((input.shape[1],), self.foreground_weight)
        weight[0] = 1.0
        return F.cross_entropy(input, target[:, 0], weight)


SEGMENTATION_LOSSES = (
    Method("CrossEntropyLoss", "segmentation_loss", CrossEntropyLoss),
    Method(
        "WeightedCrossEntropyLoss",
        "segmentation_loss",
        CrossEntropyLoss,
        {"foreground_weight": LogUniform(1.0, 10.0)},
    ),
)


def as_map(target: Int[Tensor, " nhw"], output: Float[Tensor, "n c h w"]) -> Int[Tensor, "n 1 h w"]:
    """The training loop hands targets over flattened; here they are in the shape of the image again."""
    return target.view(len(output), 1, *output.shape[2:])


class OfMaps(nn.Module):
    """A loss that is given the targets of an image as a map.

    Args:
        loss: called with logits (n, c, h, w) and class indices (n, 1, h, w).
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, input: Float[Tensor, "n c h w"], target: Int[Tensor, " nhw"]) -> Float[Tensor, ""]:
        try:
            return self.loss(input, as_map(target, input))
        except ImportError as error:
            raise BadInput(str(error)) from error


@dataclass(frozen=True)
class SegmentationLossSlot(Slot):
    """A slot of such losses."""

    def build(self, choice: Choice, setting: Any) -> OfMaps:
        return OfMaps(super().build(choice, setting))


def segmentation_loss_slot() -> SegmentationLossSlot:
    """Losses of logits (n, c, h, w) and class indices (n, 1, h, w); cross entropy with Dice is the usual one."""
    return SegmentationLossSlot("loss", Choice("CEDiceLoss"), Options(SEGMENTATION_LOSSES, "segmentation_loss"))


def _block(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    """A small U-Net from images (n, 3, h, w) to logits (n, 2, h, w): one convolution on each level, down and up.

    Args:
        widths: channels of each level. Sides must be multiples of 2 ** (levels - 1).
    """

    def __init__(self, widths: tuple[int, ...] = (8, 16, 32)) -> None:
        super().__init__()
        self.down = nn.ModuleList(_block(*pair) for pair in pairwise((3, *widths)))
        self.up = nn.ModuleList(_block(below + level, level) for level, below in reversed(list(pairwise(widths))))
        self.head = nn.Conv2d(widths[0], 2, 1)

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 2 h w"]:
        kept: list[Tensor] = []
        for block in self.down:
            kept.append(block(F.max_pool2d(kept[-1], 2) if kept else x))
        x = kept.pop()
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), kept.pop()], 1))
        logits: Tensor = self.head(x)
        return logits


def _masks(
    output: Float[Tensor, "n 2 h w"], target: Int[Tensor, " nhw"]
) -> Iterator[tuple[Int[Tensor, "h w"], Int[Tensor, "h w"]]]:
    """Predicted and true mask of each image."""
    return zip(output.argmax(1), as_map(target, output)[:, 0], strict=True)


def component_error(output: Float[Tensor, "n 2 h w"], target: Int[Tensor, " nhw"]) -> float:
    """Betti-0 error: by how many the number of pieces is wrong, on average over images."""
    return fmean(betti_error(*masks).components for masks in _masks(output, target))


def hole_error(output: Float[Tensor, "n 2 h w"], target: Int[Tensor, " nhw"]) -> float:
    """Betti-1 error: by how many the number of holes is wrong, on average over images."""
    return fmean(betti_error(*masks).holes for masks in _masks(output, target))


def betti_dissimilarity(output: Float[Tensor, "n 2 h w"], target: Int[Tensor, " nhw"]) -> float:
    """Differences of the numbers of pieces and holes over their sums (Bray and Curtis), on average over images.

    Nothing found has 1, the most there is. The number of pieces alone would not do: nothing or everything found has
    about the right one.
    """
    return fmean(
        _sum(betti_error(found, there)) / max(1, _sum(betti_numbers(found)) + _sum(betti_numbers(there)))
        for found, there in _masks(output, target)
    )


def _sum(numbers: BettiNumbers) -> int:
    return numbers.components + numbers.holes


def dice(output: Float[Tensor, "n 2 h w"], target: Int[Tensor, " nhw"]) -> float:
    """Dice coefficient of the foreground, on average over images."""
    return fmean(
        2 * int((found & there).sum()) / max(1, int(found.sum()) + int(there.sum()))
        for found, there in _masks(output, target)
    )
