"""GroCo: every positive above every negative, by differentiable sorting (Shvetsova et al. 2023, arXiv:2301.02009).

An anchor's similarities to its k strongest negatives and to its positives, each group in ascending order, make the
input x = [negatives, positives] of an odd-even sorting network. A comparator between neighbours a, b swaps softly:

    α = 1/2 + arctan(β (b - a)) / π,    min = α a + (1 - α) b,    max = (1 - α) a + α b

The same mixing, applied to the columns of the identity, gives the soft permutation P: P[r, c] is the part of input r
that ends up at place c. With p_r = sum_c≥k P[r, c], the part of input r that ends up among the positives' places,

    L = mean_r BCE(p_r, 1 if r is a positive else 0)

Every view is the anchor in turn. Its positives are the other views of the sample, its negatives the same view of the
other samples, and gradient reaches the anchor only.

The paper's text was not at hand: this is the authors' code, https://github.com/ninatu/learning_by_sorting. Two things
are computed otherwise. The code builds P by products of n × n matrices, of which the loss needs but one sum in each
row: here the mixing is applied to the indicator of the positives' places, last layer first, which takes O(n) a layer.
And the code's loss is half the sum of two cross entropies that are equal, as p and 1 - p are each other's complement.
In batches with fewer negatives than asked for, all are taken; the code refuses these.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.losses.classification import check_reduction, reduce
from fairtrial.methods.losses.contrastive import (
    check_temperature,
    check_views,
    full_precision,
    off_diagonal,
    unit,
)
from fairtrial.methods.registry import LogUniform, method


def mixed(values: Float[Tensor, "*b n"], alpha: Float[Tensor, "*b m"], start: int) -> Float[Tensor, "*b n"]:
    """Each comparator's two places, `start` and the one after, the next two and so on, exchange the part 1 - α."""
    end = start + 2 * alpha.shape[-1]
    left, right = values[..., start:end].unflatten(-1, (-1, 2)).unbind(-1)
    moved = (1.0 - alpha) * (right - left)
    pairs = torch.stack([left + moved, right - moved], -1).flatten(-2)
    return torch.cat([values[..., :start], pairs, values[..., end:]], -1)


def soft_layers(
    x: Float[Tensor, "*b n"], steepness: float
) -> tuple[Float[Tensor, "*b n"], list[Float[Tensor, "*b m"]]]:
    """The softly sorted values, and each layer's α; layers begin at place 0 and 1 in turn."""
    alphas = []
    for layer in range(x.shape[-1]):
        start = layer % 2
        end = start + (x.shape[-1] - start) // 2 * 2
        left, right = x[..., start:end].unflatten(-1, (-1, 2)).unbind(-1)
        alphas.append(0.5 + torch.atan(steepness * (right - left)) / math.pi)
        x = mixed(x, alphas[-1], start)
    return x, alphas


def soft_odd_even_sort(
    x: Float[Tensor, "*b n"], steepness: float = 1.0
) -> tuple[Float[Tensor, "*b n"], Float[Tensor, "*b n n"]]:
    """Sort softly along the last dimension, ascending, by an odd-even network of n layers.

    Returns:
        The sorted values, and P: P[r, c] is the part of input r at place c, so that `values = x @ P`. Its rows and
        columns sum to 1.
    """
    require(x.ndim >= 1 and x.shape[-1] >= 1, "x", tuple(x.shape), "of shape (..., n ≥ 1)")
    check_temperature(steepness, "steepness")
    values, alphas = soft_layers(x, steepness)
    n = x.shape[-1]
    parts = torch.eye(n, dtype=x.dtype, device=x.device).expand(*x.shape[:-1], n, n)
    for layer, alpha in enumerate(alphas):
        parts = mixed(parts, alpha[..., None, :].expand(*alpha.shape[:-1], n, alpha.shape[-1]), layer % 2)
    return values, parts


def ordering_loss(
    positives: Float[Tensor, "b p"], negatives: Float[Tensor, "b k"], steepness: float
) -> Float[Tensor, " b"]:
    """The loss of each anchor from its similarities, in any order within the two groups."""
    x = torch.cat([negatives.sort(1).values, positives.sort(1).values], 1)
    target = torch.zeros_like(x)
    target[:, negatives.shape[1] :] = 1.0
    _, alphas = soft_layers(x, steepness)
    among_positives = target
    for layer in reversed(range(len(alphas))):  # P times the indicator, layer by layer; a layer's matrix is symmetric
        among_positives = mixed(among_positives, alphas[layer], layer % 2)
    return F.binary_cross_entropy(among_positives.clamp(0.0, 1.0), target, reduction="none").mean(1)


@method(
    paper="groco",
    slot="contrastive_loss",
    search={"steepness": LogUniform(0.3, 30.0)},
)
class GroupOrderingLoss(nn.Module):
    """GroCo of two or more views (b, d) of b ≥ 2 samples, row i with row i: `loss(view1, view2)`, `loss(*views)`.

    It does not reach 0: neighbours swap a little however far apart they are.

    Args:
        num_negatives: k ≥ 1, how many of the strongest negatives count; all of them in a batch that has fewer.
        steepness: β > 0; towards infinity the sorting becomes hard.
        stop_gradient: gradient reaches each anchor, but not the positives and negatives that it is compared with.
        n_positive_views: only so many views, the first ones, serve as positives, as in multi-crop training, where the
            large crops come first; all views are anchors. By default all.
        reduction: 'none' gives each sample's loss, the mean over its views; 'mean' or 'sum'.

    The defaults are those of the authors' code.
    """

    def __init__(
        self,
        num_negatives: int = 10,
        steepness: float = 1.0,
        *,
        stop_gradient: bool = True,
        n_positive_views: int | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        require(num_negatives >= 1, "num_negatives", num_negatives, "at least 1")
        check_temperature(steepness, "steepness")
        require(
            n_positive_views is None or n_positive_views >= 2,
            "n_positive_views",
            n_positive_views,
            "at least 2, or None",
        )
        check_reduction(reduction)
        self.num_negatives, self.steepness, self.stop_gradient = num_negatives, steepness, stop_gradient
        self.n_positive_views, self.reduction = n_positive_views, reduction

    def forward(self, *views: Float[Tensor, "b d"]) -> Float[Tensor, "..."]:
        self._check(views)
        with full_precision(views[0]):
            units = [unit(view) for view in views]
            fixed = [view.detach() for view in units] if self.stop_gradient else units
            loss = torch.cat([self._of_anchors(group, units, fixed) for group in self._groups(len(views))]).mean(0)
        return reduce(loss, self.reduction).to(views[0].dtype)

    def _groups(self, views: int) -> list[range]:
        """Anchors of as many positives: those that are positives themselves, and the others."""
        end = self.n_positive_views or views
        return [group for group in (range(end), range(end, views)) if group]

    def _of_anchors(
        self, places: range, units: Sequence[Float[Tensor, "b d"]], fixed: Sequence[Float[Tensor, "b d"]]
    ) -> Float[Tensor, "v b"]:
        """The losses of some views as anchors, sorted in one go."""
        similarities = [self._similarities(place, units[place], fixed) for place in places]
        positives, negatives = (torch.cat(part) for part in zip(*similarities, strict=True))
        losses: Tensor = ordering_loss(positives, negatives, self.steepness)
        return losses.view(len(places), -1)

    def _similarities(
        self, place: int, anchor: Float[Tensor, "b d"], fixed: Sequence[Float[Tensor, "b d"]]
    ) -> tuple[Float[Tensor, "b p"], Float[Tensor, "b k"]]:
        """Those to an anchor's positives, and to its strongest negatives."""
        partners = [view for other, view in enumerate(fixed[: self.n_positive_views]) if other != place]
        positives = torch.stack([(anchor * partner).sum(1) for partner in partners], 1)
        negatives = off_diagonal(anchor @ fixed[place].T)
        return positives, negatives.topk(min(self.num_negatives, negatives.shape[1]), dim=1).values

    def _check(self, views: Sequence[Float[Tensor, "b d"]]) -> None:
        require(len(views) >= 2, "views", len(views), "at least 2")
        fewest = self.n_positive_views or 2
        require(len(views) >= fewest, "n_positive_views", fewest, f"at most {len(views)}, the number of views")
        for place, view in enumerate(views[1:], 2):
            check_views(views[0], view, ("view1", f"view{place}"))

    def extra_repr(self) -> str:
        return (
            f"num_negatives={self.num_negatives}, steepness={self.steepness}, stop_gradient={self.stop_gradient}, "
            f"n_positive_views={self.n_positive_views}, reduction={self.reduction!r}"
        )
