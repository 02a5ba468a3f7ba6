"""Dice losses for imbalanced tagging and classification (Li et al. 2019, arXiv:1911.02855).

With p the probability of a class, y whether the sample is of it, and γ a smoothing constant, a sample's losses are

    DL     1 - (2 p y + γ) / (p² + y² + γ)                                        squared Dice
    TL     1 - (p y + γ) / (p y + a p (1-y) + b (1-p) y + γ)                      Tversky
    DSC    1 - (2 q y + γ) / (q + y + γ),    q = (1-p)^α p                        self-adjusting Dice

where (1-p)^α takes weight from samples that are easily told. Several classes are taken one against the rest, and their
losses added up. The Dice coefficient of the batch as a set takes sums over the samples before the ratio, in numerator
and denominator, and is 1 - F1 where p is 0 or 1, α = 0 and γ = 0:

    DiceLoss    1 - (2 sum q y + γ) / (sum q² + sum y² + γ),    without squares if `square_denominator` is false

The published runs rest on the latter: the authors' scripts (github.com/ShannonAI/dice_loss_for_NLP) set α = 0.01, γ = 1
and the squares for outputs of one logit, and keep only the hardest negatives besides. `DiceLoss` has these defaults.

Two properties follow from the formulas and are not repaired here. q vanishes at p = 1, too: a negative that is surely
taken for a positive gets no gradient for α > 0, and a positive's DSC is least at p = 1/(1+α), so that the model is kept
from being sure. `detach_weight=True` takes (1-p)^α for a constant. And with two classes, one against the rest, and
α = 1 the DSC is the same for p and 1 - p, so that nothing is learned.

For several classes the code mixes the two definitions: each sample's numerator over the whole batch's denominator. The
scale and the minimum of that belong to neither; it is here as `mixed_dice_loss`, for comparison only. Its mining of
negatives is defined here by rank, where the code compares with a threshold that is off by one, and for each of several
classes as for one. The formulas are from memory of the paper and agree with the code.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.losses.classification import at_least_float32, check_reduction, check_scores, reduce
from fairtrial.methods.registry import LogUniform, Uniform, method


def _check_targets(target: Int[Tensor, "..."], classes: int, ignore_index: int) -> None:
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
        require(not bool(wrong.any()), "target", target[wrong].tolist(), f"within 0..{classes - 1}, or {ignore_index}")


class _OneVersusRest(nn.Module):
    """Scores (n, classes) and class indices as columns, one for each class."""

    def __init__(self, from_logits: bool, ignore_index: int) -> None:
        super().__init__()
        self.from_logits, self.ignore_index = from_logits, ignore_index

    def _columns(
        self, input: Float[Tensor, "n *c"], target: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c"], Bool[Tensor, "n c"], Bool[Tensor, "n 1"]]:
        """p, log(1 - p), which samples are of the class, and which count; p is 0 where they do not."""
        check_scores(input, torch.zeros_like(target))  # values follow: one of them may be outside
        _check_targets(target, input.shape[1], self.ignore_index)
        kept = (target != self.ignore_index)[:, None]
        scores = at_least_float32(input).masked_fill(~kept, 0.0)
        of_class = torch.where(kept, target[:, None], -1) == torch.arange(input.shape[1], device=input.device)
        if self.from_logits:
            p, log_rest = _softmax(scores)
        else:
            p, log_rest = scores, _log_of_rest(scores)
        return p.masked_fill(~kept, 0.0), log_rest, of_class, kept


class _Binary(_OneVersusRest):
    """Logits (n,) and targets of 0 and 1 as one column, that of class 1."""

    def _columns(
        self, input: Float[Tensor, "n *c"], target: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c"], Bool[Tensor, "n c"], Bool[Tensor, "n 1"]]:
        require(input.ndim == 1, "input", tuple(input.shape), "one logit for each sample, of shape (n,)")
        require(input.shape[0] > 0, "input", tuple(input.shape), "logits of at least one sample")
        require(input.is_floating_point(), "input", input.dtype, "a floating-point tensor")
        require(not target.is_floating_point() and not target.is_complex(), "target", target.dtype, "integers")
        require(target.shape == input.shape, "target", tuple(target.shape), f"of shape {tuple(input.shape)}, as input")
        _check_targets(target, 2, self.ignore_index)
        kept = (target != self.ignore_index)[:, None]
        scores = at_least_float32(input)[:, None].masked_fill(~kept, 0.0)
        if self.from_logits:
            p, log_rest = scores.sigmoid(), F.logsigmoid(-scores)
        else:
            p, log_rest = scores, _log_of_rest(scores)
        return p.masked_fill(~kept, 0.0), log_rest, (target[:, None] == 1) & kept, kept


def _softmax(scores: Float[Tensor, "n c"]) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c"]]:
    """p, and log(1 - p) without cancellation: the likeliest class's is the logarithm of all the others' share."""
    p = scores.softmax(1)
    likeliest = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.argmax(1, keepdim=True), True)
    others = scores.masked_fill(likeliest, torch.finfo(scores.dtype).min).logsumexp(1, keepdim=True)
    share = others - scores.logsumexp(1, keepdim=True)
    return p, torch.where(likeliest, share, (-p.masked_fill(likeliest, 0.0)).log1p())


def _log_of_rest(p: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    if p.device.type == "cpu" and not torch.compiler.is_compiling():
        require(bool(((p >= 0) & (p <= 1)).all()), "input", "other values", "probabilities if from_logits is false")
    return (1 - p).clamp(min=torch.finfo(p.dtype).tiny).log()


def _self_adjusted(
    p: Float[Tensor, "n c"], log_rest: Float[Tensor, "n c"], alpha: float, detach_weight: bool
) -> Float[Tensor, "n c"]:
    """q = (1 - p)^α p."""
    if alpha == 0:
        return p
    weight = (alpha * log_rest).exp()
    return (weight.detach() if detach_weight else weight) * p


def _hardest(
    p: Float[Tensor, "n c"], of_class: Bool[Tensor, "n c"], kept: Bool[Tensor, "n 1"], ratio: float
) -> Bool[Tensor, "n c"]:
    """Each class's samples, and floor(ratio × their number) of the others, those of largest p."""
    order = p.detach().masked_fill(of_class | ~kept, -1.0).argsort(dim=0, descending=True, stable=True)
    rank = order.argsort(dim=0)
    wanted = (ratio * of_class.sum(0).double() + 1e-9).floor()
    return of_class | (~of_class & kept & (rank < wanted))


@method(paper="dice_loss", slot="loss", search={"smooth": LogUniform(1e-2, 10.0), "alpha": Uniform(0.0, 0.5)})
class DiceLoss(_OneVersusRest):
    """1 - the Dice coefficient of the batch, of scores (n, classes) and class indices (n,), added up over the classes.

    The value belongs to the batch as a whole: there is no `reduction`, and a batch should hold samples of rare classes.

    Args:
        alpha: α ≥ 0 of the self-adjusting factor (1-p)^α; the authors' scripts set 0.01.
        smooth: γ ≥ 0; the scripts set 1, the code's default is 1e-4. It is the loss's scale in batches without a
            sample of the class: small values make it jump there.
        square_denominator: squares in the denominator, as in the scripts.
        ohem_ratio: if above 0, of a class's negatives only the floor(ratio × positives) likeliest are kept.
        detach_weight: no gradient through (1-p)^α.
        from_logits: scores are taken through softmax; false if they are probabilities.
        ignore_index: the target of samples that do not count. Where none counts the loss is 0, with a graph.
    """

    def __init__(
        self,
        alpha: float = 0.01,
        smooth: float = 1.0,
        *,
        square_denominator: bool = True,
        ohem_ratio: float = 0.0,
        detach_weight: bool = False,
        from_logits: bool = True,
        ignore_index: int = -100,
    ) -> None:
        super().__init__(from_logits, ignore_index)
        _check_constants(alpha=alpha, smooth=smooth, ohem_ratio=ohem_ratio)
        self.alpha, self.smooth, self.square_denominator = alpha, smooth, square_denominator
        self.ohem_ratio, self.detach_weight = ohem_ratio, detach_weight

    def forward(self, input: Float[Tensor, "n *c"], target: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        p, log_rest, of_class, kept = self._columns(input, target)
        q = _self_adjusted(p, log_rest, self.alpha, self.detach_weight)
        if self.ohem_ratio > 0:
            q = q.masked_fill(~_hardest(p, of_class, kept, self.ohem_ratio), 0.0)
        y = of_class.to(q.dtype)
        numerator = 2 * (q * y).sum(0) + self.smooth
        denominator = (q.square() if self.square_denominator else q).sum(0) + y.sum(0) + self.smooth
        empty = denominator == 0  # of γ = 0 alone: nothing is there, and nothing is found
        dice = numerator.masked_fill(empty, 1.0) / denominator.masked_fill(empty, 1.0)
        return (1 - dice).sum().to(input.dtype)

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha}, smooth={self.smooth}, square_denominator={self.square_denominator}, "
            f"ohem_ratio={self.ohem_ratio}, detach_weight={self.detach_weight}, from_logits={self.from_logits}, "
            f"ignore_index={self.ignore_index}"
        )


@method(paper="dice_loss", slot="binary_loss", search={"smooth": LogUniform(1e-2, 10.0), "alpha": Uniform(0.0, 0.5)})
class BinaryDiceLoss(_Binary, DiceLoss):
    """`DiceLoss` of logits (n,) and targets (n,) of 0 and 1: that of class 1 alone, the form of the published runs."""


class _PerSample(_OneVersusRest):
    """What the losses of single samples share: sums over classes, and the reduction over samples that count."""

    def __init__(self, from_logits: bool, ignore_index: int, reduction: str) -> None:
        super().__init__(from_logits, ignore_index)
        check_reduction(reduction)
        self.reduction = reduction

    def forward(self, input: Float[Tensor, "n *c"], target: Int[Tensor, " n"]) -> Float[Tensor, "..."]:
        p, log_rest, of_class, kept = self._columns(input, target)
        losses = self._losses(p, log_rest, of_class.to(p.dtype)).masked_fill(~kept, 0.0).sum(1)
        if self.reduction == "mean":
            return (losses.sum() / kept.sum().clamp(min=1)).to(input.dtype)
        return reduce(losses, self.reduction).to(input.dtype)

    def _losses(
        self, p: Float[Tensor, "n c"], log_rest: Float[Tensor, "n c"], y: Float[Tensor, "n c"]
    ) -> Float[Tensor, "n c"]:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"from_logits={self.from_logits}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"


@method(paper="dice_loss", slot="loss", search={"alpha": Uniform(0.0, 1.0), "smooth": LogUniform(1e-2, 10.0)})
class SelfAdjustingDiceLoss(_PerSample):
    """The paper's DSC of scores (n, classes) and class indices (n,), one class against the rest.

    Args:
        alpha, smooth, detach_weight: as in `DiceLoss`; here γ has to be above 0.
        from_logits, ignore_index: as in `DiceLoss`.
        reduction: 'none', 'mean' (over samples that count) or 'sum'.
    """

    def __init__(
        self,
        alpha: float = 0.01,
        smooth: float = 1.0,
        *,
        detach_weight: bool = False,
        from_logits: bool = True,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(from_logits, ignore_index, reduction)
        _check_constants(alpha=alpha)
        require(0 < smooth < math.inf, "smooth", smooth, "above 0 and finite")
        self.alpha, self.smooth, self.detach_weight = alpha, smooth, detach_weight

    def _losses(
        self, p: Float[Tensor, "n c"], log_rest: Float[Tensor, "n c"], y: Float[Tensor, "n c"]
    ) -> Float[Tensor, "n c"]:
        q = _self_adjusted(p, log_rest, self.alpha, self.detach_weight)
        return 1 - (2 * q * y + self.smooth) / (q + y + self.smooth)

    def extra_repr(self) -> str:
        own = f"alpha={self.alpha}, smooth={self.smooth}, detach_weight={self.detach_weight}"
        return f"{own}, {super().extra_repr()}"


@method(paper="dice_loss", slot="loss", search={"smooth": LogUniform(1e-2, 10.0)})
class SquaredDiceLoss(_PerSample):
    """The paper's DL of scores (n, classes) and class indices (n,), one class against the rest.

    Args:
        smooth: γ > 0; 1 in the paper's formulas.
        from_logits, ignore_index, reduction: as in `SelfAdjustingDiceLoss`.
    """

    def __init__(
        self, smooth: float = 1.0, *, from_logits: bool = True, ignore_index: int = -100, reduction: str = "mean"
    ) -> None:
        super().__init__(from_logits, ignore_index, reduction)
        require(0 < smooth < math.inf, "smooth", smooth, "above 0 and finite")
        self.smooth = smooth

    def _losses(
        self, p: Float[Tensor, "n c"], log_rest: Float[Tensor, "n c"], y: Float[Tensor, "n c"]
    ) -> Float[Tensor, "n c"]:
        return 1 - (2 * p * y + self.smooth) / (p.square() + y + self.smooth)

    def extra_repr(self) -> str:
        return f"smooth={self.smooth}, {super().extra_repr()}"


@method(paper="dice_loss", slot="loss", search={"b": Uniform(0.0, 1.0), "smooth": LogUniform(1e-2, 10.0)})
class TverskyLoss(_PerSample):
    """The paper's TL of scores (n, classes) and class indices (n,), one class against the rest.

    Args:
        a: weight ≥ 0 of what is wrongly found.
        b: weight ≥ 0 of what is missed. a = b = 0.5 is Dice without squares, its γ being twice this one.
        smooth: γ > 0.
        from_logits, ignore_index, reduction: as in `SelfAdjustingDiceLoss`.
    """

    def __init__(
        self,
        a: float = 0.5,
        b: float = 0.5,
        smooth: float = 1.0,
        *,
        from_logits: bool = True,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(from_logits, ignore_index, reduction)
        _check_constants(a=a, b=b)
        require(0 < smooth < math.inf, "smooth", smooth, "above 0 and finite")
        self.a, self.b, self.smooth = a, b, smooth

    def _losses(
        self, p: Float[Tensor, "n c"], log_rest: Float[Tensor, "n c"], y: Float[Tensor, "n c"]
    ) -> Float[Tensor, "n c"]:
        found = p * y
        return 1 - (found + self.smooth) / (found + self.a * p * (1 - y) + self.b * (1 - p) * y + self.smooth)

    def extra_repr(self) -> str:
        return f"a={self.a}, b={self.b}, smooth={self.smooth}, {super().extra_repr()}"


@method(paper="dice_loss", slot="binary_loss", search={"alpha": Uniform(0.0, 1.0), "smooth": LogUniform(1e-2, 10.0)})
class BinarySelfAdjustingDiceLoss(_Binary, SelfAdjustingDiceLoss):
    """`SelfAdjustingDiceLoss` of logits (n,) and targets (n,) of 0 and 1: that of class 1 alone."""


@method(paper="dice_loss", slot="binary_loss", search={"smooth": LogUniform(1e-2, 10.0)})
class BinarySquaredDiceLoss(_Binary, SquaredDiceLoss):
    """`SquaredDiceLoss` of logits (n,) and targets (n,) of 0 and 1: that of class 1 alone."""


@method(paper="dice_loss", slot="binary_loss", search={"b": Uniform(0.0, 1.0), "smooth": LogUniform(1e-2, 10.0)})
class BinaryTverskyLoss(_Binary, TverskyLoss):
    """`TverskyLoss` of logits (n,) and targets (n,) of 0 and 1: that of class 1 alone."""


def mixed_dice_loss(
    input: Float[Tensor, "n c"], target: Int[Tensor, " n"], *, alpha: float = 0.0, smooth: float = 1e-4
) -> Float[Tensor, ""]:
    """What the authors' code computes of several classes without squares, with its defaults; for comparison only.

    The mean over samples i of sum_c 1 - (2 q_ic y_ic + γ) / (sum_j q_jc + sum_j y_jc + γ).
    """
    _check_constants(alpha=alpha, smooth=smooth)
    check_scores(input, target)
    p, log_rest = _softmax(at_least_float32(input))
    q, y = _self_adjusted(p, log_rest, alpha, False), F.one_hot(target.long(), input.shape[1]).to(p.dtype)
    return (1 - (2 * q * y + smooth) / (q.sum(0) + y.sum(0) + smooth)).sum(1).mean().to(input.dtype)


def _check_constants(**constants: float) -> None:
    for name, value in constants.items():
        require(0 <= value < math.inf, name, value, "at least 0 and finite")
