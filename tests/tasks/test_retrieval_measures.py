import pytest
import torch

from fairtrial.tasks.retrieval_measures import map_at_r, recall_at_k

# on a circle, by angle: 0, 10, 25, 60, 70, 180 degrees
ANGLES = torch.tensor([0.0, 10, 25, 60, 70, 180]).deg2rad()
EMBEDDINGS = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
LABELS = torch.tensor([0, 0, 1, 1, 0, 2])


def test_recall_counts_those_with_one_of_their_class_among_the_nearest() -> None:
    # nearest: 0→1, 1→0, 2→1, 3→4, 4→3, 5→4
    assert recall_at_k(EMBEDDINGS, LABELS) == pytest.approx(2 / 6)
    # two nearest: 2→{1, 0}, 3→{4, 2}, 4→{3, 2}, 5→{4, 3}
    assert recall_at_k(EMBEDDINGS, LABELS, 2) == pytest.approx(3 / 6)
    assert recall_at_k(EMBEDDINGS, LABELS, 5) == pytest.approx(5 / 6)


def test_average_precision_at_r() -> None:
    # R: 2, 2, 1, 1, 2, 0; hits up to R: 0→(1, 0), 1→(1, 0), 2→(0), 3→(0), 4→(0, 0)
    assert map_at_r(EMBEDDINGS, LABELS) == pytest.approx((0.5 + 0.5) / 6)
    assert map_at_r(EMBEDDINGS[[0, 1, 5]], torch.tensor([0, 0, 1])) == pytest.approx(2 / 3)
    # 0: second of two is a hit, at precision 1/2; 1: both are; 2: the first is
    assert map_at_r(EMBEDDINGS[:3], torch.tensor([0, 1, 0])) == pytest.approx(0.0)
    assert map_at_r(EMBEDDINGS[:3], torch.tensor([0, 0, 0])) == 1.0
    assert map_at_r(EMBEDDINGS[:3], torch.arange(3)) == 0.0


def test_lengths_do_not_matter() -> None:
    longer = EMBEDDINGS * torch.tensor([[1.0], [5], [0.1], [3], [2], [7]])
    assert recall_at_k(longer, LABELS) == recall_at_k(EMBEDDINGS, LABELS)
    assert map_at_r(longer, LABELS) == map_at_r(EMBEDDINGS, LABELS)


def test_as_many_neighbours_as_there_are() -> None:
    for k in (0, 6):
        with pytest.raises(ValueError, match="k must be within 1..5"):
            recall_at_k(EMBEDDINGS, LABELS, k)
