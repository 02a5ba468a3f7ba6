"""Breast cancer to be found by a model that has seen few cases of it: a logit, and a decision by its sign."""

from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float, Int
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from fairtrial.contract import Choice, Metric, Slot
from fairtrial.methods.losses.anyloss import SEARCH, AnyLoss
from fairtrial.methods.registry import LogUniform, Method
from fairtrial.tasks import tabular
from fairtrial.tasks.altered import AlteredTask
from fairtrial.tasks.imbalance import balanced_accuracy, thinned
from fairtrial.tasks.samples import Part, Samples
from fairtrial.tasks.slots import Options, layer_slot, optimizer_slot, schedule_slot

POSITIVES = 10


def samples() -> Samples:
    """The table of `tabular`, malignant being 1."""
    table = tabular.samples(load_breast_cancer, torch.long)
    return replace(table, y=1 - table.y, y_test=1 - table.y_test)


def with_few_positives(part: Part, generator: torch.Generator) -> Part:
    """Ten positives, beside about 200 negatives."""
    return thinned(part, (len(part.y), POSITIVES), generator)


def area_under_the_roc_curve(output: Float[Tensor, " n"], target: Int[Tensor, " n"]) -> float:
    """How often a positive has a higher logit than a negative: the same wherever the threshold is."""
    return float(roc_auc_score(target, output))


class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    """PyTorch's, of targets of any type.

    Args:
        pos_weight: of the positives.
    """

    def __init__(self, pos_weight: float = 1.0) -> None:
        super().__init__(pos_weight=torch.tensor(pos_weight))

    def forward(self, input: Float[Tensor, " n"], target: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        return super().forward(input, target.to(input.dtype))


def binary_loss_slot() -> Slot:
    """Losses of logits (n,) and targets in {0, 1} (n,)."""
    losses = (
        Method("BCEWithLogitsLoss", "binary_loss", BCEWithLogitsLoss),
        Method("WeightedBCEWithLogitsLoss", "binary_loss", BCEWithLogitsLoss, {"pos_weight": LogUniform(1.0, 100.0)}),
        Method("AnyLoss", "binary_loss", AnyLoss, SEARCH, paper="anyloss"),
    )
    return Slot("loss", Choice("BCEWithLogitsLoss"), Options(losses, "binary_loss"))


tabular_screening = AlteredTask(
    name="tabular-screening",
    version=1,
    metric=Metric("balanced accuracy", "maximize", "fraction", margin=0.01, worst=0.0),
    measure=balanced_accuracy,
    also={"area under the ROC curve": area_under_the_roc_curve},
    samples=samples,
    model=partial(tabular.regressor, 30),
    total_steps=150,
    batch_size=32,
    slots={slot.name: slot for slot in (optimizer_slot(), binary_loss_slot(), schedule_slot(), layer_slot())},
    alter=with_few_positives,
)
