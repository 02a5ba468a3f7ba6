"""EnsLoss: a randomly drawn calibrated loss in every step (Dai 2024, arXiv:2409.00908).

Gradient descent sees a margin loss φ(z), z = y f(x) with y = ±1, through its derivative only. φ is convex and
calibrated if its derivative does not decrease and is negative at 0. So for a batch of b margins, b negative numbers
are drawn and handed out in order, as the derivatives g_i of a loss that nobody has to write down:

    e_i ~ N(0, 1),    r_i = max(-BC⁻¹_λ(e_i), -1),    BC⁻¹_λ(e) = max(0, 1 + λ e)^(1/λ),    BC⁻¹_0 = exp
    g = sorted r, the most negative for the smallest margin
    g_i ← g_i / z_i where z_i > 1, so that the loss stays bounded below;    g_i ← g_i - 1e-6
    loss = mean g_i z_i, with g held fixed

The loss's gradient in f(x_i) is y_i g_i / b; its value means nothing. As dropout, it is for training: in evaluation
mode `EnsLoss` is the logistic loss.

The authors' code is followed: it divides by z_i after sorting, which may put neighbours around z = 1 out of order, and
the derivatives of the released experiments have λ = 0 throughout. `EnsLossScheduler` draws λ anew between epochs, as
their trainer does when told to. The draws are of float32 whatever the logits are.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.losses.binary import check_logits
from fairtrial.methods.losses.classification import at_least_float32, check_reduction, reduce
from fairtrial.methods.losses.exponential import expm1_then_linear
from fairtrial.methods.registry import Categorical, Uniform, method


def margins(input: Float[Tensor, "n *one"], target: Shaped[Tensor, "n *_"]) -> Float[Tensor, " n"]:
    """z = y f with y = ±1, of logits of shape (n,) or (n, 1)."""
    if input.ndim == 2:
        require(input.shape[1] == 1, "input", tuple(input.shape), "logits of shape (n,) or (n, 1)")
        input = input[:, 0]
        target = target[:, 0] if target.ndim == 2 else target
    check_logits(input, target)
    logits = at_least_float32(input)
    return (2 * target.to(logits.dtype) - 1) * logits


@method(
    paper="ensloss",
    slot="binary_loss",
    search={"lam": Uniform(-1.0, 1.0)},
    bind=lambda setting: {"generator": setting.generator},
)
class EnsLoss(nn.Module):
    """EnsLoss of logits (n,) or (n, 1) and targets in {0, 1}; the logistic loss in evaluation mode.

    Its value in training mode is no measure of anything: neither watch it nor stop by it.

    Args:
        lam: λ of the inverse Box-Cox transform; 0 is the exponential. It is part of the state_dict.
        lam_range: what `resample_lambda` draws λ from, uniformly.
        clip: the most negative derivative before the tail, > 0.
        tail: 'inverse' divides derivatives at margins above 1 by the margin; None leaves them.
        generator: what is drawn from; torch's global one by default. With one given, `torch.compile` cannot take the
            loss whole: it does not trace generators.
        reduction: 'none', 'mean' or 'sum'.

    Attributes:
        last_derivatives: g of the last batch in training mode, None before.
    """

    def __init__(
        self,
        lam: float = 0.0,
        *,
        lam_range: tuple[float, float] = (-1.0, 1.0),
        clip: float = 1.0,
        tail: str | None = "inverse",
        generator: torch.Generator | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        require(abs(lam) < math.inf, "lam", lam, "finite")
        low, high = lam_range
        require(-math.inf < low <= high < math.inf, "lam_range", lam_range, "two finite numbers, the smaller one first")
        require(0 < clip < math.inf, "clip", clip, "above 0 and finite")
        require(tail in ("inverse", None), "tail", tail, "'inverse' or None")
        check_reduction(reduction)
        self.lam, self.lam_range, self.clip, self.tail = lam, lam_range, clip, tail
        self.generator, self.reduction = generator, reduction
        self.last_derivatives: Tensor | None = None

    def forward(self, input: Float[Tensor, "n *one"], target: Shaped[Tensor, "n *_"]) -> Float[Tensor, "..."]:
        z = margins(input, target)
        if not self.training:
            return reduce(F.softplus(-z), self.reduction).to(input.dtype)
        self.last_derivatives = self.derivatives(z.detach())
        return reduce(self.last_derivatives * z, self.reduction).to(input.dtype)

    def derivatives(self, z: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """A random loss's derivatives at the margins."""
        device = z.device if self.generator is None else self.generator.device
        drawn = torch.randn(len(z), generator=self.generator, device=device).to(z)
        ascending = (-self._inverse_box_cox(drawn)).clamp(min=-self.clip).sort().values
        g = torch.empty_like(z).scatter(0, z.argsort(stable=True), ascending)
        if self.tail == "inverse":
            g = g / z.clamp(min=1.0)
        return g - 1e-6

    def _inverse_box_cox(self, e: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        if self.lam == 0:
            return e.exp()
        return (1 + self.lam * e).clamp(min=0.0) ** (1 / self.lam)

    def resample_lambda(self) -> None:
        """Draw λ anew."""
        low, high = self.lam_range
        device = "cpu" if self.generator is None else self.generator.device
        self.lam = low + (high - low) * float(torch.rand((), generator=self.generator, device=device))

    def get_extra_state(self) -> Float[Tensor, ""]:
        return torch.tensor(self.lam, dtype=torch.float64)

    def set_extra_state(self, state: Float[Tensor, ""]) -> None:
        self.lam = float(state)

    def extra_repr(self) -> str:
        return (
            f"lam={self.lam}, lam_range={self.lam_range}, clip={self.clip}, tail={self.tail!r}, "
            f"reduction={self.reduction!r}"
        )


class EnsLossScheduler:
    """Draws λ of an `EnsLoss` anew in every `period`-th epoch: call `step()` at the beginning of every epoch.

    Args:
        loss: the loss whose λ is drawn. Its state_dict has the λ, that of the scheduler the epoch.
        period: epochs from one draw to the next, at least 1. Before the first draw λ is what the loss was made with.
    """

    def __init__(self, loss: EnsLoss, period: int) -> None:
        require(period >= 1, "period", period, "at least 1")
        self.loss, self.period, self.epoch = loss, period, 0

    def step(self) -> None:
        self.epoch += 1
        if self.epoch % self.period == 0:
            self.loss.resample_lambda()

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epoch = state_dict["epoch"]


@method(paper="ensloss", slot="binary_loss", search={"kind": Categorical(["logistic", "hinge", "exponential"])})
class MarginLoss(nn.Module):
    """The fixed losses that EnsLoss is held against, of logits (n,) or (n, 1) and targets in {0, 1}.

    Args:
        kind: 'logistic' log(1 + exp(-z)), 'hinge' max(0, 1 - z), or 'exponential' exp(-z), which goes along its
            tangent from z = -40 down. The authors clip the norm of the exponential loss's gradient at 10.
        reduction: 'none', 'mean' or 'sum'.
    """

    def __init__(self, kind: str = "logistic", *, reduction: str = "mean") -> None:
        super().__init__()
        require(kind in ("logistic", "hinge", "exponential"), "kind", kind, "'logistic', 'hinge' or 'exponential'")
        check_reduction(reduction)
        self.kind, self.reduction = kind, reduction

    def forward(self, input: Float[Tensor, "n *one"], target: Shaped[Tensor, "n *_"]) -> Float[Tensor, "..."]:
        z = margins(input, target)
        if self.kind == "logistic":
            loss = F.softplus(-z)
        elif self.kind == "hinge":
            loss = (1 - z).relu()
        else:
            loss = 1 + expm1_then_linear(-z)
        return reduce(loss, self.reduction).to(input.dtype)

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, reduction={self.reduction!r}"
