"""MNIST-1D: ten little curves, disguised (Greydanus and Kobak 2020, arXiv:2011.14439).

A digit is a template of 12 points. Each sample is its template padded with zeros, stretched to 72 points, scaled,
shifted around, laid over smooth noise where it is zero, overlaid with white noise, sheared, and read off at 40 points.
The templates, the parameters and the order of the random draws are those of the package `mnist1d` (Apache-2.0), so the
samples are the same, number for number: 4000 to train on and 1000 for the test.
"""

from functools import cache

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from torch import nn

from fairtrial.contract import Metric
from fairtrial.tasks.measures import accuracy, cross_entropy
from fairtrial.tasks.samples import Samples
from fairtrial.tasks.supervised import SupervisedTask

Array = NDArray[np.float64]

TEMPLATES: Array = np.array(
    [
        [5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5],
        [5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5],
        [5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5],
        [5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5],
        [5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5],
        [5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5],
        [5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5],
        [5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5],
        [5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5],
        [5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5],
    ]
)
PADDING = 36, 60
WIDTH = TEMPLATES.shape[1] + PADDING[1]
MAX_SHIFT = 48
SCALE = 0.4
SMOOTH_NOISE, WHITE_NOISE = 0.25, 0.02
SHEAR = 0.75
POINTS = 40


@cache
def samples(count: int = 5000, seed: int = 42) -> Samples:
    """Samples of every digit alike, in random order; the last fifth is for the test."""
    random = RandomState(seed)
    digits = np.repeat(np.arange(10), count // 10)
    curves, smooth, white = np.empty((3, len(digits), WIDTH))
    shears = np.empty(len(digits))
    templates = TEMPLATES - TEMPLATES.mean(1, keepdims=True)
    templates /= templates.std(1, keepdims=True)
    templates = (templates - templates[:, :1]) / 6
    for i, digit in enumerate(digits):
        zeros = PADDING[0] + int(random.rand() * (PADDING[1] - PADDING[0] + 1))
        padded = np.concatenate([templates[digit] + 1e-8, np.zeros(zeros)])  # only the padding is exactly zero
        stretched = _read_off(padded, WIDTH) * (1 + SCALE * (random.rand() - 0.5))
        curves[i] = np.roll(stretched, random.choice(MAX_SHIFT))
        smooth[i], white[i] = random.randn(WIDTH), random.randn(WIDTH)
        shears[i] = SHEAR * (random.rand() - 0.5)
    curves = np.where(curves != 0, curves, gaussian_filter1d(SMOOTH_NOISE * smooth, 2)) + WHITE_NOISE * white
    curves -= shears[:, None] * np.linspace(-0.5, 0.5, WIDTH)
    order = random.permutation(len(digits))
    points = np.stack([_read_off(curve, POINTS) for curve in curves[order]])
    x = torch.from_numpy((points - points.mean()) / points.std()).float()
    y = torch.from_numpy(digits[order])
    split = int(len(x) * 0.8)
    return Samples(x[:split], y[:split], x[split:], y[split:])


def _read_off(curve: Array, points: int) -> Array:
    read: Array = np.interp(np.linspace(0, 1, points), np.linspace(0, 1, len(curve)), curve)
    return read


def convolutional() -> nn.Module:
    """Three convolutions with batch normalisation, each halving the curve, and a linear layer."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, POINTS))]
    for channels, width in (1, 5), (25, 3), (25, 3):
        layers += [
            nn.Conv1d(channels, 25, width, stride=2, padding=width // 2, bias=False),
            nn.BatchNorm1d(25),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(125, 10))


mnist1d = SupervisedTask(
    name="mnist1d",
    version=1,
    metric=Metric("accuracy", "maximize", "fraction", margin=0.005, worst=0.0),
    measure=accuracy,
    also={"cross entropy": cross_entropy},
    samples=samples,
    model=convolutional,
    total_steps=600,
    scale="all",
)
