"""Training on the classes of digits-retrieval with losses that are in no slot, and retrieval of the unseen ones."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from fairtrial.contract import Diverged
from fairtrial.tasks.digits_retrieval import STEPS, VALIDATION, encoder, samples
from fairtrial.tasks.retrieval import BalancedSampler, with_numbered_classes
from fairtrial.tasks.retrieval_measures import map_at_r, recall_at_k
from fairtrial.tasks.samples import Division, Part, Samples, divide
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import predict
from fairtrial.tasks.training import index_batches

BATCH, PER_CLASS = 64, 8

LossOfBatch = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Retrieval:
    """Of classes that were not trained on; both 0 if the run diverged.

    Attributes:
        recall: Recall@1.
        precision: MAP@R.
    """

    recall: float = 0.0
    precision: float = 0.0


def divided(streams: Streams) -> Division:
    """A seed's own division of the classes, as in the task."""
    return with_numbered_classes(divide(_samples(), VALIDATION, "all", streams))


@cache
def _samples() -> Samples:
    return samples()


def trained(
    loss_of: LossOfBatch, division: Division, streams: Streams, *, lr: float, weights: Sequence[Tensor] = ()
) -> nn.Module:
    """An encoder after the task's steps on balanced batches, with AdamW and a cosine schedule.

    Args:
        loss_of: the loss of a batch as a function of encoder, inputs and labels.
        division: what to train on.
        streams: those of the run.
        lr: learning rate at the start.
        weights: further ones to train, a loss's own.

    Raises:
        Diverged: the loss or the embeddings are no longer finite.
    """
    with streams.globally("model"):
        model = encoder()
    optimizer = torch.optim.AdamW([*model.parameters(), *weights], lr=lr)
    schedule = CosineAnnealingLR(optimizer, STEPS)
    x, y = division.training
    batches = index_batches(BalancedSampler(y, BATCH, PER_CLASS, streams("order")), BATCH)
    for _ in range(STEPS):
        index = next(batches)
        optimizer.zero_grad()
        loss = loss_of(model, x[index], y[index])
        if not math.isfinite(loss.item()):
            raise Diverged(f"the loss was {loss.item()}")
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return model.eval()


def judged(model: nn.Module, part: Part) -> Retrieval:
    """How well the classes of a part are retrieved."""
    embeddings, labels = predict(model, part)
    return Retrieval(recall_at_k(embeddings, labels), map_at_r(embeddings, labels))
