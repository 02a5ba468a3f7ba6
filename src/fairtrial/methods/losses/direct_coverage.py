"""Direct coverage optimisation: train for one right answer among N samples (Chen et al. 2025, arXiv:2502.07154).

With p the model's probability of a target sequence, the product over its tokens, N independent samples contain it with
the probability 1 - (1 - p)^N, the coverage. The loss is

    l_N = -log(1 - (1 - p)^N),    grad l_N = F(N, p) grad(-log p),    F(N, p) = N (1-p)^(N-1) p / (1 - (1-p)^N)

The factor F falls from 1 at p = 0 to 0 at p = 1, with its knee near p = 1/N: what the model answers surely enough for N
samples is no longer pushed. l_1 is cross entropy, summed over the tokens and not averaged, for p is of the sequence.

The authors' code (github.com/allanraventos/refine) propagates F, taken as a constant, times the cross entropy:
`form='weighted'`. That has the gradient of l_N but another value; `form='value'`, the default here, is l_N. Two things
differ. Their series for F at small N p is in error by up to 1e-4; here F is exact to round-off. And the function that
their training takes by default divides each sequence's loss by its number of tokens, which weighs short answers more;
here, as in their other function and in the equation, it is the sum.

Where an answer comes after a chain of thought p cannot be computed. The paper estimates it by the share of right
answers among samples, and weighs the examples by `coverage_factor(share, n)`. For proof search the loss is taken of
every step by itself: give each step as a sequence. In a `transformers.Trainer` it goes into `compute_loss`.
"""

import math

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.losses.classification import at_least_float32, check_reduction, reduce
from fairtrial.methods.registry import Integer, method

SMALL = 1e-4  # below this N p the first terms of the series are exact to round-off, and p may be 0 to round-off


@method(paper="direct_coverage", slot="sequence_loss", search={"n": Integer(1, 256, log=True)})
class DirectCoverageLoss(nn.Module):
    """l_N of logits (batch, length, vocabulary) and labels (batch, length), logits at t being scores of label t + 1.

    The losses of different n cannot be compared with each other.

    Args:
        n: N, the samples of which one shall be right; at least 1. The paper sets it to the number drawn at test time;
            the default is not the paper's.
        form: 'value' gives l_N, 'weighted' F times the cross entropy; their gradients are equal.
        ignore_index: the label of tokens that do not count, those of the prompt and the padding.
        reduction: 'none', 'mean' or 'sum', over sequences.

    Raises:
        ValueError: a sequence without a token that counts. Looked for on the CPU only; elsewhere its loss is 0.
    """

    def __init__(self, n: int = 16, *, form: str = "value", ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__()
        check_n(n)
        require(form in ("value", "weighted"), "form", form, "'value' or 'weighted'")
        check_reduction(reduction)
        self.n, self.form, self.ignore_index, self.reduction = n, form, ignore_index, reduction

    def forward(self, input: Float[Tensor, "b t v"], labels: Int[Tensor, "b t"]) -> Float[Tensor, "..."]:
        check_sequences(input, labels, self.ignore_index)
        log_p = sequence_log_probability(at_least_float32(input), labels, self.ignore_index)
        return reduce(self._loss(log_p), self.reduction).to(input.dtype)

    def from_logprob(self, log_p: Float[Tensor, " b"]) -> Float[Tensor, "..."]:
        """The loss of sequences whose log-probabilities are known, at most 0."""
        require(log_p.ndim == 1 and log_p.shape[0] > 0, "log_p", tuple(log_p.shape), "of shape (b,), b ≥ 1")
        if log_p.device.type == "cpu" and not torch.compiler.is_compiling():
            require(bool((log_p <= 0).all()), "log_p", float(log_p.detach().max()), "at most 0")
        return reduce(self._loss(at_least_float32(log_p)), self.reduction).to(log_p.dtype)

    def _loss(self, log_p: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        if self.form == "weighted":
            return -_factor(log_p.detach(), self.n) * log_p
        return _coverage_loss(log_p, self.n)

    def extra_repr(self) -> str:
        return f"n={self.n}, form={self.form!r}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"


def check_n(n: int) -> None:
    require(isinstance(n, int) and not isinstance(n, bool) and n >= 1, "n", n, "a whole number of at least 1")


def check_sequences(input: Float[Tensor, "..."], labels: Shaped[Tensor, "..."], ignore_index: int) -> None:
    """Refuse anything but logits (batch, length, vocabulary) with labels (batch, length), some token in each row.

    Labels are looked at on the CPU only, and not under `torch.compile`.
    """
    require(input.ndim == 3, "input", tuple(input.shape), "logits of shape (batch, length, vocabulary)")
    require(input.shape[0] > 0, "input", tuple(input.shape), "logits of at least one sequence")
    require(input.shape[1] >= 2, "input", tuple(input.shape), "logits of sequences of at least 2 tokens")
    require(input.is_floating_point(), "input", input.dtype, "a floating-point tensor")
    require(labels.shape == input.shape[:2], "labels", tuple(labels.shape), f"of shape {tuple(input.shape[:2])}")
    require(not labels.is_floating_point() and not labels.is_complex(), "labels", labels.dtype, "integer token indices")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        counts = labels[:, 1:] != ignore_index
        require(bool(counts.any(1).all()), "labels", "a row without any", "of some token after the first in every row")
        low, high = int(labels[:, 1:][counts].min()), int(labels[:, 1:][counts].max())
        require(
            low >= 0 and high < input.shape[2],
            "labels",
            f"{low}..{high}",
            f"within 0..{input.shape[2] - 1}, or {ignore_index}",
        )


def sequence_log_probability(
    logits: Float[Tensor, "b t v"], labels: Int[Tensor, "b t"], ignore_index: int = -100
) -> Float[Tensor, " b"]:
    """log p of each row's labels, the first one and those to be ignored left out; logits at t are scores of t + 1."""
    losses = F.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:].long(), ignore_index=ignore_index, reduction="none"
    )
    return -losses.sum(1)


def _log_one_minus(log_p: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """log(1 - p), for log p within the numbers' range below 0."""
    near_one = log_p > -math.log(2)
    return torch.where(
        near_one,
        (-log_p.masked_fill(~near_one, -1.0).expm1()).log(),
        (-log_p.masked_fill(near_one, -1.0).exp()).log1p(),
    )


def _coverage_loss(log_p: Float[Tensor, "*b"], n: int) -> Float[Tensor, "*b"]:
    if n == 1:
        return -log_p
    small = log_p < math.log(SMALL / n)
    series = -(math.log(n) + log_p) + 0.5 * (n - 1) * log_p.exp()
    inside = log_p.masked_fill(small, -1.0).clamp(max=-torch.finfo(log_p.dtype).tiny)  # where p = 1: loss 0, gradient 0
    return torch.where(small, series, -_log_one_minus(n * _log_one_minus(inside)))


def _factor(log_p: Float[Tensor, "*b"], n: int) -> Float[Tensor, "*b"]:
    if n == 1:
        return torch.ones_like(log_p)
    small = log_p < math.log(SMALL / n)
    series = 1 - 0.5 * (n - 1) * log_p.exp()
    inside = log_p.masked_fill(small, -1.0).clamp(max=-torch.finfo(log_p.dtype).tiny)
    log_missed = _log_one_minus(inside)
    exact = n * ((n - 1) * log_missed).exp() * inside.exp() / -(n * log_missed).expm1()
    return torch.where(small, series, exact)


def coverage_factor(p: Float[Tensor, "*b"], n: int) -> Float[Tensor, "*b"]:
    """F(N, p): the weight of an example in the gradient, from 1 at p = 0 to 0 at p = 1 (1 everywhere for n = 1).

    Args:
        p: probabilities, or their estimates, in 0..1.
        n: N, at least 1.
    """
    check_n(n)
    _check_probabilities(p, "p")
    return _factor(at_least_float32(p).log(), n).to(p.dtype)


def _check_probabilities(p: Float[Tensor, "*b"], name: str) -> None:
    if p.device.type == "cpu" and not torch.compiler.is_compiling():
        within = bool(((p >= 0) & (p <= 1)).all())
        require(within, name, p.tolist(), "within 0..1")


def pass_at_n(correct: Int[Tensor, "*b"], total: int, n: int) -> Float[Tensor, "*b"]:
    """Unbiased estimate of the chance that n samples hold a right one, 1 - C(total - c, n) / C(total, n), in float64.

    Args:
        correct: how many of the samples drawn are right, c.
        total: how many were drawn.
        n: how many would be, at most `total`.
    """
    check_n(n)
    require(total >= n, "total", total, f"at least n = {n}")
    if correct.device.type == "cpu" and not torch.compiler.is_compiling():
        require(bool(((correct >= 0) & (correct <= total)).all()), "correct", correct.tolist(), f"within 0..{total}")
    wrong = total - correct.double()
    enough = wrong >= n  # else every choice of n holds a right one
    wrong = wrong.masked_fill(~enough, float(total))
    log_ratio = (wrong + 1).lgamma() - (wrong - n + 1).lgamma() - math.lgamma(total + 1) + math.lgamma(total - n + 1)
    return torch.where(enough, -log_ratio.expm1(), 1.0)


def optimal_pass_at_n_policy(pi: Float[Tensor, "*b m"], n: int) -> Float[Tensor, "*b m"]:
    """The distribution p over m answers that maximises the chance sum_j π_j (1 - (1 - p_j)^N) of pass@N.

    From the conditions of Karush, Kuhn and Tucker, p_j = max(0, 1 - (λ / (N π_j))^(1 / (N - 1))) with the λ that makes
    their sum 1; the largest p_j, from which the others follow, is found by bisection. For n = 1 all is on the likeliest
    answer.

    Args:
        pi: probabilities of the answers being right, of sum 1 in the last dimension.
        n: N, at least 1.
    """
    check_n(n)
    _check_probabilities(pi, "pi")
    exact = pi.double()
    if pi.device.type == "cpu" and not torch.compiler.is_compiling():
        total = exact.sum(-1)
        require(bool(((total - 1).abs() < 1e-4).all()), "pi", total.tolist(), "of sum 1")
    best, place = exact.max(-1, keepdim=True)
    if n == 1:
        return torch.zeros_like(pi).scatter(-1, place, 1.0)
    lag = (best.log() - exact.log()) / (n - 1)  # of log(1 - p_j) behind that of the best

    def policy(largest: Float[Tensor, "*b 1"]) -> Float[Tensor, "*b m"]:
        return -((-largest).log1p() + lag).clamp(max=0.0).expm1()

    low, high = torch.full_like(best, 1.0 / pi.shape[-1]), torch.ones_like(best)
    for _ in range(60):
        middle = (low + high) / 2
        short = policy(middle).sum(-1, keepdim=True) < 1
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    found = policy(low)  # `high` may be 1, where lag and log1p may be infinite and cancel
    return (found / found.sum(-1, keepdim=True)).to(pi.dtype)
