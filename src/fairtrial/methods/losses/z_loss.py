"""Z-loss: a softplus of the target's standardised score (Brébisson and Vincent 2016, arXiv:1604.08859).

With `z_c = (o_c - mean(o)) / std(o)` over the D scores of a sample (biased variance, 1/D),

    L(o, c) = softplus(a (b - z_c)) / a

It ignores shift and positive scale of the scores. It belongs to the *spherical family*, losses that need only
`(o_c, sum o, sum o²)`: for those an output layer `o = W h` has an exact SGD step in O(d²) instead of O(D d) (Vincent,
de Brébisson and Bouthillier 2015, arXiv:1412.7091), which `FactoredSphericalOutput` takes. The two other members that
the paper compares with are here too: the spherical softmax and the Taylor softmax.

Not to be confused with the regulariser log² Z of language models that goes by the same name.

The paper leaves `a` and `b` to be tuned for the metric that is wanted; the defaults are neutral, not the paper's.
The authors' Theano code was not available: the update's coefficients follow from the gradient and are held against the
dense layer in the tests.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.losses.classification import at_least_float32, check_reduction, check_scores, reduce
from fairtrial.methods.registry import LogUniform, Uniform, method


def z_loss(
    input: Float[Tensor, "n c"],
    target: Int[Tensor, " n"],
    *,
    a: float = 1.0,
    b: float = 0.0,
    eps: float = 1e-12,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    """Functional form of `ZLoss`."""
    check_scores(input, target)
    scores = at_least_float32(input)
    centred = scores - scores.mean(1, keepdim=True)
    variance = centred.square().mean(1)
    constant = variance <= eps  # such a row has no direction: z = 0, no gradient
    z = centred.gather(1, target[:, None].long())[:, 0] / variance.masked_fill(constant, 1.0).sqrt()
    loss = F.softplus(a * (b - z.masked_fill(constant, 0.0))) / a
    return reduce(loss, reduction).to(input.dtype)


@method(paper="z_loss", slot="loss", search={"a": LogUniform(0.1, 10.0), "b": Uniform(0.0, 20.0)})
class ZLoss(nn.Module):
    """Z-loss of scores (n, classes) and class indices (n,).

    Args:
        a: sharpness, > 0. Towards infinity the loss is the hinge max(0, b - z), towards 0 it is linear in z.
        b: location: how many standard deviations above the mean the target's score should stand. No z exceeds
            sqrt(classes - 1); a `b` above that never saturates.
        eps: rows whose variance is at most this count as constant and have z = 0 and no gradient.
        reduction: 'none', 'mean' or 'sum'.

    The gradient scales as 1/std(o): learning rates differ from cross entropy's.
    """

    def __init__(self, a: float = 1.0, b: float = 0.0, *, eps: float = 1e-12, reduction: str = "mean") -> None:
        super().__init__()
        require(a > 0, "a", a, "above 0")
        require(abs(b) < float("inf"), "b", b, "finite")
        require(eps >= 0, "eps", eps, "at least 0")
        check_reduction(reduction)
        self.a, self.b, self.eps, self.reduction = a, b, eps, reduction

    def forward(self, input: Float[Tensor, "n c"], target: Int[Tensor, " n"]) -> Float[Tensor, "..."]:
        return z_loss(input, target, a=self.a, b=self.b, eps=self.eps, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"a={self.a}, b={self.b}, eps={self.eps}, reduction={self.reduction!r}"


@method(paper="z_loss", slot="loss")
class SphericalSoftmaxLoss(nn.Module):
    """-log p_c with p_c = (o_c² + eps) / sum_k (o_k² + eps): the sign of a score does not matter."""

    def __init__(self, *, eps: float = 1e-6, reduction: str = "mean") -> None:
        super().__init__()
        require(eps > 0, "eps", eps, "above 0")
        check_reduction(reduction)
        self.eps, self.reduction = eps, reduction

    def forward(self, input: Float[Tensor, "n c"], target: Int[Tensor, " n"]) -> Float[Tensor, "..."]:
        check_scores(input, target)
        weights = at_least_float32(input).square() + self.eps
        loss = weights.sum(1).log() - weights.gather(1, target[:, None].long())[:, 0].log()
        return reduce(loss, self.reduction).to(input.dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, reduction={self.reduction!r}"


@method(paper="z_loss", slot="loss")
class TaylorSoftmaxLoss(nn.Module):
    """-log p_c with exp replaced by its second-order expansion 1 + o + o²/2, which is at least 1/2."""

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction = reduction

    def forward(self, input: Float[Tensor, "n c"], target: Int[Tensor, " n"]) -> Float[Tensor, "..."]:
        check_scores(input, target)
        scores = at_least_float32(input)
        weights = 0.5 * (1.0 + (1.0 + scores).square())  # = 1 + o + o²/2 without cancellation
        loss = weights.sum(1).log() - weights.gather(1, target[:, None].long())[:, 0].log()
        return reduce(loss, self.reduction).to(input.dtype)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


class SphericalStep(NamedTuple):
    """What one step of the factored layer gives back."""

    loss: Float[Tensor, ""]
    grad_hidden: Float[Tensor, " d"]


class FactoredSphericalOutput:
    """Output layer `o = W h` under the Z-loss whose exact SGD step costs O(d²), whatever the number of classes D.

    The weights are held as `W = V U + 1 u0ᵀ`, beside `Q = WᵀW` and `w̄ = Wᵀ1`. The loss's gradient in o is
    `alpha 1 + beta o + gamma e_c`, so a step is a rank-one change of U, a shift of u0 and a change of one row of V:

        W ← W M - lr (alpha 1 hᵀ + gamma e_c hᵀ),    M = I - lr beta h hᵀ

    One example per step. `Q`, `w̄` and `U⁻¹` are rebuilt from V, U and u0 every `rebuild_every` steps against the drift
    of round-off; that costs O(D d²) and is rare.

    Args:
        weight: initial W of shape (D, d), D ≥ 2; copied. Its dtype and device are the layer's.
        a, b, eps: as in `ZLoss`.
        rebuild_every: steps between two rebuilds; 0 never rebuilds.
    """

    def __init__(
        self,
        weight: Float[Tensor, "D d"],
        a: float = 1.0,
        b: float = 0.0,
        *,
        eps: float = 1e-12,
        rebuild_every: int = 10_000,
    ) -> None:
        require(weight.ndim == 2 and weight.shape[0] >= 2, "weight", tuple(weight.shape), "of shape (D ≥ 2, d)")
        require(a > 0, "a", a, "above 0")
        require(eps >= 0, "eps", eps, "at least 0")
        require(rebuild_every >= 0, "rebuild_every", rebuild_every, "at least 0")
        self.a, self.b, self.eps, self.rebuild_every = a, b, eps, rebuild_every
        self.num_classes, self.dim = weight.shape
        self.steps = 0
        self.V = weight.detach().clone()
        self.U = torch.eye(self.dim, dtype=weight.dtype, device=weight.device)
        self.u0 = torch.zeros(self.dim, dtype=weight.dtype, device=weight.device)
        self._rebuild()

    @property
    def weight(self) -> Float[Tensor, "D d"]:
        """W, written out in O(D d²)."""
        return self.V @ self.U + self.u0

    def _rebuild(self) -> None:
        weight = self.weight
        self.Q, self.w_sum = weight.T @ weight, weight.sum(0)
        self.U_inverse = torch.linalg.inv(self.U)

    @torch.no_grad()
    def step(self, hidden: Float[Tensor, " d"], target: int, lr: float) -> SphericalStep:
        """Loss and its gradient in `hidden` at the present weights, then the SGD step on W.

        Raises:
            ValueError: `hidden` is not of shape (d,), `target` is not in 0..D-1, or `lr` is negative.
        """
        require(hidden.shape == (self.dim,), "hidden", tuple(hidden.shape), f"of shape {(self.dim,)}")
        require(0 <= target < self.num_classes, "target", target, f"within 0..{self.num_classes - 1}")
        require(lr >= 0, "lr", lr, "at least 0")
        D, h = self.num_classes, hidden
        w_c = self.U.T @ self.V[target] + self.u0
        Qh = self.Q @ h
        mu = self.w_sum @ h / D
        variance = h @ Qh / D - mu * mu
        if variance <= self.eps:
            loss = F.softplus(torch.as_tensor(self.a * self.b, dtype=h.dtype, device=h.device)) / self.a
            return SphericalStep(loss, torch.zeros_like(h))
        sigma = variance.sqrt()
        z = (w_c @ h - mu) / sigma
        g = torch.sigmoid(self.a * (self.b - z))
        beta = g * z / (D * variance)
        alpha = g / sigma * (1.0 / D - z * mu / (D * sigma))
        gamma = -g / sigma
        result = SphericalStep(
            F.softplus(self.a * (self.b - z)) / self.a,
            alpha * self.w_sum + beta * Qh + gamma * w_c,
        )
        self._update(h, target, lr, float(alpha), float(beta), float(gamma), Qh, w_c)
        self.steps += 1
        if self.rebuild_every and self.steps % self.rebuild_every == 0:
            self._rebuild()
        return result

    def _update(
        self,
        h: Float[Tensor, " d"],
        target: int,
        lr: float,
        alpha: float,
        beta: float,
        gamma: float,
        Qh: Float[Tensor, " d"],
        w_c: Float[Tensor, " d"],
    ) -> None:
        D, s = self.num_classes, lr * beta
        w_sum = self.w_sum - s * (self.w_sum @ h) * h  # M w̄
        r = w_c - s * (w_c @ h) * h  # M W_c
        MQh = Qh - s * (h @ Qh) * h
        # Q ← M Q M - lr alpha (v hᵀ + h vᵀ) - lr gamma (r hᵀ + h rᵀ) + lr² (…) h hᵀ, gathered into one symmetric
        # rank-two term x hᵀ + h xᵀ; M Q M = Q - s (h (Qh)ᵀ + (M Q h) hᵀ).
        quadratic = lr * lr * (D * alpha * alpha + 2 * alpha * gamma + gamma * gamma)
        x = -lr * alpha * w_sum - lr * gamma * r + 0.5 * quadratic * h - s * 0.5 * (Qh + MQh)
        self.Q += torch.outer(x, h) + torch.outer(h, x)
        self.w_sum = w_sum - lr * (D * alpha + gamma) * h
        self.U -= s * torch.outer(self.U @ h, h)
        self.U_inverse += torch.outer(h, (s / (1.0 - s * (h @ h))) * (h @ self.U_inverse))
        self.u0 = self.u0 - s * (self.u0 @ h) * h - lr * alpha * h
        self.V[target] -= lr * gamma * (self.U_inverse.T @ h)
