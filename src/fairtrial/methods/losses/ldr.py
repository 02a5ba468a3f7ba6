"""LDR losses: the worst case over the label's distribution (Zhu, Ying and Yang, ICML 2023, arXiv:2112.14869).

With scores f of K classes, label y and margin c, `delta_k = f_k - f_y + c` for k ≠ y and `delta_y = 0`. The label is a
distribution p near the uniform one, and the loss is the worst that it can do:

    LDR-KL      max_p sum_k p_k delta_k - λ KL(p || 1/K)  =  λ log mean_k exp(delta_k / λ),    p = softmax(delta / λ)
    ALDR-KL     max_λ≥0 max_p sum_k p_k delta_k - λ KL(p || 1/K) - (a/2) (λ - λ0)²

LDR-KL is cross entropy with temperature λ and a margin, less log K. Its limit for λ → 0 is the loss of Crammer and
Singer, max_k delta_k; for λ → ∞ it is mean_k delta_k, linear and symmetric, hence robust to label noise. ALDR-KL gives
each training sample its own λ. Given p the best is λ = λ0 - KL(p || 1/K) / a: small for confident samples, λ0 for
undecided ones. By the envelope theorem the scores' gradient is that of LDR-KL at this λ. The loss of Weston and
Watkins is the maximum over all 0 ≤ p_k ≤ 1/K without a regulariser.

Where theory and the authors' code differ, the code is followed, as its results are the published ones:

- The scores are first brought to mean size 1 within each sample, which gives λ and c an absolute meaning:
  softplus(f) / mean softplus(f) for LDR-KL, f / mean |f| for ALDR-KL. `normalize=None` is the theory's form.
- ALDR-KL takes one alternating step a visit: p at the λ that the sample was left with, then λ, then the loss at the
  new λ. This p = softmax(f / λ) leaves the margin out (`margin_in_p=True` is the theory's form), and 1e-5 is added to
  each of its entries before it is brought back to sum 1.
- a = α log K / λ0, so that α > 1 keeps every λ above 0, because KL(p || 1/K) ≤ log K.

Three things differ from the code. Rows that it turns into 0/0 stay finite here: the quotient of softpluses is computed
through logarithms, and rows of zeros are not divided by their size. Of samples that come up more than once in a batch
each uses the λ of its own row, while the code gives all of them the last one's. And λ moves in training mode only.
"""

import math
import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.losses.classification import at_least_float32, check_reduction, check_scores, reduce
from fairtrial.methods.registry import LogUniform, method


def margins(scores: Float[Tensor, "n c"], target: Int[Tensor, " n"], margin: float) -> Float[Tensor, "n c"]:
    """delta_k = f_k - f_y + margin for k ≠ y, and 0 for k = y."""
    y = target[:, None].long()
    return (scores - scores.gather(1, y) + margin).scatter(1, y, 0.0)


def kl_regularised_maximum(delta: Float[Tensor, "n c"], lam: float | Float[Tensor, "n 1"]) -> Float[Tensor, " n"]:
    """max_p sum_k p_k delta_k - lam KL(p || 1/K) over distributions p."""
    return (lam * ((delta / lam).logsumexp(1, keepdim=True) - math.log(delta.shape[1])))[:, 0]


def normalised(scores: Float[Tensor, "n c"], normalize: str | None) -> Float[Tensor, "n c"]:
    """Scores of mean size 1 in each row."""
    if normalize == "softplus_mean":
        # softplus(f) / mean softplus(f) = K softmax(log softplus(f)), where log softplus(f) = f far below 0
        log_softplus = torch.where(scores < -40.0, scores, F.softplus(scores.clamp(min=-40.0)).log())
        return scores.shape[1] * log_softplus.softmax(1)
    if normalize == "l1":
        size = scores.abs().mean(1, keepdim=True)
        return scores / size.masked_fill(size == 0, 1.0)
    return scores


def check_normalize(normalize: str | None) -> None:
    require(normalize in ("softplus_mean", "l1", None), "normalize", normalize, "'softplus_mean', 'l1' or None")


@method(paper="ldr", slot="loss", search={"lam": LogUniform(0.1, 10.0)})
class LDRLoss(nn.Module):
    """LDR-KL loss of scores (n, classes) and class indices (n,).

    Args:
        lam: temperature λ > 0. The paper chooses among 0.1, 1 and 10; large values withstand more label noise.
        margin: c ≥ 0; the default is that of the authors' training script.
        normalize: 'softplus_mean' (the authors' code), 'l1', or None for scores as they are (the theory).
        reduction: 'none', 'mean' or 'sum'.

    The loss may be negative: it is at least -λ log K.
    """

    def __init__(
        self,
        lam: float = 1.0,
        margin: float = 0.1,
        *,
        normalize: str | None = "softplus_mean",
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        require(0 < lam < math.inf, "lam", lam, "above 0 and finite")
        require(0 <= margin < math.inf, "margin", margin, "at least 0 and finite")
        check_normalize(normalize)
        check_reduction(reduction)
        self.lam, self.margin, self.normalize, self.reduction = lam, margin, normalize, reduction

    def forward(self, input: Float[Tensor, "n c"], target: Int[Tensor, " n"]) -> Float[Tensor, "..."]:
        check_scores(input, target)
        delta = margins(normalised(at_least_float32(input), self.normalize), target, self.margin)
        return reduce(kl_regularised_maximum(delta, self.lam), self.reduction).to(input.dtype)

    def extra_repr(self) -> str:
        return f"lam={self.lam}, margin={self.margin}, normalize={self.normalize!r}, reduction={self.reduction!r}"


@method(
    paper="ldr",
    slot="loss",
    search={"lam0": LogUniform(0.1, 10.0)},
    bind=lambda setting: {"num_samples": setting.num_samples},
)
class ALDRLoss(nn.Module):
    """ALDR-KL loss of scores (n, classes), class indices (n,) and the samples' indices in the training set (n,).

    The temperatures live in the buffer `lambdas` (num_samples,), which starts at λ0 and is part of the state_dict. A
    call in training mode moves those of its samples by one step, in eval mode they stay. Samples that keep a large λ
    are those that the model does not make up its mind about, mislabelled ones among them. Under data parallelism each
    process has its own temperatures, of the samples that it has seen.

    Args:
        num_samples: size of the training set.
        lam0: λ0 > 0, where temperatures start and which they never exceed. The paper chooses among 0.1, 1 and 10.
        margin: c ≥ 0; the default is that of the authors' training script.
        alpha: α ≥ 1: no temperature falls below λ0 (1 - 1/α), so at 1, which warns, they may come down to 0.
        normalize: 'l1' (the authors' code), 'softplus_mean' (their code for CIFAR-100), or None (the theory).
        margin_in_p: let the p that moves the temperatures see the margin, as in the theory.
        reduction: 'none', 'mean' or 'sum'.
    """

    lambdas: Tensor

    def __init__(
        self,
        num_samples: int,
        lam0: float = 1.0,
        margin: float = 0.1,
        *,
        alpha: float = 2.0,
        normalize: str | None = "l1",
        margin_in_p: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        require(num_samples >= 1, "num_samples", num_samples, "at least 1")
        require(0 < lam0 < math.inf, "lam0", lam0, "above 0 and finite")
        require(0 <= margin < math.inf, "margin", margin, "at least 0 and finite")
        require(1 <= alpha < math.inf, "alpha", alpha, "at least 1 and finite")
        check_normalize(normalize)
        check_reduction(reduction)
        if alpha == 1:
            warnings.warn("alpha = 1 lets the temperatures of confident samples fall to 0", stacklevel=2)
        self.lam0, self.margin, self.alpha, self.normalize = lam0, margin, alpha, normalize
        self.margin_in_p, self.reduction = margin_in_p, reduction
        self.register_buffer("lambdas", torch.full((num_samples,), lam0, dtype=torch.float32))

    def forward(
        self, input: Float[Tensor, "n c"], target: Int[Tensor, " n"], index: Int[Tensor, " n"]
    ) -> Float[Tensor, "..."]:
        check_scores(input, target)
        self._check_index(index, input.shape[0])
        index = index.to(self.lambdas.device, torch.long)
        scores = normalised(at_least_float32(input), self.normalize)
        delta = margins(scores, target, self.margin)
        stiffness = self.alpha * math.log(scores.shape[1]) / self.lam0  # a
        lam = self.lambdas[index].to(scores.dtype)[:, None]
        if self.training:
            lam = self._step((delta if self.margin_in_p else scores).detach() / lam, stiffness)
            self.lambdas[index] = lam[:, 0].to(self.lambdas.dtype)
        loss = kl_regularised_maximum(delta, lam) - 0.5 * stiffness * (lam[:, 0] - self.lam0).square()
        return reduce(loss, self.reduction).to(input.dtype)

    def _step(self, logits: Float[Tensor, "n c"], stiffness: float) -> Float[Tensor, "n 1"]:
        """The λ that is best for p = softmax(logits)."""
        p = logits.softmax(1) + 1e-5
        p = p / p.sum(1, keepdim=True)
        divergence = (p * (p.shape[1] * p).log()).sum(1, keepdim=True)
        return self.lam0 - divergence / stiffness

    def _check_index(self, index: Int[Tensor, "..."], n: int) -> None:
        integer = not index.is_floating_point() and not index.is_complex() and index.dtype != torch.bool
        require(integer, "index", index.dtype, "integer sample indices")
        require(index.shape == (n,), "index", tuple(index.shape), f"of shape {(n,)}, one per row")
        if index.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high, last = int(index.min()), int(index.max()), self.lambdas.shape[0] - 1
            require(low >= 0 and high <= last, "index", f"{low}..{high}", f"within 0..{last}")

    def extra_repr(self) -> str:
        return (
            f"num_samples={self.lambdas.shape[0]}, lam0={self.lam0}, margin={self.margin}, alpha={self.alpha}, "
            f"normalize={self.normalize!r}, margin_in_p={self.margin_in_p}, reduction={self.reduction!r}"
        )


@method(paper="ldr", slot="loss", search={"margin": LogUniform(0.1, 10.0)})
class CSLoss(nn.Module):
    """The multi-class hinge of Crammer and Singer, max_k delta_k: LDR-KL for λ → 0, on scores as they are.

    Args:
        margin: c ≥ 0. The paper chooses among 0.1, 1 and 10.
        reduction: 'none', 'mean' or 'sum'.
    """

    def __init__(self, margin: float = 1.0, *, reduction: str = "mean") -> None:
        super().__init__()
        require(0 <= margin < math.inf, "margin", margin, "at least 0 and finite")
        check_reduction(reduction)
        self.margin, self.reduction = margin, reduction

    def forward(self, input: Float[Tensor, "n c"], target: Int[Tensor, " n"]) -> Float[Tensor, "..."]:
        check_scores(input, target)
        loss = margins(at_least_float32(input), target, self.margin).amax(1)
        return reduce(loss, self.reduction).to(input.dtype)

    def extra_repr(self) -> str:
        return f"margin={self.margin}, reduction={self.reduction!r}"


@method(paper="ldr", slot="loss", search={"margin": LogUniform(0.1, 10.0)})
class WWLoss(nn.Module):
    """The multi-class hinge of Weston and Watkins, mean_k max(0, delta_k), on scores as they are.

    The mean is over all K classes, the target's own 0 included, as in the authors' code; Weston and Watkins take the
    sum. Where every hinge is active it equals the limit of LDR-KL for λ → ∞.

    Args:
        margin: c ≥ 0. The paper chooses among 0.1, 1 and 10.
        reduction: 'none', 'mean' or 'sum'.
    """

    def __init__(self, margin: float = 1.0, *, reduction: str = "mean") -> None:
        super().__init__()
        require(0 <= margin < math.inf, "margin", margin, "at least 0 and finite")
        check_reduction(reduction)
        self.margin, self.reduction = margin, reduction

    def forward(self, input: Float[Tensor, "n c"], target: Int[Tensor, " n"]) -> Float[Tensor, "..."]:
        check_scores(input, target)
        loss = margins(at_least_float32(input), target, self.margin).relu().mean(1)
        return reduce(loss, self.reduction).to(input.dtype)

    def extra_repr(self) -> str:
        return f"margin={self.margin}, reduction={self.reduction!r}"
