"""Multi-similarity loss and general pair weighting (Wang et al., CVPR 2019, arXiv:1904.06627).

With cosine similarities S of a batch of m embeddings, an anchor i has positives P_i (its label, itself excluded) and
negatives N_i. *General pair weighting* reads every loss of S as a weighted sum of similarities whose weights are its
derivatives, w_ij = |∂L/∂S_ij|; `pair_weights` gives them. The paper's own loss mines pairs first and weights them then:

    keep j in N_i   if S_ij > min_{k in P_i} S_ik - ε        keep j in P_i   if S_ij < max_{k in N_i} S_ik + ε

    L = 1/m Σ_i  1/α log(1 + Σ_{k in P_i} exp(-α (S_ik - λ)))  +  1/β log(1 + Σ_{k in N_i} exp(β (S_ik - λ)))

so that a pair's weight rests on its own similarity to λ and on the anchor's other positives or negatives,

    w⁺_ij = 1 / (exp(-α (λ - S_ij)) + Σ_{k in P_i} exp(-α (S_ik - S_ij)))
    w⁻_ij = 1 / (exp( β (λ - S_ij)) + Σ_{k in N_i} exp( β (S_ik - S_ij)))

The authors' code (research-ms-loss) is followed where it is more definite than the paper: λ = 0.5, the sum is divided
by the size of the batch and not by the number of anchors that keep a pair, and an anchor without a positive or without
a negative counts as 0. One thing differs: the code tells an anchor from its positives by S < 1 - 1e-5 and so loses
exact duplicates too, while here only the anchor itself is left out.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.losses.classification import check_reduction, reduce
from fairtrial.methods.losses.metric_learning import (
    Pairs,
    check_embeddings,
    check_labels,
    cosine_similarities,
    log_sum_exp,
    pairs_of,
)
from fairtrial.methods.registry import LogUniform, Uniform, method


def mined(similarity: Float[Tensor, "m m"], pairs: Pairs, epsilon: float) -> Pairs:
    """The pairs that are hard: within ε of the anchor's hardest of the other side. None without another side."""
    positives, negatives = pairs
    similarity = similarity.detach()
    hardest_positive = similarity.masked_fill(~positives, torch.inf).amin(1, keepdim=True)
    hardest_negative = similarity.masked_fill(~negatives, -torch.inf).amax(1, keepdim=True)
    return Pairs(
        positives & (similarity < hardest_negative + epsilon), negatives & (similarity > hardest_positive - epsilon)
    )


def of_both_kinds(pairs: Pairs) -> Pairs:
    """All pairs of the anchors that have a positive and a negative."""
    both = pairs.positives.any(1, keepdim=True) & pairs.negatives.any(1, keepdim=True)
    return Pairs(pairs.positives & both, pairs.negatives & both)


def multi_similarity(
    similarity: Float[Tensor, "m m"], pairs: Pairs, *, alpha: float = 2.0, beta: float = 50.0, base: float = 0.5
) -> Float[Tensor, " m"]:
    """The weighting half of the loss, for each anchor, of pairs that are already chosen."""
    above = similarity - base
    attraction = F.softplus(log_sum_exp(-alpha * above, pairs.positives)) / alpha
    repulsion = F.softplus(log_sum_exp(beta * above, pairs.negatives)) / beta
    return attraction + repulsion


@method(
    paper="multi_similarity", slot="embedding_loss", search={"alpha": LogUniform(0.5, 20.0), "base": Uniform(0.2, 0.9)}
)
class MultiSimilarityLoss(nn.Module):
    """Multi-similarity loss of embeddings (m, d), which need not be normalised, and class labels (m,).

    Args:
        alpha: α > 0, how sharply positives are weighted.
        beta: β > 0, how sharply negatives are weighted. 50 is the paper's, 40 the authors' configuration.
        base: λ, the similarity that divides pairs; the default is that of the authors' code.
        epsilon: ε ≥ 0, how much easier than the hardest of the other side a pair may be and still be kept.
        mine: leave out easy pairs; without it every pair of an anchor that has both kinds counts.
        reduction: 'none', 'mean' or 'sum'; the mean is over all anchors, also those that keep no pair.

    A batch in which no pair is kept has loss 0 and gradient 0.

    Raises:
        ValueError: fewer than two embeddings, not one label for each, or embeddings that are not finite.
    """

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 50.0,
        base: float = 0.5,
        epsilon: float = 0.1,
        *,
        mine: bool = True,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        require(0 < alpha < float("inf"), "alpha", alpha, "above 0 and finite")
        require(0 < beta < float("inf"), "beta", beta, "above 0 and finite")
        require(abs(base) < float("inf"), "base", base, "finite")
        require(epsilon >= 0, "epsilon", epsilon, "at least 0")
        check_reduction(reduction)
        self.alpha, self.beta, self.base, self.epsilon = alpha, beta, base, epsilon
        self.mine, self.reduction = mine, reduction

    def forward(self, embeddings: Float[Tensor, "m d"], labels: Int[Tensor, " m"]) -> Float[Tensor, "..."]:
        check_embeddings(embeddings, labels)
        similarity = cosine_similarities(embeddings)
        pairs = pairs_of(labels)
        pairs = mined(similarity, pairs, self.epsilon) if self.mine else of_both_kinds(pairs)
        loss = multi_similarity(similarity, pairs, alpha=self.alpha, beta=self.beta, base=self.base)
        return reduce(loss, self.reduction).to(embeddings.dtype)

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha}, beta={self.beta}, base={self.base}, epsilon={self.epsilon}, mine={self.mine}, "
            f"reduction={self.reduction!r}"
        )


class MinedPairs(NamedTuple):
    """Index pairs: anchors with a positive each, and anchors with a negative each."""

    anchors: Int[Tensor, " p"]
    positives: Int[Tensor, " p"]
    negative_anchors: Int[Tensor, " q"]
    negatives: Int[Tensor, " q"]


class MultiSimilarityMiner(nn.Module):
    """The loss's mining alone, for other losses: hard pairs of embeddings (m, d), as four index vectors.

    Their number depends on the values, so a call waits for the device.

    Args:
        epsilon: as in `MultiSimilarityLoss`.
    """

    def __init__(self, epsilon: float = 0.1) -> None:
        super().__init__()
        require(epsilon >= 0, "epsilon", epsilon, "at least 0")
        self.epsilon = epsilon

    @torch.no_grad()
    def forward(self, embeddings: Float[Tensor, "m d"], labels: Int[Tensor, " m"]) -> MinedPairs:
        check_embeddings(embeddings, labels)
        positives, negatives = mined(cosine_similarities(embeddings), pairs_of(labels), self.epsilon)
        return MinedPairs(*positives.nonzero(as_tuple=True), *negatives.nonzero(as_tuple=True))

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon}"


PairLoss = Callable[[Tensor, Pairs], Tensor]


def contrastive(similarity: Float[Tensor, "m m"], pairs: Pairs, *, margin: float = 0.5) -> Float[Tensor, " m"]:
    """Σ_{P_i} -S + Σ_{N_i} max(0, S - margin) for each anchor."""
    attraction = (-similarity).masked_fill(~pairs.positives, 0.0).sum(1)
    return attraction + (similarity - margin).relu().masked_fill(~pairs.negatives, 0.0).sum(1)


def triplet(similarity: Float[Tensor, "m m"], pairs: Pairs, *, margin: float = 0.1) -> Float[Tensor, " m"]:
    """Σ_{p in P_i, n in N_i} max(0, S_in - S_ip + margin) for each anchor."""
    gap = similarity[:, None, :] - similarity[:, :, None] + margin
    return gap.relu().masked_fill(~(pairs.positives[:, :, None] & pairs.negatives[:, None, :]), 0.0).sum((1, 2))


def lifted_structure(similarity: Float[Tensor, "m m"], pairs: Pairs, *, base: float = 0.5) -> Float[Tensor, " m"]:
    """max(0, log Σ_{P_i} exp(base - S) + log Σ_{N_i} exp(S - base)) for each anchor."""
    total = log_sum_exp(base - similarity, pairs.positives) + log_sum_exp(similarity - base, pairs.negatives)
    return total.relu()


def binomial_deviance(
    similarity: Float[Tensor, "m m"], pairs: Pairs, *, alpha: float = 2.0, beta: float = 50.0, base: float = 0.5
) -> Float[Tensor, " m"]:
    """Σ_{P_i} log(1 + exp(α (base - S))) / α + Σ_{N_i} log(1 + exp(β (S - base))) / β for each anchor."""
    attraction = F.softplus(alpha * (base - similarity)) / alpha
    repulsion = F.softplus(beta * (similarity - base)) / beta
    return attraction.masked_fill(~pairs.positives, 0.0).sum(1) + repulsion.masked_fill(~pairs.negatives, 0.0).sum(1)


PAIR_LOSSES: dict[str, PairLoss] = {
    "contrastive": contrastive,
    "triplet": triplet,
    "lifted_structure": lifted_structure,
    "binomial_deviance": binomial_deviance,
    "multi_similarity": multi_similarity,
}


def pair_weights(
    similarity: Float[Tensor, "m m"],
    labels: Int[Tensor, " m"],
    loss: str | PairLoss = "multi_similarity",
    *,
    pairs: Pairs | None = None,
    **hyperparameters: float,
) -> Float[Tensor, "m m"]:
    """General pair weighting: w_ij = |∂L/∂S_ij| of a loss summed over anchors, S taken as m² free numbers.

    Args:
        similarity: S, of shape (m, m).
        labels: of shape (m,).
        loss: 'contrastive', 'triplet', 'lifted_structure', 'binomial_deviance', 'multi_similarity', or a function of
            S and `Pairs` that gives each anchor's loss.
        pairs: the pairs that the loss sees; by default all of them.
        hyperparameters: of the loss.

    Raises:
        ValueError: S is not square, the labels do not fit to it, or no loss has that name.
    """
    square = similarity.ndim == 2 and similarity.shape[0] == similarity.shape[1]
    require(square, "similarity", tuple(similarity.shape), "of shape (m, m)")
    check_labels(similarity, labels)
    if isinstance(loss, str):
        require(loss in PAIR_LOSSES, "loss", loss, f"one of {', '.join(PAIR_LOSSES)}, or a function")
        loss = PAIR_LOSSES[loss]
    with torch.enable_grad():
        leaf = similarity.detach().clone().requires_grad_()
        total = partial(loss, **hyperparameters)(leaf, pairs or pairs_of(labels)).sum()
        return torch.autograd.grad(total, leaf)[0].abs()
