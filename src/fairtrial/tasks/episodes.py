"""Few-shot tasks: classes that training has not seen are told apart by a few examples of each.

An episode has a few classes, of each some examples, the support, and some queries, which belong to the class whose
support has the nearest mean.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fairtrial.contract import Choice, Slot
from fairtrial.methods.arguments import require
from fairtrial.methods.losses.susana import EpisodeLoss
from fairtrial.methods.registry import LogUniform, Method
from fairtrial.tasks.retrieval import BalancedSampler
from fairtrial.tasks.slots import Options, optimizer_slot, schedule_slot

WAYS, QUERIES = 5, 10
DRAWN = 400  # episodes that measure


class OfEpisode(nn.Module):
    """A loss of an episode, of a batch's embeddings: those of one class after those of the other.

    Args:
        loss: called with support (ways, shots, d) and queries (ways, queries, d).
        shots: examples of each class in the support.
        queries: queries of each class.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], shots: int, queries: int) -> None:
        super().__init__()
        self.loss, self.shots, self.queries = loss, shots, queries

    def forward(self, embeddings: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        episode = embeddings.view(-1, self.shots + self.queries, embeddings.shape[1])
        return self.loss(episode[:, : self.shots], episode[:, self.shots :])


def prototype_cross_entropy(temperature: float = 1.0) -> EpisodeLoss:
    """Cross entropy of minus the squared distances to prototypes over a temperature (Snell et al. 2017).

    Args:
        temperature: above 0.
    """
    return EpisodeLoss(["cross"], temperature=temperature)


EPISODE_LOSSES = (
    Method("PrototypeCrossEntropy", "episode_loss", prototype_cross_entropy, {"temperature": LogUniform(0.1, 100.0)}),
)


@dataclass(frozen=True)
class EpisodeLossSlot(Slot):
    """Losses of support (ways, shots, d) and queries (ways, queries, d).

    Attributes:
        shots: examples of each class in the support.
    """

    shots: int = 1

    def build(self, choice: Choice, setting: Any) -> OfEpisode:
        return OfEpisode(super().build(choice, setting), self.shots, QUERIES)


def episode_slots(shots: int) -> dict[str, Slot]:
    """The slots of a task whose batches are episodes: the sampler gives the classes of each one after the other."""
    losses = Options(EPISODE_LOSSES, "episode_loss")
    sampler = Method(
        "EpisodeSampler",
        "episode_sampler",
        BalancedSampler,
        bind=lambda setting: {
            "labels": torch.cat([labels for _, labels in setting.score_batches()]),
            "batch_size": WAYS * (shots + QUERIES),
            "per_class": shots + QUERIES,
        },
    )
    slots = (
        optimizer_slot(),
        EpisodeLossSlot("loss", Choice("PrototypeCrossEntropy"), losses, shots=shots),
        schedule_slot(),
        Slot(
            "sampler",
            Choice("EpisodeSampler"),
            Options((sampler,), "episode_sampler"),
            lambda setting: {"generator": setting.order},
        ),
    )
    return {slot.name: slot for slot in slots}


def few_shot_accuracy(embeddings: Float[Tensor, "n d"], labels: Int[Tensor, " n"], shots: int) -> float:
    """The part of queries whose class has the nearest prototype, over episodes that are always drawn alike."""
    _, labels = torch.unique(labels, return_inverse=True)
    episodes = drawn_episodes(labels, shots, torch.Generator().manual_seed(0))
    support, queries = embeddings[episodes[:, :, :shots]], embeddings[episodes[:, :, shots:]]
    nearest = torch.cdist(queries.flatten(1, 2), support.mean(2)).argmin(2)
    return (nearest == torch.arange(WAYS).repeat_interleave(QUERIES)).double().mean().item()


def drawn_episodes(
    labels: Int[Tensor, " n"], shots: int, generator: torch.Generator
) -> Int[Tensor, "episodes ways samples"]:
    """Places of the samples of `DRAWN` episodes; none is twice in one. Classes are 0 to C - 1."""
    counts = torch.bincount(labels)
    fewest = int(counts.min())
    require(fewest >= shots + QUERIES, "labels", f"a class of {fewest}", f"at least {shots + QUERIES} of each class")
    by_class, starts, most = labels.argsort(stable=True), counts.cumsum(0) - counts, int(counts.max())
    classes = torch.rand(DRAWN, len(counts), generator=generator).argsort(1)[:, :WAYS]
    places = torch.rand(DRAWN, WAYS, most, generator=generator)
    places = places.masked_fill(torch.arange(most) >= counts[classes][:, :, None], torch.inf)
    return by_class[starts[classes][:, :, None] + places.argsort(2)[:, :, : shots + QUERIES]]
