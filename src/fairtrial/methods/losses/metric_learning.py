"""What the losses of metric learning share: input checks, cosine similarities, and which pairs are of one class."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fairtrial.methods.arguments import require
from fairtrial.methods.losses.classification import at_least_float32

NOTHING = -1e30  # stands for the logarithm of an empty sum: finite, so that no gradient becomes NaN


class Pairs(NamedTuple):
    """Which columns are an anchor's positives and negatives; nothing is its own positive."""

    positives: Bool[Tensor, "n m"]
    negatives: Bool[Tensor, "n m"]


def check_labels(embeddings: Float[Tensor, "..."], labels: Int[Tensor, "..."], *, name: str = "labels") -> None:
    integer = not labels.is_floating_point() and not labels.is_complex() and labels.dtype != torch.bool
    require(integer, name, labels.dtype, "integer class labels")
    require(labels.shape == embeddings.shape[:1], name, tuple(labels.shape), f"of shape {(len(embeddings),)}, one each")


def check_embeddings(
    embeddings: Float[Tensor, "..."],
    labels: Int[Tensor, "..."],
    *,
    names: tuple[str, str] = ("embeddings", "labels"),
    fewest: int = 2,
) -> None:
    """Refuse anything but finite embeddings of shape (n, d), n ≥ `fewest`, with one integer label for each row.

    Values are looked at on the CPU only: elsewhere that would wait for the device, and under `torch.compile` it would
    break the graph.
    """
    name = names[0]
    require(embeddings.ndim == 2, name, tuple(embeddings.shape), "of shape (n, d)")
    require(embeddings.shape[0] >= fewest, name, tuple(embeddings.shape), f"at least {fewest} rows")
    require(embeddings.is_floating_point(), name, embeddings.dtype, "a floating-point tensor")
    check_labels(embeddings, labels, name=names[1])
    if embeddings.device.type == "cpu" and not torch.compiler.is_compiling():
        require(bool(embeddings.isfinite().all()), name, "NaN or infinite values", "finite")


def unit(embeddings: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows of length 1, in float32 at least. A row of zeros stays one."""
    rows: Tensor = at_least_float32(embeddings)
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    safe: Tensor = length.masked_fill(length == 0, 1.0)
    return rows / safe


def dot_products(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """a bᵀ in the precision of its arguments, under autocast too: temperatures would blow its rounding up."""
    with torch.autocast(a.device.type, enabled=False):
        products: Tensor = a @ b.T
        return products


def cosine_similarities(embeddings: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """Cosines between all embeddings, in float32 at least."""
    rows = unit(embeddings)
    return dot_products(rows, rows)


def pairs_of(labels: Int[Tensor, " n"]) -> Pairs:
    """Positives and negatives within a batch."""
    same = labels[:, None] == labels
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return Pairs(same & ~own, ~same)


def log_sum_exp(values: Float[Tensor, "n m"], kept: Bool[Tensor, "n m"]) -> Float[Tensor, " n"]:
    """Logarithm of the sum of exp over the kept values of each row; `NOTHING`, and no gradient, where none is."""
    return torch.where(kept, values, NOTHING).logsumexp(1)
