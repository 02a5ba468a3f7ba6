"""The diabetes table when only the mean response of every five patients is known.

Training and validation part are laid into bags at random, for each seed in another way. Recipes are chosen by how well
they explain the mean responses of held-out bags, as nothing else is known; the test is of single patients. Responses
are standardised by the bags' means alone, too.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

from fairtrial.contract import Choice, Metric, Slot
from fairtrial.methods.losses.aggregate_responses import make_bags
from fairtrial.tasks import tabular
from fairtrial.tasks.bags import BagTask
from fairtrial.tasks.measures import mean_absolute_error
from fairtrial.tasks.samples import Division, Part
from fairtrial.tasks.slots import Options, layer_slot, optimizer_slot, schedule_slot

BAG_SIZE, FEATURES = 5, 10
WORST = -1.0


def laid_into_bags(part: Part, size: int, generator: torch.Generator) -> Part:
    """Random bags (m, size, features) and their mean responses (m,); what fills no bag is left out."""
    kept = torch.randperm(len(part.x), generator=generator)[: len(part.x) // size * size]
    order = kept[make_bags(len(kept), size, generator).argsort(stable=True)].view(-1, size)
    return Part(part.x[order], part.y[order].mean(1))


def bagged(division: Division, generator: torch.Generator, size: int = BAG_SIZE) -> Division:
    """Bags to train on and to validate with; for the test, each sample is one of its own."""
    training, validation = (laid_into_bags(part, size, generator) for part in division[:2])
    test = Part(division.test.x[:, None], division.test.y)
    deviation, mean = torch.std_mean(training.y, correction=0)
    scale = deviation * math.sqrt(size)  # a single response's, of which bags at random are k
    return Division(*(Part(part.x, (part.y - mean) / scale) for part in (training, validation, test)))


def regressor() -> nn.Module:
    """10-64-64-1 for each sample: bags (m, k, 10) become predictions (m, k)."""
    return nn.Sequential(tabular.perceptron(FEATURES, 1), nn.Flatten(1))


def explained(output: Float[Tensor, "m k"], target: Float[Tensor, " m"]) -> float:
    """R² of bags' mean predictions for their mean responses, at least -1: no model is worse than one that diverged."""
    error = (output.mean(1) - target).square().mean() / target.var(correction=0)
    return max(WORST, 1.0 - error.item())


def mean_absolute_error_of_bags(output: Float[Tensor, "m k"], target: Float[Tensor, " m"]) -> float:
    """Mean of |mean prediction - response| over bags."""
    return mean_absolute_error(output.mean(1), target)


class OfBags(nn.Module):
    """A loss of single predictions and their bags' targets, of a row of predictions for each bag."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, output: Float[Tensor, "m k"], target: Float[Tensor, " m"]) -> Float[Tensor, ""]:
        bag = torch.arange(len(output)).repeat_interleave(output.shape[1])
        value: Tensor = self.loss(output.flatten(), target, bag)
        return value


@dataclass(frozen=True)
class BagMeansSlot(Slot):
    """Losses of predictions (n,), bag targets (m,) and the number of each prediction's bag (n,)."""

    def build(self, choice: Choice, setting: Any) -> OfBags:
        return OfBags(super().build(choice, setting))


def slots() -> dict[str, Slot]:
    """Those of a regression task."""
    loss = BagMeansSlot("loss", Choice("BagLoss"), Options((), "bag_loss"))
    return {slot.name: slot for slot in (optimizer_slot(), loss, schedule_slot(), layer_slot())}


diabetes_bags = BagTask(
    name="diabetes-bags",
    version=1,
    metric=Metric("R²", "maximize", "fraction", margin=0.02, worst=WORST),
    measure=explained,
    also={"mean absolute error": mean_absolute_error_of_bags},
    samples=partial(tabular.samples, load_diabetes, torch.float32),
    model=regressor,
    total_steps=150,
    batch_size=16,
    slots=slots(),
    validation=0.33,
    bagged=bagged,
)
