"""A task of your own: what methods shall be tried on.

It runs as it is, on the wines that scikit-learn brings along. Change data, model, metric and steps to yours, then

    fairtrial compare THIS_FILE.py optimizer=AdamW,SGD
"""

import torch
from sklearn.datasets import load_wine
from torch import nn

from fairtrial.tasks import Metric, Samples, SupervisedTask, accuracy, classification_slots, cross_entropy, hold_out


def samples() -> Samples:
    """All your data as tensors: inputs with one row for each sample, and class indices (integers).

    For a regression give floating-point targets of shape (n,).

    `hold_out` sets a test part aside, the same for every seed. If you have a test set, give `Samples(x, y, x_test,
    y_test)` instead. Every run divides the rest into a training and a validation part by its seed, and standardises
    inputs by the training part.
    """
    x, y = load_wine(return_X_y=True)
    return hold_out(torch.from_numpy(x).float(), torch.from_numpy(y).long(), fraction=0.3)


def model() -> nn.Module:
    """A model with fresh weights. It takes a batch of inputs and gives scores (n, classes).

    For a regression give predictions (n,): end with `nn.Flatten(0)`.
    """
    return nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 3))


task = SupervisedTask(
    name="my-task",
    # Raise the version when you change something that makes earlier results incomparable.
    version=1,
    # `margin` is the smallest difference that would matter to you: methods that are closer count as equivalent.
    # `worst` is what a run counts that diverged or died.
    metric=Metric("accuracy", "maximize", "fraction", margin=0.01, worst=0.0),
    # Any function of the model's outputs and the targets will do, here and in `also`.
    measure=accuracy,
    also={"cross entropy": cross_entropy},
    samples=samples,
    model=model,
    total_steps=200,
    batch_size=32,
    # What may be swapped: optimizer, loss, schedule, batch, sampler, layer. For a regression: `regression_slots()`.
    slots=classification_slots(),
    # Inputs are standardised 'each' feature by itself, or 'all' alike, which suits images.
    scale="each",
    # The validation part's share in what is not held out.
    validation=0.2,
)

# If the shared training loop does not suit you, write a class of your own instead: it needs the members name, version,
# metric, slots, check(choices) and run(choices, seed, *, split, progress), which are described in fairtrial.contract.
