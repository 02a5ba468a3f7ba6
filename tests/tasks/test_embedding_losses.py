"""Baselines of metric learning, by their definitions."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.methods.losses.sc_mil import SupConLoss
from fairtrial.tasks.embedding_losses import (
    EMBEDDING_LOSSES,
    ContrastiveLoss,
    NormalizedSoftmaxLoss,
    TripletMarginLoss,
)


def batch(n: int = 12, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, generator=generator, dtype=torch.float64), torch.arange(n) % classes


def cosines(x: Tensor) -> Tensor:
    return F.normalize(x) @ F.normalize(x).T


def test_contrastive() -> None:
    x, labels = batch()
    s = cosines(x)
    same = labels[:, None] == labels
    others = same & ~torch.eye(12, dtype=torch.bool)
    violations = (s[~same] - 0.3).clamp(min=0)
    expected = (1 - s[others]).mean() + violations[violations > 0].mean()
    torch.testing.assert_close(ContrastiveLoss(0.3)(x, labels), expected)


def test_triplets_are_semi_hard() -> None:
    x, labels = batch()
    s = cosines(x)
    terms = []
    for a in range(12):
        negatives = s[a, labels != labels[a]]
        for p in range(12):
            if p != a and labels[p] == labels[a]:
                farther = negatives[negatives < s[a, p]]
                n = farther.max() if len(farther) else negatives.min()
                terms.append((n - s[a, p] + 0.2).clamp(min=0))
    torch.testing.assert_close(TripletMarginLoss(0.2)(x, labels), torch.stack(terms).mean())


def test_normalised_softmax_learns_its_weights() -> None:
    x, labels = batch()
    loss = NormalizedSoftmaxLoss(3, 4, 0.5).double()
    expected = F.cross_entropy(F.normalize(x) @ F.normalize(loss.weight).T / 0.5, labels)
    value = loss(x, labels)
    value.backward()
    torch.testing.assert_close(value, expected)
    assert loss.weight.grad is not None


def test_supervised_contrastive() -> None:
    x, labels = batch()
    s = (cosines(x) / 0.2).fill_diagonal_(-torch.inf)
    log_p = s.log_softmax(1)
    terms = [-log_p[a, [p for p in range(12) if p != a and labels[p] == labels[a]]].mean() for a in range(12)]
    torch.testing.assert_close(SupConLoss(0.2)(x, labels), torch.stack(terms).mean())


@pytest.mark.parametrize("loss", [ContrastiveLoss(), TripletMarginLoss(), SupConLoss()], ids=repr)
def test_batches_without_pairs_have_a_finite_loss_and_gradient(loss: nn.Module) -> None:
    x, _ = batch()
    for labels in (torch.zeros(12, dtype=torch.long), torch.arange(12)):
        leaf = x.clone().requires_grad_()
        value = loss(leaf, labels)
        value.backward()
        assert value.isfinite()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


def test_all_can_be_made_for_a_task_and_refuse_what_makes_no_sense() -> None:
    assert {method.slot for method in EMBEDDING_LOSSES} == {"embedding_loss"}
    for wrong in (lambda: ContrastiveLoss(1.0), lambda: TripletMarginLoss(0.0)):
        with pytest.raises(ValueError, match="margin must be"):
            wrong()
    for temperature in (0.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be"):
            SupConLoss(temperature)
        with pytest.raises(ValueError, match="temperature must be"):
            NormalizedSoftmaxLoss(3, 4, temperature)
