"""Handwritten digits of 8×8 pixels, which scikit-learn brings along."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from fairtrial.contract import Metric
from fairtrial.tasks.measures import accuracy, cross_entropy
from fairtrial.tasks.samples import Samples, hold_out
from fairtrial.tasks.supervised import SupervisedTask


def samples() -> Samples:
    """1797 images, a fifth of them held out."""
    x, y = load_digits(return_X_y=True)
    return hold_out(torch.from_numpy(x).float(), torch.from_numpy(y).long())


def perceptron() -> nn.Module:
    """64-128-128-10."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def convolutional() -> nn.Module:
    """Two convolutions with batch normalisation, each halving the image, and a linear layer."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


METRIC = Metric("accuracy", "maximize", "fraction", margin=0.005, worst=0.0)

digits = SupervisedTask(
    name="digits",
    version=1,
    metric=METRIC,
    measure=accuracy,
    also={"cross entropy": cross_entropy},
    samples=samples,
    model=perceptron,
    total_steps=400,
    scale="all",
)

digits_cnn = SupervisedTask(
    name="digits-cnn",
    version=1,
    metric=METRIC,
    measure=accuracy,
    also={"cross entropy": cross_entropy},
    samples=samples,
    model=convolutional,
    total_steps=160,
    scale="all",
)
