"""Losses that want the targets of a sample in a row of their own: several labels, or a sequence of tokens.

The training loop hands targets over flattened, for models that give a row of scores for each of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from fairtrial.contract import Choice, Slot


class Unflattened(nn.Module):
    """A loss that is given one row of targets for each row of the model's outputs.

    Args:
        loss: called with outputs (n, ...) and targets (n, m).
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, input: Float[Tensor, "n ..."], target: Shaped[Tensor, " nm"]) -> Float[Tensor, ""]:
        return self.loss(input, target.view(len(input), -1))


@dataclass(frozen=True)
class UnflattenedSlot(Slot):
    """A slot of such losses."""

    def build(self, choice: Choice, setting: Any) -> Unflattened:
        return Unflattened(super().build(choice, setting))
