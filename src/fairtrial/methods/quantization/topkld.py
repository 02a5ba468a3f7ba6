"""TopKLD: distillation for training with few bits that treats the classes which top-k sampling can emit apart.

Ding et al. 2025 (arXiv:2501.06218) compare image generators by quality at a number of bits, and propose a loss that
balances "explicit knowledge", the k classes that top-k sampling chooses among, and "implicit knowledge", the rest.

TopKLD's published formula could not be confirmed. `TopKLDLoss` implements a reconstruction that keeps its stated idea,
separate treatment of the teacher's top k classes and the rest; results are those of the reconstruction, not of the
paper. With the teacher's p, the student's q and the set K of the teacher's k most likely classes, "split" is

    L = Σ_{i ∈ K} d_top(p_i, q_i) + Σ_{i ∉ K} d_rest(p_i, q_i)

where forward terms are p log(p/q), which cover all that the teacher does, and reverse terms q log(q/p), which keep to
what it does most. 0 log 0 is 0, and what only the distribution in the denominator excludes makes the loss infinite. By
default the top is reverse and the rest forward. Parts of such sums can be negative; the generalised terms,
p log(p/q) - p + q and q log(q/p) - q + p, cannot, and come to the same sums over all classes.
"renormalised" is

    L = KL(gate_p ‖ gate_q) + w_top KL_top + w_rest KL_rest,    gate = (mass of K, mass of the rest)

with the divergences of the two parts renormalised to 1, each weighted by its mass under the distribution that leads it:
p forward, q reverse. With both parts forward that is KL(p ‖ q), by the chain rule.

The weighting of bits that the paper counts compute in was not published either: `total_compute_bits` has two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fairtrial.methods.arguments import require

Direction = Literal["forward", "reverse"]
NOTHING = -float("inf")


class TopKLDLoss(nn.Module):
    """Divergence of a student's distribution from a teacher's, with the top classes in a direction of their own.

    Called with the scores of the student and of the teacher, both (..., classes). No gradient goes to the teacher.

    Args:
        k: how many of the teacher's most likely classes are the top, from 0 to all of them; of classes that are equally
            likely the first. What is sampled with, such as the 900 of 4096 that VAR's authors evaluate with.
        temperature: both scores are divided by it, > 0.
        variant: 'split' or 'renormalised'; see above.
        top, rest: the directions of the two parts, 'forward' or 'reverse'. With k = 0 only the rest is left, and with
            all classes only the top.
        generalized: of 'split', whether terms are the generalised ones, none of which is negative. Without, the loss is
            not least where the student agrees with the teacher, unless k is 0 or all classes.
        reduction: 'batchmean', the mean over positions; 'sum', or 'none' for a value at each position.

    Raises:
        ValueError: an argument lies outside its range; when called, shapes differ, or scores are not numbers, infinite
            or, at a position, all -inf.
    """

    def __init__(
        self,
        k: int,
        temperature: float = 1.0,
        variant: Literal["split", "renormalised"] = "split",
        top: Direction = "reverse",
        rest: Direction = "forward",
        generalized: bool = True,
        reduction: Literal["batchmean", "sum", "none"] = "batchmean",
    ) -> None:
        super().__init__()
        require(type(k) is int and k >= 0, "k", k, "a whole number of at least 0")
        require(0 < temperature < float("inf"), "temperature", temperature, "above 0 and finite")
        require(variant in ("split", "renormalised"), "variant", variant, "'split' or 'renormalised'")
        for name, direction in (("top", top), ("rest", rest)):
            require(direction in ("forward", "reverse"), name, direction, "'forward' or 'reverse'")
        require(reduction in ("batchmean", "sum", "none"), "reduction", reduction, "'batchmean', 'sum' or 'none'")
        self.k, self.temperature, self.variant = k, temperature, variant
        self.top, self.rest, self.generalized, self.reduction = top, rest, generalized, reduction

    def forward(self, student_logits: Float[Tensor, "*b v"], teacher_logits: Float[Tensor, "*b v"]) -> Tensor:
        shape = tuple(student_logits.shape)
        require(teacher_logits.shape == student_logits.shape, "teacher_logits", tuple(teacher_logits.shape), str(shape))
        require(student_logits.numel() > 0, "student_logits", shape, "scores of at least one position")
        require(self.k <= shape[-1], "k", self.k, f"at most {shape[-1]}, the number of classes")
        if student_logits.device.type == "cpu" and not torch.compiler.is_compiling():
            for name, scores in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
                require(not bool(scores.isnan().any()), name, "NaN", "numbers")
                require(bool(scores.amax(-1).isfinite().all()), name, "others", "finite or -inf, and not all -inf")
        wide = torch.promote_types(student_logits.dtype, torch.float32)
        teacher = teacher_logits.detach().to(wide)
        in_top = most_likely(teacher, self.k)
        log_p = (teacher / self.temperature).log_softmax(-1)
        log_q = (student_logits.to(wide) / self.temperature).log_softmax(-1)
        losses = self._split(log_p, log_q, in_top) if self.variant == "split" else self._parts(log_p, log_q, in_top)
        losses = losses.to(student_logits.dtype)
        if self.reduction == "batchmean":
            return losses.mean()
        return losses.sum() if self.reduction == "sum" else losses

    def _split(
        self, log_p: Float[Tensor, "*b v"], log_q: Float[Tensor, "*b v"], in_top: Bool[Tensor, "*b v"]
    ) -> Float[Tensor, "*b"]:
        if self.top == self.rest:
            forward = torch.full_like(in_top, self.top == "forward")
        else:
            forward = in_top if self.top == "forward" else ~in_top
        lead, other = torch.where(forward, log_p, log_q), torch.where(forward, log_q, log_p)
        mass = lead.exp()
        terms = mass * _log_ratio(lead, other)
        return (terms - mass + other.exp() if self.generalized else terms).sum(-1)

    def _parts(
        self, log_p: Float[Tensor, "*b v"], log_q: Float[Tensor, "*b v"], in_top: Bool[Tensor, "*b v"]
    ) -> Float[Tensor, "*b"]:
        parts = []
        for part, direction, size in ((in_top, self.top, self.k), (~in_top, self.rest, log_p.shape[-1] - self.k)):
            if size:
                (log_mass_p, inner_p), (log_mass_q, inner_q) = (_renormalised(log, part) for log in (log_p, log_q))
                lead, other, mass = (
                    (inner_p, inner_q, log_mass_p) if direction == "forward" else (inner_q, inner_p, log_mass_q)
                )
                inside = (lead.exp() * _log_ratio(lead, other)).sum(-1)
                parts.append(log_mass_p.exp() * _log_ratio(log_mass_p, log_mass_q) + mass.exp() * inside)
        return torch.stack(parts).sum(0)

    def extra_repr(self) -> str:
        of = f", generalized={self.generalized}" if self.variant == "split" else ""
        return (
            f"k={self.k}, temperature={self.temperature}, variant={self.variant!r}, top={self.top!r}, "
            f"rest={self.rest!r}{of}, reduction={self.reduction!r}"
        )


def _renormalised(
    log_p: Float[Tensor, "*b v"], part: Bool[Tensor, "*b v"]
) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b v"]]:
    """The logarithm of a part's mass, and log-probabilities within the part; zeros stand for the others."""
    log_mass = log_p.masked_fill(~part, NOTHING).logsumexp(-1)
    inner = (log_p - log_mass[..., None]).masked_fill(log_p == NOTHING, NOTHING)
    return log_mass, inner.masked_fill(~part, 0.0)


def _log_ratio(lead: Float[Tensor, "*s"], other: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """The difference of logarithms, and 0 where the leading one is -inf, whose exponential it is multiplied by."""
    return torch.where(lead == NOTHING, 0.0, lead - other)


def most_likely(scores: Float[Tensor, "*b v"], k: int) -> Bool[Tensor, "*b v"]:
    """Which are the k largest of each row; of equal ones the first."""
    if k in (0, scores.shape[-1]):
        return torch.full_like(scores, k > 0, dtype=torch.bool)
    last = scores.topk(k).values[..., -1:]
    above, tied = scores > last, scores == last
    return above | (tied & (tied.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


# Quality against bits ----------------------------------------------------------------------------------------------


class Fit(NamedTuple):
    """log(quality) = intercept + slope · log(total bits)."""

    intercept: float
    slope: float

    def __call__(self, total_bits: float) -> float:
        """The quality that the line gives for a number of bits."""
        return float(np.exp(self.intercept + self.slope * np.log(total_bits)))


@dataclass(frozen=True)
class BitScalingFrontier:
    """A line for each precision, of quality against total bits.

    Attributes:
        fits: by bits per weight.
    """

    fits: Mapping[float, Fit]

    def dominating(self, total_bits: float) -> float:
        """The bits per weight whose line is lowest at a number of bits in all.

        Raises:
            ValueError: the number is not above 0 and finite.
        """
        require(0 < total_bits < float("inf"), "total_bits", total_bits, "above 0 and finite")
        return min(self.fits, key=lambda bits: self.fits[bits](total_bits))


def bit_scaling_frontier(
    params: Sequence[float], bits: Sequence[float], quality: Sequence[float]
) -> BitScalingFrontier:
    """Fit quality against the bits of the whole model, one line in logarithms for each precision, by least squares.

    Args:
        params: numbers of weights of the models.
        bits: of a weight of each, what scales take included (`average_bits`); models of equal numbers share a line.
        quality: of each, above 0; less is better, as a Fréchet distance or a perplexity.

    Raises:
        ValueError: lengths differ, numbers are not above 0 and finite, or a precision has models of one size only.
    """
    m, b, q = (np.asarray(values, dtype=np.float64) for values in (params, bits, quality))
    require(
        m.ndim == 1 and m.shape == b.shape == q.shape, "bits", b.shape, f"of shape {m.shape}, as params and quality"
    )
    for name, values in (("params", m), ("bits", b), ("quality", q)):
        require(bool(((values > 0) & np.isfinite(values)).all()), name, values.tolist(), "above 0 and finite")
    require(len(m) > 0, "params", [], "of at least two models")
    fits = {}
    for each in np.unique(b):
        x, y = np.log(m[b == each] * each), np.log(q[b == each])
        require(len(np.unique(x)) > 1, "params", m[b == each].tolist(), f"of at least two sizes at {each:g} bits")
        slope = float(((x - x.mean()) * (y - y.mean())).sum() / np.square(x - x.mean()).sum())
        fits[float(each)] = Fit(float(y.mean() - slope * x.mean()), slope)
    return BitScalingFrontier(fits)


def total_compute_bits(
    macs: Sequence[float],
    weight_bits: Sequence[float],
    activation_bits: Sequence[float],
    compute: Literal["product", "max"] = "product",
) -> float:
    """Bits that the multiplications of a model's layers handle.

    Args:
        macs: multiplications of each layer.
        weight_bits, activation_bits: of its weights and of its inputs.
        compute: a multiplication counts as the 'product' of the two, or as the larger of them, 'max'.

    Raises:
        ValueError: lengths differ, or a number is negative or not finite.
    """
    require(compute in ("product", "max"), "compute", compute, "'product' or 'max'")
    counts, w, a = (np.asarray(values, dtype=np.float64) for values in (macs, weight_bits, activation_bits))
    require(counts.shape == w.shape == a.shape, "weight_bits", w.shape, f"of shape {counts.shape}, as macs")
    for name, values in (("macs", counts), ("weight_bits", w), ("activation_bits", a)):
        require(bool(((values >= 0) & np.isfinite(values)).all()), name, values.tolist(), "at least 0 and finite")
    return float((counts * (w * a if compute == "product" else np.maximum(w, a))).sum())
