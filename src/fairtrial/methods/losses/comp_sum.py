"""Comp-sum losses: compositions of a transform with a sum of exponentials (Mao, Mohri and Zhong, ICML 2023,
arXiv:2304.07288).

With scores h of n classes, label y and `u = sum_{k≠y} exp(h_k - h_y)`, so that softmax(h)_y = p = 1 / (1 + u),

    L(h, y) = Φ_τ(u),    Φ_τ(u) = ((1 + u)^(1-τ) - 1) / (1 - τ),    Φ_1(u) = log(1 + u)

τ = 0 is the sum-exponential loss 1/p - 1, τ = 1 cross entropy, 1 < τ < 2 the generalised cross entropy
(1 - p^q) / q with q = τ - 1, and τ = 2 half the mean absolute error, 1 - p. The gradient in h_k is
p^(τ-1) (softmax(h)_k - [k = y]).

For every distribution of labels the excess zero-one loss β is bounded by the excess of the comp-sum loss t:
T_τ(β) ≤ t, with the transform of `comp_sum_transform`, whose inverse Γ_τ is `comp_sum_bound`. (For restricted
hypothesis sets both sides contain the minimizability gap besides.) T_τ follows from giving the softmax mass of the
likeliest and of the predicted class to these two in the best way. It is attained for τ ≤ 1, and for two classes and
τ ≤ 2; elsewhere it holds, but the least excess may be larger.

The smooth adversarial loss adds to the comp-sum loss at temperature ρ what a perturbation changes in the margins
D_k = h_y - h_k:

    L(h, x, y) = Φ_τ(sum_{k≠y} exp(-D_k(x) / ρ)) + ν sup_{‖x'-x‖ ≤ ε} ‖D(x') - D(x)‖

There is no code of the authors'. Regulariser norm, ρ and ν follow our reading of the paper's construction; with
ν ≥ sqrt(n-1) / ρ the loss is an upper bound of the adversarial ρ-margin loss sup_{x'} Φ_τ(sum_{k≠y} Φ_ρ(D_k(x'))),
Φ_ρ(v) = min(1, max(0, 1 - v/ρ)), because Φ_ρ(v) ≤ exp(-v/ρ), Φ_ρ is 1/ρ-Lipschitz and Φ_τ is 1-Lipschitz. The
published constants are not confirmed. `TRADESLoss`, the usual alternative, stands beside it.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.losses.adversarial import check_ball, worst_inputs
from fairtrial.methods.losses.classification import at_least_float32, check_reduction, check_scores, reduce
from fairtrial.methods.losses.exponential import expm1_then_linear
from fairtrial.methods.registry import Uniform, method

HALVINGS = 60  # of [0, 1] by the bisection: beyond the resolution of float64


def check_tau(tau: float) -> None:
    require(0 <= tau < math.inf, "tau", tau, "at least 0 and finite")


def comp_sum_of(surprise: Float[Tensor, "*n"], tau: float) -> Float[Tensor, "*n"]:
    """Φ_τ as a function of log(1 + u) = -log p."""
    if tau == 1:
        return surprise
    return expm1_then_linear((1 - tau) * surprise) / (1 - tau)


def comp_sum_loss(
    input: Float[Tensor, "n c"], target: Int[Tensor, " n"], *, tau: float = 1.0, reduction: str = "mean"
) -> Float[Tensor, "..."]:
    """Functional form of `CompSumLoss`."""
    check_scores(input, target)
    surprise = F.cross_entropy(at_least_float32(input), target.long(), reduction="none")
    return reduce(comp_sum_of(surprise, tau), reduction).to(input.dtype)


@method(paper="comp_sum", slot="loss", search={"tau": Uniform(0.0, 2.0)})
class CompSumLoss(nn.Module):
    """Comp-sum loss of scores (n, classes) and class indices (n,).

    Args:
        tau: τ ≥ 0. Small values weigh badly classified samples up, large ones down, which withstands label noise.
        reduction: 'none', 'mean' or 'sum'.

    For τ < 1 loss and gradient grow as p^(τ-1): clip the gradient, or choose a small learning rate. From
    (1-τ) log(1/p) = 40 on the loss goes along its tangent; in float16 it overflows before. For τ > 1 the loss is below
    1 / (τ-1), and the gradient vanishes where p does. Losses of different τ need different learning rates.
    """

    def __init__(self, tau: float = 1.0, *, reduction: str = "mean") -> None:
        super().__init__()
        check_tau(tau)
        check_reduction(reduction)
        self.tau, self.reduction = tau, reduction

    def forward(self, input: Float[Tensor, "n c"], target: Int[Tensor, " n"]) -> Float[Tensor, "..."]:
        return comp_sum_loss(input, target, tau=self.tau, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"tau={self.tau}, reduction={self.reduction!r}"


def comp_sum_transform(beta: float | Float[Tensor, "*shape"], tau: float, n: int) -> Float[Tensor, "*shape"]:
    """T_τ(β): the least excess comp-sum loss that an excess zero-one loss of β comes with.

    Args:
        beta: excess zero-one loss within [0, 1]; a number is taken for a float64 tensor.
        tau: τ ≥ 0.
        n: number of classes, at least 2. It matters for τ > 1 only.
    """
    check_tau(tau)
    require(n >= 2, "n", n, "at least 2 classes")
    beta = _within(beta, 0.0, 1.0, "beta")
    if tau == 1:
        entropy: Tensor = 0.5 * (torch.special.xlog1py(1 + beta, beta) + torch.special.xlog1py(1 - beta, -beta))
        return entropy
    scale = (tau - 1) * math.pow(2 if tau < 1 else n, tau - 1)
    if tau >= 2:
        return beta / scale
    # The power mean of 1 + β and 1 - β with exponent r = 1 / (2-τ) ≥ 1/2, as a multiple of 1 + β: no overflow.
    r = 1 / (2 - tau)
    mean: Tensor = (1 + beta) * (0.5 * (1 + ((1 - beta) / (1 + beta)) ** r)) ** (1 / r)
    return (mean - 1) / scale


def comp_sum_bound(t: float | Float[Tensor, "*shape"], tau: float, n: int) -> Float[Tensor, "*shape"]:
    """Γ_τ(t): the largest excess zero-one loss that an excess comp-sum loss of t allows; 1 where T_τ(1) ≤ t.

    Args:
        t: excess comp-sum loss, at least 0; a number is taken for a float64 tensor.
        tau: τ ≥ 0.
        n: number of classes, at least 2.
    """
    t = _within(t, 0.0, math.inf, "t")
    low, high = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        allowed = comp_sum_transform(middle, tau, n) <= t
        low, high = torch.where(allowed, middle, low), torch.where(allowed, high, middle)
    return high


def _within(value: float | Tensor, low: float, high: float, name: str) -> Tensor:
    tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    least, most = (float(end) for end in tensor.aminmax())
    accepted = f"within {low:g}..{high:g}" if high < math.inf else f"at least {low:g}"
    require(least >= low and most <= high, name, value if tensor.ndim == 0 else f"{least}..{most}", accepted)
    return tensor


def margin_comp_sum_loss(
    input: Float[Tensor, "n c"],
    target: Int[Tensor, " n"],
    *,
    tau: float = 1.0,
    rho: float = 1.0,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    """The ρ-margin comp-sum loss Φ_τ(sum_{k≠y} Φ_ρ(h_y - h_k)), of which the smooth adversarial loss bounds the worst.

    Args:
        input: scores (n, classes).
        target: class indices (n,).
        tau: τ ≥ 0.
        rho: ρ > 0, the margin from which on a rival no longer counts.
        reduction: 'none', 'mean' or 'sum'.
    """
    check_scores(input, target)
    check_tau(tau)
    require(0 < rho < math.inf, "rho", rho, "above 0 and finite")
    check_reduction(reduction)
    short = (1 - _margins(at_least_float32(input), target) / rho).clamp(0.0, 1.0)
    u = short.scatter(1, target[:, None].long(), 0.0).sum(1)
    return reduce(comp_sum_of(torch.log1p(u), tau), reduction).to(input.dtype)


def _margins(scores: Float[Tensor, "n c"], target: Int[Tensor, " n"]) -> Float[Tensor, "n c"]:
    """D_k = h_y - h_k for all k; 0 for k = y, which no norm notices."""
    return scores.gather(1, target[:, None].long()) - scores


class SmoothAdversarialCompSumLoss(nn.Module):
    """Comp-sum loss at temperature ρ, and how far the worst perturbation moves the margins: `loss(model, x, y)`.

    Gradients flow through the model at x and at the perturbed x', not through the search for x'. With ε = 0 or ν = 0
    there is no search, and the loss is `CompSumLoss` of the scores over ρ.

    Args:
        tau: τ ≥ 0; 1 is ADV-COMP-SUM as reported.
        rho: temperature ρ > 0 of the margins.
        nu: weight ν ≥ 0 of the regulariser. From sqrt(classes - 1) / ρ on the loss bounds the adversarial one.
        epsilon: radius ε ≥ 0 of the ball, in units of x.
        steps: of projected gradient ascent.
        step_size: of one step; ε/4 by default.
        norm: 'linf' or 'l2', of the perturbation.
        regularizer_norm: order of the norm of the margins' change, at least 1.
        generator: what the start of the search is drawn from; torch's global one by default.
        reduction: 'none', 'mean' or 'sum'.

    ρ, ν and the search's constants are this library's choices. A training step costs `steps` + 2 passes through the
    model instead of one. Perturbed inputs are not brought back into any range.
    """

    def __init__(
        self,
        tau: float = 1.0,
        rho: float = 1.0,
        nu: float = 1.0,
        *,
        epsilon: float,
        steps: int = 10,
        step_size: float | None = None,
        norm: str = "linf",
        regularizer_norm: float = 2.0,
        generator: torch.Generator | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check_tau(tau)
        require(0 < rho < math.inf, "rho", rho, "above 0 and finite")
        require(0 <= nu < math.inf, "nu", nu, "at least 0 and finite")
        check_ball(epsilon, steps, step_size, norm)
        require(regularizer_norm >= 1, "regularizer_norm", regularizer_norm, "at least 1")
        check_reduction(reduction)
        self.tau, self.rho, self.nu, self.epsilon = tau, rho, nu, epsilon
        self.steps, self.step_size, self.norm = steps, step_size, norm
        self.regularizer_norm, self.generator, self.reduction = regularizer_norm, generator, reduction

    def forward(self, model: nn.Module, x: Float[Tensor, "n ..."], y: Int[Tensor, " n"]) -> Float[Tensor, "..."]:
        scores = model(x)
        loss = comp_sum_loss(scores / self.rho, y, tau=self.tau, reduction="none")
        if self.nu > 0 and self.epsilon > 0:
            clean = scores.detach()
            perturbed = worst_inputs(
                model,
                lambda output: self.change(clean, output, y),
                x,
                epsilon=self.epsilon,
                steps=self.steps,
                step_size=self.step_size,
                norm=self.norm,
                generator=self.generator,
            )
            loss = loss + self.nu * self.change(scores, model(perturbed), y)
        return reduce(loss, self.reduction)

    def change(
        self, clean: Float[Tensor, "n c"], perturbed: Float[Tensor, "n c"], y: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """‖D(x') - D(x)‖ of each sample."""
        check_scores(clean, y)
        moved: Tensor = torch.linalg.vector_norm(_margins(perturbed - clean, y), self.regularizer_norm, dim=1)
        return moved

    def extra_repr(self) -> str:
        return (
            f"tau={self.tau}, rho={self.rho}, nu={self.nu}, epsilon={self.epsilon}, steps={self.steps}, "
            f"step_size={self.step_size}, norm={self.norm!r}, regularizer_norm={self.regularizer_norm}, "
            f"reduction={self.reduction!r}"
        )


class TRADESLoss(nn.Module):
    """TRADES (Zhang et al. 2019, arXiv:1901.08573): cross entropy + β KL(softmax h(x) || softmax h(x')), worst x'.

    Called as `loss(model, x, y)`. The search starts at random within the ball, as that of the loss above, where TRADES
    starts at a small normal perturbation.

    Args:
        beta: weight β ≥ 0; 6 is usual.
        epsilon, steps, step_size, norm, generator, reduction: as in `SmoothAdversarialCompSumLoss`.
    """

    def __init__(
        self,
        beta: float = 6.0,
        *,
        epsilon: float,
        steps: int = 10,
        step_size: float | None = None,
        norm: str = "linf",
        generator: torch.Generator | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        require(0 <= beta < math.inf, "beta", beta, "at least 0 and finite")
        check_ball(epsilon, steps, step_size, norm)
        check_reduction(reduction)
        self.beta, self.epsilon, self.steps, self.step_size = beta, epsilon, steps, step_size
        self.norm, self.generator, self.reduction = norm, generator, reduction

    def forward(self, model: nn.Module, x: Float[Tensor, "n ..."], y: Int[Tensor, " n"]) -> Float[Tensor, "..."]:
        scores = model(x)
        loss = comp_sum_loss(scores, y, reduction="none")
        if self.beta > 0 and self.epsilon > 0:
            clean = scores.detach()
            perturbed = worst_inputs(
                model,
                lambda output: _divergence(clean, output),
                x,
                epsilon=self.epsilon,
                steps=self.steps,
                step_size=self.step_size,
                norm=self.norm,
                generator=self.generator,
            )
            loss = loss + self.beta * _divergence(scores, model(perturbed))
        return reduce(loss, self.reduction)

    def extra_repr(self) -> str:
        return (
            f"beta={self.beta}, epsilon={self.epsilon}, steps={self.steps}, step_size={self.step_size}, "
            f"norm={self.norm!r}, reduction={self.reduction!r}"
        )


def _divergence(clean: Float[Tensor, "n c"], perturbed: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    return F.kl_div(perturbed.log_softmax(1), clean.log_softmax(1), log_target=True, reduction="none").sum(1)
