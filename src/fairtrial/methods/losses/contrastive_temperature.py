"""InfoNCE and its limits, a hard-negative variant, and what its temperature does (Wang and Liu 2020, arXiv:2012.09740).

Anchor i has the similarity s_i0 to its positive and s_ik to K negatives, cosines all of them. With temperature τ:

    InfoNCE        L_i = -log[ exp(s_i0 / τ) / (exp(s_i0 / τ) + sum_k exp(s_ik / τ)) ]
    simple loss    L_i = -s_i0 + λ sum_k s_ik
    hard losses    the same, over the n largest negatives alone

The gradient of InfoNCE in s_ik is P_ik / τ, with P the softmax over positive and negatives, and that in s_i0 is minus
the sum of those. How the push is shared among the negatives, r_ik = P_ik / sum_j P_ij, is a Boltzmann distribution
whose entropy rises with τ. For τ → 0, τ L_i becomes max(0, max_k s_ik - s_i0): only the nearest negative counts. For
τ → ∞, L_i = log(K + 1) - (s_i0 - mean_k≥0 s_ik) / τ + O(1/τ²): all count alike, as in the simple loss with λ = 1/K.

`uniformity` and `tolerance` measure what small and large temperatures trade against each other.

The paper keeps the negatives above the upper α-quantile of all; here it is exactly the largest ceil(α K), at least
one. There is no code by the authors.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.losses.classification import at_least_float32, check_reduction, reduce
from fairtrial.methods.losses.contrastive import (
    check_embeddings,
    check_finite,
    check_temperature,
    check_views,
    cosines,
    off_diagonal,
    similarities_of_views,
)
from fairtrial.methods.registry import LogUniform, method


def similarities(input: Float[Tensor, "n m"], other: Float[Tensor, "n m"] | None) -> Float[Tensor, "n k"]:
    """Similarities with the positive in column 0: `input` as it is, or those of its rows to the rows of `other`."""
    if other is not None:
        check_views(input, other, ("input", "other"))
        return similarities_of_views(input, other)
    require(input.ndim == 2, "input", tuple(input.shape), "similarities of shape (n, 1 + negatives)")
    require(input.shape[0] >= 1, "input", tuple(input.shape), "similarities of at least one anchor")
    require(input.shape[1] >= 2, "input", tuple(input.shape), "similarities to a positive and at least one negative")
    check_finite(input, "input")
    return at_least_float32(input)


def hardest(s: Float[Tensor, "n m"], top_fraction: float) -> Float[Tensor, "n k"]:
    """The positive in column 0, and the largest negatives; which they are has no gradient."""
    # a fraction such as 0.07 of 100 must not become 8 by round-off
    kept = max(1, math.ceil(top_fraction * (s.shape[1] - 1) - 1e-9))
    return torch.cat([s[:, :1], s[:, 1:].topk(kept, dim=1).values], 1)


def infonce(s: Float[Tensor, "n m"], temperature: float) -> Float[Tensor, " n"]:
    """InfoNCE of each row, its positive in column 0; as a softplus it keeps its precision where it is small."""
    logits = s / temperature
    return F.softplus(logits[:, 1:].logsumexp(1) - logits[:, 0])


def simple(s: Float[Tensor, "n m"], weight: float | None) -> Float[Tensor, " n"]:
    """-positive + weight × the sum of the negatives; by default their mean."""
    return (s[:, 1:].mean(1) if weight is None else weight * s[:, 1:].sum(1)) - s[:, 0]


def check_top_fraction(top_fraction: float) -> None:
    require(0 < top_fraction <= 1, "top_fraction", top_fraction, "above 0 and at most 1")


def check_weight(weight: float | None) -> None:
    require(weight is None or 0 < weight < math.inf, "weight", weight, "above 0 and finite, or None")


@method(paper="contrastive_temperature", slot="contrastive_loss", search={"temperature": LogUniform(0.03, 3.0)})
class InfoNCELoss(nn.Module):
    """InfoNCE of two views, or of similarities.

    Called with two views (n, d) of n ≥ 2 samples, the rows of the first are the anchors, row i of the second is the
    positive of row i, and the other rows of the second are the negatives. Called with one argument, that is the
    similarities (n, 1 + K), the positives' in column 0.

    Args:
        temperature: τ > 0; 0.3 was best on all data of the paper.
        reduction: 'none' gives the loss of each anchor; 'mean' or 'sum'.
    """

    def __init__(self, temperature: float = 0.3, *, reduction: str = "mean") -> None:
        super().__init__()
        check_temperature(temperature)
        check_reduction(reduction)
        self.temperature, self.reduction = temperature, reduction

    def forward(self, input: Float[Tensor, "n m"], other: Float[Tensor, "n m"] | None = None) -> Float[Tensor, "..."]:
        return reduce(infonce(similarities(input, other), self.temperature), self.reduction).to(input.dtype)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}"


@method(paper="contrastive_temperature", slot="contrastive_loss")
class SimpleContrastiveLoss(nn.Module):
    """The simple loss, which is blind to how hard a negative is; called as `InfoNCELoss`.

    Args:
        weight: λ > 0; by default 1/K, with which positive and negatives balance and which is InfoNCE's limit.
        reduction: 'none' gives the loss of each anchor; 'mean' or 'sum'.
    """

    def __init__(self, weight: float | None = None, *, reduction: str = "mean") -> None:
        super().__init__()
        check_weight(weight)
        check_reduction(reduction)
        self.weight, self.reduction = weight, reduction

    def forward(self, input: Float[Tensor, "n m"], other: Float[Tensor, "n m"] | None = None) -> Float[Tensor, "..."]:
        return reduce(simple(similarities(input, other), self.weight), self.reduction).to(input.dtype)

    def extra_repr(self) -> str:
        return f"weight={self.weight}, reduction={self.reduction!r}"


@method(
    paper="contrastive_temperature",
    slot="contrastive_loss",
    search={"temperature": LogUniform(0.03, 3.0), "top_fraction": LogUniform(0.02, 1.0)},
)
class HardContrastiveLoss(nn.Module):
    """InfoNCE over the largest negatives of each anchor; called as `InfoNCELoss`.

    Args:
        temperature: τ > 0. The paper finds that hard negatives allow larger ones.
        top_fraction: the share of the negatives that is kept, above 0 and at most 1; the paper's are 0.0819 on CIFAR,
            0.0315 on SVHN and 0.034 on ImageNet-100.
        reduction: 'none' gives the loss of each anchor; 'mean' or 'sum'.
    """

    def __init__(self, temperature: float = 0.3, top_fraction: float = 0.08, *, reduction: str = "mean") -> None:
        super().__init__()
        check_temperature(temperature)
        check_top_fraction(top_fraction)
        check_reduction(reduction)
        self.temperature, self.top_fraction, self.reduction = temperature, top_fraction, reduction

    def forward(self, input: Float[Tensor, "n m"], other: Float[Tensor, "n m"] | None = None) -> Float[Tensor, "..."]:
        kept = hardest(similarities(input, other), self.top_fraction)
        return reduce(infonce(kept, self.temperature), self.reduction).to(input.dtype)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, top_fraction={self.top_fraction}, reduction={self.reduction!r}"


@method(paper="contrastive_temperature", slot="contrastive_loss", search={"top_fraction": LogUniform(0.02, 1.0)})
class HardSimpleLoss(nn.Module):
    """The simple loss over the largest negatives of each anchor; called as `InfoNCELoss`.

    Args:
        top_fraction: the share of the negatives that is kept, above 0 and at most 1.
        weight: λ > 0; by default one over the number of negatives that are kept.
        reduction: 'none' gives the loss of each anchor; 'mean' or 'sum'.
    """

    def __init__(self, top_fraction: float = 0.08, weight: float | None = None, *, reduction: str = "mean") -> None:
        super().__init__()
        check_top_fraction(top_fraction)
        check_weight(weight)
        check_reduction(reduction)
        self.top_fraction, self.weight, self.reduction = top_fraction, weight, reduction

    def forward(self, input: Float[Tensor, "n m"], other: Float[Tensor, "n m"] | None = None) -> Float[Tensor, "..."]:
        kept = hardest(similarities(input, other), self.top_fraction)
        return reduce(simple(kept, self.weight), self.reduction).to(input.dtype)

    def extra_repr(self) -> str:
        return f"top_fraction={self.top_fraction}, weight={self.weight}, reduction={self.reduction!r}"


def negative_penalty(
    input: Float[Tensor, "n m"], other: Float[Tensor, "n m"] | None = None, *, temperature: float
) -> Float[Tensor, "n k"]:
    """How InfoNCE's push is shared among each anchor's negatives: r_ik, which sum to 1. Called as `InfoNCELoss`."""
    check_temperature(temperature)
    return (similarities(input, other)[:, 1:] / temperature).softmax(1).to(input.dtype)


def penalty_entropy(
    input: Float[Tensor, "n m"], other: Float[Tensor, "n m"] | None = None, *, temperature: float
) -> Float[Tensor, " n"]:
    """Entropy of `negative_penalty` for each anchor, in nats: from 0, one negative bears it all, to log K."""
    check_temperature(temperature)
    logs = (similarities(input, other)[:, 1:] / temperature).log_softmax(1)
    return -(logs.exp() * logs).sum(1).to(input.dtype)


def uniformity(z: Float[Tensor, "n d"], t: float = 2.0) -> Float[Tensor, ""]:
    """log of the mean of exp(-t ‖f(x) - f(y)‖²) over pairs of distinct rows, on the unit sphere.

    At most 0, where all rows are alike; the lower, the more evenly they are spread. The paper plots its negative.

    Args:
        z: embeddings of n ≥ 2 samples; brought to length 1 here.
        t: above 0; 2 as in the paper.
    """
    check_embeddings(z, "z")
    check_temperature(t, "t")
    exponents = off_diagonal(2 * t * (cosines(z, z) - 1))
    return (exponents.flatten().logsumexp(0) - math.log(exponents.numel())).to(z.dtype)


def tolerance(z: Float[Tensor, "n d"], labels: Int[Tensor, " n"], *, normalize: bool = True) -> Float[Tensor, ""]:
    """Mean cosine of pairs of distinct rows of the same class: how close similar samples may lie.

    Args:
        z: embeddings of n ≥ 2 samples; brought to length 1 here.
        labels: their classes.
        normalize: the mean over the pairs of the same class; False is the formula as printed, in which the sum over
            those is divided by the number of all pairs, so that it depends on how many classes there are.
    """
    check_embeddings(z, "z")
    require(labels.shape == z.shape[:1], "labels", tuple(labels.shape), f"of shape {(z.shape[0],)}, one per row")
    same = off_diagonal((labels[:, None] == labels).to(z.dtype))
    total = (off_diagonal(cosines(z, z)) * same).sum()
    if not normalize:
        return (total / same.numel()).to(z.dtype)
    if z.device.type == "cpu" and not torch.compiler.is_compiling():
        require(bool(same.any()), "labels", "all different", "such that at least two rows have the same class")
    return (total / same.sum()).to(z.dtype)
