"""Proto-Triplet and ICNN losses of few-shot episodes (Mendez-Ruiz et al. 2023, arXiv:2305.09062).

An episode has a few embeddings of each class as support, whose means are the prototypes mu_c, and queries to be
classified by the nearest prototype. With d(a, b) = sqrt(|a - b|² + 1e-6), the triplet loss between a query q, the
prototype of its class y and the nearest wrong one is

    L_PT = mean_q max(0, d(q, mu_y) - min_{c ≠ y} d(q, mu_c) + m)

The *ICNN score* (inter and intra class nearest neighbours) says how well classes are separated among neighbours. Of
each x let D_1 ≤ D_2 ≤ … be the distances to its `items_per_class` nearest neighbours, b the smallest of them to another
class, S_j whether neighbour j is of the class of x, and the first k of them the neighbourhood:

    A = 1 - mean_x mean_{j ≤ k, S_j} R_j,    R_j = (D_j / (b + ε)) / max(1, max_{j ≤ k} D_j / (b + ε))
    E = mean_x mean_{j ≤ k, not S_j} D_j / (max D + ε),    the maximum over all x and j ≤ k that are not S_j
    γ = mean_x #{j ≤ k: S_j} / k
    score = ((A + E) / 2 + γ) / 2 within [0, 1],    L_ICNN = -log(score)

Means over x leave out those without such a neighbour; R is 0 where no neighbour is of another class, and E is 1 where
that is so for all x. Where k + 2 reaches the number of targets, k is that number less 2, and γ = 1. The gradient comes
from A and E, as γ and the choice of neighbours have none. The published runs train on the mean of several terms:
`EpisodeLoss`.

The definitions are those of the authors' code (github.com/maumruiz/FSL-Loss). Three things differ, and
`reference=True` brings the code's own behaviour back:

- The code drops the first neighbour, taking it for x itself. Here x is dropped by its index, so that duplicates stay,
  and nothing is dropped where neighbours are looked for among other embeddings: the nearest of them counts.
- With no two neighbours of one class, as among a support of one shot, A is 1 in the code; here it is 0.
- The score is at least 1e-6 before the logarithm; this one applies in both cases.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.losses.classification import at_least_float32, check_reduction, reduce
from fairtrial.methods.losses.metric_learning import check_embeddings
from fairtrial.methods.registry import LogUniform, method

TERMS = ("cross", "prototriplet", "suppicnn", "queryicnn", "fullicnn")
EPS = 1e-7


def squared_distances(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    return (a[:, None] - b).square().sum(-1)


def smoothed_root(squared: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Distances whose gradient is finite where they are 0."""
    return (squared + 1e-6).sqrt()


def compute_prototypes(
    support: Float[Tensor, "n d"], labels: Int[Tensor, " n"], num_classes: int
) -> Float[Tensor, "c d"]:
    """The mean embedding of each class 0..num_classes-1.

    Raises:
        ValueError: labels do not fit to the embeddings, are outside the range, or leave a class without support.
    """
    check_embeddings(support, labels, names=("support", "labels"), fewest=1)
    labels = labels.long()
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        present = sorted(set(labels.tolist()))
        require(present == list(range(num_classes)), "labels", present, f"all of 0..{num_classes - 1}")
    rows = at_least_float32(support)
    total = rows.new_zeros(num_classes, rows.shape[1]).index_add(0, labels, rows)
    count = rows.new_zeros(num_classes).index_add(0, labels, torch.ones_like(rows[:, 0]))
    return (total / count[:, None]).to(support.dtype)


def proto_triplet(
    squared: Float[Tensor, "q c"], labels: Int[Tensor, " q"], prototype_labels: Int[Tensor, " c"], margin: float
) -> Float[Tensor, " q"]:
    """The triplet loss of each query, from its squared distances to the prototypes."""
    distance = smoothed_root(squared)
    own = labels[:, None] == prototype_labels
    nearest_own = distance.masked_fill(~own, torch.inf).amin(1)
    nearest_wrong = distance.masked_fill(own, torch.inf).amin(1)
    return (nearest_own - nearest_wrong + margin).relu()


class ProtoTripletLoss(nn.Module):
    """Proto-Triplet loss of queries (q, d) with labels (q,) and prototypes (c, d) with labels (c,).

    Embeddings are not normalised. Without `prototype_labels` the prototypes are those of classes 0..c-1.

    Args:
        margin: m ≥ 0, in units of distance; the default is that of the authors' code.
        reduction: 'none', 'mean' or 'sum'.

    Raises:
        ValueError: shapes that do not fit, embeddings that are not finite, fewer than two prototypes, or a query whose
            class has no prototype or is the only one that has.
    """

    def __init__(self, margin: float = 0.5, *, reduction: str = "mean") -> None:
        super().__init__()
        require(0 <= margin < math.inf, "margin", margin, "at least 0 and finite")
        check_reduction(reduction)
        self.margin, self.reduction = margin, reduction

    def forward(
        self,
        queries: Float[Tensor, "q d"],
        query_labels: Int[Tensor, " q"],
        prototypes: Float[Tensor, "c d"],
        prototype_labels: Int[Tensor, " c"] | None = None,
    ) -> Float[Tensor, "..."]:
        if prototype_labels is None:
            prototype_labels = torch.arange(len(prototypes), device=prototypes.device)
        check_embeddings(queries, query_labels, names=("queries", "query_labels"), fewest=1)
        check_embeddings(prototypes, prototype_labels, names=("prototypes", "prototype_labels"))
        _check_dimension(prototypes, queries, "prototypes")
        if queries.device.type == "cpu" and not torch.compiler.is_compiling():
            own = query_labels[:, None] == prototype_labels
            lost = query_labels[~own.any(1) | own.all(1)].tolist()
            require(not lost, "query_labels", lost, "classes with a prototype beside which there is another class's")
        squared = squared_distances(at_least_float32(queries), at_least_float32(prototypes))
        loss = proto_triplet(squared, query_labels, prototype_labels, self.margin)
        return reduce(loss, self.reduction).to(queries.dtype)

    def extra_repr(self) -> str:
        return f"margin={self.margin}, reduction={self.reduction!r}"


def _neighbours(
    embeddings: Float[Tensor, "n d"], targets: Float[Tensor, "m d"], count: int, *, within: bool, reference: bool
) -> Int[Tensor, "n count"]:
    """Indices of the nearest targets, nearest first. `within` says that the targets are the embeddings themselves."""
    with torch.no_grad():
        distance = torch.cdist(embeddings, targets, compute_mode="donot_use_mm_for_euclid_dist")
        if reference:
            return distance.topk(count + 1, largest=False).indices[:, 1:]
        if within:
            distance = distance.masked_fill(torch.eye(len(targets), dtype=torch.bool, device=targets.device), torch.inf)
        return distance.topk(count, largest=False).indices


def _score(
    embeddings: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    targets: Float[Tensor, "m d"] | None,
    target_labels: Int[Tensor, " m"] | None,
    k: int,
    items_per_class: int | None,
    reference: bool,
) -> Float[Tensor, ""]:
    within = targets is None
    x = at_least_float32(embeddings)
    t, t_labels = (
        (x, labels) if targets is None or target_labels is None else (at_least_float32(targets), target_labels)
    )
    clamped = k + 2 >= len(t)
    k = len(t) - 2 if clamped else k
    ipc = k + 1 if items_per_class is None else items_per_class
    require(k <= ipc < len(t), "items_per_class", ipc, f"at least k = {k} and below the {len(t)} targets")

    nearest = _neighbours(x, t, ipc, within=within, reference=reference)
    distance = smoothed_root((x[:, None] - t[nearest]).square().sum(-1))
    same = labels[:, None] == t_labels[nearest]
    alone = same.all(1, keepdim=True)
    boundary = distance.masked_fill(same, torch.inf).amin(1, keepdim=True).masked_fill(alone, 1.0)
    near, same = distance[:, :k], same[:, :k]

    ratio = (near / (boundary + EPS)).masked_fill(alone, 0.0)
    ratio = ratio / ratio.amax(1, keepdim=True).clamp(min=1.0)
    intra = _mean_of_means(ratio, same, none=0.0 if reference else 1.0)
    others = near.masked_fill(same, 0.0)
    inter = _mean_of_means(others / (others.amax() + EPS), ~same, none=1.0)
    gamma = 1.0 if clamped else same.to(near.dtype).mean()
    return (0.5 * (1.0 - intra + inter) + gamma) / 2


def _mean_of_means(values: Float[Tensor, "n k"], kept: Tensor, *, none: float) -> Float[Tensor, ""]:
    """The mean over rows of the mean of what is kept of them; rows of which nothing is kept do not count."""
    count = kept.sum(1)
    means = values.masked_fill(~kept, 0.0).sum(1) / count.clamp(min=1)
    rows = (count > 0).sum()
    return torch.where(rows > 0, means.sum() / rows.clamp(min=1), none)


def icnn_score(
    embeddings: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    targets: Float[Tensor, "m d"] | None = None,
    target_labels: Int[Tensor, " m"] | None = None,
    *,
    k: int = 4,
    items_per_class: int | None = None,
    reference: bool = False,
) -> Float[Tensor, ""]:
    """How well classes are separated among neighbours, from 0 to 1; arguments as in `ICNNLoss`."""
    _check_neighbourhood(k, items_per_class)
    require((targets is None) == (target_labels is None), "target_labels", target_labels, "given with targets only")
    check_embeddings(embeddings, labels, fewest=3 if targets is None else 1)
    present = labels
    if targets is not None and target_labels is not None:
        check_embeddings(targets, target_labels, names=("targets", "target_labels"), fewest=3)
        _check_dimension(targets, embeddings, "targets")
        present = torch.cat([labels, target_labels])
    if present.device.type == "cpu" and not torch.compiler.is_compiling():
        require(bool((present != present[0]).any()), "labels", f"{int(present[0])} only", "of at least two classes")
    return _score(embeddings, labels, targets, target_labels, k, items_per_class, reference).to(embeddings.dtype)


class ICNNLoss(nn.Module):
    """ICNN loss of embeddings (n, d) and labels (n,), among themselves or among targets (m, d) with labels (m,).

    It belongs to the batch as a whole, and embeddings are not normalised: the score ignores their scale up to the
    1e-6 in distances.

    Args:
        k: neighbours that form a neighbourhood, at least 1; one of fewer than k + 3 targets is all of them but one.
        items_per_class: neighbours among which the nearest of another class is looked for; k + 1 by default. The
            authors give the number of embeddings of each class when it is the whole episode.
        reference: count neighbours as the authors' code does.

    Raises:
        ValueError: shapes that do not fit, embeddings that are not finite, fewer than three targets, labels of one
            class, or `items_per_class` below k or not below the number of targets.
    """

    def __init__(self, k: int = 4, items_per_class: int | None = None, *, reference: bool = False) -> None:
        super().__init__()
        _check_neighbourhood(k, items_per_class)
        self.k, self.items_per_class, self.reference = k, items_per_class, reference

    def forward(
        self,
        embeddings: Float[Tensor, "n d"],
        labels: Int[Tensor, " n"],
        targets: Float[Tensor, "m d"] | None = None,
        target_labels: Int[Tensor, " m"] | None = None,
    ) -> Float[Tensor, ""]:
        score = icnn_score(
            at_least_float32(embeddings),
            labels,
            targets,
            target_labels,
            k=self.k,
            items_per_class=self.items_per_class,
            reference=self.reference,
        )
        return _negative_log(score).to(embeddings.dtype)

    def extra_repr(self) -> str:
        return f"k={self.k}, items_per_class={self.items_per_class}, reference={self.reference}"


def _negative_log(score: Float[Tensor, ""]) -> Float[Tensor, ""]:
    return -score.clamp(min=1e-6).log()


@method(
    paper="susana",
    slot="episode_loss",
    search={"margin": LogUniform(0.05, 5.0), "temperature": LogUniform(0.1, 100.0)},
)
class EpisodeLoss(nn.Module):
    """Mean of the chosen terms over an episode: support (ways, shots, d) and queries (ways, queries, d).

    Row i of both is class i of the episode. The terms are those of the authors' scripts:

    - 'cross': cross entropy of -|q - mu_c|² / temperature, the loss of prototypical networks;
    - 'prototriplet': Proto-Triplet loss;
    - 'suppicnn', 'queryicnn', 'fullicnn': ICNN loss of the support, of the queries among the support, and of both
      together, the latter with `items_per_class` = shots + queries.

    Args:
        terms: one or more of these.
        margin: m ≥ 0 of Proto-Triplet.
        temperature: > 0, of the cross entropy; 1 in the authors' code.
        k: neighbours of the ICNN loss, at least 1.

    Raises:
        ValueError: shapes that do not fit, embeddings that are not finite, fewer than two ways, or too few embeddings
            for a term's neighbourhoods.
    """

    def __init__(
        self,
        terms: Sequence[str] = ("cross", "prototriplet", "fullicnn"),
        margin: float = 0.5,
        *,
        temperature: float = 1.0,
        k: int = 4,
    ) -> None:
        super().__init__()
        known = not isinstance(terms, str) and len(terms) > 0 and set(terms) <= set(TERMS)
        require(known and len(set(terms)) == len(terms), "terms", terms, f"a list of some of {', '.join(TERMS)}")
        require(0 <= margin < math.inf, "margin", margin, "at least 0 and finite")
        require(0 < temperature < math.inf, "temperature", temperature, "above 0 and finite")
        _check_neighbourhood(k, None)
        self.terms, self.margin, self.temperature, self.k = tuple(terms), margin, temperature, k

    def forward(self, support: Float[Tensor, "w s d"], queries: Float[Tensor, "w q d"]) -> Float[Tensor, ""]:
        self._check_episode(support, queries)
        ways, shots, per_class = support.shape[0], support.shape[1], queries.shape[1]
        s, q = at_least_float32(support), at_least_float32(queries)
        classes = torch.arange(ways, device=support.device)
        known, wanted = classes.repeat_interleave(shots), classes.repeat_interleave(per_class)
        squared = squared_distances(q.flatten(0, 1), s.mean(1))
        losses = []
        if "cross" in self.terms:
            losses.append(F.cross_entropy(-squared / self.temperature, wanted))
        if "prototriplet" in self.terms:
            losses.append(proto_triplet(squared, wanted, classes, self.margin).mean())
        if "suppicnn" in self.terms:
            losses.append(self._icnn(s.flatten(0, 1), known))
        if "queryicnn" in self.terms:
            losses.append(self._icnn(q.flatten(0, 1), wanted, s.flatten(0, 1), known))
        if "fullicnn" in self.terms:
            both = torch.cat([s, q], 1)
            labels = classes.repeat_interleave(shots + per_class)
            losses.append(self._icnn(both.flatten(0, 1), labels, items_per_class=shots + per_class))
        return (torch.stack(losses).sum() / len(losses)).to(support.dtype)

    def _icnn(
        self,
        embeddings: Float[Tensor, "n d"],
        labels: Int[Tensor, " n"],
        targets: Float[Tensor, "m d"] | None = None,
        target_labels: Int[Tensor, " m"] | None = None,
        items_per_class: int | None = None,
    ) -> Float[Tensor, ""]:
        return _negative_log(_score(embeddings, labels, targets, target_labels, self.k, items_per_class, False))

    def _check_episode(self, support: Float[Tensor, "..."], queries: Float[Tensor, "..."]) -> None:
        for name, embeddings in (("support", support), ("queries", queries)):
            shape = tuple(embeddings.shape)
            require(embeddings.ndim == 3, name, shape, "of shape (ways, embeddings of each, d)")
            require(shape[0] >= 2 and shape[1] >= 1, name, shape, "at least two ways with at least one embedding each")
            require(embeddings.is_floating_point(), name, embeddings.dtype, "a floating-point tensor")
            if embeddings.device.type == "cpu" and not torch.compiler.is_compiling():
                require(bool(embeddings.isfinite().all()), name, "NaN or infinite values", "finite")
        ways, shots, d = support.shape
        require(queries.shape[::2] == (ways, d), "queries", tuple(queries.shape), f"of {ways} ways and dimension {d}")
        if "suppicnn" in self.terms or "queryicnn" in self.terms:
            require(ways * shots >= 3, "support", tuple(support.shape), "at least three embeddings, for neighbourhoods")
        if "fullicnn" in self.terms:
            count = shots + queries.shape[1]
            require(self.k <= count, "queries", tuple(queries.shape), f"at least {self.k - shots} of each way, for k")

    def extra_repr(self) -> str:
        return f"terms={self.terms}, margin={self.margin}, temperature={self.temperature}, k={self.k}"


def _check_neighbourhood(k: int, items_per_class: int | None) -> None:
    require(k >= 1, "k", k, "at least 1")
    require(items_per_class is None or items_per_class >= k, "items_per_class", items_per_class, f"at least k = {k}")


def _check_dimension(embeddings: Float[Tensor, "n d1"], others: Float[Tensor, "m d2"], name: str) -> None:
    require(embeddings.shape[1] == others.shape[1], name, tuple(embeddings.shape), f"of dimension {others.shape[1]}")
