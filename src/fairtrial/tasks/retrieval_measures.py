"""What retrieval is measured by: whether the embeddings that lie nearest to one, by the cosine, are of its class.

Every embedding asks all others; one without another of its class in the set counts as 0.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from fairtrial.methods.arguments import require


def recall_at_k(embeddings: Float[Tensor, "n d"], labels: Int[Tensor, " n"], k: int = 1) -> float:
    """The part of embeddings that have one of their class among their k nearest (Recall@k)."""
    require(1 <= k < len(embeddings), "k", k, f"within 1..{len(embeddings) - 1}")
    return _hits(embeddings, labels, k).any(1).sum().item() / len(labels)


def map_at_r(embeddings: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> float:
    """Mean average precision at R, R being how many others of its class an embedding has (Musgrave et al. 2020).

    1/R Σ_{i ≤ R} precision at i, where the i-th nearest is of the class.
    """
    others = torch.bincount(labels)[labels] - 1
    longest = int(others.max())
    if not longest:
        return 0.0
    rank = torch.arange(1, longest + 1)
    hits = _hits(embeddings, labels, longest) & (rank <= others[:, None])
    precision = hits.cumsum(1, dtype=torch.float64) / rank
    average = (precision * hits).sum(1) / others.clamp(min=1)
    return average.mean().item()


def _hits(embeddings: Float[Tensor, "n d"], labels: Int[Tensor, " n"], k: int) -> Bool[Tensor, "n k"]:
    """Whether the k nearest of each embedding, itself left out, are of its class; the nearest first."""
    rows = F.normalize(embeddings)
    similarity = (rows @ rows.T).fill_diagonal_(-torch.inf)
    return labels[similarity.topk(k, dim=1).indices] == labels[:, None]
