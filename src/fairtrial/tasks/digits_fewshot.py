"""Handwritten digits, turned and disturbed, of classes that training has not seen, told apart by an example of each.

A class is a digit turned by 0, 90, 180 or 270 degrees: 40 of them, about 45 of scikit-learn's images each, and every
image is in one only. Besides, each image is turned by up to 20 degrees and displaced by up to a pixel, once and for
all. Of each digit one turn is kept for the test. Of the other 30 classes each seed takes 10 to validate with, and
trains on 20.

The pixels themselves, as embeddings, have an accuracy of 0.54 with one example of each of five classes, and of 0.69
with five.
"""

from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import nn

from fairtrial.contract import Metric
from fairtrial.tasks.digits_ssl import turned
from fairtrial.tasks.episodes import QUERIES, WAYS, episode_slots, few_shot_accuracy
from fairtrial.tasks.retrieval import RetrievalTask
from fairtrial.tasks.samples import Samples
from fairtrial.tasks.streams import Streams

TURNS = 4
TRAINING_CLASSES, VALIDATION_CLASSES = 20, 10
VALIDATION = VALIDATION_CLASSES / (VALIDATION_CLASSES + TRAINING_CLASSES)
SHOTS, STEPS = 1, 300


def samples() -> Samples:
    """Images of class `4 digit + turn`; those with digit + turn = 1 (mod 4) are for the test."""
    pixels, digit = load_digits(return_X_y=True)
    images, digits = torch.from_numpy(pixels).float().view(-1, 8, 8) / 16, torch.from_numpy(digit).long()
    disturbed = turned(images, 20.0, 1.0, Streams(1)("disturbed"))
    turn = torch.randint(TURNS, (len(images),), generator=Streams(1)("turn"))
    x = torch.stack([torch.rot90(disturbed, k, (1, 2)) for k in range(TURNS)])[turn, torch.arange(len(images))]
    x, y, test = x.flatten(1), TURNS * digits + turn, (digits + turn) % TURNS == 1
    return Samples(x[~test], y[~test], x[test], y[test], groups=y[~test], num_classes=TRAINING_CLASSES)


def encoder() -> nn.Module:
    """64-128-128-32."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 32))


digits_fewshot = RetrievalTask(
    name="digits-fewshot",
    version=1,
    metric=Metric("5-way 1-shot accuracy", "maximize", "fraction", margin=0.01, worst=0.0),
    measure=partial(few_shot_accuracy, shots=1),
    also={"5-way 5-shot accuracy": partial(few_shot_accuracy, shots=5)},
    samples=samples,
    model=encoder,
    total_steps=STEPS,
    batch_size=WAYS * (SHOTS + QUERIES),
    slots=episode_slots(SHOTS),
    scale="all",
    validation=VALIDATION,
)
