import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fairtrial.methods.losses import FactoredSphericalOutput, SphericalSoftmaxLoss, TaylorSoftmaxLoss, ZLoss

SCORES = torch.tensor([[1.0, 2, 3, 4], [0, 0, 1, 5]], dtype=torch.float64)
TARGETS = torch.tensor([3, 2])


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (1.0, 0.0, [0.232235, 0.821750]),
        (0.1, 10.0, [12.169854, 13.310501]),
        (1.0, 10.0, [8.658533, 10.242571]),
        (10.0, 2.0, [0.658497, 2.242536]),
    ],
)
def test_golden_values(a, b, expected):
    loss = ZLoss(a, b, reduction="none")(SCORES, TARGETS)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def test_gradient_is_golden_and_orthogonal_to_ones_and_scores():
    scores = SCORES.clone().requires_grad_()
    ZLoss(reduction="sum")(scores, TARGETS).backward()
    expected = [[-0.037072, 0.018536, 0.074145, -0.055608], [0.079942, 0.079942, -0.199856, 0.039971]]
    torch.testing.assert_close(scores.grad, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    assert scores.grad.sum(1).abs().max() < 1e-12
    assert (scores.grad * SCORES).sum(1).abs().max() < 1e-12


@settings(deadline=None)
@given(scale=st.floats(1e-2, 1e2), shift=st.floats(-50, 50), seed=st.integers(0, 999))
def test_shift_and_scale_do_not_matter_and_scale_divides_the_gradient(scale, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    target = torch.randint(6, (4,), generator=generator)
    moved = (scale * scores + shift).requires_grad_()
    scores.requires_grad_()
    loss = ZLoss(2.0, 1.0)
    torch.testing.assert_close(loss(moved, target), loss(scores, target), rtol=1e-9, atol=1e-9)
    (g_moved,) = torch.autograd.grad(loss(moved, target), moved)
    (g_plain,) = torch.autograd.grad(loss(scores, target), scores)
    torch.testing.assert_close(g_moved * scale, g_plain, rtol=1e-6, atol=1e-9)


def test_limits_in_a():
    z = (SCORES - SCORES.mean(1, keepdim=True)) / SCORES.std(1, unbiased=False, keepdim=True)
    z = z.gather(1, TARGETS[:, None])[:, 0]
    soft = ZLoss(1e-3, 1.0, reduction="none")(SCORES, TARGETS)
    torch.testing.assert_close(soft, math.log(2) / 1e-3 + (1.0 - z) / 2, atol=2e-3, rtol=0)
    hard = ZLoss(1e4, 1.0, reduction="none")(SCORES, TARGETS)
    torch.testing.assert_close(hard, (1.0 - z).clamp(min=0), atol=1e-3, rtol=0)


def test_floor_is_reached_when_all_other_scores_are_equal():
    scores = torch.tensor([[5.0, 1, 1, 1, 1]], dtype=torch.float64)
    floor = F.softplus(torch.tensor(2.0 * (1.0 - 2.0), dtype=torch.float64)) / 2.0  # sqrt(D - 1) = 2
    assert ZLoss(2.0, 1.0)(scores, torch.tensor([0])).item() == pytest.approx(floor.item(), abs=1e-9)


def test_constant_rows_have_the_documented_loss_and_no_gradient():
    scores = torch.full((2, 3), 7.0, requires_grad=True)
    loss = ZLoss(2.0, 1.5, reduction="none")(scores, torch.tensor([0, 2]))
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), F.softplus(torch.tensor([3.0, 3.0])) / 2.0)
    assert torch.equal(scores.grad, torch.zeros(2, 3))


def test_spherical_and_taylor_softmax_are_their_definitions():
    o = SCORES[0]
    spherical = -torch.log((o[3] ** 2 + 1e-6) / (o**2 + 1e-6).sum())
    taylor = -torch.log((1 + o[3] + o[3] ** 2 / 2) / (1 + o + o**2 / 2).sum())
    assert SphericalSoftmaxLoss()(SCORES[:1], TARGETS[:1]).item() == pytest.approx(spherical.item(), abs=1e-12)
    assert TaylorSoftmaxLoss()(SCORES[:1], TARGETS[:1]).item() == pytest.approx(taylor.item(), abs=1e-12)


@pytest.mark.parametrize("rebuild_every", [0, 7])
def test_factored_layer_equals_the_dense_layer(rebuild_every):
    D, d, lr, a, b = 200, 8, 1.0, 1.0, 5.0
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(D, d, generator=generator, dtype=torch.float64) / d**0.5
    factored = FactoredSphericalOutput(start, a, b, rebuild_every=rebuild_every)
    dense = start.clone()
    for _ in range(50):
        hidden = torch.randn(d, generator=generator, dtype=torch.float64)
        target = int(torch.randint(D, (), generator=generator))
        W, h = dense.clone().requires_grad_(), hidden.clone().requires_grad_()
        loss = ZLoss(a, b)((W @ h)[None], torch.tensor([target]))
        grad_w, grad_h = torch.autograd.grad(loss, (W, h))
        dense -= lr * grad_w
        step = factored.step(hidden, target, lr)
        torch.testing.assert_close(step.loss, loss.detach(), atol=1e-9, rtol=0)
        torch.testing.assert_close(step.grad_hidden, grad_h, atol=1e-9, rtol=0)
    torch.testing.assert_close(factored.weight, dense, atol=1e-9, rtol=0)
    assert (dense - start).abs().max() > 1


def test_misuse_is_refused_with_the_argument_named():
    for arguments in ({"a": 0.0}, {"a": float("nan")}, {"b": float("inf")}, {"eps": -1.0}, {"reduction": "avg"}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            ZLoss(**arguments)
    layer = FactoredSphericalOutput(torch.ones(3, 2))
    with pytest.raises(ValueError, match="target must be within 0..2"):
        layer.step(torch.ones(2), 3, 0.1)
    with pytest.raises(ValueError, match="hidden"):
        layer.step(torch.ones(5), 0, 0.1)
