"""DEXML: decoupled softmax and soft top-k for many correct labels (Gupta et al. 2023, arXiv:2310.10636).

A query i has scores s_il for all labels l, of which P_i are correct, n_i in number, and N_i are not. In InfoNCE every
correct label competes with the other correct ones, whose scores stand in its denominator. Decoupled softmax leaves them
out:

    L_i = (1/n_i) sum_{p in P_i} -log( exp s_ip / (exp s_ip + sum_{l in N_i} exp s_il) )

For precision at k the softmax gives way to a differentiable top-k operator, whose threshold t makes the sum k:

    topk(s)_l = sigmoid(α (s_l + t)),    sum_l topk(s)_l = k,    L_i = (1/n_i) sum_{p in P_i} -log topk(s_i)_p

By the implicit function theorem dt/ds = -v / sum(v) with v = σ'(α (s + t)).

All of it acts on the matrix of scores alone: <query, label> / temperature of a dual encoder, or a classifier's outputs.

The authors' code (github.com/nilesh2797/DEXML) is followed; the paper's own numbering of these equations was not at
hand. Three things differ:

- The code hides a label by giving it the score -100. Here it is left out, whatever the size of the scores.
- The code finds t by 32 bisections of an interval that is too narrow for more than about 20,000 k labels, and from sums
  that cannot be told from k where the scores are far apart. Here t is sought between bounds around the mean of the k-th
  and the (k+1)-th largest score, by Newton's method on the difference between what the labels above the threshold lack
  and what those below it have, and is exact to round-off.
- The code draws the correct labels that count in a step, one or, for the top-k loss, k of them, and hides the others.
  Here the mean is over all of them, which is what drawing estimates; `sample_positives` draws.
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.losses.classification import at_least_float32, check_reduction, reduce
from fairtrial.methods.registry import LogUniform, method

NEWTON_STEPS = 6  # round-off in float64


def check_label_scores(
    input: Float[Tensor, "..."], target: Shaped[Tensor, "..."], mask: Shaped[Tensor, "..."] | None
) -> None:
    """Refuse anything but scores (n, labels) with targets and mask of that shape, 0 or 1 each.

    Values are looked at on the CPU only, and not under `torch.compile`.
    """
    require(input.ndim == 2, "input", tuple(input.shape), "scores of shape (n, labels)")
    require(input.shape[0] > 0, "input", tuple(input.shape), "scores of at least one sample")
    require(input.shape[1] >= 2, "input", tuple(input.shape), "scores of at least 2 labels")
    require(input.is_floating_point(), "input", input.dtype, "a floating-point tensor")
    require(target.shape == input.shape, "target", tuple(target.shape), f"of shape {tuple(input.shape)}, as input")
    if mask is not None:
        require(mask.dtype == torch.bool, "mask", mask.dtype, "boolean, true where a label takes part")
        require(mask.shape == input.shape, "mask", tuple(mask.shape), f"of shape {tuple(input.shape)}, as input")
    if input.device.type == "cpu" and not torch.compiler.is_compiling():
        require(not bool(input.isnan().any()), "input", "NaN", "numbers")
        binary = bool(((target == 0) | (target == 1)).all())
        require(binary, "target", "other values", "0 or 1 everywhere")


def check_empty(empty: str) -> None:
    require(empty in ("raise", "skip"), "empty", empty, "'raise' or 'skip'")


def _prepared(
    input: Float[Tensor, "n l"], target: Shaped[Tensor, "n l"], mask: Bool[Tensor, "n l"] | None, empty: str
) -> tuple[Float[Tensor, "n l"], Bool[Tensor, "n l"]]:
    """Scores to compute with, hidden labels at the lowest number there is, and which labels are correct."""
    check_label_scores(input, target, mask)
    scores, correct = at_least_float32(input), target > 0
    if mask is not None:
        scores, correct = scores.masked_fill(~mask, torch.finfo(scores.dtype).min), correct & mask
    if empty == "raise" and input.device.type == "cpu" and not torch.compiler.is_compiling():
        every = bool(correct.any(1).all())
        require(every, "target", "a row without any", "at least one correct label in every row, or empty='skip'")
    return scores, correct


def _over_rows(
    losses: Float[Tensor, "n l"], correct: Bool[Tensor, "n l"], reduction: str, *, average: bool = True
) -> Float[Tensor, "..."]:
    """Mean, or sum, over each row's correct labels, then the reduction over rows that have any."""
    count = correct.sum(1)
    rows = torch.where(correct, losses, 0.0).sum(1)
    if average:
        rows = rows / count.clamp(min=1)
    if reduction == "mean":
        return rows.sum() / (count > 0).sum().clamp(min=1)
    return reduce(rows, reduction)


class _LabelLoss(nn.Module):
    """What the losses below share: how rows are reduced, and what becomes of rows without a correct label."""

    def __init__(self, empty: str, reduction: str) -> None:
        super().__init__()
        check_empty(empty)
        check_reduction(reduction)
        self.empty, self.reduction = empty, reduction

    def extra_repr(self) -> str:
        return f"empty={self.empty!r}, reduction={self.reduction!r}"


@method(paper="dexml", slot="multilabel_loss", search={"temperature": LogUniform(0.1, 10.0)})
class DecoupledSoftmaxLoss(_LabelLoss):
    """Decoupled softmax of scores (n, labels) and targets (n, labels) of 0 and 1.

    With one correct label in every row it is cross entropy. A row whose labels are all correct has loss 0.

    Args:
        temperature: the scores are divided by it; > 0. The authors' 0.05 is for cosines; 1 takes scores as they are.
        empty: a row without a correct label is refused ('raise'), or has loss 0 and does not count in the mean
            ('skip'). Rows are looked at on the CPU only; elsewhere they are skipped.
        reduction: 'none', 'mean' or 'sum', over rows.

    A call takes a `mask` (n, labels), false at labels that are neither correct nor wrong.
    """

    def __init__(self, temperature: float = 1.0, *, empty: str = "raise", reduction: str = "mean") -> None:
        super().__init__(empty, reduction)
        require(0 < temperature < math.inf, "temperature", temperature, "above 0 and finite")
        self.temperature = temperature

    def forward(
        self, input: Float[Tensor, "n l"], target: Shaped[Tensor, "n l"], mask: Bool[Tensor, "n l"] | None = None
    ) -> Float[Tensor, "..."]:
        scores, correct = _prepared(input, target, mask, self.empty)
        scores = scores / self.temperature
        rivals = scores.masked_fill(correct, torch.finfo(scores.dtype).min).logsumexp(1, keepdim=True)
        return _over_rows(-F.logsigmoid(scores - rivals), correct, self.reduction).to(input.dtype)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, {super().extra_repr()}"


@method(paper="dexml", slot="multilabel_loss", search={"temperature": LogUniform(0.1, 10.0)})
class MultiLabelInfoNCELoss(_LabelLoss):
    """InfoNCE with several correct labels: cross entropy of each against all labels, the other correct ones too.

    What the paper compares with. Arguments and call as in `DecoupledSoftmaxLoss`, and

    Args:
        average_positives: take the mean over a row's correct labels. False takes the sum, as the authors' code does
            when it draws no labels: rows with many correct labels then weigh more.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        average_positives: bool = True,
        empty: str = "raise",
        reduction: str = "mean",
    ) -> None:
        super().__init__(empty, reduction)
        require(0 < temperature < math.inf, "temperature", temperature, "above 0 and finite")
        self.temperature, self.average_positives = temperature, average_positives

    def forward(
        self, input: Float[Tensor, "n l"], target: Shaped[Tensor, "n l"], mask: Bool[Tensor, "n l"] | None = None
    ) -> Float[Tensor, "..."]:
        scores, correct = _prepared(input, target, mask, self.empty)
        losses = -(scores / self.temperature).log_softmax(1)
        return _over_rows(losses, correct, self.reduction, average=self.average_positives).to(input.dtype)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, average_positives={self.average_positives}, {super().extra_repr()}"


@method(paper="dexml", slot="multilabel_loss", search={"alpha": LogUniform(0.2, 10.0)})
class SoftTopKLoss(_LabelLoss):
    """-log of the soft top-k operator at the correct labels, of scores (n, labels) and targets (n, labels).

    A row with more than k correct labels cannot have loss 0; the authors draw k of them (`sample_positives`).

    Args:
        k: how many labels are wanted; from 1 to labels - 1. The authors' code trains with 5.
        alpha: sharpness, > 0; the authors' code takes 2 on scores already divided by the temperature.
        empty, reduction: as in `DecoupledSoftmaxLoss`.

    A call takes a `mask` as there; more than k labels of a row have to take part.
    """

    def __init__(self, k: int = 5, alpha: float = 2.0, *, empty: str = "raise", reduction: str = "mean") -> None:
        super().__init__(empty, reduction)
        require(k >= 1, "k", k, "at least 1")
        require(0 < alpha < math.inf, "alpha", alpha, "above 0 and finite")
        self.k, self.alpha = k, alpha

    def forward(
        self, input: Float[Tensor, "n l"], target: Shaped[Tensor, "n l"], mask: Bool[Tensor, "n l"] | None = None
    ) -> Float[Tensor, "..."]:
        scores, correct = _prepared(input, target, mask, self.empty)
        if mask is not None and input.device.type == "cpu" and not torch.compiler.is_compiling():
            fewest = int(mask.sum(1).min())
            require(fewest > self.k, "mask", f"{fewest} labels in a row", f"true at more than k = {self.k} of each row")
        losses = -log_soft_topk(scores, self.k, self.alpha)
        return _over_rows(losses, correct, self.reduction).to(input.dtype)

    def extra_repr(self) -> str:
        return f"k={self.k}, alpha={self.alpha}, {super().extra_repr()}"


def soft_topk(x: Float[Tensor, "n l"], k: int | Int[Tensor, " n"], alpha: float = 1.0) -> Float[Tensor, "n l"]:
    """sigmoid(α (x + t)) with the t of each row that makes its sum k.

    Args:
        x: scores, one row for each query.
        k: the wanted sum, from 1 to labels - 1; one for all rows, or one for each.
        alpha: sharpness, > 0: towards infinity the result is 1 at the k largest and 0 elsewhere.

    Differentiable any number of times; each row's Jacobian has rows that sum to 0.
    """
    return _logits(x, k, alpha).sigmoid().to(x.dtype)


def log_soft_topk(x: Float[Tensor, "n l"], k: int | Int[Tensor, " n"], alpha: float = 1.0) -> Float[Tensor, "n l"]:
    """log of `soft_topk`, finite where that is 0."""
    return F.logsigmoid(_logits(x, k, alpha)).to(x.dtype)


def _logits(x: Float[Tensor, "n l"], k: int | Int[Tensor, " n"], alpha: float) -> Float[Tensor, "n l"]:
    require(x.ndim == 2 and x.shape[1] >= 2, "x", tuple(x.shape), "of shape (n, labels) with at least 2 labels")
    require(0 < alpha < math.inf, "alpha", alpha, "above 0 and finite")
    if isinstance(k, Tensor):
        require(k.shape == x.shape[:1], "k", tuple(k.shape), f"of shape {(x.shape[0],)}, one per row")
        if k.device.type == "cpu" and not torch.compiler.is_compiling():
            within = bool(((k >= 1) & (k < x.shape[1])).all())
            require(within, "k", k.tolist(), f"within 1..{x.shape[1] - 1}")
    else:
        require(1 <= k < x.shape[1], "k", k, f"within 1..{x.shape[1] - 1}")
    scores = at_least_float32(x)
    t: Tensor = _Threshold.apply(scores, k, alpha)
    return alpha * (scores + t)


class _Threshold(torch.autograd.Function):
    """t (n, 1) of each row. The result is kept for the gradient, so that this is differentiable again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int | Tensor, alpha: float) -> Tensor:
        t = threshold(x, k, alpha)
        ctx.save_for_backward(x, t)
        ctx.alpha = alpha
        return t

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        x, t = ctx.saved_tensors
        z = ctx.alpha * (x + t)
        size = z.abs()
        v = (size.amin(1, keepdim=True).detach() - size).exp() / (1 + (-size).exp()).square()  # the largest is near 1
        return -grad_output * v / v.sum(1, keepdim=True), None, None


def threshold(x: Float[Tensor, "n l"], k: int | Int[Tensor, " n"], alpha: float) -> Float[Tensor, "n 1"]:
    """The t with sum_l sigmoid(α (x_l + t)) = k of each row.

    With z = α (x + t), `above` the labels of the k largest scores and `below` the others, the sum is k when

        sum_below sigmoid(z) = sum_above sigmoid(-z)

    and no sum is close to another number that it would have to be told from. Both sides are at least their term next
    to the threshold and at most the number of their terms as large. So t lies within -log(labels - k)/α and log(k)/α of
    c, minus the mean of the two scores at the threshold. Written in r = exp(α (t - c)) the terms are rational in r.
    """
    labels = x.shape[1]
    if isinstance(k, Tensor):
        wanted = k[:, None].to(x.device, torch.long)
        above = below = x.sort(1, descending=True).values
        left_out = torch.arange(labels, device=x.device) < wanted
        of_others = ~left_out
        last, first = (above.gather(1, place) for place in (wanted - 1, wanted))
        low, high = -(labels - wanted).to(x.dtype).log(), wanted.to(x.dtype).log()
    else:
        largest = x.topk(k + 1, 1)
        above, below = largest.values[:, :k], x
        left_out = torch.zeros_like(x, dtype=torch.bool).scatter(1, largest.indices[:, :k], True)
        of_others = torch.zeros_like(above, dtype=torch.bool)
        last, first = largest.values[:, k - 1 : k], largest.values[:, k:]
        low, high = torch.full_like(last, -math.log(labels - k)), torch.full_like(last, math.log(k))
    centre, gap = -(last + first) / 2, alpha * (last - first) / 2
    # terms at r = 1, over exp(-gap), so that the largest of them are near 1
    lacking = (gap - alpha * (above + centre)).masked_fill(of_others, -math.inf).exp()
    having = (gap + alpha * (below + centre)).masked_fill(left_out, -math.inf).exp()
    scale, rho = (-gap).exp(), torch.zeros_like(centre)  # rho = log r
    for _ in range(NEWTON_STEPS):
        r = rho.exp()
        (lack, lack_slope), (have, have_slope) = (
            _sum_of_sigmoids(lacking / r, scale),
            _sum_of_sigmoids(having * r, scale),
        )
        excess = (have / lack).log()
        low, high = torch.where(excess < 0, rho, low), torch.where(excess > 0, rho, high)
        step = rho - excess / (have_slope / have + lack_slope / lack)
        rho = torch.where((step < low) | (step > high), (low + high) / 2, step)
    return centre + rho / alpha


def _sum_of_sigmoids(
    odds: Float[Tensor, "n l"], scale: Float[Tensor, "n 1"]
) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "n 1"]]:
    """The sum of odds / (1 + scale odds), and its derivative by the logarithm of all the odds."""
    terms = odds / (odds * scale).add_(1)
    total = terms.sum(1, keepdim=True)
    return total, total - scale * terms.square_().sum(1, keepdim=True)


def sample_positives(
    target: Shaped[Tensor, "n l"], generator: torch.Generator, count: int = 1
) -> tuple[Bool[Tensor, "n l"], Bool[Tensor, "n l"]]:
    """Draw `count` correct labels of each row without replacement, all of them where there are no more.

    Args:
        target: relevances, at least 0; a label's chance grows with its own.
        generator: what is drawn from; on the target's device.
        count: how many, at least 1.

    Returns:
        The labels drawn, and the mask for the losses: false at correct labels that were not drawn.
    """
    require(count >= 1, "count", count, "at least 1")
    require(target.ndim == 2, "target", tuple(target.shape), "of shape (n, labels)")
    relevance = target.double()
    uniform = torch.rand(target.shape, generator=generator, dtype=torch.float64, device=target.device)
    keys = (-uniform.log() / relevance).masked_fill(relevance <= 0, math.inf)  # exponential races: the first ones win
    first = keys.topk(min(count, target.shape[1]), 1, largest=False).indices
    correct = relevance > 0
    drawn = torch.zeros_like(correct).scatter(1, first, True) & correct
    return drawn, drawn | ~correct
