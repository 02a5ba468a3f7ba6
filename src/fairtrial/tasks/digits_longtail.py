"""Handwritten digits of which some are a hundred times rarer than others while training; the seed decides which."""

import torch
from torch.nn import CrossEntropyLoss

from fairtrial.contract import Metric, Slot
from fairtrial.methods.registry import Method
from fairtrial.tasks import digits, standard
from fairtrial.tasks.altered import AlteredTask
from fairtrial.tasks.imbalance import balanced_accuracy, long_tail, thinned
from fairtrial.tasks.measures import cross_entropy
from fairtrial.tasks.samples import Part
from fairtrial.tasks.slots import CROSS_ENTROPY, Options, classification_slots
from fairtrial.tasks.supervised import Setting

CLASSES, LARGEST, RATIO = 10, 100, 100.0


def with_long_tail(part: Part, generator: torch.Generator) -> Part:
    """Class sizes from 100 down to 1, 250 samples in all."""
    sizes = torch.tensor(long_tail(CLASSES, LARGEST, RATIO))
    return thinned(part, sizes[torch.randperm(CLASSES, generator=generator)].tolist(), generator)


def inverse_frequencies(setting: Setting) -> dict[str, torch.Tensor]:
    """Class weights that give every class the same weight in all."""
    sizes = sum(torch.bincount(y.flatten(), minlength=setting.num_classes) for _, y in setting.score_batches())
    return {"weight": setting.num_samples / (setting.num_classes * torch.as_tensor(sizes).clamp(min=1).float())}


LOSSES = (
    *standard.CLASSIFICATION_LOSSES,
    Method("WeightedCrossEntropyLoss", "loss", CrossEntropyLoss, bind=inverse_frequencies),
)

digits_longtail = AlteredTask(
    name="digits-longtail",
    version=1,
    metric=Metric("balanced accuracy", "maximize", "fraction", margin=0.01, worst=0.0),
    measure=balanced_accuracy,
    also={"cross entropy": cross_entropy},
    samples=digits.samples,
    model=digits.perceptron,
    total_steps=300,
    slots=classification_slots() | {"loss": Slot("loss", CROSS_ENTROPY, Options(LOSSES, "loss"))},
    scale="all",
    alter=with_long_tail,
)
