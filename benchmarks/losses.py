"""Losses against the packages that people would take instead: forward and backward, in one process, alternating.

    pip install --target PEERS --no-deps pytorch-metric-learning==2.9.0 lightly==1.6.0 diffsort==0.2.0
    git clone https://github.com/nilesh2797/DEXML CHECKOUT
    OMP_NUM_THREADS=2 python benchmarks/losses.py PEERS [CHECKOUT]

Peers are compared with what does the same work: pytorch-metric-learning's loss with its miner, lightly's symmetric
losses, and diffsort's network of matrices with the loss of group ordering on top. Beside NT-Xent stands the supervised
contrastive loss of pytorch-metric-learning, which has the same value where each sample is a class of two views: its own
NTXentLoss compares every positive pair with the negative pairs of all anchors, 10⁹ numbers for 512 samples. Without a
checkout of the authors' code the soft top-k operator is compared with its plain definition instead: 32 bisections for
the threshold, and the implicit gradient. Printed are median milliseconds of ours and theirs, the median of the rounds'
ratios, and the range of their middle half. On a machine that others use, OMP_WAIT_POLICY=passive keeps threads from
spinning while they wait for one that does not run.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import distributions
from itertools import chain
from pathlib import Path
from types import ModuleType

import torch
from side_by_side import compared, forward_and_backward, line
from torch import Tensor
from torch.nn import functional as F

from fairtrial.methods.losses import dexml, groco
from fairtrial.methods.losses.contrastive import off_diagonal
from fairtrial.methods.losses.decoupled_contrastive import DCLLoss, NTXentLoss
from fairtrial.methods.losses.multi_similarity import MultiSimilarityLoss, MultiSimilarityMiner

PEERS = {"pytorch-metric-learning": "2.9.0", "lightly": "1.6.0", "diffsort": "0.2.0"}
BATCHES, DIM = (512, 2048), 128

Case = tuple[str, Callable[[], None], Callable[[], None]]


def multi_similarity(batch: int) -> Iterator[Case]:
    from pytorch_metric_learning import losses, miners

    embeddings = torch.randn(batch, DIM, requires_grad=True)
    labels = torch.arange(batch) // 5  # five of a class, as in the paper
    peer, miner, own_miner = losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner(), MultiSimilarityMiner()
    yield (
        f"multi-similarity with mining, pytorch-metric-learning, {batch}",
        forward_and_backward(MultiSimilarityLoss(), embeddings, labels),
        forward_and_backward(lambda e, y: peer(e, y, miner(e, y)), embeddings, labels),
    )
    yield (
        f"multi-similarity without mining, pytorch-metric-learning, {batch}",
        forward_and_backward(MultiSimilarityLoss(mine=False), embeddings, labels),
        forward_and_backward(peer, embeddings, labels),
    )
    yield (
        f"multi-similarity miner alone, pytorch-metric-learning, {batch}",
        lambda: (own_miner(embeddings, labels), None)[1],
        lambda: (miner(embeddings, labels), None)[1],
    )


def contrastive(batch: int) -> Iterator[Case]:
    from pytorch_metric_learning import losses

    z1, z2 = (view.requires_grad_() for view in torch.randn(2, batch, DIM).unbind())
    for own in (NTXentLoss, DCLLoss):
        peer = getattr(importlib.import_module(f"lightly.loss.{LIGHTLY[own.__name__]}"), own.__name__)
        yield (
            f"{own.__name__}, lightly, {batch}",
            forward_and_backward(own(0.1), z1, z2),
            forward_and_backward(peer(temperature=0.1), z1, z2),
        )
    yield (
        f"NTXentLoss, pytorch-metric-learning's SupConLoss, {batch}",
        forward_and_backward(NTXentLoss(0.1), z1, z2),
        forward_and_backward(losses.SelfSupervisedLoss(losses.SupConLoss(temperature=0.1)), z1, z2),
    )


LIGHTLY = {"NTXentLoss": "ntx_ent_loss", "DCLLoss": "dcl_loss"}


def without_models(folder: Path) -> None:
    """Lightly's losses alone, as its models need torchvision: the packages that would import them stand empty."""
    for name in ("lightly.loss", "lightly.models", "lightly.models.modules", "lightly.models.utils"):
        package = ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
    sys.modules["lightly.models"].utils = sys.modules["lightly.models.utils"]  # type: ignore[attr-defined]


class Bisected(torch.autograd.Function):
    """The soft top-k operator's logarithm by its definition."""

    @staticmethod
    def forward(ctx, x: Tensor, k: int, alpha: float) -> Tensor:
        low, high = -x.amax(1, keepdim=True) - 10 / alpha, -x.amin(1, keepdim=True) + 10 / alpha
        for _ in range(32):
            middle = (low + high) / 2
            few = (alpha * (x + middle)).sigmoid().sum(1, keepdim=True) < k
            low, high = torch.where(few, middle, low), torch.where(few, high, middle)
        logits = alpha * (x + (low + high) / 2)
        ctx.save_for_backward(logits)
        ctx.alpha = alpha
        return F.logsigmoid(logits)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        p = logits.sigmoid()
        v, own = p * (1 - p), ctx.alpha * grad * (1 - p)
        return own - own.sum(1, keepdim=True) * v / v.sum(1, keepdim=True), None, None


def soft_topk(checkout: Path | None) -> Iterator[Case]:
    whose, operator = "plain definition", Bisected.apply
    if checkout is not None:
        sys.path.insert(0, str(checkout))
        whose, operator = "authors' code", importlib.import_module("utils.topk_utils").dist_log_topk
    for rows, labels in ((128, 4_000), (64, 131_000), (512, 4_000)):
        x = (torch.randn(rows, labels) * 4).requires_grad_()
        weights = (torch.rand(rows, labels) < 5 / labels).float()
        yield (
            f"soft top-5 of {rows} x {labels:,}, {whose}",
            forward_and_backward(lambda x, w: (dexml.log_soft_topk(x, 5, 2.0) * w).sum(), x, weights),
            forward_and_backward(lambda x, w: (operator(x, 5, 2.0) * w).sum(), x, weights),
        )


def group_ordering() -> Iterator[Case]:
    from diffsort import DiffSortNet

    for batch, negatives in ((128, 10), (512, 10), (512, 50)):
        z1, z2 = (view.requires_grad_() for view in torch.randn(2, batch, DIM).unbind())
        network = DiffSortNet("odd_even", 1 + negatives, steepness=1.0, distribution="cauchy")

        def of_matrices(z1: Tensor, z2: Tensor, k: int = negatives, network=network) -> Tensor:
            views, total = [F.normalize(view, dim=1) for view in (z1, z2)], 0.0
            for anchor, other in (views, views[::-1]):
                near = off_diagonal(anchor @ anchor.detach().T).topk(k, 1, sorted=True).values.flip(1)
                positive = (anchor * other.detach()).sum(1, keepdim=True)
                _, parts = network(torch.cat([near, positive], 1))
                target = torch.zeros(parts.shape[:2])
                target[:, k:] = 1
                total = total + F.binary_cross_entropy(parts[:, :, k:].sum(2).clamp(0, 1), target) / 2
            return total

        yield (
            f"group ordering, {negatives} negatives, diffsort, {batch}",
            forward_and_backward(groco.GroupOrderingLoss(negatives), z1, z2),
            forward_and_backward(of_matrices, z1, z2),
        )


def main(peers: Path, checkout: Path | None = None) -> None:
    found = {each.name: each.version for each in distributions(path=[str(peers)])}
    missing = [f"{name}=={version}" for name, version in PEERS.items() if found.get(name) != version]
    if missing:
        sys.exit(f"pip install --target {peers} --no-deps {' '.join(missing)}")
    sys.path.append(str(peers))
    without_models(peers)
    print("  ".join(f"{name} {version}" for name, version in PEERS.items()), f" torch {torch.__version__}")
    torch.manual_seed(0)
    pairs = (loss(batch) for batch in BATCHES for loss in (multi_similarity, contrastive))
    for what, ours, theirs in chain(*pairs, soft_topk(checkout), group_ordering()):
        print(line(what, compared(ours, theirs)), flush=True)


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
