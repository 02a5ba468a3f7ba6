import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairtrial.methods.losses import (
    CEDiceLoss,
    RegionWiseLoss,
    SkeletonRecallLoss,
    SoftCLDiceLoss,
    SoftSkeletonize,
    betti_error,
    betti_numbers,
    skeleton_tube,
)


def mask(*boxes: tuple[slice, slice], size: int = 12) -> torch.Tensor:
    drawn = torch.zeros(size, size, dtype=torch.long)
    for rows, columns in boxes:
        drawn[rows, columns] = 1
    return drawn


THICK = mask(
    (slice(1, 4), slice(1, 11)),
    (slice(7, 10), slice(1, 11)),
    (slice(1, 10), slice(1, 3)),
    (slice(1, 10), slice(8, 11)),
)
THIN = mask(
    *((slice(row, row + 1), slice(1, 11)) for row in (2, 8)),
    *((slice(2, 9), slice(column, column + 1)) for column in (1, 5, 10)),
)
LINE = mask((slice(5, 6), slice(1, 11)))
TARGET = THICK[None, None]


def logits_of(foreground: torch.Tensor) -> torch.Tensor:
    """Logits (1, 2, h, w), those of the background 0."""
    return torch.stack([torch.zeros_like(foreground), foreground])[None]


def sure(target: torch.Tensor) -> torch.Tensor:
    return logits_of(200.0 * target.double() - 100.0)


PREDICTED = logits_of(4.0 * THICK.double() - 2.0)
CUT = PREDICTED.clone()
CUT[0, 1, 1:4, 5] = -2.0


def near(value: torch.Tensor, expected: float, tolerance: float = 1e-6) -> None:
    assert value.item() == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        (THICK, (1, 1)),
        (THIN, (1, 2)),
        (mask((slice(3, 4), slice(3, 4)), (slice(4, 5), slice(4, 5))), (1, 0)),  # corners hold the foreground together
        (1 - mask((slice(3, 4), slice(3, 4)), (slice(4, 5), slice(4, 5))), (1, 2)),  # and keep the background apart
        (torch.zeros(5, 5), (0, 0)),
        (torch.ones(5, 5, dtype=torch.bool), (1, 0)),
        (torch.tensor([[0.0, 1.0, 0.0]]), (1, 0)),  # what reaches the border is no hole
    ],
)
def test_betti_numbers(drawn, expected):
    assert betti_numbers(drawn) == expected


def test_a_missing_pixel_opens_a_hole():
    cut = THIN.clone()
    cut[2, 4] = 0
    assert betti_numbers(cut) == (1, 1)
    assert betti_error(cut, THIN) == betti_error(THIN, cut) == (0, 1)
    assert betti_error(torch.zeros_like(THIN), THIN) == (1, 2)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), turns=st.integers(0, 3))
def test_betti_numbers_survive_turning_and_sum_to_eulers_number(seed, turns):
    drawn = torch.rand(9, 11, generator=torch.Generator().manual_seed(seed)) < 0.6
    betti = betti_numbers(drawn)
    assert betti_numbers(drawn.rot90(turns)) == betti
    padded = torch.nn.functional.pad(drawn, (1, 1, 1, 1))
    edges = [(padded[1:] | padded[:-1])[:, 1:-1], (padded[:, 1:] | padded[:, :-1])[1:-1]]
    corners = padded[1:, 1:] | padded[1:, :-1] | padded[:-1, 1:] | padded[:-1, :-1]
    assert betti.components - betti.holes == corners.sum() - sum(edge.sum() for edge in edges) + drawn.sum()


def test_soft_skeletons():
    near(SoftSkeletonize(3)(TARGET.double()).sum(), 27.0)
    line = LINE[None, None].double()
    torch.testing.assert_close(SoftSkeletonize(3)(line), line)


def in_a_frame() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and target whose structure lies 9 pixels from the border or more."""
    noise = 0.3 * torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = logits_of(torch.nn.functional.pad(4.0 * THICK + noise, (8, 8, 8, 8)) - 2.0)
    return logits, torch.nn.functional.pad(TARGET, (8, 8, 8, 8))


@pytest.mark.parametrize("loss", [SoftCLDiceLoss(), CEDiceLoss(), SkeletonRecallLoss()], ids=repr)
def test_moving_the_picture_does_not_change_the_loss(loss):
    logits, target = in_a_frame()
    torch.testing.assert_close(loss(*(x.roll((2, -1), (2, 3)) for x in (logits, target))), loss(logits, target))


def test_moving_the_picture_changes_region_wise_maps_of_the_background_alone():
    """Its distances are measured in units of the largest, that of the corner farthest from the structure."""
    logits, target = in_a_frame()
    loss, moved = RegionWiseLoss(), [x.roll((2, -1), (2, 3)) for x in (logits, target)]
    gradient, after = (
        torch.autograd.functional.jacobian(lambda x, y=y: loss(x, y), x) for x, y in ((logits, target), moved)
    )
    there = target[0, 0] == 1
    assert loss(*moved) != loss(logits, target)
    shifted = gradient.roll((2, -1), (2, 3))[0, 1], after[0, 1]
    torch.testing.assert_close(*(grad[there.roll((2, -1), (0, 1))] for grad in shifted))


@pytest.mark.parametrize("loss", [SoftCLDiceLoss(), CEDiceLoss(), RegionWiseLoss()], ids=repr)
def test_turning_the_picture_over_does_not_change_the_loss(loss):
    logits, target = in_a_frame()
    for change in (lambda x: x.flip(2), lambda x: x.flip(3), lambda x: x.transpose(2, 3)):
        torch.testing.assert_close(loss(change(logits), change(target)), loss(logits, target))


def test_golden_losses():
    near(CEDiceLoss()(PREDICTED, TARGET), -0.753708)
    near(CEDiceLoss()(PREDICTED, TARGET) - torch.nn.functional.cross_entropy(PREDICTED, TARGET[:, 0]), -0.880636)
    near(torch.nn.functional.cross_entropy(PREDICTED, TARGET[:, 0]), 0.126928)
    near(CEDiceLoss()(CUT, TARGET), -0.696277)
    near(SoftCLDiceLoss()(PREDICTED, TARGET), -0.4098, 5e-5)
    near(SoftCLDiceLoss()(CUT, TARGET), -0.3942, 5e-5)


def test_golden_shares_of_cl_dice():
    p, t, loss = PREDICTED.softmax(1)[:, 1:], TARGET.double(), SoftCLDiceLoss()
    near(loss._share(loss.skeletonize(p), t), 1.0)
    near(loss._share(loss.skeletonize(t), p), 0.885054)
    near(loss._share(loss.skeletonize(t), CUT.softmax(1)[:, 1:]), 0.857854)
    near(1 - SoftCLDiceLoss(alpha=1.0)(PREDICTED, TARGET), 2 * 0.885054 / 1.885054)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999))
def test_shares_of_cl_dice_are_within_0_and_1(seed):
    logits = 3 * torch.randn(2, 2, 12, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert 0 <= SoftCLDiceLoss(alpha=1.0)(logits, torch.cat([TARGET, TARGET])) <= 1


def test_a_perfect_prediction():
    near(SoftCLDiceLoss()(sure(THICK), TARGET), -0.5)
    near(SoftCLDiceLoss(alpha=1.0)(sure(THICK), TARGET), 0.0)
    near(CEDiceLoss()(sure(THICK), TARGET), -1.0)
    near(SkeletonRecallLoss()(sure(THICK), TARGET), -1.0)


def test_skeleton_recall_is_the_probability_on_the_tube_and_ignores_what_is_wrongly_found():
    everywhere = torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = LINE[None, None]
    for elsewhere in (everywhere, everywhere + 3.0):
        logits = logits_of(torch.where(LINE == 1, math.log(4.0), elsewhere))  # p₁ = 0.8 on the line
        recall = torch.nn.functional.cross_entropy(logits, target[:, 0]) - SkeletonRecallLoss()(logits, target)
        near(recall, 0.8, 1e-5)


def test_tubes_are_skeletons_widened_within_the_label():
    block = mask((slice(2, 11), slice(1, 11)))[None, None]
    thin, tube = skeleton_tube(block, 0), skeleton_tube(block, 1)
    assert 0 < thin.sum() < tube.sum() < block.sum()
    assert (thin <= tube).all()
    assert (tube <= block.bool()).all()
    assert torch.equal(skeleton_tube(LINE[None, None]), LINE[None, None].bool())
    assert not skeleton_tube(torch.zeros_like(block)).any()


def test_a_given_tube_takes_the_place_of_the_labels_own():
    own = skeleton_tube(TARGET)
    torch.testing.assert_close(SkeletonRecallLoss()(CUT, TARGET, own), SkeletonRecallLoss()(CUT, TARGET))
    torch.testing.assert_close(SkeletonRecallLoss()(CUT, TARGET, own.long()), SkeletonRecallLoss()(CUT, TARGET))
    whole = SkeletonRecallLoss(weight=2.0)(CUT, TARGET, torch.ones_like(TARGET))
    share = CUT.softmax(1)[:, 1][THICK[None] == 1].mean()  # outside the label a tube does not count
    near(whole, torch.nn.functional.cross_entropy(CUT, TARGET[:, 0]).item() - 2 * share.item())


def test_without_scikit_image_a_tube_must_be_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.morphology", None)
    with pytest.raises(ImportError, match=r"pip install 'fairtrial\[vision\]'"):
        SkeletonRecallLoss()(CUT, TARGET)
    assert SkeletonRecallLoss()(CUT, TARGET, TARGET).isfinite()


def test_region_wise_maps():
    target = torch.tensor([[[[0, 1, 1, 1, 1]]]])
    p1 = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64)
    logits = logits_of((p1 / (1 - p1)).log()[None])
    of_1 = torch.tensor([1.0, -0.25, -0.5, -0.75, -1.0], dtype=torch.float64)
    of_0 = torch.tensor([-1.0, 1, 1, 1, 1], dtype=torch.float64)
    near(RegionWiseLoss()(logits, target), torch.stack([p1 * of_1, (1 - p1) * of_0]).mean().item(), 1e-12)
    filled = torch.ones_like(target)  # one class everywhere, the other nowhere
    near(RegionWiseLoss()(logits, filled), ((1 - p1) - p1).mean().item() / 2, 1e-12)


def test_several_classes():
    logits = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.randint(4, (2, 1, 9, 9), generator=torch.Generator().manual_seed(1))
    order = torch.tensor([2, 0, 3, 1])
    for loss in (CEDiceLoss(), RegionWiseLoss()):
        torch.testing.assert_close(loss(logits[:, order], order.argsort()[target]), loss(logits, target))


def test_misuse_is_refused_with_the_argument_named(monkeypatch):
    for make, options in (
        (SoftSkeletonize, {"iterations": 0}),
        (SoftCLDiceLoss, {"iterations": 0}),
        (SoftCLDiceLoss, {"alpha": math.nan}),
        (SoftCLDiceLoss, {"smooth": 0.0}),
        (SkeletonRecallLoss, {"weight": -1.0}),
        (SkeletonRecallLoss, {"tube_dilations": -1}),
    ):
        with pytest.raises(ValueError, match=f"^{next(iter(options))} must be"):
            make(**options)
    for loss in (SoftCLDiceLoss(), SkeletonRecallLoss()):
        with pytest.raises(ValueError, match="^input must be logits of 2 classes"):
            loss(torch.zeros(1, 3, 12, 12), TARGET)
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # the annotations' checks would come first
    for name, call in {
        "tube": lambda: SkeletonRecallLoss()(CUT, TARGET, TARGET[:, :, 1:, 1:]),
        "dilations": lambda: skeleton_tube(TARGET, -1),
        "mask": lambda: betti_numbers(TARGET),
        "prediction": lambda: betti_error(THICK[1:], THICK),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} must be"):
            call()
