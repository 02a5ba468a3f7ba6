import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairtrial.methods.losses import GroupOrderingLoss, soft_odd_even_sort

A1 = torch.tensor([[1, 0], [0, 1], [0.6, 0.8], [-1, 0]], dtype=torch.float64)
A2 = torch.tensor([[0.8, 0.6], [0.28, 0.96], [1, 0], [-0.6, 0.8]], dtype=torch.float64)


def random_views(seed, views=2, b=6, d=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(views, b, d, generator=generator, dtype=torch.float64)


def test_golden_values_of_sorting():
    values, parts = soft_odd_even_sort(torch.tensor([0.1, 0.9, 0.5], dtype=torch.float64))
    expected = [[0.466514, 0.375426, 0.158060], [0.299356, 0.304541, 0.396103], [0.234130, 0.320033, 0.445836]]
    assert values.tolist() == pytest.approx([0.433137, 0.471646, 0.595217], abs=1e-6)
    torch.testing.assert_close(parts, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("steepness", "expected"), [(1.0, 0.355708), (10.0, 0.408466), (100.0, 0.747710)])
def test_golden_values(steepness, expected):
    assert GroupOrderingLoss(2, steepness)(A1, A2).item() == pytest.approx(expected, abs=1e-6)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), n=st.integers(1, 7), steepness=st.floats(1e-3, 1e3))
def test_the_soft_permutation_is_doubly_stochastic_and_carries_the_values(seed, n, steepness):
    x = random_views(seed, 2, 3, n)
    values, parts = soft_odd_even_sort(x, steepness)
    ones = torch.ones(2, 3, n, dtype=torch.float64)
    torch.testing.assert_close(parts.sum(-1), ones)
    torch.testing.assert_close(parts.sum(-2), ones)
    assert (parts >= -1e-12).all()
    torch.testing.assert_close((x[..., None, :] @ parts)[..., 0, :], values)


@pytest.mark.parametrize("n", [2, 5, 6])
def test_limits_in_the_steepness(n):
    x = random_views(1, 1, 4, n)[0]
    hard, parts = soft_odd_even_sort(x, 1e8)
    torch.testing.assert_close(hard, x.sort(-1).values, atol=1e-6, rtol=0)
    torch.testing.assert_close(parts, torch.nn.functional.one_hot(x.argsort(-1)).mT.double(), atol=1e-6, rtol=0)
    soft, _ = soft_odd_even_sort(x[:, :2], 1e-9)
    torch.testing.assert_close(soft, x[:, :2].mean(1, keepdim=True).expand(4, 2), atol=1e-6, rtol=0)


def test_the_loss_is_that_of_the_permutation_written_out():
    views, k = random_views(2, 3), 4
    units = views / views.norm(dim=-1, keepdim=True)
    losses = []
    for v in range(3):
        positive = torch.stack([(units[v] * units[o]).sum(1) for o in range(3) if o != v], 1).sort(1).values
        square = units[v] @ units[v].T
        negative = torch.stack([torch.cat([row[:i], row[i + 1 :]]).sort().values[-k:] for i, row in enumerate(square)])
        _, parts = soft_odd_even_sort(torch.cat([negative, positive], 1), 2.0)
        among = parts[:, :, k:].sum(2)
        losses.append(-torch.cat([(1 - among[:, :k]).log(), among[:, k:].log()], 1).mean(1))
    single = GroupOrderingLoss(k, 2.0, reduction="none")(*views)
    torch.testing.assert_close(single, torch.stack(losses).mean(0))


@pytest.mark.parametrize("steepness", [0.3, 1.0, 20.0])
def test_one_negative_has_a_closed_form(steepness):
    a, b = random_views(3, 2, 2)
    units = [v / v.norm(dim=1, keepdim=True) for v in (a, b)]
    positive = (units[0] * units[1]).sum(1)
    negative = torch.stack([unit[0] @ unit[1] for unit in units])[:, None]
    expected = -(0.5 + torch.atan(steepness * (positive - negative)) / math.pi).log().mean()
    torch.testing.assert_close(GroupOrderingLoss(1, steepness)(a, b), expected)


def test_perfect_order_is_not_free():
    a = torch.tensor([[1.0, 0], [-1, 0]], dtype=torch.float64)
    assert GroupOrderingLoss(1)(a, a).item() == pytest.approx(0.159680, abs=1e-6)


def test_the_gradient_pulls_the_positive_and_pushes_the_negative():
    a, b = random_views(4, 2, 2)
    leaf = a.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(GroupOrderingLoss(1, reduction="none")(leaf, b)[0], leaf)
    assert (gradient[1] == 0).all()
    assert (gradient[0] @ b[0]) < 0 < (gradient[0] @ a[1])


def test_only_anchors_receive_gradient():
    views = [view.clone().requires_grad_() for view in random_views(5)]
    loss = GroupOrderingLoss(3, reduction="none")
    for view in views:
        (gradient,) = torch.autograd.grad(loss(*views)[0], view, retain_graph=True)
        assert (gradient[1:] == 0).all()
        assert (gradient[0] != 0).any()
    free = GroupOrderingLoss(3, stop_gradient=False, reduction="none")
    (gradient,) = torch.autograd.grad(free(*views)[0], views[0])
    assert (gradient[1:] != 0).any()
    assert torch.autograd.gradcheck(GroupOrderingLoss(3, 5.0, stop_gradient=False), views)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), order=st.permutations(range(6)))
def test_the_order_of_samples_and_of_views_does_not_matter(seed, order):
    views = random_views(seed, 3)
    loss = GroupOrderingLoss(3)
    torch.testing.assert_close(loss(*views[:, order]), loss(*views))
    torch.testing.assert_close(loss(*views.flip(0)), loss(*views))


def test_only_the_first_views_are_positives_in_multi_crop_training():
    views = random_views(6, 4)
    single = GroupOrderingLoss(2, n_positive_views=2, reduction="none")
    moved = torch.cat([views[:2], views[2:].flip(0)])
    torch.testing.assert_close(single(*moved), single(*views))
    assert not torch.allclose(single(*views), GroupOrderingLoss(2, reduction="none")(*views))
    leaf = views[3].clone().requires_grad_()  # a small crop is an anchor all the same
    (gradient,) = torch.autograd.grad(single(*views[:3], leaf).sum(), leaf)
    assert (gradient != 0).any()


def test_a_small_batch_gives_all_its_negatives():
    torch.testing.assert_close(GroupOrderingLoss(10)(A1, A2), GroupOrderingLoss(3)(A1, A2))


def test_misuse_is_refused_with_the_argument_named():
    for arguments in (
        {"num_negatives": 0},
        {"steepness": 0.0},
        {"steepness": float("nan")},
        {"n_positive_views": 1},
        {"reduction": "avg"},
    ):
        with pytest.raises(ValueError, match=f"^{next(iter(arguments))} must be"):
            GroupOrderingLoss(**arguments)
    with pytest.raises(ValueError, match="^views must be at least 2, got 1"):
        GroupOrderingLoss()(A1)
    with pytest.raises(ValueError, match="^n_positive_views must be at most 2, the number of views, got 3"):
        GroupOrderingLoss(n_positive_views=3)(A1, A2)
    with pytest.raises(ValueError, match="^steepness must be"):
        soft_odd_even_sort(A1, -1.0)
