"""Sums modulo 31: a network memorises three fifths of the table at once and is asked for the rest."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.contract import Choice, Metric
from fairtrial.tasks.measures import accuracy, cross_entropy
from fairtrial.tasks.samples import Samples, hold_out
from fairtrial.tasks.slots import classification_slots, optimizer_slot
from fairtrial.tasks.supervised import SupervisedTask

MODULUS = 31


def samples() -> Samples:
    """All pairs (n, 2) of numbers below the modulus, a fifth of them held out, and their sums."""
    pairs = torch.cartesian_prod(torch.arange(MODULUS), torch.arange(MODULUS))
    return hold_out(pairs, pairs.sum(1) % MODULUS)


class OneHotPerceptron(nn.Module):
    """Scores (n, p) of pairs (n, 2) of numbers below p: one-hot 2p-200-200-p, ReLU, no biases."""

    def __init__(self, modulus: int = MODULUS, width: int = 200) -> None:
        super().__init__()
        self.modulus = modulus
        self.layers = nn.Sequential(
            nn.Linear(2 * modulus, width, bias=False),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
            nn.ReLU(),
            nn.Linear(width, modulus, bias=False),
        )

    def forward(self, x: Int[Tensor, "n 2"]) -> Float[Tensor, "n p"]:
        scores: Tensor = self.layers(F.one_hot(x, self.modulus).flatten(1).float())
        return scores


modular_addition = SupervisedTask(
    name="modular-addition",
    version=1,
    metric=Metric("accuracy", "maximize", "fraction", margin=0.02, worst=0.0),
    measure=accuracy,
    also={"cross entropy": cross_entropy},
    samples=samples,
    model=OneHotPerceptron,
    total_steps=300,
    batch_size=MODULUS**2,  # all that there is in every step
    slots=classification_slots() | {"optimizer": optimizer_slot(Choice("AdamW", {"lr": 0.01}))},
    validation=0.25,
)
