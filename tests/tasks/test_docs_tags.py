from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from fairtrial.contract import Choice
from fairtrial.tasks import SupervisedTask, load
from fairtrial.tasks.docs_tags import (
    FEWEST,
    TERMS,
    BinaryCrossEntropyLoss,
    at_the_top,
    precision,
    r_precision,
    samples,
)


def test_passages_have_terms_and_are_in_one_part_only() -> None:
    data = samples()
    assert data.num_classes == data.y.shape[1] == TERMS
    assert data.y.sum(1).min() >= FEWEST
    assert (data.y.sum(0) + data.y_test.sum(0) > 0).all()
    training, test = ({row.numpy().tobytes() for row in part} for part in (data.x, data.x_test))
    assert not training & test
    assert data.hash == samples().hash


def test_precision_counts_what_is_on_top() -> None:
    scores = torch.tensor([[4.0, 3, 2, 1], [1, 2, 3, 4]])
    target = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0]]).flatten()
    assert precision(scores, target, 2) == 0.25
    assert at_the_top(scores, target) == 0.5
    assert r_precision(scores, target) == 0.25


def test_the_baseline_is_weighted_binary_cross_entropy() -> None:
    scores, target = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.eye(3, 4).long()
    plain = F.binary_cross_entropy_with_logits(scores, target.float())
    torch.testing.assert_close(BinaryCrossEntropyLoss()(scores, target), plain)
    weighted = BinaryCrossEntropyLoss(3.0)(scores, target)
    torch.testing.assert_close(weighted, plain + 2 * F.softplus(-scores.diagonal()).sum() / 12)
    with pytest.raises(ValueError, match="pos_weight must be above 0"):
        BinaryCrossEntropyLoss(0.0)


def test_losses_of_labels_learn() -> None:
    task = load("docs-tags")
    assert isinstance(task, SupervisedTask)
    task = replace(task, total_steps=150)
    for loss in ("BinaryCrossEntropyLoss", "DecoupledSoftmaxLoss"):
        choices = {"loss": Choice(loss), "optimizer": Choice("AdamW", {"lr": 1e-2})}
        task.check(choices)
        found = task.run(choices, 0, split="test")
        assert 0.1 < found.value < 0.5  # the most frequent terms alone have 0.05
