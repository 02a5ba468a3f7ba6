import torch
from torch import nn

from fairtrial.tasks.memory import PeakMemory


def test_what_is_alive_at_once_counts() -> None:
    x = torch.zeros(10)
    with PeakMemory([x]) as memory:
        y = x + 1
        z = y * 2
        assert memory.now == 120
        del y
        assert memory.now == 80
        del z
        w = x - 1
        assert memory.now == 80
    assert memory.peak == 120
    del w


def test_views_and_operations_in_place_are_free() -> None:
    with PeakMemory() as memory:
        x = torch.zeros(8, dtype=torch.float64)
        x.view(2, 4).t().add_(1)
        x[3:].mul_(2)
    assert memory.peak == 64


def test_a_view_keeps_the_whole_storage() -> None:
    with PeakMemory() as memory:
        x = torch.zeros(100)[:1]
        assert memory.now == 400
        del x
        assert memory.now == 0


def test_tensors_that_it_was_not_given_count_when_they_are_used() -> None:
    known, unknown = torch.zeros(4), torch.zeros(4)
    with PeakMemory({"a": (known,)}) as memory:
        assert memory.now == 16
        known += unknown
    assert memory.now == 32


def test_what_autograd_saves_counts_until_the_backward_pass() -> None:
    layer = nn.Linear(3, 5, bias=False)
    x = torch.ones(4, 3)
    with PeakMemory([layer.weight, x]) as memory:
        assert memory.now == 60 + 48
        loss = layer(x).square().sum()
        assert memory.now == 60 + 48 + 80 + 4  # the layer's output is saved for the derivative of the square
        loss.backward()
        assert memory.now == 60 + 48 + 4 + 60
    assert layer.weight.grad is not None


def test_sparse_gradients_do_not_disturb() -> None:
    table = nn.Embedding(10, 2, sparse=True)
    with PeakMemory([table.weight]) as memory:
        table(torch.tensor([1, 2])).sum().backward()
    assert memory.peak >= 80
