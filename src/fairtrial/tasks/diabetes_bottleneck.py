"""The progress of diabetes, predicted from ten measurements through a code of eight numbers."""

from functools import partial

import torch
from sklearn.datasets import load_diabetes

from fairtrial.contract import Metric
from fairtrial.tasks import tabular
from fairtrial.tasks.bottleneck import (
    ATTACKS,
    BottleneckNetwork,
    attacked_error,
    bottleneck_slots,
    root_mean_squared_error,
)
from fairtrial.tasks.samples import Samples
from fairtrial.tasks.supervised import SupervisedTask

INPUTS = 10


def samples() -> Samples:
    """442 patients, three tenths of them held out."""
    return tabular.samples(load_diabetes, torch.float32)


diabetes_bottleneck = SupervisedTask(
    name="diabetes-bottleneck",
    version=1,
    metric=Metric("RMSE", "minimize", "standard deviations of the target", margin=0.01, worst=10.0),
    measure=root_mean_squared_error,
    also={f"RMSE under attack, step {step:g}": partial(attacked_error, attack=k) for k, step in enumerate(ATTACKS)},
    samples=samples,
    model=partial(BottleneckNetwork, INPUTS),
    total_steps=150,
    batch_size=128,
    slots=bottleneck_slots(INPUTS),
)
