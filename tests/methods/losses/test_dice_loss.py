import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from torch.nn import functional as F

from fairtrial.methods.losses import (
    BinaryDiceLoss,
    BinarySelfAdjustingDiceLoss,
    BinarySquaredDiceLoss,
    BinaryTverskyLoss,
    DiceLoss,
    SelfAdjustingDiceLoss,
    SquaredDiceLoss,
    TverskyLoss,
    mixed_dice_loss,
)

LOGITS, BINARY = torch.tensor([2.0, 1, 2, 2, 1], dtype=torch.float64), torch.tensor([0, 1, 0, 0, 0])
SCORES = torch.tensor([[2, 0.5, -1], [0.1, 1.2, 0.3], [-0.5, 0, 1], [1, 1, 0]], dtype=torch.float64)
TARGETS = torch.tensor([0, 1, 2, 1])
P, Y = torch.tensor([0.9, 0.6, 0.1, 0.3], dtype=torch.float64), torch.tensor([1, 1, 0, 0])
PER_SAMPLE = [SelfAdjustingDiceLoss, SquaredDiceLoss, TverskyLoss]
BINARY_PER_SAMPLE = [BinarySelfAdjustingDiceLoss, BinarySquaredDiceLoss, BinaryTverskyLoss]


def near(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=tolerance, rtol=0)


def gradient(loss, scores, target):
    leaf = scores.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, target).sum(), leaf)[0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"alpha": 0.0, "smooth": 1e-4, "square_denominator": False}, 0.713550),
        ({"alpha": 1.0, "smooth": 1e-4, "square_denominator": False}, 0.769758),
        ({"alpha": 0.0, "smooth": 1e-4}, 0.667406),
        ({"alpha": 0.0, "square_denominator": False}, 0.596672),
        ({"alpha": 0.6, "square_denominator": False}, 0.510666),
        ({}, 0.536571),
        ({"alpha": 0.6}, 0.306964),
    ],
)
def test_golden_set_dice(options, expected):
    near(BinaryDiceLoss(**options)(LOGITS, BINARY), expected)
    near(BinaryDiceLoss(**options, from_logits=False)(LOGITS.sigmoid(), BINARY), expected)


@pytest.mark.parametrize(("ratio", "expected"), [(0.0, 0.254237), (0.5, 0.169811), (1.0, 0.214286)])
def test_golden_hard_negatives(ratio, expected):
    p = torch.tensor([0.9, 0.6, 0.3, 0.2, 0.8, 0.1], dtype=torch.float64)
    y = torch.tensor([1, 0, 0, 0, 1, 0])
    loss = BinaryDiceLoss(0.0, square_denominator=False, ohem_ratio=ratio, from_logits=False)
    near(loss(p, y), expected)


def test_golden_several_classes():
    near(DiceLoss()(SCORES, TARGETS), 0.359211)
    near(DiceLoss(from_logits=False)(SCORES.softmax(1), TARGETS), 0.359211)
    near(mixed_dice_loss(SCORES, TARGETS), 2.545940)
    near(mixed_dice_loss(SCORES, TARGETS, alpha=0.6, smooth=1.0), 1.841548)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (
            BinarySelfAdjustingDiceLoss(1.0, from_logits=False, reduction="none"),
            [0.435407, 0.339286, 0.082569, 0.173554],
        ),
        (
            BinarySelfAdjustingDiceLoss(0.6, from_logits=False, reduction="none"),
            [0.347667, 0.278637, 0.085818, 0.194979],
        ),
        (BinarySquaredDiceLoss(from_logits=False, reduction="none"), [0.003559, 0.067797, 0.009901, 0.082569]),
        (BinaryTverskyLoss(from_logits=False, reduction="none"), [0.025641, 0.111111, 0.047619, 0.130435]),
        (BinarySelfAdjustingDiceLoss(1.0, from_logits=False), 0.257704),
    ],
)
def test_golden_per_sample(loss, expected):
    near(loss(P, Y), expected)


def test_hard_predictions_give_one_minus_f1():
    generator = torch.Generator().manual_seed(0)
    y, found = torch.rand(2, 200, generator=generator) < 0.2
    for square in (True, False):
        loss = BinaryDiceLoss(0.0, 0.0, square_denominator=square, from_logits=False)
        assert 1 - loss(found.double(), y.long()).item() == pytest.approx(f1_score(y, found), abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(p=st.floats(0.001, 0.999), y=st.integers(0, 1), gamma=st.floats(0.01, 5))
def test_tversky_with_halves_is_dice_without_squares(p, y, gamma):
    arguments = torch.tensor([p], dtype=torch.float64), torch.tensor([y])
    tversky = BinaryTverskyLoss(smooth=gamma / 2, from_logits=False)(*arguments)
    near(tversky, BinarySelfAdjustingDiceLoss(0.0, gamma, from_logits=False)(*arguments), 1e-12)


def test_a_large_constant_smooths_everything_away():
    for loss in (DiceLoss(smooth=1e9), *(make(smooth=1e9) for make in PER_SAMPLE)):
        assert 0 <= loss(SCORES, TARGETS) < 1e-8


def test_several_classes_are_one_against_the_rest():
    columns = SCORES.softmax(1).unbind(1)
    one_hot = [(label == TARGETS).long() for label in range(3)]
    for several, one in [(DiceLoss, BinaryDiceLoss), *zip(PER_SAMPLE, BINARY_PER_SAMPLE, strict=True)]:
        added = sum(one(from_logits=False)(p, y) for p, y in zip(columns, one_hot, strict=True))
        near(several()(SCORES, TARGETS), added, 1e-12)


def test_two_classes_with_alpha_1_teach_nothing():
    scores = torch.tensor([[3.0, -1.0]], dtype=torch.float64)
    near(
        SelfAdjustingDiceLoss(1.0)(scores, torch.tensor([0])),
        SelfAdjustingDiceLoss(1.0)(scores.flip(1), torch.tensor([0])),
    )


def test_a_negative_taken_for_a_positive_has_no_gradient_unless_the_weight_is_detached():
    logit, negative = torch.tensor([20.0], dtype=torch.float64), torch.tensor([0])
    assert gradient(BinarySelfAdjustingDiceLoss(1.0), logit, negative).abs() < 1e-8
    peak = torch.tensor([0.5], dtype=torch.float64).logit()  # 1 / (1 + α)
    near(gradient(BinarySelfAdjustingDiceLoss(1.0), peak, negative), [0.0], 1e-12)
    assert gradient(BinarySelfAdjustingDiceLoss(1.0, detach_weight=True), peak, negative) > 0.05
    near(BinarySelfAdjustingDiceLoss(1.0, detach_weight=True)(peak, negative), 0.2)


def test_derivatives():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 4, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.tensor([0, 1, 3, -100, 2])
    for loss in (DiceLoss(0.6), DiceLoss(0.3, ohem_ratio=2.0), *(make() for make in PER_SAMPLE)):
        assert torch.autograd.gradcheck(lambda s, loss=loss: loss(s, target), scores)
    p = torch.linspace(0.05, 0.95, 5, dtype=torch.float64).requires_grad_()
    y = torch.tensor([0, 1, 1, 0, 1])
    for make in (BinaryDiceLoss, *BINARY_PER_SAMPLE):
        loss = make(from_logits=False)
        assert torch.autograd.gradcheck(lambda p, loss=loss: loss(p, y), p)


@pytest.mark.parametrize("make", [DiceLoss, *PER_SAMPLE])
def test_ignored_samples_have_no_say(make):
    target = torch.tensor([0, -100, 2, -100])
    moved = SCORES.clone()
    moved[1], moved[3] = float("nan"), 1e4
    loss = make()
    near(loss(moved, target), loss(SCORES[[0, 2]], target[[0, 2]]), 1e-12)
    found = gradient(loss, moved, target)
    assert torch.equal(found[[0, 2]], gradient(loss, SCORES, target)[[0, 2]])
    assert not found[[1, 3]].any()


@pytest.mark.parametrize("make", [DiceLoss, BinaryDiceLoss, *PER_SAMPLE, *BINARY_PER_SAMPLE])
def test_where_nothing_counts_the_loss_is_zero_with_a_graph(make):
    scores = (LOGITS if make in (BinaryDiceLoss, *BINARY_PER_SAMPLE) else SCORES).clone().requires_grad_()
    for options in ({}, {"smooth": 0.0}) if make in (DiceLoss, BinaryDiceLoss) else ({},):
        loss = make(**options)(scores, torch.full((len(scores),), -100))
        (found,) = torch.autograd.grad(loss, scores)
        assert loss == 0
        assert not found.any()


def test_sure_probabilities_have_finite_gradients():
    p, y = torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([0, 1, 1, 0])
    for make in (BinaryDiceLoss, *BINARY_PER_SAMPLE):
        assert gradient(make(from_logits=False), p, y).isfinite().all()


def test_hard_negatives_of_several_classes_leave_the_rest_without_gradient():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    target = torch.zeros(40, dtype=torch.long)
    target[:4], target[4:8] = 1, 2
    p = scores.softmax(1)
    one_hot = F.one_hot(target, 3)
    expected = 0.0
    for label, wanted in enumerate((32, 2, 2)):
        negatives = p[target != label, label].sort(descending=True).values[:wanted]
        positives = p[one_hot[:, label] == 1, label]
        q = torch.cat([positives, negatives])
        expected += 1 - (2 * positives.sum() + 1) / (q.square().sum() + len(positives) + 1)
    loss = DiceLoss(0.0, ohem_ratio=0.5)
    assert int(0.5 * 32) == 16  # of class 0 there are but 8 negatives
    near(loss(scores, target), expected, 1e-12)


def test_misuse_is_refused_with_the_argument_named(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # which would come first
    for make, arguments in [
        (DiceLoss, {"alpha": -0.1}),
        (DiceLoss, {"smooth": -1.0}),
        (DiceLoss, {"ohem_ratio": float("nan")}),
        (SelfAdjustingDiceLoss, {"smooth": 0.0}),
        (SquaredDiceLoss, {"smooth": 0.0}),
        (TverskyLoss, {"a": -1.0}),
    ]:
        with pytest.raises(ValueError, match=f"^{next(iter(arguments))} must be"):
            make(**arguments)
    with pytest.raises(ValueError, match=r"^target must be within 0\.\.2, or -100, got \[7\]"):
        DiceLoss()(SCORES, torch.tensor([0, 1, 7, -100]))
    with pytest.raises(ValueError, match="^input must be probabilities if from_logits is false"):
        DiceLoss(from_logits=False)(SCORES, TARGETS)
