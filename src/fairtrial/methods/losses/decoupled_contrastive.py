"""Decoupled contrastive learning: InfoNCE without the positive in the denominator (Yeh et al. 2021, arXiv:2110.06848).

Of n samples in two views, z1 and z2 on the unit sphere, the anchor z1_i has the positive z2_i and the negatives of all
other samples in both views, 2 (n - 1) of them. With temperature τ and U_i the sum of exp(<z1_i, ·> / τ) over these:

    NT-Xent    L_i = -log[ exp(<z1_i, z2_i> / τ) / (exp(<z1_i, z2_i> / τ) + U_i) ]
    DCL        L_i = -<z1_i, z2_i> / τ + log U_i
    DCLW       L_i = -w_i <z1_i, z2_i> / τ + log U_i,    w_i = 2 - exp(<z1_i, z2_i> / σ) / mean_j exp(<z1_j, z2_j> / σ)

and the mean is taken over the samples and over both views as anchors. NT-Xent's gradient of L_i is DCL's times the
coupling factor q_i = U_i / (exp(<z1_i, z2_i> / τ) + U_i), which is small for easy positives and few negatives; since
NT-Xent = softplus(DCL) for each anchor, q = sigmoid(DCL). DCL leaves the factor out. It may be negative. The weights
of DCLW are constants with mean 1: no gradient goes through them, as in the package lightly; another public
reimplementation lets it through. There is no code by the authors.

The default temperature is that of the public reimplementations; σ is the paper's.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.methods.losses.classification import check_reduction, reduce
from fairtrial.methods.losses.contrastive import (
    check_temperature,
    check_views,
    full_precision,
    symmetric_similarities,
    unit,
)
from fairtrial.methods.registry import LogUniform, method

WeightFunction = Callable[[Tensor, Tensor], Tensor]


def decoupled_terms(
    z1: Float[Tensor, "n d"], z2: Float[Tensor, "n d"], temperature: float
) -> tuple[Float[Tensor, "2 n"], Float[Tensor, "2 n"]]:
    """For each anchor, by view: <anchor, positive> / τ, and log U."""
    positive, others = symmetric_similarities(z1, z2, temperature)
    return positive.unflatten(0, (2, -1)), others.logsumexp(1).unflatten(0, (2, -1))


def npc_multiplier(z1: Float[Tensor, "n d"], z2: Float[Tensor, "n d"], temperature: float) -> Float[Tensor, "2 n"]:
    """The coupling factor q of every anchor: those of the first view in the first row, of the second in the second."""
    check_views(z1, z2, ("z1", "z2"))
    check_temperature(temperature)
    positive, log_sum = decoupled_terms(z1, z2, temperature)
    return torch.sigmoid(log_sum - positive).to(z1.dtype)


def negative_von_mises_fisher(
    z1: Float[Tensor, "n d"], z2: Float[Tensor, "n d"], sigma: float = 0.5
) -> Float[Tensor, " n"]:
    """The weights of DCLW, with mean 1: the easier the positive, the smaller."""
    positive = (unit(z1) * unit(z2)).sum(1)
    return 2.0 - z1.shape[0] * (positive / sigma).softmax(0)


@method(paper="decoupled_contrastive", slot="contrastive_loss", search={"temperature": LogUniform(0.03, 1.0)})
class DCLLoss(nn.Module):
    """DCL of two views (n, d) of n ≥ 2 samples, row i with row i; they are brought to length 1 here.

    Args:
        temperature: τ > 0.
        weight_fn: `weight_fn(z1, z2) -> (n,)` weights the positives; it gets the views brought to length 1, and no
            gradient goes through it.
        reduction: 'none' gives the mean over a sample's two views, (n,); 'mean' or 'sum'.
    """

    def __init__(
        self, temperature: float = 0.1, weight_fn: WeightFunction | None = None, *, reduction: str = "mean"
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_reduction(reduction)
        self.temperature, self.weight_fn, self.reduction = temperature, weight_fn, reduction

    def forward(self, z1: Float[Tensor, "n d"], z2: Float[Tensor, "n d"]) -> Float[Tensor, "..."]:
        check_views(z1, z2, ("z1", "z2"))
        positive, log_sum = decoupled_terms(z1, z2, self.temperature)
        if self.weight_fn is not None:
            with torch.no_grad(), full_precision(z1):
                weights = self.weight_fn(unit(z1.detach()), unit(z2.detach()))
            positive = weights * positive
        return reduce((log_sum - positive).mean(0), self.reduction).to(z1.dtype)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, weight_fn={self.weight_fn}, reduction={self.reduction!r}"


@method(
    paper="decoupled_contrastive",
    slot="contrastive_loss",
    search={"temperature": LogUniform(0.03, 1.0), "sigma": LogUniform(0.1, 2.0)},
)
class DCLWLoss(DCLLoss):
    """DCL whose positives have the negative von Mises-Fisher weights; otherwise as `DCLLoss`.

    Args:
        temperature: τ > 0.
        sigma: σ > 0; towards infinity all weights become 1.
        reduction: 'none' gives the mean over a sample's two views, (n,); 'mean' or 'sum'.
    """

    def __init__(self, temperature: float = 0.1, sigma: float = 0.5, *, reduction: str = "mean") -> None:
        check_temperature(sigma, "sigma")
        super().__init__(temperature, partial(negative_von_mises_fisher, sigma=sigma), reduction=reduction)
        self.sigma = sigma

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, sigma={self.sigma}, reduction={self.reduction!r}"


@method(paper="decoupled_contrastive", slot="contrastive_loss", search={"temperature": LogUniform(0.03, 1.0)})
class NTXentLoss(nn.Module):
    """NT-Xent, the loss of SimCLR, of two views (n, d) of n ≥ 2 samples: what DCL is compared with.

    Args:
        temperature: τ > 0; the default is DCL's, SimCLR's own is 0.5.
        reduction: 'none' gives the mean over a sample's two views, (n,); 'mean' or 'sum'.
    """

    def __init__(self, temperature: float = 0.1, *, reduction: str = "mean") -> None:
        super().__init__()
        check_temperature(temperature)
        check_reduction(reduction)
        self.temperature, self.reduction = temperature, reduction

    def forward(self, z1: Float[Tensor, "n d"], z2: Float[Tensor, "n d"]) -> Float[Tensor, "..."]:
        check_views(z1, z2, ("z1", "z2"))
        positive, log_sum = decoupled_terms(z1, z2, self.temperature)
        return reduce(F.softplus(log_sum - positive).mean(0), self.reduction).to(z1.dtype)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}"
