"""What people reach for anyway when embeddings are to tell classes apart: the baselines of metric learning.

All take embeddings (n, d), which they normalise, and class labels (n,); similarities are cosines. Each gives one number
for the batch, and 0 where it has no pair.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.losses.metric_learning import (
    check_embeddings,
    cosine_similarities,
    dot_products,
    pairs_of,
    unit,
)
from fairtrial.methods.losses.sc_mil import SupConLoss
from fairtrial.methods.registry import LogUniform, Method, Uniform


class ContrastiveLoss(nn.Module):
    """Mean of 1 - s over positive pairs, plus mean of max(0, s - margin) over those negative ones where it is not 0.

    Args:
        margin: the similarity up to which a negative pair is far enough apart (Hadsell et al. 2006).
    """

    def __init__(self, margin: float = 0.5) -> None:
        super().__init__()
        require(-1 <= margin < 1, "margin", margin, "at least -1 and below 1")
        self.margin = margin

    def forward(self, embeddings: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        check_embeddings(embeddings, labels)
        similarity, (positives, negatives) = cosine_similarities(embeddings), pairs_of(labels)
        near = (1.0 - similarity).masked_fill(~positives, 0.0).sum() / positives.sum().clamp(min=1)
        far = (similarity - self.margin).relu().masked_fill(~negatives, 0.0)
        return near + far.sum() / (far > 0).sum().clamp(min=1)


class TripletMarginLoss(nn.Module):
    """Mean of max(0, s_an - s_ap + margin) over positive pairs (a, p), each with its semi-hard negative n.

    That is the most similar negative among those less similar than p, or else the least similar of all negatives
    (Schroff et al. 2015).

    Args:
        margin: how much more similar the positive should be.
    """

    def __init__(self, margin: float = 0.2) -> None:
        super().__init__()
        require(0 < margin < 2, "margin", margin, "above 0 and below 2")
        self.margin = margin

    def forward(self, embeddings: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        check_embeddings(embeddings, labels)
        similarity, (positives, negatives) = cosine_similarities(embeddings), pairs_of(labels)
        to_negatives = similarity[:, None, :].masked_fill(~negatives[:, None, :], -torch.inf)
        semi_hard = to_negatives.masked_fill(to_negatives >= similarity[:, :, None], -torch.inf).amax(2)
        easiest = similarity.masked_fill(~negatives, torch.inf).amin(1, keepdim=True)
        chosen = torch.where(semi_hard.isfinite(), semi_hard, easiest)
        counted = positives & negatives.any(1, keepdim=True)
        violation = (chosen - similarity + self.margin).relu().masked_fill(~counted, 0.0)
        return violation.sum() / counted.sum().clamp(min=1)


class NormalizedSoftmaxLoss(nn.Module):
    """Cross entropy of cosines to learned class weights, over a temperature (Zhai and Wu 2019).

    The weights belong to the loss: give its parameters to the optimizer.

    Args:
        num_classes: number of classes.
        embedding_dim: size of an embedding.
        temperature: what cosines are divided by.
    """

    def __init__(self, num_classes: int, embedding_dim: int, temperature: float = 0.05) -> None:
        super().__init__()
        require(0 < temperature < float("inf"), "temperature", temperature, "above 0 and finite")
        self.temperature = temperature
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_dim))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, embeddings: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        check_embeddings(embeddings, labels)
        return F.cross_entropy(dot_products(unit(embeddings), unit(self.weight)) / self.temperature, labels.long())


EMBEDDING_LOSSES = (
    Method("TripletMarginLoss", "embedding_loss", TripletMarginLoss, {"margin": Uniform(0.05, 0.5)}),
    Method("ContrastiveLoss", "embedding_loss", ContrastiveLoss, {"margin": Uniform(0.0, 0.9)}),
    Method(
        "NormalizedSoftmaxLoss",
        "embedding_loss",
        NormalizedSoftmaxLoss,
        {"temperature": LogUniform(0.02, 0.5)},
        lambda setting: {"num_classes": setting.num_classes, "embedding_dim": setting.embedding_dim},
    ),
    Method("SupConLoss", "embedding_loss", SupConLoss, {"temperature": LogUniform(0.02, 0.5)}),
)
