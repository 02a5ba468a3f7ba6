"""Handwritten digits, turned and moved: images of classes that training has not seen, to be found by their like.

Each of scikit-learn's 1797 images of 8×8 pixels is turned by 0, 90, 180 or 270 degrees, once and for all, and laid
somewhere on a noisy 14×14 canvas. A class is a digit turned one way: 40 of them, about 45 images each, and every image
is in one only. Of each digit one turn is kept for the test. Of the other 30 classes each seed takes 10 to validate
with, and trains on 20.

The pixels themselves, compared by the cosine, have a Recall@1 of about 0.6 and a MAP@R below 0.1 on the test classes.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from fairtrial.contract import Metric
from fairtrial.tasks.retrieval import RetrievalTask
from fairtrial.tasks.retrieval_measures import map_at_r, recall_at_k
from fairtrial.tasks.samples import Samples
from fairtrial.tasks.streams import Streams

TURNS, SIZE, CANVAS, NOISE = 4, 8, 14, 0.1
TRAINING_CLASSES, VALIDATION_CLASSES = 20, 10
VALIDATION = VALIDATION_CLASSES / (VALIDATION_CLASSES + TRAINING_CLASSES)
EMBEDDING, STEPS = 32, 150


def samples() -> Samples:
    """Images of class `4 digit + turn`; those of which digit + turn is a multiple of 4 are for the test."""
    pixels, digit = load_digits(return_X_y=True)
    images, digits = torch.from_numpy(pixels).float().view(-1, SIZE, SIZE) / 16, torch.from_numpy(digit).long()
    generator = Streams(0)("canvas")
    number = torch.arange(len(images))
    turn = torch.randint(TURNS, (len(images),), generator=generator)
    turned = torch.stack([torch.rot90(images, k, (1, 2)) for k in range(TURNS)])[turn, number]
    corner = torch.randint(CANVAS - SIZE + 1, (len(images), 2), generator=generator)
    rows, columns = (corner[:, axis, None] + torch.arange(SIZE) for axis in (0, 1))
    canvas = NOISE * torch.randn(len(images), CANVAS, CANVAS, generator=generator)
    canvas[number[:, None, None], rows[:, :, None], columns[:, None, :]] += turned
    y, test = TURNS * digits + turn, (digits + turn) % TURNS == 0
    return Samples(canvas[~test], y[~test], canvas[test], y[test], groups=y[~test], num_classes=TRAINING_CLASSES)


def encoder() -> nn.Module:
    """Three convolutions with batch normalisation, the maximum over places, and a linear layer to 32 numbers."""
    return nn.Sequential(
        nn.Unflatten(1, (1, CANVAS)),
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 48, 3, bias=False),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(48, EMBEDDING),
    )


digits_retrieval = RetrievalTask(
    name="digits-retrieval",
    version=1,
    metric=Metric("Recall@1", "maximize", "fraction", margin=0.01, worst=0.0),
    measure=recall_at_k,
    also={"MAP@R": map_at_r},
    samples=samples,
    model=encoder,
    total_steps=STEPS,
    scale="all",
    validation=VALIDATION,
)
