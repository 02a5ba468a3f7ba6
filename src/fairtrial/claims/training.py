"""Training of a model outside the slots of a task, by the loop that the shipped tasks share."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.utils.data import RandomSampler

from fairtrial.tasks.samples import Part
from fairtrial.tasks.standard import NoTransform
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.training import Parts, train


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    part: Part,
    streams: Streams,
    *,
    steps: int,
    batch_size: int = 64,
    loss: Callable[..., Tensor] | None = None,
    schedule: LRScheduler | None = None,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Train on every sample of a part in turn, in an order that the streams decide.

    Args:
        model: trained in place.
        optimizer: over its parameters.
        part: what to train on.
        streams: those of the run.
        steps: how many optimizer steps.
        batch_size: samples in a step.
        loss: cross entropy by default; asked with the samples' indices if it has an argument `index`.
        schedule: of the learning rate; by default along a cosine to 0.
        after: called after every step with its number, from 1.

    Raises:
        Diverged: the loss is no longer finite.
    """
    parts = Parts(
        model=model,
        loss=loss or nn.CrossEntropyLoss(),
        optimizer=optimizer,
        schedule=schedule or CosineAnnealingLR(optimizer, steps),
        batch=NoTransform(),
        sampler=RandomSampler(range(len(part.x)), generator=streams("order")),
    )
    train(parts, *part, steps=steps, batch_size=batch_size, generator=streams("batch"), after=after)
