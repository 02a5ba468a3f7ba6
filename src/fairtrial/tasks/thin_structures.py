"""Mortar to be found in pictures of brick walls, in one piece and with a hole for each brick.

The labels to learn from are accurate in `thin-structures`, and drawn quickly with a thin pen in
`thin-structures-noisy`; those that judge are accurate in both. The walls are `synthetic_brick_wall`'s.
"""

from functools import partial

import numpy as np
import torch

from fairtrial.contract import Metric
from fairtrial.methods.losses.brick_walls import synthetic_brick_wall
from fairtrial.tasks.samples import Division, Samples
from fairtrial.tasks.segmentation import (
    UNet,
    betti_dissimilarity,
    component_error,
    dice,
    hole_error,
    segmentation_loss_slot,
)
from fairtrial.tasks.slots import layer_slot, optimizer_slot, schedule_slot
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import SupervisedTask

SIZE = 64  # pixels, squared
WALLS, TEST = 64, 64


def samples(labels: str) -> Samples:
    """Walls, the labels to judge by, and behind them the labels to learn from."""
    walls = synthetic_brick_wall(WALLS + TEST, SIZE, np.random.default_rng(1), labels)
    y = torch.cat([walls.accurate, walls.labels], 1)
    return Samples(walls.images[TEST:], y[TEST:], walls.images[:TEST], y[:TEST], num_classes=2)


class WallsTask(SupervisedTask):
    """A task whose samples have two labels each: the first to judge by, the second to learn from."""

    def _divide(self, streams: Streams) -> Division:
        training, validation, test = super()._divide(streams)
        return Division(
            training._replace(y=training.y[:, 1:].contiguous()),
            *(part._replace(y=part.y[:, :1].contiguous()) for part in (validation, test)),
        )


def _task(name: str, labels: str) -> WallsTask:
    return WallsTask(
        name=name,
        version=1,
        metric=Metric("Betti dissimilarity", "minimize", "fraction", margin=0.02, worst=1.0),
        measure=betti_dissimilarity,
        also={"Betti-0 error": component_error, "Betti-1 error": hole_error, "Dice": dice},
        samples=partial(samples, labels),
        model=UNet,
        total_steps=120,
        batch_size=4,
        slots={slot.name: slot for slot in (optimizer_slot(), segmentation_loss_slot(), schedule_slot(), layer_slot())},
        scale="all",
        validation=0.375,
    )


thin_structures = _task("thin-structures", "accurate")
thin_structures_noisy = _task("thin-structures-noisy", "noisy")
