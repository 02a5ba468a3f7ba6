"""LOOK: leave-one-out k-nearest-neighbour classification as a loss (Feng et al., ICLR 2022, arXiv:2110.06014).

Every embedding's label is to be predicted by a weighted vote of its k nearest neighbours N_k(i) among references, the
embedding itself left out. With cosine similarities s_ij, temperature τ and labels y,

    p(c | i) = Σ_{j in N_k(i)} exp(s_ij / τ) [y_j = c]  /  Σ_{j in N_k(i)} exp(s_ij / τ),    L = mean_i -log p(y_i | i)

For a fixed set of neighbours the gradient of L_i in the embedding is (Σ_j w_ij z_j - Σ_{j same} w⁺_ij z_j) / τ, w being
the softmax over all neighbours and w⁺ that over those of the same class. It attracts to the closest of the class only,
and vanishes where all neighbours are of the class: a class may keep several clusters, which cross entropy would merge.
With all references as neighbours this is the loss of neighbourhood components analysis.

The references are the rest of the batch or, at large scale, a queue of keys from a slowly moving copy of the encoder
(`KeyQueue`, `MomentumEncoder`).

No code was published. The weighting and the hyperparameters are our reading of 'weighted kNN with leave-one-out
error'; the published formula could not be confirmed, nor what becomes of an embedding without a neighbour of its class
(`empty`).
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from fairtrial.methods.arguments import require
from fairtrial.methods.losses.metric_learning import (
    NOTHING,
    check_embeddings,
    check_labels,
    dot_products,
    log_sum_exp,
    unit,
)
from fairtrial.methods.registry import Integer, LogUniform, method

CLAMPED = 1e-8  # the p of an embedding without a neighbour of its class, with empty='clamp'


class Neighbours(NamedTuple):
    """The references that vote on each embedding.

    Attributes:
        similarity: cosines, in decreasing order.
        place: which references they are.
    """

    similarity: Float[Tensor, "n k"]
    place: Int[Tensor, "n k"]


class Vote(NamedTuple):
    """What the neighbours say of the embeddings' own labels.

    Attributes:
        p: the weighted share of neighbours that have the embedding's label.
        log_p: its logarithm; not meaningful where `empty`.
        empty: no neighbour has the label, so that p is 0.
    """

    p: Float[Tensor, " n"]
    log_p: Float[Tensor, " n"]
    empty: Bool[Tensor, " n"]


def check_vote(k: int, temperature: float) -> None:
    require(isinstance(k, int) and k >= 1, "k", k, "a whole number of at least 1")
    require(0 < temperature < float("inf"), "temperature", temperature, "above 0 and finite")


def similarities(z: Float[Tensor, "n d"], ref: Float[Tensor, "m d"] | None) -> Float[Tensor, "n m"]:
    """Cosines to the references; without any, to the batch, each embedding's own being minus infinity."""
    rows = unit(z)
    if ref is not None:
        return dot_products(rows, unit(ref).to(rows.dtype))
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    return dot_products(rows, rows).masked_fill(own, -torch.inf)


def nearest(similarity: Float[Tensor, "n m"], k: int, *, leave_one_out: bool) -> Neighbours:
    """The k nearest references, or all of them if there are fewer."""
    return Neighbours(*similarity.topk(min(k, similarity.shape[1] - leave_one_out), dim=1))


def vote(logits: Float[Tensor, "n k"], same: Bool[Tensor, "n k"]) -> Vote:
    """The vote of neighbours with weights softmax(logits); `same` marks those that have the embedding's label."""
    log_p = -F.softplus(log_sum_exp(logits, ~same) - log_sum_exp(logits, same))  # exact where p is close to 1, too
    empty = ~same.any(1)
    return Vote(log_p.exp(), log_p, empty)


@method(
    paper="look", slot="embedding_loss", search={"k": Integer(2, 40, log=True), "temperature": LogUniform(0.02, 0.5)}
)
class LOOKLoss(nn.Module):
    """LOOK of embeddings (n, d), which need not be normalised, and class labels (n,).

    Args:
        k: neighbours that vote; where there are fewer references, all of them do.
        temperature: τ > 0 of the votes' weights, on cosines.
        weights: 'softmax', or 'uniform' for plain votes: a measure, as its gradient is 0.
        empty: what an embedding counts as if no neighbour has its label. 'skip': not at all, the mean is over the
            others, and 0 without any. 'append': the nearest reference of its class votes too (and it is skipped if
            there is none). 'clamp': p = 1e-8, a constant without gradient.

    The value belongs to the batch as a whole. The defaults are our choice, the paper's are not known.
    """

    def __init__(self, k: int = 20, temperature: float = 0.1, *, weights: str = "softmax", empty: str = "skip") -> None:
        super().__init__()
        check_vote(k, temperature)
        require(weights in ("softmax", "uniform"), "weights", weights, "'softmax' or 'uniform'")
        require(empty in ("skip", "append", "clamp"), "empty", empty, "'skip', 'append' or 'clamp'")
        self.k, self.temperature, self.weights, self.empty = k, temperature, weights, empty

    def vote(
        self,
        z: Float[Tensor, "n d"],
        labels: Int[Tensor, " n"],
        ref: Float[Tensor, "m d"] | None = None,
        ref_labels: Int[Tensor, " m"] | None = None,
    ) -> Vote:
        """The vote on each embedding, before `empty` is settled, except that what it appends has voted.

        Raises:
            ValueError: arguments that do not fit together, that are not finite, or without a reference.
        """
        check_embeddings(z, labels, names=("z", "labels"), fewest=2 if ref is None else 1)
        require((ref is None) == (ref_labels is None), "ref_labels", ref_labels, "given just where ref is")
        if ref is not None and ref_labels is not None:
            check_embeddings(ref, ref_labels, names=("ref", "ref_labels"), fewest=1)
            require(ref.shape[1] == z.shape[1], "ref", tuple(ref.shape), f"of shape (m, {z.shape[1]})")
        similarity = similarities(z, ref)
        same = labels[:, None] == (labels if ref_labels is None else ref_labels)
        near = nearest(similarity, self.k, leave_one_out=ref is None)
        votes, voters = near.similarity, same.gather(1, near.place)
        if self.empty == "append":
            candidates = similarity.masked_fill(~same, -torch.inf)
            best = candidates.amax(1, keepdim=True)
            wanted = ~voters.any(1, keepdim=True) & best.isfinite()
            votes = torch.cat([votes, best.masked_fill(~wanted, NOTHING)], 1)
            voters = torch.cat([voters, wanted], 1)
        logits = votes / self.temperature
        if self.weights == "uniform":
            logits = torch.where(votes > NOTHING, 0.0 * votes, logits.detach())
        return vote(logits, voters)

    def forward(
        self,
        z: Float[Tensor, "n d"],
        labels: Int[Tensor, " n"],
        ref: Float[Tensor, "m d"] | None = None,
        ref_labels: Int[Tensor, " m"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss among the batch or, given references (m, d) with labels (m,), among those."""
        found = self.vote(z, labels, ref, ref_labels)
        if self.empty == "clamp":
            clamped = found.log_p.new_tensor(CLAMPED).log()
            return -torch.where(found.empty, clamped, found.log_p).mean().to(z.dtype)
        total = found.log_p.masked_fill(found.empty, 0.0).sum()
        return (-total / (~found.empty).sum().clamp(min=1)).to(z.dtype)

    def extra_repr(self) -> str:
        return f"k={self.k}, temperature={self.temperature}, weights={self.weights!r}, empty={self.empty!r}"


@torch.no_grad()
def loo_knn_accuracy(
    z: Float[Tensor, "n d"], y: Int[Tensor, " n"], k: int = 20, temperature: float = 0.1
) -> Float[Tensor, ""]:
    """The share of embeddings whose label gets the largest weighted vote of their k nearest, themselves left out."""
    check_vote(k, temperature)
    check_embeddings(z, y, names=("z", "y"))
    near = nearest(similarities(z, None), k, leave_one_out=True)
    _, classes = torch.unique(y, return_inverse=True)
    weights = (near.similarity / temperature).softmax(1)
    votes = weights.new_zeros(len(z), len(z)).scatter_add_(1, classes[near.place], weights)
    right: Tensor = votes.argmax(1) == classes
    return right.to(weights.dtype).mean()


class KeyQueue(nn.Module):
    """The latest keys and their labels, as references for `LOOKLoss`: `loss(z, labels, queue.keys, queue.labels)`.

    Args:
        size: how many keys it holds; the oldest make room. 4096 and more are usual.
        dim: size of a key.
    """

    stored: Tensor
    stored_labels: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        require(size >= 1, "size", size, "at least 1")
        require(dim >= 1, "dim", dim, "at least 1")
        self.size, self.dim, self.pushed = size, dim, 0
        self.register_buffer("stored", torch.zeros(size, dim))
        self.register_buffer("stored_labels", torch.zeros(size, dtype=torch.long))

    @property
    def keys(self) -> Float[Tensor, "filled d"]:
        """Normalised keys, as many as there are yet; a copy, as later keys take their places."""
        return self.stored[: min(self.pushed, self.size)].clone()

    @property
    def labels(self) -> Int[Tensor, " filled"]:
        """Their labels."""
        return self.stored_labels[: min(self.pushed, self.size)]

    @torch.no_grad()
    def push(self, keys: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> None:
        """Put keys (n, d) in, without gradient; of more than `size` the last ones stay."""
        require(keys.shape[1:] == (self.dim,), "keys", tuple(keys.shape), f"of shape (n, {self.dim})")
        check_labels(keys, labels)
        places = torch.arange(self.pushed, self.pushed + len(keys), device=self.stored.device) % self.size
        kept = slice(max(0, len(keys) - self.size), None)
        self.stored[places[kept]] = unit(keys)[kept].to(self.stored)
        self.stored_labels[places[kept]] = labels[kept].to(self.stored_labels)
        self.pushed += len(keys)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.pushed)

    def set_extra_state(self, state: Tensor) -> None:
        self.pushed = int(state)

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.dim}"


def move_towards(averaged: list[Tensor], current: list[Tensor], count: Tensor | int, *, momentum: float) -> None:
    """averaged ← momentum averaged + (1 - momentum) current, in place."""
    torch._foreach_lerp_(averaged, current, 1.0 - momentum)


class MomentumEncoder(AveragedModel):
    """A copy of an encoder that follows it slowly and makes keys: call `update_parameters(encoder)` after each step.

    Buffers, such as the statistics of batch normalisation, are the encoder's own after every update.

    Args:
        encoder: what to copy; it stays as it is.
        momentum: share of itself that the copy keeps at each update.
    """

    def __init__(self, encoder: nn.Module, momentum: float = 0.999) -> None:
        require(0 <= momentum < 1, "momentum", momentum, "at least 0 and below 1")
        super().__init__(encoder, multi_avg_fn=partial(move_towards, momentum=momentum))
        self.requires_grad_(False)
        self.n_averaged.fill_(1)  # the copy itself is the first; else the first update would copy again
        self.momentum = momentum

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}"
