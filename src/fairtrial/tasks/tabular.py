"""Small tables that scikit-learn brings along, and a small network on each."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from torch import nn

from fairtrial.contract import Metric
from fairtrial.tasks.measures import accuracy, cross_entropy, mean_absolute_error, root_mean_squared_error
from fairtrial.tasks.samples import Samples, hold_out
from fairtrial.tasks.slots import regression_slots
from fairtrial.tasks.supervised import SupervisedTask


def samples(load: Callable[..., Any], targets: torch.dtype) -> Samples:
    """A table, three tenths of its rows held out: in so small ones a fifth would hardly tell anything."""
    x, y = load(return_X_y=True)
    return hold_out(torch.from_numpy(x).float(), torch.from_numpy(y).to(targets), 0.3)


def perceptron(inputs: int, outputs: int) -> nn.Module:
    """inputs-64-64-outputs."""
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))


def regressor(inputs: int) -> nn.Module:
    """inputs-64-64-1, the prediction of a sample being a number and not a row."""
    return nn.Sequential(perceptron(inputs, 1), nn.Flatten(0))


tabular = SupervisedTask(
    name="tabular",
    version=1,
    metric=Metric("accuracy", "maximize", "fraction", margin=0.01, worst=0.0),
    measure=accuracy,
    also={"cross entropy": cross_entropy},
    samples=partial(samples, load_breast_cancer, torch.long),
    model=partial(perceptron, 30, 2),
    total_steps=200,
    batch_size=32,
)

tabular_wine = SupervisedTask(
    name="tabular-wine",
    version=1,
    metric=Metric("accuracy", "maximize", "fraction", margin=0.01, worst=0.0),
    measure=accuracy,
    also={"cross entropy": cross_entropy},
    samples=partial(samples, load_wine, torch.long),
    model=partial(perceptron, 13, 3),
    total_steps=100,
    batch_size=32,
)

tabular_diabetes = SupervisedTask(
    name="tabular-diabetes",
    version=1,
    metric=Metric("RMSE", "minimize", "standard deviations of the target", margin=0.01, worst=10.0),
    measure=root_mean_squared_error,
    also={"mean absolute error": mean_absolute_error},
    samples=partial(samples, load_diabetes, torch.float32),
    model=partial(regressor, 10),
    total_steps=200,
    batch_size=32,
    slots=regression_slots(),
)
