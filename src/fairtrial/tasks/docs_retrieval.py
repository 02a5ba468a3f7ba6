"""From a few words of documentation to the passage that they were cut from.

Texts are the topics that Python brings along for its `help()`, in windows of 48 words. In training any twelve
successive words of a window are the query and the others are its passage (the inverse cloze task of Lee, Chang and
Toutanova 2019, arXiv:1906.00300); when measured, the query is the window's beginning, and it has to find its passage
among those of all windows of the part.
"""

import re
import zlib
from dataclasses import replace
from pydoc_data.topics import topics

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.contract import Choice, Metric
from fairtrial.methods.losses.mw_loss import pooled_auc
from fairtrial.methods.registry import Method
from fairtrial.tasks.contrastive import contrastive_slots
from fairtrial.tasks.samples import Samples, hold_out
from fairtrial.tasks.supervised import SupervisedTask

WINDOW, QUERY = 48, 12  # words
BUCKETS = 2048  # words are told apart up to their hash
BLOCK = 4  # successive windows are in the same part
EMBEDDING = 128


def samples() -> Samples:
    """Windows of word hashes, by topic; paragraphs that several topics share are taken once."""
    seen: set[str] = set()
    windows, topic_of = [], []
    for place, topic in enumerate(sorted(topics)):
        paragraphs = [paragraph for paragraph in topics[topic].split("\n\n") if paragraph not in seen]
        seen.update(paragraphs)
        words = re.findall("[a-z]+|[0-9]+", "\n".join(paragraphs).lower())
        hashes = torch.tensor([zlib.crc32(word.encode()) % BUCKETS for word in words], dtype=torch.long)
        whole = hashes[: len(hashes) // WINDOW * WINDOW].view(-1, WINDOW)
        windows.append(whole)
        topic_of.append(torch.full((len(whole),), place))
    x = torch.cat(windows)
    held_out = hold_out(x, torch.cat(topic_of), groups=torch.arange(len(x)) // BLOCK)
    return replace(held_out, num_classes=len(topics))


class AnySpan:
    """Turns each window around, so that any of its spans comes first and is the query."""

    def __call__(
        self, x: Int[Tensor, "n w"], y: Int[Tensor, " n"], generator: torch.Generator
    ) -> tuple[Int[Tensor, "n w"], Int[Tensor, " n"]]:
        start = torch.randint(WINDOW - QUERY + 1, (len(x), 1), generator=generator)
        return x.gather(1, (start + torch.arange(WINDOW)) % WINDOW), y


class WordSums(nn.Module):
    """Weighted sums of word vectors: windows (n, words) become embeddings of query and passage (n, 2, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors = nn.Embedding(BUCKETS, EMBEDDING)
        self.weights = nn.Embedding(BUCKETS, 1)
        nn.init.ones_(self.weights.weight)

    def forward(self, x: Int[Tensor, "n w"]) -> Float[Tensor, "n 2 d"]:
        return torch.stack([self._sum(x[:, :QUERY]), self._sum(x[:, QUERY:])], 1)

    def _sum(self, words: Int[Tensor, "n w"]) -> Float[Tensor, "n d"]:
        weights = self.weights(words)[..., 0]
        return F.embedding_bag(words, self.vectors.weight, per_sample_weights=weights, mode="sum")


def scores_of(embeddings: Float[Tensor, "n 2 d"]) -> Float[Tensor, "n n"]:
    """Cosines of all queries to all passages."""
    queries, passages = F.normalize(embeddings, dim=-1).unbind(1)
    return queries @ passages.T


def own(scores: Float[Tensor, "n n"]) -> Bool[Tensor, "n n"]:
    """Which scores are of a query and its own passage."""
    return torch.eye(len(scores), dtype=torch.bool)


def mean_reciprocal_rank(embeddings: Float[Tensor, "n 2 d"], topic: Int[Tensor, " n"]) -> float:
    """Mean of 1 / rank of the own passage, 0 beyond rank 10; of equal scores the own is the last."""
    scores = scores_of(embeddings)
    rank = (scores >= scores.diagonal()[:, None]).sum(1)
    return torch.where(rank <= 10, 1.0 / rank, 0.0).double().mean().item()


def area_over_queries(embeddings: Float[Tensor, "n 2 d"], topic: Int[Tensor, " n"]) -> float:
    """Area under the ROC curve over the pairs of all queries together: whether one threshold serves them all."""
    scores = scores_of(embeddings)
    return pooled_auc(scores, own(scores))


docs_retrieval = SupervisedTask(
    name="docs-retrieval",
    version=1,
    metric=Metric("MRR@10", "maximize", "mean reciprocal rank", margin=0.01, worst=0.0),
    measure=mean_reciprocal_rank,
    also={"pooled AUC": area_over_queries},
    samples=samples,
    model=WordSums,
    total_steps=200,
    batch_size=64,
    slots=contrastive_slots(
        Choice("InfoNCELoss"), EMBEDDING, [Method("AnySpan", "batch", AnySpan)], optimizer=Choice("AdamW", {"lr": 0.03})
    ),
)
