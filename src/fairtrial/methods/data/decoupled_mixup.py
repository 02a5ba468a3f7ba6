"""Decoupled Mixup: each mixed class also competes without the other (Liu et al., NeurIPS 2023, arXiv:2203.10761).

In a mixture of classes a and b, softmax cross entropy lets one class rise only as the other falls, so that a hard
mixed sample is never predicted confidently as both. The regulariser takes the other mixed class out of the
denominator. With logits z and share λ of class a, per sample with a ≠ b,

    DM(CE)    L = -λ log softmax(z)_a - (1 - λ) log softmax(z)_b - η_a log φ_a - η_b log φ_b
              φ_i = exp(z_i) / (exp(z_i) + sum_{c ∉ {a, b}} exp(z_c)),    η_a = η λ^ξ,    η_b = η (1 - λ)^ξ

and plain cross entropy with a = b. It is a criterion for any policy of mixing; `DecoupledMixup` applies it to Mixup.
With sigmoids, DM(BCE) raises the targets of both classes instead, since there the classes do not compete:

    y = h(λ) 1_a + h(1 - λ) 1_b,    h(λ) = min(1, (λ / t)^ξ),    h(0) = 0

Defaults are those of the authors' base configuration. Their code is followed except that

- the weights belong to their classes here; there they follow the order of the first sample's class indices, which
  swaps η_a and η_b for the whole batch if a > b in it;
- λ = 1/2 gets the regulariser like any other λ; there it is left out, as the two classes are told apart by their λ;
- a class is in the mix if its share is above 0; there it must be above 0.001;
- DM(BCE) is a mean over samples and classes; there it is a sum over classes.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.data.mixing import Mixup
from fairtrial.methods.losses.classification import at_least_float32, check_reduction, check_scores, reduce
from fairtrial.methods.registry import LogUniform, method


class Mix(NamedTuple):
    """What is mixed in each sample: classes a and b, equal where nothing is, and the share of a."""

    a: Int[Tensor, " n"]
    b: Int[Tensor, " n"]
    lam: Float[Tensor, " n"]


def mix_of(
    input: Float[Tensor, "n c"],
    target: Int[Tensor, " n"] | Float[Tensor, "n c"],
    target_b: Int[Tensor, " n"] | None,
    lam: float | Float[Tensor, ""] | Float[Tensor, " n"] | None,
    *,
    min_classes: int,
) -> Mix:
    """The mix that the targets of either form describe. Values are looked at on the CPU only, as in `check_scores`."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    if target_b is None or lam is None:
        require(target_b is None and lam is None, "target_b", target_b, "given together with lam")
        require(target.is_floating_point(), "target", target.dtype, "soft labels, or classes beside target_b and lam")
        require(
            target.shape == input.shape, "target", tuple(target.shape), f"soft labels of shape {tuple(input.shape)}"
        )
        check_scores(input, target.argmax(-1), min_classes=min_classes)
        if target.device.type == "cpu" and not torch.compiler.is_compiling():
            count = (target > 0).sum(1)
            fits = (target >= 0).all(1) & (count >= 1) & (count <= 2) & ((target.sum(1) - 1.0).abs() < 0.01)
            expected = "one or two positive shares in each row, of sum 1"
            require(bool(fits.all()), "target", target[~fits][:1].tolist(), expected)
        shares, classes = target.topk(2, dim=1)
        a, b = classes.unbind(1)
        return Mix(a, torch.where(shares[:, 1] > 0, b, a), shares[:, 0].to(dtype))
    check_scores(input, target, min_classes=min_classes)
    check_scores(input, target_b, min_classes=min_classes, name="target_b")
    if isinstance(lam, Tensor):
        n = input.shape[0]
        require(lam.is_floating_point(), "lam", lam.dtype, "a floating-point tensor")
        require(lam.shape in ((), (n,)), "lam", tuple(lam.shape), f"of shape () or {(n,)}")
        if lam.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = float(lam.min()), float(lam.max())
            require(low >= 0 and high <= 1, "lam", f"{low}..{high}", "within 0..1")
        return Mix(target.long(), target_b.long(), lam.to(input.device, dtype).expand(n))
    require(0 <= lam <= 1, "lam", lam, "within 0..1")
    return Mix(target.long(), target_b.long(), input.new_full(target.shape, lam, dtype=dtype))


def raised(share: Float[Tensor, "*shape"], threshold: float, power: float) -> Float[Tensor, "*shape"]:
    """h(share) = min(1, (share / threshold)^power), and 0 for no share at all."""
    return torch.where(share > 0, (share / threshold).clamp(max=1.0).pow(power), 0.0)


class DecoupledMixupLoss(nn.Module):
    """DM(CE): cross entropy of mixed samples with the decoupled regulariser.

    Called as `loss(logits, a, b, lam)` with class indices (n,) and the share of `a`, a number or a tensor () or (n,);
    or as `loss(logits, target)` with soft labels (n, classes) that have one or two positive entries in each row. The
    logits are (n, classes) with at least 3 classes, for with 2 of them φ is 1.

    Args:
        eta: η ≥ 0, weight of the regulariser. The authors' configurations have 0.1 or, tuned for CIFAR-100, 0.01.
        mode: which classes get it: 'both'; 'more', the one of the greater share; 'less', the one of the smaller. At
            λ = 1/2 `a` counts as the greater.
        xi: ξ ≥ 0: the weight of a class goes with its share to this power. 0 weighs both alike.
        reduction: 'none', 'mean' or 'sum'.
    """

    def __init__(self, eta: float = 0.1, *, mode: str = "both", xi: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        require(0 <= eta < math.inf, "eta", eta, "at least 0 and finite")
        require(mode in ("both", "more", "less"), "mode", mode, "'both', 'more' or 'less'")
        require(0 <= xi < math.inf, "xi", xi, "at least 0 and finite")
        check_reduction(reduction)
        self.eta, self.mode, self.xi, self.reduction = eta, mode, xi, reduction

    def forward(
        self,
        input: Float[Tensor, "n c"],
        target: Int[Tensor, " n"] | Float[Tensor, "n c"],
        target_b: Int[Tensor, " n"] | None = None,
        lam: float | Float[Tensor, ""] | Float[Tensor, " n"] | None = None,
    ) -> Float[Tensor, "..."]:
        a, b, share_a = mix_of(input, target, target_b, lam, min_classes=3)
        logits = at_least_float32(input)
        pair = torch.stack((a, b), 1)
        share = torch.stack((share_a, 1.0 - share_a), 1)
        z = logits.gather(1, pair)
        cross_entropy = logits.logsumexp(1) - (share * z).sum(1)
        others = logits.scatter(1, pair, -math.inf).logsumexp(1, keepdim=True)
        decoupled = F.softplus(others - z)  # -log φ of both classes
        loss = cross_entropy + (self._weights(share) * (a != b)[:, None] * decoupled).sum(1)
        return reduce(loss, self.reduction).to(input.dtype)

    def _weights(self, share: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
        weights = self.eta * raised(share, 1.0, self.xi)
        if self.mode == "both":
            return weights
        a_is_more = share[:, :1] >= 0.5
        more = torch.cat((a_is_more, ~a_is_more), 1)
        return weights * (more if self.mode == "more" else ~more)

    def extra_repr(self) -> str:
        return f"eta={self.eta}, mode={self.mode!r}, xi={self.xi}, reduction={self.reduction!r}"


class TwoHotMixupBCELoss(nn.Module):
    """DM(BCE): binary cross entropy of mixed samples with raised targets; called as `DecoupledMixupLoss` is.

    Args:
        threshold: t in (0, 1]: a class with at least this share counts in full.
        power: ξ ≥ 0: smaller shares count as (share / t)^ξ. With t = 1 and ξ = 1 the targets are the shares.
        reduction: 'none' gives the means over each sample's classes (n,); 'mean' or 'sum' is of these.
    """

    def __init__(self, threshold: float = 1.0, power: float = 1.0, *, reduction: str = "mean") -> None:
        super().__init__()
        require(0 < threshold <= 1, "threshold", threshold, "above 0 and at most 1")
        require(0 <= power < math.inf, "power", power, "at least 0 and finite")
        check_reduction(reduction)
        self.threshold, self.power, self.reduction = threshold, power, reduction

    def forward(
        self,
        input: Float[Tensor, "n c"],
        target: Int[Tensor, " n"] | Float[Tensor, "n c"],
        target_b: Int[Tensor, " n"] | None = None,
        lam: float | Float[Tensor, ""] | Float[Tensor, " n"] | None = None,
    ) -> Float[Tensor, "..."]:
        a, b, share_a = mix_of(input, target, target_b, lam, min_classes=2)
        logits = at_least_float32(input)
        hot_a = raised(share_a, self.threshold, self.power)[:, None]
        hot_b = raised(1.0 - share_a, self.threshold, self.power)[:, None]
        two_hot = torch.zeros_like(logits).scatter(1, a[:, None], hot_a).scatter_add(1, b[:, None], hot_b)
        loss = F.binary_cross_entropy_with_logits(logits, two_hot.clamp(max=1.0), reduction="none").mean(1)
        return reduce(loss, self.reduction).to(input.dtype)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, power={self.power}, reduction={self.reduction!r}"


@method(
    paper="decoupled_mixup",
    slot="batch",
    search={"alpha": LogUniform(0.1, 2.0), "eta": LogUniform(0.01, 1.0)},
    bind=lambda setting: {"num_classes": setting.num_classes},
)
class DecoupledMixup(Mixup):
    """Mixup whose soft labels are trained on with DM(CE), by its `criterion(input, target)`.

    Args:
        num_classes: number of classes, at least 3.
        alpha: α > 0 of λ's Beta(α, α), as in `Mixup`.
        eta, mode, xi: as in `DecoupledMixupLoss`.
    """

    def __init__(
        self, num_classes: int, alpha: float = 1.0, eta: float = 0.1, *, mode: str = "both", xi: float = 1.0
    ) -> None:
        require(num_classes >= 3, "num_classes", num_classes, "at least 3")
        super().__init__(num_classes, alpha)
        self.criterion = DecoupledMixupLoss(eta, mode=mode, xi=xi)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, {self.criterion.extra_repr()})"
