import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fairtrial.methods.optimizers import DiffGrad

F64 = torch.float64
START = torch.tensor([1.0, -2.0], dtype=F64)
GRADIENTS = torch.tensor([[0.5, -1.0], [0.4, 1.0], [0.4, 1.0]], dtype=F64)


def path(make, start, gradients):
    """The weights before the first and after each step along given gradients."""
    w = nn.Parameter(start.clone())
    optimizer, found = make([w]), [start]
    for gradient in gradients:
        w.grad = gradient.clone()
        optimizer.step()
        found.append(w.detach().clone())
    return torch.stack(found)


def moves(make, start, gradients):
    return path(make, start, gradients).diff(dim=0)


def random_gradients(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_golden_steps():
    found = path(lambda p: DiffGrad(p, lr=0.1), START, GRADIENTS)[1:]
    golden = [[0.937754, -1.926894], [0.885880, -1.931530], [0.836564, -1.951641]]
    torch.testing.assert_close(found, torch.tensor(golden, dtype=F64), atol=1e-6, rtol=0)


def with_the_defect(params):
    """The previous gradient is the buffer of the present one, from the second step on."""
    optimizer = DiffGrad(params, lr=0.1)

    def alias(optimizer, args, kwargs):
        for p, state in optimizer.state.items():
            state["previous_grad"].copy_(p.grad)

    optimizer.register_step_pre_hook(alias)
    return optimizer


def test_the_defect_of_the_authors_first_code_is_reached_by_forgetting_the_last_gradient_only():
    found = path(with_the_defect, START, GRADIENTS)[1:]
    golden = [[0.937754, -1.926894], [0.888348, -1.929526], [0.839032, -1.949636]]
    torch.testing.assert_close(found, torch.tensor(golden, dtype=F64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_the_last_gradient_is_a_copy(set_to_none):
    w = nn.Parameter(START.clone())
    optimizer = DiffGrad([w], lr=0.1)
    for gradient in GRADIENTS:
        (w * gradient).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        torch.testing.assert_close(optimizer.state[w]["previous_grad"], gradient, atol=0, rtol=0)
        if not set_to_none:
            w.grad.add_(7.0)
            torch.testing.assert_close(optimizer.state[w]["previous_grad"], gradient, atol=0, rtol=0)
            w.grad.zero_()
    torch.testing.assert_close(w.detach(), path(lambda p: DiffGrad(p, lr=0.1), START, GRADIENTS)[-1])


def test_along_a_constant_gradient_it_is_adam_at_half_the_rate_but_for_the_first_step():
    constant = torch.tensor([0.3, -0.7], dtype=F64).expand(30, 2)
    ours = moves(lambda p: DiffGrad(p, lr=0.1, eps=1e-12), START, constant)
    adam = moves(lambda p: torch.optim.Adam(p, lr=0.1), START, constant)
    torch.testing.assert_close(ours[1:], 0.5 * adam[1:], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours[0] / adam[0], torch.tensor([0.574443, 0.668188], dtype=F64), rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-6, 1e-2, 1.0, 100.0]))
def test_moves_are_between_half_of_adams_and_all_of_it(seed, scale):
    gradients = scale * random_gradients(seed, 6, 5)
    start = random_gradients(seed + 1, 5)
    ours = moves(lambda p: DiffGrad(p, lr=0.1, eps=1e-30), start, gradients)
    adam = moves(lambda p: torch.optim.Adam(p, lr=0.1, eps=1e-30), start, gradients)
    assert (ours.abs() <= adam.abs() * (1 + 1e-9) + 1e-12).all()
    assert (ours.abs() >= 0.5 * adam.abs() * (1 - 1e-9) - 1e-12).all()


@pytest.mark.parametrize(("scale", "share"), [(1e8, 1.0), (1e-8, 0.5)])
def test_it_is_adam_for_large_gradients_and_adam_at_half_the_rate_for_small_ones(scale, share):
    gradients, start = scale * random_gradients(0, 8, 5), random_gradients(1, 5)
    ours = path(lambda p: DiffGrad(p, lr=0.1, eps=1e-30), start, gradients)
    adam = path(lambda p: torch.optim.Adam(p, lr=0.1 * share, eps=1e-30), start, gradients)
    torch.testing.assert_close(ours, adam, rtol=1e-6, atol=0)


def test_eps_is_added_before_the_correction_of_the_bias():
    (move,) = moves(lambda p: DiffGrad(p, lr=0.1, eps=1.0), START, GRADIENTS[:1])
    m, v = 0.1 * GRADIENTS[0], 0.001 * GRADIENTS[0] ** 2
    xi = torch.sigmoid(GRADIENTS[0].abs())
    torch.testing.assert_close(move, -0.1 * math.sqrt(0.001) / 0.1 * xi * m / (v.sqrt() + 1.0), rtol=1e-9, atol=0)


def test_coupled_decay_is_part_of_the_gradient_and_of_the_remembered_one():
    w = nn.Parameter(START.clone())
    optimizer = DiffGrad([w], lr=0.1, weight_decay=0.5)
    w.grad = GRADIENTS[0].clone()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[w]["previous_grad"], GRADIENTS[0] + 0.5 * START)
    torch.testing.assert_close(w.detach(), path(lambda p: DiffGrad(p, lr=0.1), START, [GRADIENTS[0] + 0.5 * START])[-1])


def test_decoupled_decay_shrinks_the_weight_beside_the_step():
    decayed = path(lambda p: DiffGrad(p, lr=0.1, weight_decay=0.5, decoupled_weight_decay=True), START, GRADIENTS[:1])
    plain = path(lambda p: DiffGrad(p, lr=0.1), START, GRADIENTS[:1])
    torch.testing.assert_close(decayed[1], plain[1] - 0.05 * START)


def test_tensors_larger_than_a_portion_and_many_small_ones_go_the_way_of_single_ones(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), (), (2, 3, 2), (7,), (2, 2)]
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    ends = []
    for portion in (1, 16, 10**6):
        monkeypatch.setattr("fairtrial.methods.optimizers.diffgrad.PORTION", portion)
        params = [nn.Parameter(start.clone()) for start in starts]
        optimizer = DiffGrad(params, lr=0.1)
        for scale in (1.0, -0.5, 2.0):
            for p, start in zip(params, starts, strict=True):
                p.grad = scale * start.sin()
            optimizer.step()
        ends.append([p.detach() for p in params])
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)
    torch.testing.assert_close(ends[0], ends[2], rtol=0, atol=0)
