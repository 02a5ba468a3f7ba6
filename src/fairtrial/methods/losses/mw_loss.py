"""Mann-Whitney loss: every positive score against every negative of the batch (arXiv:2510.00137, 2025).

Of B queries with a passage each, and H hard negatives for each query if there are any, S⁻ holds the cosines of every
query to all passages but its own, M = B (B H + B - 1) of them. With s⁺_i the cosine of query i to its own passage,

    L = mean_i mean_s∈S⁻ softplus((s - s⁺_i) / τ)

and mean over mean is at least log 2 times 1 - AUC, the share of pairs (positive, negative) in the wrong order, for
every τ > 0. The in-batch contrastive loss, which stands beside it for comparison, compares s⁺_i with the negatives of
query i alone: it does not see an offset on all scores of a query, and neither does it prevent one, though offsets bring
the AUC pooled over queries down to a half.

    L_CL = -mean_i log[ exp(s⁺_i / τ) / (exp(s⁺_i / τ) + sum_s∈S⁻_i exp(s / τ)) ]

The paper's formula for a batch sums over S⁻ where its definition takes an expectation; `reduction='paper'` is that sum.
The mean is the default, so that learning rates do not depend on B. The formula also leaves τ out, which lemma and
experiments have. τ = 0.01 in all of the paper's runs. There is no code by the authors.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fairtrial.methods.arguments import require
from fairtrial.methods.losses.classification import at_least_float32, check_reduction, reduce
from fairtrial.methods.losses.contrastive import (
    check_finite,
    check_temperature,
    check_views,
    cosines,
    full_precision,
    off_diagonal,
)
from fairtrial.methods.registry import LogUniform, method

PAIRS_AT_ONCE = 2**22


def in_batch_scores(
    query: Float[Tensor, "b d"],
    passage: Float[Tensor, "b d"],
    hard_negatives: Float[Tensor, "b h d"] | None = None,
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b m"]]:
    """Cosine of each query to its passage, and its cosines to the other passages and to all hard negatives."""
    check_views(query, passage, ("query", "passage"), fewest=2 if hard_negatives is None else 1)
    scores = cosines(query, passage)
    positive, negative = scores.diagonal(), off_diagonal(scores) if len(query) > 1 else scores[:, :0]
    if hard_negatives is None:
        return positive, negative
    b, d = query.shape
    found = tuple(hard_negatives.shape)
    require(hard_negatives.ndim == 3, "hard_negatives", found, f"of shape ({b}, h, {d})")
    require((found[0], found[2]) == (b, d) and found[1] >= 1, "hard_negatives", found, f"of shape ({b}, h ≥ 1, {d})")
    check_finite(hard_negatives, "hard_negatives")
    return positive, torch.cat([negative, cosines(query, hard_negatives.flatten(0, 1))], 1)


def comparisons(
    positive: Float[Tensor, " p"], negative: Float[Tensor, " m"], temperature: float
) -> Float[Tensor, " p"]:
    """For each positive score the mean over the negative ones of softplus((negative - positive) / τ)."""
    return F.softplus((negative - positive[:, None]) / temperature).mean(1)


def mann_whitney(
    positive: Float[Tensor, " p"], negative: Float[Tensor, " m"], temperature: float, chunk_size: int | None
) -> Float[Tensor, " p"]:
    """`comparisons`, so many positives at once; backward computes the chunks' comparisons again, and keeps none."""
    size = chunk_size or max(1, PAIRS_AT_ONCE // len(negative))
    if size >= len(positive):
        return comparisons(positive, negative, temperature)
    chunks = [
        checkpoint(comparisons, chunk, negative, temperature, use_reentrant=False, preserve_rng_state=False)
        for chunk in positive.split(size)
    ]
    return torch.cat(chunks)


@method(paper="mw_loss", slot="contrastive_loss", search={"temperature": LogUniform(0.01, 1.0)})
class MannWhitneyLoss(nn.Module):
    """Mann-Whitney loss of queries (b, d) and their passages (b, d), row i with row i; brought to length 1 here.

    `of_scores` takes scores and a mask of the positives instead. The value belongs to the batch as a whole: each
    positive meets the negatives of all queries.

    Args:
        temperature: τ > 0. At the paper's 0.01 the gradient is that of a hinge, nearly: few pairs have any.
        chunk_size: so many positives are compared at once; by default as many as make about four million pairs. The
            work grows as b³, the memory as b² and the chunk.
        reduction: 'none' gives each positive's mean over the negatives; 'mean' or 'sum' over the positives; 'paper'
            is the mean over the positives of the sum over the negatives.
    """

    def __init__(self, temperature: float = 0.01, *, chunk_size: int | None = None, reduction: str = "mean") -> None:
        super().__init__()
        check_temperature(temperature)
        require(chunk_size is None or chunk_size >= 1, "chunk_size", chunk_size, "at least 1, or None")
        require(
            reduction in ("none", "mean", "sum", "paper"), "reduction", reduction, "'none', 'mean', 'sum' or 'paper'"
        )
        self.temperature, self.chunk_size, self.reduction = temperature, chunk_size, reduction

    def forward(
        self,
        query: Float[Tensor, "b d"],
        passage: Float[Tensor, "b d"],
        hard_negatives: Float[Tensor, "b h d"] | None = None,
    ) -> Float[Tensor, "..."]:
        with full_precision(query):
            positive, negative = in_batch_scores(query, passage, hard_negatives)
            return self._reduced(positive, negative.flatten()).to(query.dtype)

    def of_scores(
        self,
        scores: Float[Tensor, "b n"],
        positive_mask: Bool[Tensor, "b n"],
        valid_mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "..."]:
        """The loss of scores as they are; a query may have several positives, or none.

        Args:
            scores: of b queries and n candidates.
            positive_mask: which are of a positive.
            valid_mask: which count at all; by default all.

        How many positives there are decides shapes, so `torch.compile(fullgraph=True)` does not take this form.
        """
        check_scores_and_masks(scores, positive_mask, valid_mask)
        valid = torch.ones_like(positive_mask) if valid_mask is None else valid_mask
        values = at_least_float32(scores)
        positive, negative = values[positive_mask & valid], values[~positive_mask & valid]
        require(len(positive) > 0, "positive_mask", "without any valid one", "such that there is a positive")
        require(len(negative) > 0, "positive_mask", "true for all valid ones", "such that there is a negative")
        return self._reduced(positive, negative).to(scores.dtype)

    def _reduced(self, positive: Float[Tensor, " p"], negative: Float[Tensor, " m"]) -> Float[Tensor, "..."]:
        loss = mann_whitney(positive, negative, self.temperature, self.chunk_size)
        if self.reduction == "paper":
            return loss.mean() * len(negative)
        return reduce(loss, self.reduction)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, chunk_size={self.chunk_size}, reduction={self.reduction!r}"


class InBatchContrastiveLoss(nn.Module):
    """In-batch contrastive loss, called as `MannWhitneyLoss`; without hard negatives it is `InfoNCELoss`.

    Args:
        temperature: τ > 0.
        reduction: 'none' gives the loss of each query; 'mean' or 'sum'.
    """

    def __init__(self, temperature: float = 0.01, *, reduction: str = "mean") -> None:
        super().__init__()
        check_temperature(temperature)
        check_reduction(reduction)
        self.temperature, self.reduction = temperature, reduction

    def forward(
        self,
        query: Float[Tensor, "b d"],
        passage: Float[Tensor, "b d"],
        hard_negatives: Float[Tensor, "b h d"] | None = None,
    ) -> Float[Tensor, "..."]:
        positive, negative = in_batch_scores(query, passage, hard_negatives)
        return self._reduced(torch.cat([positive[:, None], negative], 1)).to(query.dtype)

    def of_scores(self, scores: Float[Tensor, "b n"], positive_mask: Bool[Tensor, "b n"]) -> Float[Tensor, "..."]:
        """The loss of scores as they are, each query with exactly one positive."""
        check_scores_and_masks(scores, positive_mask)
        if scores.device.type == "cpu" and not torch.compiler.is_compiling():
            counts = positive_mask.sum(1)
            require(bool((counts == 1).all()), "positive_mask", counts.tolist(), "true exactly once in each row")
        logits = at_least_float32(scores)
        first = positive_mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        return self._reduced(logits.gather(1, first)).to(scores.dtype)

    def _reduced(self, scores: Float[Tensor, "b n"]) -> Float[Tensor, "..."]:
        logits = scores / self.temperature
        return reduce(F.softplus(logits[:, 1:].logsumexp(1) - logits[:, 0]), self.reduction)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}"


def check_scores_and_masks(
    scores: Float[Tensor, "..."], positive_mask: Bool[Tensor, "..."], valid_mask: Bool[Tensor, "..."] | None = None
) -> None:
    require(scores.ndim == 2 and scores.numel() > 0, "scores", tuple(scores.shape), "of shape (b ≥ 1, n ≥ 1)")
    check_finite(scores, "scores")
    for name, mask in (("positive_mask", positive_mask), ("valid_mask", valid_mask)):
        if mask is not None:
            require(mask.dtype == torch.bool, name, mask.dtype, "a boolean tensor")
            require(mask.shape == scores.shape, name, tuple(mask.shape), f"of shape {tuple(scores.shape)}, as scores")


def pooled_auc(scores: Float[Tensor, "..."], positive_mask: Bool[Tensor, "..."]) -> float:
    """Area under the ROC curve over the pairs of all queries together: the share of pairs (positive, negative) in the
    right order, ties by half.

    For training that a single threshold shall follow: the mean over queries of each query's own area is another thing.
    """
    from sklearn.metrics import roc_auc_score

    mask = positive_mask.flatten()
    require(bool(mask.any()) and not bool(mask.all()), "positive_mask", "of one kind", "such that both kinds occur")
    return float(roc_auc_score(mask.cpu().numpy(), scores.detach().flatten().double().cpu().numpy()))
