"""Tagging with many labels: which of 400 terms a passage of Python's documentation holds, told from its other words."""

import re
from collections import Counter
from dataclasses import replace
from pydoc_data.topics import topics
from zlib import crc32

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.contract import Choice, Metric
from fairtrial.methods.arguments import require
from fairtrial.methods.registry import LogUniform, Method
from fairtrial.tasks.samples import Samples, hold_out
from fairtrial.tasks.slots import Options, layer_slot, optimizer_slot, schedule_slot
from fairtrial.tasks.supervised import SupervisedTask
from fairtrial.tasks.unflattened import UnflattenedSlot

TERMS, FREQUENT = 400, 60  # so many labels; a word in more passages than that is none
LENGTH, FEWEST = 300, 5  # characters of a passage, and terms, at least
BUCKETS = 1024  # of the other words
CHAPTER = 8  # passages in a row that are in the same part
TOP = 5


def samples() -> Samples:
    """Passages as counts of hashed words, which are no terms, and the terms in each as a row of 0 and 1."""
    passages = [Counter(re.findall("[a-z_]{3,}", passage.lower())) for passage in _passages()]
    found_in = Counter(word for passage in passages for word in passage)
    by_frequency = sorted(found_in, key=lambda word: (-found_in[word], word))
    terms = [word for word in by_frequency if found_in[word] <= FREQUENT][:TERMS]
    place = {term: number for number, term in enumerate(terms)}
    passages = [passage for passage in passages if len(passage.keys() & place.keys()) >= FEWEST]
    x, y = torch.zeros(len(passages), BUCKETS), torch.zeros(len(passages), TERMS, dtype=torch.long)
    for row, passage in enumerate(passages):
        for word, count in passage.items():
            if word in place:
                y[row, place[word]] = 1
            else:
                x[row, crc32(word.encode()) % BUCKETS] += count
    return replace(hold_out(x.log1p(), y, groups=torch.arange(len(x)) // CHAPTER), num_classes=TERMS)


def _passages() -> list[str]:
    """Paragraphs in a row, as many as make a passage; those that several topics share are taken once."""
    paragraphs = dict.fromkeys(paragraph for topic in sorted(topics) for paragraph in topics[topic].split("\n\n"))
    found, passage = [], ""
    for paragraph in paragraphs:
        passage += paragraph + "\n"
        if len(passage) >= LENGTH:
            found.append(passage)
            passage = ""
    return found


def model() -> nn.Module:
    """1024-64-400: scores of the terms, a row for each passage."""
    return nn.Sequential(nn.Linear(BUCKETS, 64), nn.ReLU(), nn.Linear(64, TERMS))


class BinaryCrossEntropyLoss(nn.Module):
    """Mean binary cross entropy of scores (n, labels) and targets (n, labels) of 0 and 1.

    Args:
        pos_weight: weight of the labels that are there; > 0.
    """

    def __init__(self, pos_weight: float = 1.0) -> None:
        super().__init__()
        require(pos_weight > 0, "pos_weight", pos_weight, "above 0")
        self.pos_weight = pos_weight

    def forward(self, input: Float[Tensor, "n l"], target: Int[Tensor, "n l"]) -> Float[Tensor, ""]:
        weight = torch.tensor(self.pos_weight, dtype=input.dtype, device=input.device)
        return F.binary_cross_entropy_with_logits(input, target.to(input.dtype), pos_weight=weight)


MULTILABEL_LOSSES = (
    Method("BinaryCrossEntropyLoss", "multilabel_loss", BinaryCrossEntropyLoss, {"pos_weight": LogUniform(1.0, 100.0)}),
)


def precision(output: Float[Tensor, "n l"], target: Int[Tensor, " nl"], k: int = TOP) -> float:
    """The part of the k labels of highest score that are there, on average over passages."""
    return target.view_as(output).gather(1, output.topk(k).indices).double().mean().item()


def at_the_top(output: Float[Tensor, "n l"], target: Int[Tensor, " nl"]) -> float:
    """How often the label of highest score is there."""
    return precision(output, target, 1)


def r_precision(output: Float[Tensor, "n l"], target: Int[Tensor, " nl"]) -> float:
    """The part of each passage's labels found among as many of highest score, on average over passages."""
    there = target.view_as(output)
    ranked = there.gather(1, output.argsort(1, descending=True))
    count = there.sum(1, keepdim=True)
    among = torch.arange(output.shape[1]) < count
    return (torch.where(among, ranked, 0).sum(1) / count[:, 0]).double().mean().item()


def loss_slot() -> UnflattenedSlot:
    """Losses of scores (n, labels) and targets (n, labels) of 0 and 1."""
    return UnflattenedSlot("loss", Choice("BinaryCrossEntropyLoss"), Options(MULTILABEL_LOSSES, "multilabel_loss"))


docs_tags = SupervisedTask(
    name="docs-tags",
    version=1,
    metric=Metric(f"precision at {TOP}", "maximize", "fraction", margin=0.01, worst=0.0),
    measure=precision,
    also={"precision at 1": at_the_top, "R-precision": r_precision},
    samples=samples,
    model=model,
    total_steps=200,
    batch_size=32,
    slots={slot.name: slot for slot in (optimizer_slot(), loss_slot(), schedule_slot(), layer_slot())},
    scale="all",
)
