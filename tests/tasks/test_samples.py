import pytest
import torch

from fairtrial.tasks.samples import Samples, divide, hold_out, random_part
from fairtrial.tasks.streams import Streams


def numbered(count: int = 100) -> Samples:
    x = torch.arange(count, dtype=torch.float64)[:, None]
    return hold_out(x, torch.arange(count) % 4)


def rows(x: torch.Tensor) -> set[float]:
    return set(x.flatten().tolist())


def test_the_test_part_is_always_the_same() -> None:
    assert torch.equal(numbered().x_test, numbered().x_test)
    assert len(numbered().x_test) == 20
    assert rows(numbered().x_test) | rows(numbered().x) == set(range(100))


def test_parts_are_disjoint_and_redrawn_by_seed() -> None:
    x = torch.arange(100)[:, None]  # integers are not standardised, so that rows can be told apart
    samples = hold_out(x, torch.arange(100) % 4)
    seen = set()
    for seed in range(5):
        division = divide(samples, 0.25, "each", Streams(seed))
        training, validation, test = (rows(part.x) for part in division)
        assert training | validation | test == set(range(100))
        assert len(training) + len(validation) + len(test) == 100
        assert len(validation) == 20
        assert test == rows(samples.x_test)
        seen.add(frozenset(validation))
    assert len(seen) == 5


def test_every_class_gives_its_share() -> None:
    y = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    marked = random_part(y, 0.2, None, Streams(0)("split"))
    assert torch.bincount(y[marked]).tolist() == [10, 6, 4]


def test_groups_stay_together() -> None:
    groups = torch.arange(60) // 5
    samples = hold_out(torch.arange(60)[:, None], torch.arange(60) % 3, 0.25, groups=groups)
    assert len(samples.x_test) == 15
    assert samples.groups is not None
    division = divide(samples, 0.34, "each", Streams(1))
    group_sets = [{int(row) // 5 for row in rows(part.x)} for part in division]
    assert sum(map(len, group_sets)) == 12
    assert set.union(*group_sets) == set(range(12))


def test_standardisation_sees_the_training_part_only() -> None:
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0, 0.0]) + 5
    division = divide(hold_out(x, torch.arange(200) % 2), 0.2, "each", Streams(0))
    assert division.training.x.mean(0) == pytest.approx([0, 0, 0], abs=1e-5)
    assert division.training.x.std(0, correction=0) == pytest.approx([1, 1, 0], abs=1e-5)
    assert abs(division.validation.x[:, 1].mean()) > 1e-3
    together = divide(hold_out(x, torch.arange(200) % 2), 0.2, "all", Streams(0))
    assert together.training.x.mean().item() == pytest.approx(0, abs=1e-5)
    assert together.training.x.std(0)[1] > together.training.x.std(0)[0]


def test_targets_that_are_numbers_are_standardised_and_classes_are_not() -> None:
    y = torch.linspace(100, 300, 50)
    division = divide(hold_out(torch.randn(50, 2), y), 0.2, "each", Streams(0))
    assert division.training.y.mean().item() == pytest.approx(0, abs=1e-5)
    assert numbered().num_classes == 4
    assert hold_out(torch.randn(50, 2), y).num_classes == 0


def test_the_hash_tells_data_apart() -> None:
    one, other = numbered(), numbered()
    assert one.hash == other.hash
    other.x_test[0] += 1
    assert one.hash != other.hash


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="y must be 3 rows, as many as x has, got 2"):
        Samples(torch.zeros(3, 1), torch.zeros(2), torch.zeros(1, 1), torch.zeros(1))
    with pytest.raises(ValueError, match="fraction must be between 0 and 1, got 1.5"):
        hold_out(torch.zeros(3, 1), torch.zeros(3), 1.5)
    with pytest.raises(ValueError, match="fraction must be enough for at least one of 3 samples, got 0.1"):
        hold_out(torch.zeros(3, 1), torch.zeros(3), 0.1)
