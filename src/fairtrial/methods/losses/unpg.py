"""UNPG: negative pairs between samples in a margin softmax (Jung et al., ECCV 2022, arXiv:2203.11593).

A margin softmax contrasts a sample x_i with class weights W_j only, which late in training are no hard negatives. UNPG
adds the batch's own: with cosines c_ij of samples to class weights, the target's lessened by a margin, and the
similarities S⁻ of all pairs of samples of differing classes,

    L = -1/B Σ_i log  exp(s c_{i,y_i}) / ( Σ_j exp(s c_ij) + Σ_{u in S'} exp(s u) )

Every sample gets the same S', so that all positives must exceed all negatives. S' is S⁻ without its outliers, by the
rule of box and whiskers: of l values in ascending order, Q1 is number ⌊l/4⌋ and Q3 number ⌊3l/4⌋, counted from 0 and
without interpolation, and what lies outside [Q1 - r (Q3 - Q1), Q3 + r (Q3 - Q1)] is removed. The gradient goes through
what is kept; the bounds only select.

The heads are CosFace, c_y = cos θ - m (Wang et al. 2018), and ArcFace, c_y = cos(θ + m) (Deng et al. 2019).

The authors' code (github.com/Jung-Jun-Uk/UNPG) writes the kept similarities into each row of the logits; here their sum
is taken once. It adds a copy of them for each GPU, and so none on a CPU; here there is always one.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fairtrial.methods.arguments import require
from fairtrial.methods.losses.classification import at_least_float32, check_reduction, check_scores, reduce
from fairtrial.methods.losses.metric_learning import (
    NOTHING,
    check_embeddings,
    cosine_similarities,
    dot_products,
    unit,
)
from fairtrial.methods.registry import LogUniform, Uniform, method

CLOSEST = 1e-7  # so far from ±1 cosines are kept where an angle is taken


def cosface(cosines: Float[Tensor, "b c"], labels: Int[Tensor, " b"], margin: float) -> Float[Tensor, "b c"]:
    """cos θ - margin in the column of the label."""
    y = labels[:, None].long()
    return cosines.scatter(1, y, cosines.gather(1, y) - margin)


def arcface(cosines: Float[Tensor, "b c"], labels: Int[Tensor, " b"], margin: float) -> Float[Tensor, "b c"]:
    """cos(θ + margin) in the column of the label."""
    y = labels[:, None].long()
    angle = cosines.gather(1, y).clamp(-1 + CLOSEST, 1 - CLOSEST).acos()
    return cosines.scatter(1, y, (angle + margin).cos())


def no_margin(cosines: Float[Tensor, "b c"], labels: Int[Tensor, " b"], margin: float) -> Float[Tensor, "b c"]:
    """cos θ in every column."""
    return cosines


HEADS = {"cosface": cosface, "arcface": arcface, None: no_margin}


def within_whiskers(values: Float[Tensor, " l"], counted: Bool[Tensor, " l"], whisker: float) -> Bool[Tensor, " l"]:
    """Which of the counted values are no outliers."""
    ascending = values.detach().masked_fill(~counted, torch.inf).sort().values  # what is not counted comes last
    number = counted.sum()
    quartiles = torch.stack([number // 4, 3 * number // 4]).clamp(max=len(values) - 1)
    first, third = ascending.gather(0, quartiles)
    reach = whisker * (third - first)
    inside: Tensor = (values >= first - reach) & (values <= third + reach)
    return counted & inside


def box_whisker_filter(values: Float[Tensor, " l"], whisker: float = 1.5) -> Float[Tensor, " kept"]:
    """The values that are no outliers, in ascending order.

    Args:
        values: at least one.
        whisker: r ≥ 0, how many interquartile ranges beyond the quartiles a value may lie.
    """
    require(values.ndim == 1 and len(values) > 0, "values", tuple(values.shape), "of shape (l ≥ 1,)")
    require(whisker >= 0, "whisker", whisker, "at least 0")
    return values[within_whiskers(values, torch.ones_like(values, dtype=torch.bool), whisker)].sort().values


def negative_pair_similarities(features: Float[Tensor, "b d"], labels: Int[Tensor, " b"]) -> Float[Tensor, " l"]:
    """Cosines of all pairs a < b of differing labels, row by row; in float32 at least."""
    check_embeddings(features, labels, names=("features", "labels"))
    return cosine_similarities(features)[_negative_pairs(labels)]


def _negative_pairs(labels: Int[Tensor, " b"]) -> Bool[Tensor, "b b"]:
    return (labels[:, None] != labels).triu(1)


def unpg_cross_entropy(
    logits_cos: Float[Tensor, "b c"],
    extra_negatives: Float[Tensor, " l"],
    labels: Int[Tensor, " b"],
    scale: float = 64.0,
    *,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    """Cross entropy of scale · cosines, with further negatives in every row; goes with any head.

    Args:
        logits_cos: cosines to the class weights, a margin already taken from the labels'.
        extra_negatives: similarities, none or more.
        labels: class indices.
        scale: s > 0.
        reduction: 'none', 'mean' or 'sum'.
    """
    check_scores(logits_cos, labels, min_classes=1, name="labels")
    require(0 < scale < math.inf, "scale", scale, "above 0 and finite")
    check_reduction(reduction)
    everywhere = torch.ones_like(extra_negatives, dtype=torch.bool)
    loss = _cross_entropy(at_least_float32(logits_cos), at_least_float32(extra_negatives), everywhere, labels, scale)
    return reduce(loss, reduction).to(logits_cos.dtype)


def _cross_entropy(
    cosines: Float[Tensor, "b c"],
    similarities: Float[Tensor, " l"],
    kept: Bool[Tensor, " l"],
    labels: Int[Tensor, " b"],
    scale: float,
) -> Float[Tensor, " b"]:
    logits = scale * cosines
    further = (scale * similarities).masked_fill(~kept, NOTHING)
    further = torch.cat([further, further.new_full((1,), NOTHING)]).logsumexp(0)  # of no values too
    return torch.logaddexp(logits.logsumexp(1), further) - logits.gather(1, labels[:, None].long())[:, 0]


@method(
    paper="unpg",
    slot="embedding_loss",
    search={"scale": LogUniform(4.0, 64.0), "margin": Uniform(0.0, 0.5)},
    bind=lambda setting: {"num_classes": setting.num_classes, "embedding_dim": setting.embedding_dim},
)
class UNPGLoss(nn.Module):
    """Margin softmax with the batch's negative pairs, of features (b, d) and class indices (b,).

    The class weights `weight` (num_classes, embedding_dim) belong to the loss: give its parameters to the optimizer.
    Features and weights are normalised inside. A batch of one class has the loss of the head alone.

    Args:
        num_classes: C.
        embedding_dim: d.
        head: 'cosface', 'arcface', or None for no margin.
        scale: s > 0.
        margin: m ≥ 0; the default is that of the authors' configuration of both heads.
        whisker: r ≥ 0; 1.5 for face recognition in the wild, 1.0 for K-FACE.
        filter: remove outliers; without it every negative pair is added.
        reduction: 'none', 'mean' or 'sum'.

    Raises:
        ValueError: fewer than two samples, labels outside 0..C-1, or features that are not finite or not of size d.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        head: str | None = "cosface",
        scale: float = 64.0,
        margin: float = 0.5,
        whisker: float = 1.5,
        filter: bool = True,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        require(num_classes >= 1, "num_classes", num_classes, "at least 1")
        require(embedding_dim >= 1, "embedding_dim", embedding_dim, "at least 1")
        require(head in HEADS, "head", head, "'cosface', 'arcface' or None")
        require(0 < scale < math.inf, "scale", scale, "above 0 and finite")
        require(0 <= margin < math.inf, "margin", margin, "at least 0 and finite")
        require(whisker >= 0, "whisker", whisker, "at least 0")
        check_reduction(reduction)
        self.num_classes, self.embedding_dim, self.head, self.scale = num_classes, embedding_dim, head, scale
        self.margin, self.whisker, self.filter, self.reduction = margin, whisker, filter, reduction
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_dim))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, features: Float[Tensor, "b d"], labels: Int[Tensor, " b"]) -> Float[Tensor, "..."]:
        check_embeddings(features, labels, names=("features", "labels"))
        fits = features.shape[1] == self.embedding_dim
        require(fits, "features", tuple(features.shape), f"of shape (b, {self.embedding_dim})")
        rows = unit(features)
        cosines = dot_products(rows, unit(self.weight).to(rows.dtype))
        check_scores(cosines, labels, min_classes=1, name="labels")
        similarities, negative = dot_products(rows, rows).flatten(), _negative_pairs(labels).flatten()
        kept = within_whiskers(similarities, negative, self.whisker) if self.filter else negative
        loss = _cross_entropy(HEADS[self.head](cosines, labels, self.margin), similarities, kept, labels, self.scale)
        return reduce(loss, self.reduction).to(features.dtype)

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, embedding_dim={self.embedding_dim}, head={self.head!r}, "
            f"scale={self.scale}, margin={self.margin}, whisker={self.whisker}, filter={self.filter}, "
            f"reduction={self.reduction!r}"
        )
