"""Tasks that learn embeddings and retrieve classes with them that training has not seen."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from fairtrial.contract import Choice, Slot
from fairtrial.methods.arguments import require
from fairtrial.methods.registry import Method
from fairtrial.tasks import standard
from fairtrial.tasks.embedding_losses import EMBEDDING_LOSSES
from fairtrial.tasks.samples import Division
from fairtrial.tasks.slots import ADAMW, Options, schedule_slot
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import SupervisedTask

TRIPLET_MARGIN = Choice("TripletMarginLoss")
BALANCED = Choice("BalancedSampler")


class BalancedSampler(torch.utils.data.Sampler[int]):
    """Batches of as many classes as samples of each; an epoch draws as many samples as there are.

    Classes are drawn anew for each batch, and of each class samples without replacement, as long as it has enough.

    Args:
        labels: of the training set, 0 to C - 1.
        batch_size: classes times samples; what remains of an epoch beyond whole batches is left out.
        per_class: samples of a class in a batch.
        generator: what is drawn from.
    """

    def __init__(self, labels: Int[Tensor, " n"], batch_size: int, per_class: int, generator: torch.Generator) -> None:
        classes = int(labels.max()) + 1
        require(1 <= per_class <= batch_size, "per_class", per_class, f"within 1..{batch_size}")
        require(batch_size % per_class == 0, "per_class", per_class, f"a divisor of {batch_size}")
        fits = batch_size // per_class <= classes
        require(fits, "per_class", per_class, f"at least {-(-batch_size // classes)}, as there are {classes} classes")
        self.labels, self.per_class, self.generator = labels, per_class, generator
        self.batches, self.drawn = max(1, len(labels) // batch_size), batch_size // per_class
        self.counts = torch.bincount(labels)
        self.by_class = labels.argsort(stable=True)
        self.starts = self.counts.cumsum(0) - self.counts

    def __iter__(self) -> Iterator[int]:
        ranks = torch.rand(self.batches, len(self.counts), generator=self.generator)
        classes = ranks.argsort(1)[:, : self.drawn]
        most = int(self.counts.max())
        places = torch.rand(self.batches, self.drawn, most, generator=self.generator)
        places = places.masked_fill(torch.arange(most) >= self.counts[classes][:, :, None], torch.inf)
        order = places.argsort(2)[:, :, : self.per_class] % self.counts[classes][:, :, None]
        return iter(self.by_class[(self.starts[classes][:, :, None] + order).flatten()].tolist())

    def __len__(self) -> int:
        return self.batches * self.drawn * self.per_class


BALANCED_SAMPLER = Method(
    "BalancedSampler",
    "class_sampler",
    BalancedSampler,
    bind=lambda setting: {
        "labels": torch.cat([labels for _, labels in setting.score_batches()]),
        "batch_size": setting.batch_size,
        "per_class": 8,
    },
)


@dataclass(frozen=True)
class EmbeddingLossSlot(Slot):
    """Losses of embeddings (n, d) and class labels (n,). They may have weights, which the optimizer is handed.

    Attributes:
        embedding_dim: d.
    """

    embedding_dim: int = 0

    def build(self, choice: Choice, setting: Any) -> Any:
        setting.embedding_dim = self.embedding_dim
        setting.loss = super().build(choice, setting)
        return setting.loss


def retrieval_slots(embedding_dim: int) -> dict[str, Slot]:
    """The slots of a task whose model gives embeddings. Batches are balanced in all of them."""
    optimizer = Slot(
        "optimizer",
        ADAMW,
        Options(standard.OPTIMIZERS, "optimizer"),
        lambda setting: {"params": [*setting.model.parameters(), *setting.loss.parameters()]},
    )
    loss = EmbeddingLossSlot(
        "loss", TRIPLET_MARGIN, Options(EMBEDDING_LOSSES, "embedding_loss"), embedding_dim=embedding_dim
    )
    sampler = Slot(
        "sampler",
        BALANCED,
        Options((BALANCED_SAMPLER,), "class_sampler"),
        lambda setting: {"generator": setting.order},
    )
    return {slot.name: slot for slot in (optimizer, loss, schedule_slot(), sampler)}


@dataclass
class RetrievalTask(SupervisedTask):
    """A supervised task whose validation and test classes are none of those that it is trained on.

    The samples' `groups` are their classes, so that whole classes go into the validation part, and their `num_classes`
    is how many are left to train on.
    """

    slots: Mapping[str, Slot] = field(default_factory=lambda: retrieval_slots(32))

    def _divide(self, streams: Streams) -> Division:
        return with_numbered_classes(super()._divide(streams))


def with_numbered_classes(division: Division) -> Division:
    """The training classes numbered from 0, for losses that have a weight for each."""
    _, labels = torch.unique(division.training.y, return_inverse=True)
    return division._replace(training=division.training._replace(y=labels))
