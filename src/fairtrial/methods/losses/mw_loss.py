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

Pairs grow as B³, for B = 8,192 to 5 · 10¹¹. But as a function of a negative score, softplus((s - s⁺) / τ) is smooth:
within a cell of width τ/2 it is a polynomial of degree 8 to round-off (its nearest singularities lie π τ away, off the
axis). So on a grid of such cells, with the cell's Chebyshev points x_j and their Lagrange polynomials ℓ_j,

    sum_s softplus((s - s⁺_i) / τ) = sum_j w_j softplus((x_j - s⁺_i) / τ),    w_j = sum_s∈cell ℓ_j(s)

and only the few thousand x_j are compared with the positives, in float64. The power sums behind w are gathered from a
block of scores at a time, which nothing keeps. Relative to the direct sum the error is about 1e-12, and 1e-10 in
gradients. Where all pairs are few, or the scores lie so far apart that the grid would not be smaller than the negatives
themselves, pairs are compared directly.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
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
    unit,
)
from fairtrial.methods.registry import LogUniform, method

PAIRS_AT_ONCE = 2**22
LINEAR = 40.0  # softplus(x) = x from here on, in float64 too
SCORES_AT_ONCE = 2**18
POINTS = 9  # in each cell of the grid
CELLS_PER_TEMPERATURE = 2


def check_in_batch(
    query: Float[Tensor, "..."], passage: Float[Tensor, "..."], hard_negatives: Float[Tensor, "..."] | None
) -> None:
    check_views(query, passage, ("query", "passage"), fewest=2 if hard_negatives is None else 1)
    if hard_negatives is None:
        return
    b, d = query.shape
    found = tuple(hard_negatives.shape)
    require(hard_negatives.ndim == 3, "hard_negatives", found, f"of shape ({b}, h, {d})")
    require((found[0], found[2]) == (b, d) and found[1] >= 1, "hard_negatives", found, f"of shape ({b}, h ≥ 1, {d})")
    check_finite(hard_negatives, "hard_negatives")


def in_batch_scores(
    query: Float[Tensor, "b d"],
    passage: Float[Tensor, "b d"],
    hard_negatives: Float[Tensor, "b h d"] | None = None,
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b m"]]:
    """Cosine of each query to its passage, and its cosines to the other passages and to all hard negatives."""
    check_in_batch(query, passage, hard_negatives)
    scores = cosines(query, passage)
    positive, negative = scores.diagonal(), off_diagonal(scores) if len(query) > 1 else scores[:, :0]
    if hard_negatives is None:
        return positive, negative
    return positive, torch.cat([negative, cosines(query, hard_negatives.flatten(0, 1))], 1)


def comparisons(
    positive: Float[Tensor, " p"],
    negative: Float[Tensor, " m"],
    temperature: float,
    weights: Float[Tensor, " m"] | None = None,
) -> Float[Tensor, " p"]:
    """For each positive score the mean, or weighted sum, over the others of softplus((negative - positive) / τ)."""
    losses = F.softplus((negative - positive[:, None]) / temperature, threshold=LINEAR)
    return losses.mean(1) if weights is None else losses @ weights


def mann_whitney(
    positive: Float[Tensor, " p"],
    negative: Float[Tensor, " m"],
    temperature: float,
    chunk_size: int | None,
    weights: Float[Tensor, " m"] | None = None,
) -> Float[Tensor, " p"]:
    """`comparisons`, so many positives at once; backward computes the chunks' comparisons again, and keeps none."""
    size = chunk_size or max(1, PAIRS_AT_ONCE // len(negative))
    if size >= len(positive):
        return comparisons(positive, negative, temperature, weights)
    chunks = [
        checkpoint(comparisons, chunk, negative, temperature, weights, use_reentrant=False, preserve_rng_state=False)
        for chunk in positive.split(size)
    ]
    return torch.cat(chunks)


class Grid(NamedTuple):
    """Equal cells from `low` on, narrow enough for a temperature."""

    low: float
    width: float
    cells: int

    def places(self, scores: Float[Tensor, " m"]) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
        """Each score's cell, and where in it the score lies, from -1 to 1."""
        along = (scores.double() - self.low) / self.width
        cell = along.detach().long().clamp_(0, self.cells - 1)
        return cell, 2 * (along - cell) - 1

    def points(self, weights: Float[Tensor, "powers cells"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """The Chebyshev points of all cells, and the weights at them that have the given power sums."""
        halves = torch.arange(POINTS, dtype=weights.dtype, device=weights.device) + 0.5
        places = (math.pi * halves / POINTS).cos()
        powers = places ** torch.arange(POINTS, device=weights.device)[:, None]
        cells = torch.arange(self.cells, dtype=weights.dtype, device=weights.device)[:, None]
        points = self.low + self.width * (cells + (places + 1) / 2)
        return points.flatten(), torch.linalg.solve(powers, weights).T.flatten()


def grid_between(low: float, high: float, temperature: float) -> Grid:
    cells = max(1, math.ceil(CELLS_PER_TEMPERATURE * (high - low) / temperature))
    return Grid(low, (high - low) / cells or temperature / CELLS_PER_TEMPERATURE, cells)


class PowerSums(torch.autograd.Function):
    """sum_s t^k over the scores s of each cell, t being a score's place there, for k below `POINTS`, in float64.

    Nothing but the scores is kept, and the backward is differentiable again.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(scores)
        ctx.grid = grid
        cell, place = grid.places(scores)
        sums = place.new_zeros(POINTS, grid.cells)
        power = torch.ones_like(place)
        for k in range(POINTS):
            sums[k].scatter_add_(0, cell, power)
            power *= place
        return sums

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor, None]:
        (scores,) = ctx.saved_tensors
        cell, place = ctx.grid.places(scores)
        slope = torch.zeros_like(place)
        for k in reversed(range(1, POINTS)):
            slope = slope * place + k * grad_sums[k][cell]
        return (slope * (2 / ctx.grid.width)).to(scores.dtype), None


def without_own(scores: Float[Tensor, "r b"], first: int) -> Float[Tensor, " n"]:
    """Scores of queries `first` and so on to all passages, each without that to its own."""
    rows, columns = scores.shape
    flat, end = scores.flatten(), first + (rows - 1) * (columns + 1)
    between = flat[first:end].view(rows - 1, columns + 1)[:, 1:]
    return torch.cat([flat[:first], between.flatten(), flat[end + 1 :]])


def sums_of_block(
    query: Float[Tensor, "r d"], candidates: Float[Tensor, "n d"], grid: Grid, first: int | None
) -> Float[Tensor, "powers cells"]:
    scores = query @ candidates.T
    sums: Tensor = PowerSums.apply(scores.flatten() if first is None else without_own(scores, first), grid)
    return sums


def sums_in_batch(
    query: Float[Tensor, "b d"], candidates: Float[Tensor, "n d"], grid: Grid, *, own: bool
) -> Float[Tensor, "powers cells"]:
    """Power sums of all scores, block by block; backward computes them again."""
    rows = max(1, SCORES_AT_ONCE // len(candidates))
    sums = torch.zeros(POINTS, grid.cells, dtype=torch.float64, device=query.device)
    for number, block in enumerate(query.split(rows)):
        first = number * rows if own else None
        sums = sums + checkpoint(
            sums_of_block, block, candidates, grid, first, use_reentrant=False, preserve_rng_state=False
        )
    return sums


@method(paper="mw_loss", slot="contrastive_loss", search={"temperature": LogUniform(0.01, 1.0)})
class MannWhitneyLoss(nn.Module):
    """Mann-Whitney loss of queries (b, d) and their passages (b, d), row i with row i; brought to length 1 here.

    `of_scores` takes scores and a mask of the positives instead. The value belongs to the batch as a whole: each
    positive meets the negatives of all queries.

    Args:
        temperature: τ > 0. At the paper's 0.01 the gradient is that of a hinge, nearly: few pairs have any.
        chunk_size: compare every pair directly, so many positives at once: the work grows as b³, the memory as b² and
            the chunk. By default so are up to about four million pairs, and more of them through a grid: the work
            grows as b², the memory as b, beside a block of 262,144 scores.
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
        check_in_batch(query, passage, hard_negatives)
        b, h = len(query), 0 if hard_negatives is None else hard_negatives.shape[1]
        grid, count = grid_between(-1.0, 1.0, self.temperature), b * (b - 1) + b * b * h
        with full_precision(query):
            if not self._by_grid(b, count, grid):
                positive, negative = in_batch_scores(query, passage, hard_negatives)
                return self._reduced(positive, negative.flatten()).to(query.dtype)
            a, own = unit(query), unit(passage)
            sums = sums_in_batch(a, own, grid, own=True)
            if hard_negatives is not None:
                sums = sums + sums_in_batch(a, unit(hard_negatives).flatten(0, 1), grid, own=False)
            return self._reduced_by_grid((a * own).sum(1), sums, grid, count).to(query.dtype)

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
        if self.chunk_size is None and len(positive) * len(negative) > PAIRS_AT_ONCE:
            low, high = negative.detach().aminmax()
            grid = grid_between(low.item(), high.item(), self.temperature)
            if self._by_grid(len(positive), len(negative), grid):
                blocks = [PowerSums.apply(block, grid) for block in negative.split(SCORES_AT_ONCE)]
                sums = torch.stack(blocks).sum(0)
                return self._reduced_by_grid(positive, sums, grid, len(negative)).to(scores.dtype)
        return self._reduced(positive, negative).to(scores.dtype)

    def _by_grid(self, positives: int, negatives: int, grid: Grid) -> bool:
        many = self.chunk_size is None and positives * negatives > PAIRS_AT_ONCE
        return many and grid.cells * POINTS < negatives

    def _reduced_by_grid(
        self, positive: Float[Tensor, " p"], sums: Float[Tensor, "powers cells"], grid: Grid, negatives: int
    ) -> Float[Tensor, "..."]:
        points, weights = grid.points(sums / negatives)
        size = max(1, SCORES_AT_ONCE // len(points))
        loss = mann_whitney(positive.double(), points, self.temperature, size, weights)
        return self._over_positives(loss, negatives)

    def _reduced(self, positive: Float[Tensor, " p"], negative: Float[Tensor, " m"]) -> Float[Tensor, "..."]:
        loss = mann_whitney(positive, negative, self.temperature, self.chunk_size)
        return self._over_positives(loss, len(negative))

    def _over_positives(self, loss: Float[Tensor, " p"], negatives: int) -> Float[Tensor, "..."]:
        return loss.mean() * negatives if self.reduction == "paper" else reduce(loss, self.reduction)

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
