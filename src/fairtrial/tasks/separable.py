"""Two classes that a plane separates: logistic regression, in which nothing but the optimizer is at work.

The features are of very different size, as features are that nobody has scaled, and one class is rare. That makes the
problem hard for first-order steps although it is convex and all training data can be classified correctly.
"""

import torch
from torch import nn

from fairtrial.contract import Choice, Metric
from fairtrial.tasks.imbalance import balanced_accuracy
from fairtrial.tasks.measures import cross_entropy
from fairtrial.tasks.samples import Samples, hold_out
from fairtrial.tasks.slots import layer_slot, loss_slot, optimizer_slot, schedule_slot
from fairtrial.tasks.supervised import SupervisedTask

DIMENSIONS = 40
SAMPLES = 4000
RARE = 0.05  # share of the rare class
MARGIN = 0.02  # the least distance to the plane, in standard deviations of the distances, before features are scaled
LARGEST = 100.0  # standard deviation of the largest feature; that of the smallest is 1


def samples() -> Samples:
    """Gaussian features, standard deviations from 1 to 100, labels by the side of a random plane, none near it."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(DIMENSIONS, generator=generator, dtype=torch.float64)
    drawn = torch.randn(2 * SAMPLES, DIMENSIONS, generator=generator, dtype=torch.float64)
    distances = drawn @ (normal / normal.norm())
    distances -= distances.quantile(1 - RARE)
    far = (distances.abs() >= MARGIN).nonzero().flatten()[:SAMPLES]
    scales = torch.logspace(0, torch.tensor(LARGEST).log10().item(), DIMENSIONS, dtype=torch.float64)
    return hold_out((drawn * scales)[far].float(), (distances[far] > 0).long())


separable = SupervisedTask(
    name="separable",
    version=1,
    metric=Metric("balanced accuracy", "maximize", "fraction", margin=0.01, worst=0.0),
    measure=balanced_accuracy,
    also={"cross entropy": cross_entropy},
    samples=samples,
    model=lambda: nn.Linear(DIMENSIONS, 2),
    total_steps=200,
    batch_size=SAMPLES,  # all that there is in every step
    slots={
        slot.name: slot
        for slot in (optimizer_slot(Choice("AdamW", {"lr": 0.1})), loss_slot(), schedule_slot(), layer_slot())
    },
    scale="all",
)
