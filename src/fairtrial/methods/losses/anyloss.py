"""AnyLoss: any metric of the binary confusion matrix as a loss (Han, Moniz and Chawla 2024, arXiv:2405.14745).

With probabilities p_i, labels y_i in {0, 1}, and the amplification L = 73,

    ŷ_i = 1 / (1 + exp(-L (p_i - 1/2)))
    TP = sum y ŷ,    FN = sum y (1 - ŷ),    FP = sum (1 - y) ŷ,    TN = sum (1 - y)(1 - ŷ)
    loss = 1 - metric(TP, FN, FP, TN)

The steep sigmoid makes the soft counts nearly those of the decisions at threshold 1/2: 0.6 becomes 0.9993. So gradients
all but vanish for |p - 1/2| > 0.15, and a model that starts out confident does not learn: start near 1/2, with
standardised inputs.

The formulas are followed, not the authors' TensorFlow code, which divides by the size of the whole training set instead
of the batch's (wrong for all but F_beta on mini-batches) and whose last layer has no sigmoid. The constant of the
G-mean's gradient in their NumPy code, 2, is 1/2 by the formula.

More than two classes are this library's extension, not the paper's: every class is the positive one in turn, and the
losses are averaged (macro). There p_i is the softmax over that class and its strongest rival, sigmoid(h_c - max_{k≠c}
h_k), so that L → ∞ counts the decisions by the highest score, and scores that are all alike are where the gradient is
large; with softmax(h)_c it would start out vanishing, at 1/classes. For two classes the two are the same.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from fairtrial.methods.arguments import require
from fairtrial.methods.losses.binary import check_logits
from fairtrial.methods.losses.classification import at_least_float32, check_scores
from fairtrial.methods.registry import Categorical, LogUniform, Space, method

ConfusionMetric = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
METRICS = ("f1", "fbeta", "accuracy", "gmean", "balanced_accuracy", "mcc", "precision", "recall")
SEARCH: dict[str, Space] = {
    "metric": Categorical(["f1", "balanced_accuracy", "gmean"]),
    "amplification": LogUniform(3.0, 100.0),
}

Counts = Float[Tensor, "*classes"]


def confusion_metric(
    metric: str | ConfusionMetric, tp: Counts, fn: Counts, fp: Counts, tn: Counts, *, beta: float, eps: float
) -> Float[Tensor, "*classes"]:
    """A metric of soft counts; with `eps` in the denominators a ratio over no sample at all is 0, with no gradient."""
    if callable(metric):
        return metric(tp, fn, fp, tn)
    sensitivity, specificity = tp / (tp + fn + eps), tn / (tn + fp + eps)
    match metric:
        case "f1" | "fbeta":
            weight = beta**2 if metric == "fbeta" else 1.0
            return (1 + weight) * tp / ((1 + weight) * tp + weight * fn + fp + eps)
        case "accuracy":
            return (tp + tn) / (tp + fn + fp + tn)
        case "gmean":
            return (sensitivity * specificity + eps).sqrt()
        case "balanced_accuracy":
            return 0.5 * (sensitivity + specificity)
        case "mcc":
            return (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn) + eps).sqrt()
        case "precision":
            return tp / (tp + fp + eps)
        case _:
            return sensitivity


@method(paper="anyloss", slot="loss", search=SEARCH)
class AnyLoss(nn.Module):
    """1 - a metric of the soft confusion matrix, of logits (n,) and targets in {0, 1} (n,).

    Or of scores (n, classes) and class indices (n,): the mean over classes, each against the rest. The value belongs to
    the batch as a whole and is not the mean of its samples' values, so there is no `reduction`; nor is the mean over
    batches the metric of an epoch.

    In a batch without positives the metric's terms over them are 0 and have no gradient, as are those over negatives
    in a batch without negatives: 'f1' then says nothing. Stratify small batches.

    Args:
        metric: 'f1', 'fbeta', 'accuracy', 'gmean', 'balanced_accuracy', 'mcc', 'precision' or 'recall', or a function
            of the soft counts (tp, fn, fp, tn), each of shape () or (classes,), that gives a metric of the same shape.
        beta: of 'fbeta', at least 0: how many times as important recall is as precision.
        amplification: L > 0. Smaller values have useful gradients farther from the threshold.
        threshold: between 0 and 1, the probability at which a decision turns.
        from_logits: whether `input` holds logits or scores; else probabilities.
        eps: added to denominators, and under roots.
    """

    def __init__(
        self,
        metric: str | ConfusionMetric = "f1",
        *,
        beta: float = 1.0,
        amplification: float = 73.0,
        threshold: float = 0.5,
        from_logits: bool = True,
        eps: float = 1e-7,
    ) -> None:
        super().__init__()
        named = ", ".join(map(repr, METRICS))
        require(callable(metric) or metric in METRICS, "metric", metric, f"one of {named}, or a function")
        require(0 <= beta < math.inf, "beta", beta, "at least 0 and finite")
        require(0 < amplification < math.inf, "amplification", amplification, "above 0 and finite")
        require(0 < threshold < 1, "threshold", threshold, "between 0 and 1")
        require(0 <= eps < math.inf, "eps", eps, "at least 0 and finite")
        self.metric, self.beta, self.amplification, self.threshold = metric, beta, amplification, threshold
        self.from_logits, self.eps = from_logits, eps

    def forward(self, input: Float[Tensor, "n *c"], target: Shaped[Tensor, " n"]) -> Float[Tensor, ""]:
        if input.ndim == 1:
            alike = input.shape == target.shape
            require(alike, "input", tuple(input.shape), "of the targets' shape, or scores of shape (n, classes)")
            check_logits(input, target)
            positive = target == 1
        else:
            check_scores(input, target)
            positive = target[:, None] == torch.arange(input.shape[1], device=target.device)
        if not self.from_logits:
            _check_probabilities(input)
        return (1 - self._value(self._probability(at_least_float32(input)), positive).mean()).to(input.dtype)

    def _probability(self, values: Float[Tensor, "n *c"]) -> Float[Tensor, "n *c"]:
        """Of being positive; with several classes over the class and its strongest rival."""
        if values.ndim == 1:
            return values.sigmoid() if self.from_logits else values
        rivals = strongest_rivals(values)
        if self.from_logits:
            return torch.sigmoid(values - rivals)
        return values / (values + rivals).clamp(min=torch.finfo(values.dtype).tiny)

    def _value(self, probability: Float[Tensor, "n *c"], positive: Bool[Tensor, "n *c"]) -> Float[Tensor, "*c"]:
        decided = torch.sigmoid(self.amplification * (probability - self.threshold))
        y = positive.to(decided.dtype)
        return confusion_metric(
            self.metric,
            (y * decided).sum(0),
            (y * (1 - decided)).sum(0),
            ((1 - y) * decided).sum(0),
            ((1 - y) * (1 - decided)).sum(0),
            beta=self.beta,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        metric = getattr(self.metric, "__name__", self.metric)
        return (
            f"metric={metric!r}, beta={self.beta}, amplification={self.amplification}, threshold={self.threshold}, "
            f"from_logits={self.from_logits}, eps={self.eps}"
        )


def strongest_rivals(scores: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """For each class the highest score among the others."""
    values, places = scores.topk(2)
    is_best = torch.arange(scores.shape[1], device=scores.device) == places[:, :1]
    return torch.where(is_best, values[:, 1:], values[:, :1])


def _check_probabilities(input: Float[Tensor, "n *c"]) -> None:
    if input.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (float(end) for end in input.detach().aminmax())
        require(low >= 0 and high <= 1, "input", f"{low:g}..{high:g}", "probabilities within 0..1")
