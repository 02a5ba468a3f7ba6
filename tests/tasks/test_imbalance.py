import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from fairtrial.tasks.imbalance import balanced_accuracy, long_tail, thinned
from fairtrial.tasks.samples import Part


def test_sizes_fall_geometrically() -> None:
    assert long_tail(10, 100, 100.0) == [100, 60, 36, 22, 13, 8, 5, 3, 2, 1]
    assert long_tail(3, 5, 1.0) == [5, 5, 5]
    assert long_tail(3, 5, 1e6) == [5, 1, 1]
    for arguments, name in [((1, 5, 2.0), "classes"), ((2, 0, 2.0), "largest"), ((2, 5, 0.5), "ratio")]:
        with pytest.raises(ValueError, match=f"^{name} must be"):
            long_tail(*arguments)


def test_thinning_leaves_so_many_of_each_class_in_their_order() -> None:
    y = torch.arange(60) % 3
    part = thinned(Part(torch.arange(60.0)[:, None], y), (5, 100, 0), torch.Generator().manual_seed(0))
    assert torch.bincount(part.y, minlength=3).tolist() == [5, 20, 0]
    assert (part.x[:, 0].diff() > 0).all()
    assert torch.equal(part.y, y[part.x[:, 0].long()])


def test_balanced_accuracy_is_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.tensor([0] * 30 + [1] * 5 + [3] * 2)
    scores = torch.randn(37, 4, generator=generator)
    scores[:, 2] = -9.0  # a class without samples is not predicted
    expected = balanced_accuracy_score(target, scores.argmax(1))
    assert balanced_accuracy(scores, target) == pytest.approx(expected)
    logits, binary = scores[:, 0], (target > 0).long()
    assert balanced_accuracy(logits, binary) == pytest.approx(balanced_accuracy_score(binary, logits > 0))
