import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fairtrial.methods.losses import (
    DecoupledSoftmaxLoss,
    MultiLabelInfoNCELoss,
    SoftTopKLoss,
    log_soft_topk,
    sample_positives,
    soft_topk,
)

SCORES = torch.tensor([[2, 1, 0, -1, 0.5], [0.3, -0.2, 1.5, 0, 1]], dtype=torch.float64)
TARGETS = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 0, 1]])
LOSSES = [DecoupledSoftmaxLoss, MultiLabelInfoNCELoss, lambda **options: SoftTopKLoss(2, **options)]


def near(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=tolerance, rtol=0)


def gradient(loss, scores, *arguments):
    scores = scores.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(scores, *arguments).sum(), scores)
    return found


def random(n, labels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(n, labels, generator=generator, dtype=torch.float64)
    targets = torch.rand(n, labels, generator=generator) < 0.3
    targets[:, 0], targets[:, -1] = True, False
    return scores, targets


def test_golden_values():
    near(DecoupledSoftmaxLoss()(SCORES, TARGETS), 0.599096)
    near(MultiLabelInfoNCELoss(average_positives=False)(SCORES, TARGETS), 2.163216)
    near(MultiLabelInfoNCELoss()(SCORES, TARGETS), 1.081608)
    near(SoftTopKLoss(2)(SCORES[:1], TARGETS[:1]), 0.322652)


def test_golden_gradients():
    decoupled = [
        [-0.072475, -0.131502, 0.067618, 0.024875, 0.111484],
        [0.101436, 0.061524, -0.103545, 0.075146, -0.134562],
    ]
    near(gradient(DecoupledSoftmaxLoss(), SCORES, TARGETS), decoupled)
    top = [[-0.030376, -0.245187, 0.095918, 0.017332, 0.162313]]
    near(gradient(SoftTopKLoss(2), SCORES[:1], TARGETS[:1]), top)


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (1.0, [0.731709, 0.500828, 0.269593, 0.119551, 0.378319]),
        (2.0, [0.909613, 0.576622, 0.155634, 0.024338, 0.333793]),
        (10.0, [0.999996, 0.923868, 0.000551, 0.0, 0.075585]),
    ],
)
def test_golden_soft_top_k(alpha, expected):
    near(soft_topk(SCORES[:1], 2, alpha), [expected])
    near(soft_topk(SCORES, torch.tensor([2, 3]), alpha)[:1], [expected])


def test_the_gradient_is_its_closed_form():
    scores, targets = random(4, 9)
    m = scores.masked_fill(targets, -torch.inf).logsumexp(1, keepdim=True)
    share = torch.where(targets, (m - scores).sigmoid(), 0) / targets.sum(1, keepdim=True)
    repelled = (scores - m).exp() * share.sum(1, keepdim=True)
    near(gradient(DecoupledSoftmaxLoss(), scores, targets), torch.where(targets, -share, repelled) / 4, 1e-12)


def test_with_one_correct_label_the_softmax_losses_are_cross_entropy():
    scores, _ = random(6, 9)
    target = torch.arange(6)
    expected = F.cross_entropy(scores / 0.05, target)
    for loss in (DecoupledSoftmaxLoss(0.05), MultiLabelInfoNCELoss(0.05)):
        torch.testing.assert_close(loss(scores, F.one_hot(target, 9)), expected)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), shift=st.floats(-50, 50))
def test_decoupled_is_at_most_infonce_and_a_rows_shift_does_not_matter(seed, shift):
    scores, targets = random(3, 8, seed)
    assert DecoupledSoftmaxLoss()(scores, targets) <= MultiLabelInfoNCELoss()(scores, targets) + 1e-12
    moved = scores + torch.tensor([[shift], [0.0], [-shift]], dtype=torch.float64)
    for loss in LOSSES:
        torch.testing.assert_close(loss()(moved, targets), loss()(scores, targets), rtol=1e-8, atol=1e-8)


def test_correct_labels_repel_each_other_in_infonce_only():
    scores = torch.tensor([[5.0, -5, 0, 0, 0]])
    targets = torch.tensor([[1, 1, 0, 0, 0]])
    assert gradient(MultiLabelInfoNCELoss(), scores, targets)[0, 0] > 0
    assert (gradient(DecoupledSoftmaxLoss(), scores, targets)[0, :2] < 0).all()


def test_a_row_of_correct_labels_has_no_decoupled_loss():
    targets = torch.ones_like(SCORES)
    assert DecoupledSoftmaxLoss()(SCORES, targets) == 0
    assert not gradient(DecoupledSoftmaxLoss(), SCORES, targets).any()


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 999),
    labels=st.sampled_from([2, 5, 40, 1000]),
    alpha=st.sampled_from([0.01, 1.0, 30.0]),
    spread=st.sampled_from([0.0, 0.01, 1.0, 10.0]),
    at=st.floats(0, 1),
)
def test_soft_top_k_sums_to_k_in_order_and_does_not_care_how_k_is_given(seed, labels, alpha, spread, at):
    k = 1 + int(at * (labels - 2))
    x = spread * torch.randn(3, labels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = soft_topk(x, k, alpha)
    near(found.sum(1), [k] * 3, 1e-9)
    assert (found.gather(1, x.argsort(1)).diff(dim=1) >= 0).all()
    torch.testing.assert_close(soft_topk(x, torch.full((3,), k), alpha), found)


def test_soft_top_k_of_many_equal_scores_and_of_scores_far_apart():
    near(soft_topk(torch.zeros(1, 200_000), 1).sum(1), [1.0])
    apart = torch.tensor([[1e4, 1e4, -1e4, -1e4]], dtype=torch.float32).requires_grad_()
    found = log_soft_topk(apart, 2, 2.0)
    near(found.detach(), [[0.0, 0, -2e4, -2e4]])  # the threshold is half way, and the loss that of float64
    near(torch.autograd.grad(found[0, 2], apart)[0], [[-0.5, -0.5, 1.5, -0.5]])


def test_soft_top_k_becomes_hard():
    x = torch.tensor([[0.3, 2.0, 1.0, -1.0]])
    near(soft_topk(x, 2, 1e3), [[0.0, 1, 1, 0]])


def test_soft_top_k_derivatives():
    x = random(3, 6)[0].requires_grad_()
    for operator in (soft_topk, log_soft_topk):
        for k in (2, torch.tensor([1, 3, 5])):
            assert torch.autograd.gradcheck(lambda x, f=operator, k=k: f(x, k, 1.5), x)
            assert torch.autograd.gradgradcheck(lambda x, f=operator, k=k: f(x, k, 1.5), x)
    jacobian = torch.autograd.functional.jacobian(lambda x: soft_topk(x, 2, 1.5), x[:1])[0, :, 0]
    near(jacobian.sum(1), [0.0] * 6, 1e-12)
    near(gradient(SoftTopKLoss(2), SCORES, TARGETS).sum(1), [0.0, 0.0], 1e-12)


def test_hidden_labels_are_as_if_they_were_not_there():
    scores, targets = random(4, 9)
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[:, [1, 3]] = False
    mask[:, 0] = True
    kept = mask[0]
    for make in LOSSES:
        hidden = gradient(make(), scores, targets, mask)
        torch.testing.assert_close(hidden[:, kept], gradient(make(), scores[:, kept], targets[:, kept]))
        assert not hidden[:, ~kept].any()
        torch.testing.assert_close(make()(scores, targets, mask), make()(scores[:, kept], targets[:, kept]))


@pytest.mark.parametrize("make", LOSSES)
def test_rows_without_a_correct_label_are_refused_or_skipped(make):
    scores, targets = random(3, 6)
    targets[1] = False
    with pytest.raises(ValueError, match="^target must be at least one correct label in every row, or empty='skip'"):
        make()(scores, targets)
    rest = make()(scores[[0, 2]], targets[[0, 2]])
    torch.testing.assert_close(make(empty="skip")(scores, targets), rest)
    assert make(empty="skip", reduction="none")(scores, targets)[1] == 0
    alone = scores[:1].clone().requires_grad_()
    loss = make(empty="skip")(alone, torch.zeros(1, 6))
    loss.backward()
    assert loss == 0
    assert not alone.grad.any()


def test_positives_are_drawn_by_relevance_and_the_others_hidden():
    relevance = torch.tensor([[3.0, 1, 0, 0]]).expand(20_000, 4)
    drawn, mask = sample_positives(relevance, torch.Generator().manual_seed(0))
    assert (drawn.sum(1) == 1).all()
    assert drawn.double().mean(0)[:2].tolist() == pytest.approx([0.75, 0.25], abs=0.01)
    assert torch.equal(mask, drawn | (relevance == 0))
    every, mask = sample_positives(relevance, torch.Generator().manual_seed(0), 3)
    assert torch.equal(every, relevance > 0)
    assert mask.all()


def test_drawing_estimates_the_mean_over_positives():
    scores, targets = random(1, 6)
    generator = torch.Generator().manual_seed(0)
    drawn, mask = sample_positives(targets.expand(20_000, 6), generator)
    estimate = DecoupledSoftmaxLoss()(scores.expand(20_000, 6), drawn, mask)
    assert estimate.item() == pytest.approx(DecoupledSoftmaxLoss()(scores, targets).item(), rel=0.02)


def test_misuse_is_refused_with_the_argument_named(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # which would come first
    for make, arguments in [
        (DecoupledSoftmaxLoss, {"temperature": 0.0}),
        (MultiLabelInfoNCELoss, {"temperature": float("nan")}),
        (SoftTopKLoss, {"k": 0}),
        (SoftTopKLoss, {"alpha": -1.0}),
        (DecoupledSoftmaxLoss, {"empty": "drop"}),
    ]:
        with pytest.raises(ValueError, match=f"^{next(iter(arguments))} must be"):
            make(**arguments)
    for k in (0, 5, torch.tensor([1, 5])):
        with pytest.raises(ValueError, match=r"^k must be within 1\.\.4"):
            soft_topk(SCORES, k)
    with pytest.raises(ValueError, match="^k must be of shape"):
        soft_topk(SCORES, torch.tensor([1]))
    with pytest.raises(ValueError, match="^mask must be true at more than k = 2 of each row"):
        SoftTopKLoss(2)(SCORES, TARGETS, TARGETS.bool())
    with pytest.raises(ValueError, match="^target must be 0 or 1"):
        DecoupledSoftmaxLoss()(SCORES, TARGETS - 1)
    with pytest.raises(ValueError, match="^count must be at least 1"):
        sample_positives(TARGETS, torch.Generator(), 0)
